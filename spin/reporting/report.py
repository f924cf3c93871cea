"""The report of a run: tables, figures and samples, from its folder and game.json, as Markdown and for a browser."""

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from statistics import mean

import matplotlib

from spin.evaluation.measure_table import COMPARED, MEASURES, is_known, known_measures, missing_prompts, show
from spin.reporting.figures import STYLE, draw_lengths, draw_logps, draw_margins, draw_measures, save_figures
from spin.reporting.html_page import html_page
from spin.reporting.text import code_block, escape, inline_code, markdown_table, plain_number
from spin.runtime.files import write_text
from spin.runtime.progress import format_seconds


def write_report(folder: Path, game: dict, sets: Sequence[dict] = (), status: str | None = None) -> Path:
    """Write `folder/report.html` and, unless the run goes on, `report.md` with `figures/*.png`. Returns the path of report.md.

    `game` is the content of game.json; the rest is read from `folder`: metrics.jsonl, `iter<t>/pairs.parquet` and
    `iter<t>/margins.json`. A figure whose data are missing is left out, and an older one of that name removed. `sets` are
    the samples of report.html (`spin.reporting.samples`). `status` says what a run that has not ended is doing.
    """
    iterations, page = game["iterations"], folder / "report.md"
    with matplotlib.rc_context(STYLE):
        figures = {
            "measures": draw_measures(game["evaluations"]),
            "logps": draw_logps(_train_rows(folder), iterations),
            "margins": draw_margins(folder, iterations),
            "lengths": draw_lengths(folder, iterations),
        }
        if status is None:
            save_figures(folder, figures)
    drawn = {name for name, figure in figures.items() if figure is not None}
    first = [
        f"# {escape(game['name'])}",
        f"Self-play fine-tuning of {inline_code(game['model'])}.",
        *([f"> **{escape(status)}**"] if status else []),
        *(f"> **Missing: {escape(title)}**: {escape(reason)}" for title, reason in game["given_up"].items()),
        *conclude(game, status is None),
    ]
    rest = [
        *_held_out(game, drawn),
        *_selection(game),
        *_external(game["external"]),
        *_training(drawn),
        *_iterations(game["iterations"]),
        *_data(game["data"]),
        *["## Command", code_block(game["command"], "sh")],
        *_cost(game),
    ]
    compared = [game["differences"][0][key] for key in ("against", "policy")] if game["differences"] else [None, None]
    compared[1] = game["selected"]["policy"] if game["selected"] else compared[1]
    data = {"name": game["name"], "sets": sets, "compare": compared, "live": status is not None}
    write_text(folder / "report.html", html_page(game["name"], first, rest, figures, **data))
    if status is None:
        write_text(page, "\n\n".join([*first, *rest, *_samples(game["samples"])]) + "\n")
    return page


def _train_rows(folder: Path) -> dict[int, list[dict]]:
    """The rows of metrics.jsonl that are steps of training, by iteration."""
    path = folder / "metrics.jsonl"
    rows: dict[int, list[dict]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        row = json.loads(line)
        if row.get("stage") == "train":
            rows.setdefault(row["iter"], []).append(row)
    return rows


# --- sections ---------------------------------------------------------------------------------------------------------


def conclude(game: dict, ended: bool = True) -> list[str]:
    """The first thing to read: whether self-play helped, which policy to take, by how much, on how many prompts."""
    has_choice = ended and bool(game["iterations"])
    if not game["differences"]:
        why = "there is one policy" if game["evaluations"] else "nothing was measured on held-out prompts"
        return ["## Result", f"**Not compared**: {why}{' so far' * (not ended)}. {_take(game, None) * has_choice}"]
    first = game["differences"][0]
    better, worse = (any(row["verdict"] == word for row in first["measures"].values()) for word in ("better", "worse"))
    word = ("Mixed" if worse else "Better") if better else "Worse" if worse else "No difference seen"
    take = None if better == worse else first["policy"] if better else first["against"]
    headline = f"{word}{' so far' * (not ended)}: {escape(first['policy'])} against {escape(first['against'])}"
    return [
        "## Result",
        f"**{headline}.** {_take(game, take) * has_choice}",
        f"{escape(verdict(first))} In brackets: 95 % bootstrap intervals over the {first['n']:,} held-out prompts.",
        _difference_table(first),
    ]


def _take(game: dict, better: str | None) -> str:
    if (selected := game["selected"]) is None:
        hint = "`data.validation=64` selects the best policy on prompts of their own"
        return f"**Take {escape(better)}**; {hint}." if better else f"Which policy to take is open; {hint}."
    place = "" if Path(selected["path"]).is_absolute() else " (`best/policy`)"
    return (
        f"**Take {escape(selected['policy'])}**{place}: selected by {describe_selection(selected).partition('; ')[2]}."
    )


def _data(data: dict) -> list[str]:
    """What was read and dropped, with an example of each reason."""
    parts = [
        "## Data",
        f"{data['train']:,} training examples, {data['held_out']:,} held out, {data['validation']:,} for validation.",
    ]
    if data["counts"]:
        parts.append(markdown_table(["", "examples"], [[escape(why), f"{n:,}"] for why, n in data["counts"].items()]))
    for reason, text in data.get("dropped", {}).items():
        parts += [f"### Dropped: {escape(reason)}", code_block(text)]
    return parts


def _iterations(iterations: Sequence[dict]) -> list[str]:
    rows = [
        [
            str(played["iter"]),
            escape(played["opponent"]),
            escape(", ".join(f"{name} {value}" for name, value in played["objective"].items())),
            plain_number(played["lr"]),
            f"{played['pairs']:,}",
            escape(", ".join(f"{count:,} {reason}" for reason, count in played["dropped"].items() if count) or "none"),
            inline_code(played["policy"]),
        ]
        for played in iterations
    ]
    header = ["iteration", "opponent", "objective", "learning rate", "pairs", "dropped", "result"]
    return ["## Iterations", markdown_table(header, rows)]


def _held_out(game: dict, drawn: Collection[str]) -> list[str]:
    evaluations = game["evaluations"]
    if not evaluations:
        none = "Nothing was evaluated: there are no held-out prompts, or evaluation was switched off."
        return ["## Held-out measures", none]
    measures, n = known_measures(evaluations), evaluations[-1]["n"]
    rows = [[escape(row["policy"]), *(m.cell(row, " [{}, {}]") for m in measures)] for row in evaluations]
    parts = ["## Held-out measures", markdown_table(["policy", *(f"{m.title} ({m.unit})" for m in measures)], rows)]
    parts.append(f"In brackets: 95 % bootstrap intervals over the {n:,} held-out prompts.")
    parts.append("\n".join(f"- {m.title}: {m.meaning}." for m in measures))
    if missing := missing_prompts(n):
        parts.append("Left out: " + "; ".join(missing) + ".")
    for difference in game["differences"][1:]:
        parts += [f"**{escape(verdict(difference))}**", _difference_table(difference)]
    if "measures" in drawn:
        parts += ["![Held-out measures by iteration](figures/measures.png)", MEASURES_CAPTION]
    return parts


def describe_selection(selected: dict) -> str:
    """Which policy was selected, by what, and whether it is the last.

    "iter0, not the last (iter1); classifier AUC 0.63 [0.55, 0.70] on 96 validation prompts".
    """
    measure = MEASURES.get(selected["measure"])
    title = measure.title if measure else f"benchmark {selected['measure']}"
    value = show(selected["value"], selected["interval"], measure.format if measure else ".3f")
    rank = "the last policy" if selected["policy"] == selected["last"] else f"not the last ({selected['last']})"
    prompts = "validation prompts" if measure else "questions"
    return f"{selected['policy']}, {rank}; {title} {value} on {selected['n']:,} {prompts}"


def _selection(game: dict) -> list[str]:
    selected, rows = game["selected"], game["validations"]
    if not selected:
        return []
    parts = ["## Selected policy", f"**{escape(describe_selection(selected))}.**"]
    if rows:
        measures = [measure for measure in known_measures(rows) if measure.heading and measure.better]
        cells = [[escape(row["policy"]), *(m.cell(row, " [{}, {}]") for m in measures)] for row in rows]
        parts.append(markdown_table(["policy", *(f"{m.title} ({m.unit})" for m in measures)], cells))
        parts.append(SELECTION_NOTE)
    return parts


def verdict(difference: dict) -> str:
    """A sentence on two policies: in which measures they differ, by the interval of the difference."""
    measures: dict[str, list[str]] = {"better": [], "worse": [], "same": []}
    for measure in COMPARED:
        found = difference["measures"].get(measure.name)
        if found is not None and is_known(found["change"]):
            change = "" if found["verdict"] == "same" else f" ({found['first']:.3f} → {found['last']:.3f})"
            measures[found["verdict"]].append(measure.title + change)
    pair = f"{difference['policy']} against {difference['against']}, n={difference['n']:,}"
    if not measures["better"] and not measures["worse"]:
        return f"{pair}: no difference seen, the intervals of all differences contain 0."
    labels = {"better": "better in ", "worse": "worse in ", "same": "no difference seen in "}
    return f"{pair}: " + "; ".join(labels[key] + ", ".join(titles) for key, titles in measures.items() if titles) + "."


def _difference_table(difference: dict) -> str:
    rows = []
    for measure in COMPARED:
        if (found := difference["measures"].get(measure.name)) and is_known(found["change"]):
            values = [show(found[key], None, ".3f") for key in ("first", "last")]
            finding = "no difference seen" if found["verdict"] == "same" else found["verdict"]
            change = show(found["change"], found["interval"], "+.3f", " [{}, {}]")
            rows.append([measure.title, finding, *values, change, measure.goal])
    labels = [escape(difference[key]) for key in ("against", "policy")]
    return markdown_table(["measure", "finding", *labels, "change", "goal"], rows)


def _external(evaluations: Sequence[dict]) -> list[str]:
    """Benchmarks beside the paper's, MT-Bench, and a judge's preference; nothing for what was not evaluated."""
    parts: list[str] = []
    if rows := [row for row in evaluations if row["harness"]]:
        parts += ["## Benchmarks", _harness_table(rows)]
        parts.append(
            "Percent, with the harness's standard error and the number of questions. The paper's rows are of Zephyr-7B "
            "(arXiv 2401.01335), by an older harness: compare how they change, not where they are."
        )
    if rows := [row for row in evaluations if row["mt_bench"]]:
        header = ["policy", "score, 1 to 10", "first turn", "second turn", "questions", "verdicts not read"]
        cells = []
        for row in rows:
            graded = row["mt_bench"]
            keys = ("score", "first_turn", "second_turn")
            scores = [show(graded[key], graded.get(f"{key}_interval"), ".2f") for key in keys]
            cells.append([escape(row["policy"]), *scores, f"{graded['n']:,}", f"{graded['unparsed']:,}"])
        parts += ["## MT-Bench", markdown_table(header, cells), "In brackets: 95 % bootstrap intervals over questions."]
    if rows := [row for row in evaluations if row["comparison"]]:
        parts += ["## A judge's preference", *(escape(row["comparison"]["finding"]) for row in rows)]
        parts.append(
            "Answers to the held-out prompts, blind and in both orders; a win is a verdict that both orders give, all else "
            "is a tie. p is that of the exact sign test over the prompts that were decided."
        )
    return parts


def _harness_table(rows: Sequence[dict]) -> str:
    tasks = [(found["task"], found["shots"], found["metric"]) for found in rows[0]["harness"]]
    header = ["policy", *(escape(f"{task}, {shots} shots, {metric}") for task, shots, metric in tasks), "average"]
    cells = []
    for row in rows:
        values = [f"{100 * found['value']:.2f}{_error(found)} (n={found['n']:,})" for found in row["harness"]]
        average = mean(found["value"] * 100 for found in row["harness"])
        cells.append([escape(row["policy"]), *values, f"{average:.2f}"])
        paper = row["paper"] or {}
        if all(task in paper for task, _, _ in tasks):
            published = [paper[task] for task, _, _ in tasks]
            values = [f"{value:.2f}" for value in (*published, mean(published))]
            cells.append([escape(f"paper: {row['policy']}"), *values])
    return markdown_table(header, cells)


def _error(found: dict) -> str:
    return f" ± {100 * found['stderr']:.2f}" if is_known(found["stderr"]) else ""


def _training(drawn: Collection[str]) -> list[str]:
    parts = ["## Training"]
    if "logps" in drawn:
        parts += ["![Change of log p during training](figures/logps.png)", LOGPS_CAPTION, WHY_REAL_FALLS]
    else:
        parts.append("No training steps are on record, so there is no training figure.")
    if "margins" in drawn:
        parts += ["![Distribution of margins](figures/margins.png)", MARGINS_CAPTION]
    if "lengths" in drawn:
        parts += ["## Lengths", "![Lengths of answers](figures/lengths.png)", LENGTHS_CAPTION]
    return parts


def _samples(samples: Sequence[dict]) -> list[str]:
    parts = ["## Samples"] if samples else []
    for number, sample in enumerate(samples, 1):
        parts += [f"### Prompt {number}", code_block(sample["prompt"]), "Human answer:", code_block(sample["real"])]
        for policy, answer in sample["answers"].items():
            parts += [f"Answer of {escape(policy)}:", code_block(answer)]
    return parts


def _cost(game: dict) -> list[str]:
    rows = [[escape(stage), format_seconds(seconds)] for stage, seconds in game["seconds"].items()]
    cost = "Every stage was found in the store: nothing was computed in this run."
    if rows:
        cost = markdown_table(["stage", "time"], [*rows, ["**all**", format_seconds(sum(game["seconds"].values()))]])
    return ["## Cost", cost, f"Peak memory: {game['peak_memory_gib']:.2f} GiB."]


# --- captions ---------------------------------------------------------------------------------------------------------

SELECTION_NOTE = (
    "Measures on the validation prompts. Policies within one standard error of the best value count as equal; of these the "
    "one with the lowest NLL is selected. The held-out prompts took no part in the choice."
)
MEASURES_CAPTION = (
    "*By policy: `start` is the model as it was given, `sft` after fine-tuning on the human answers, a number the policy "
    "that this iteration made. Bars: 95 % bootstrap intervals over prompts. Grey dashes: the ideal value; for MAUVE what it "
    "comes to if the distributions are equal, for lengths the mean length of the human answers.*"
)
LOGPS_CAPTION = (
    "*Change of log p under the policy since the iteration's first step, for the pairs of each step (mean over "
    "sequences, nats). It is measured against the opponent, which the policy starts as, so both curves start at 0; the "
    "gap between them is the margin. Thin: each step; thick: moving average.*"
)
WHY_REAL_FALLS = (
    "**Why log p(real) can fall while the margin grows.** The loss sees only the gap between the two curves. The generated "
    "answers were drawn from the opponent, which the policy starts as, so their mean change (for fresh answers, sampled at "
    "temperature 1) is −KL(opponent ‖ policy), never above 0. Real answers share words with them and are pulled down along, "
    "and nothing in the loss gives the freed probability back. For the loss that is as good as one curve rising, but it "
    "is a move away from the human answers: watch the held-out NLL. If log p(real) falls, lower `optimizer.lr`, raise "
    "`loss.beta` (a smaller move then satisfies the loss), or train for fewer epochs."
)
MARGINS_CAPTION = (
    "*Held-out prompts by margin: what the policy has gained over its opponent on the human answer, less what it has "
    "gained on the opponent's answer (nats, without beta). Right of 0 the policy tells the two apart. The outermost "
    "1 % on each side is drawn at the edge.*"
)
LENGTHS_CAPTION = (
    "*Lengths of the answers in the training pairs of each iteration. Where the two shapes differ, length alone tells "
    "the opponent's answers. A spike at the right end of the generated answers is the limit on new tokens. The longest "
    "1 % is drawn at the edge.*"
)
