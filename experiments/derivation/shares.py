"""Measure the factor of the log-ratio to the data per iteration, exactly on a table of logits and with a language model.

Theorem 5.4 of the paper: with the logistic link and an unlimited function class, training to convergence gives
p_{t+1} ~ p_t (p_data / p_t)^(1/lambda). So r_t = log p_data - log p_t, minus its mean over answers (the normaliser), is
multiplied by 1 - 1/lambda. An answer is one of four letters and does not depend on the prompt.

    python -m experiments.derivation.shares data      # writes the data of the games in the README
    python -m experiments.collect derivation          # writes results.csv and figure.png, prints the table
"""

import json
import math
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
import yaml
from matplotlib.figure import Figure

from experiments.chains import answer_logps
from experiments.tables import COLOURS, MARKERS, RUNS, Row, mean_interval, read, write
from spin.method.objectives import spin_loss
from spin.reporting.figures import STYLE

LETTERS = "abcd"
HUMAN = (0.4, 0.3, 0.2, 0.1)
START = (0.25, 0.25, 0.25, 0.25)  # shares of the answers in the start's SFT data
LAMBDAS = (0.3, 0.5, 0.75, 1.0, 2.0, 5.0)
ITERATIONS = 4
TRAIN, TEST, SEEDS = 2048, 64, 3
FOLDER = Path("outputs/shares")
HERE = Path(__file__).parent


def centred(logs: Sequence[float]) -> np.ndarray:
    values = np.asarray(logs, dtype=float)
    return values - values.mean()


# --- a table: one logit per answer ------------------------------------------------------------------------------------


def play_table(beta: float) -> list[np.ndarray]:
    """Return r_0, r_1, ... of the game on a table of logits, each iteration trained to convergence on the expected loss."""
    human = torch.tensor(HUMAN, dtype=torch.float64)
    policy = torch.tensor(START, dtype=torch.float64).log()
    ratios = [centred((human.log() - policy).tolist())]
    for _ in range(ITERATIONS):
        policy = train_table(policy, human, beta)
        ratios.append(centred((human.log() - policy).tolist()))
    return ratios


def train_table(opponent: torch.Tensor, human: torch.Tensor, beta: float) -> torch.Tensor:
    """Return the log-probs that minimise the expected logistic loss over all pairs (y ~ human, y' ~ opponent)."""
    logits = opponent.clone().requires_grad_()
    real, generated = torch.cartesian_prod(torch.arange(len(human)), torch.arange(len(human))).T
    weight = human[real] * opponent.exp()[generated]
    optimiser = torch.optim.LBFGS(
        [logits], max_iter=2000, tolerance_grad=1e-13, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def loss() -> torch.Tensor:
        optimiser.zero_grad()
        logps = logits.log_softmax(0)
        policy = {"real": logps[real], "generated": logps[generated]}
        reference = {"real": opponent[real], "generated": opponent[generated]}
        value = (weight * spin_loss(policy, reference, beta, "logistic")[0]).sum()
        value.backward()
        return value

    optimiser.step(loss)
    return logits.detach().log_softmax(0)


def factor(before: np.ndarray, after: np.ndarray) -> float:
    """Return the least-squares factor c of `after` = c `before`."""
    return float(before @ after / (before @ before))


# --- a language model -------------------------------------------------------------------------------------------------


def prompts() -> list[str]:
    rng = random.Random("shares")
    unique: dict[str, None] = {}
    while len(unique) < TRAIN + TEST:
        unique["".join(rng.choices("efghijklmnopqrstuvwxyz", k=4))] = None
    return list(unique)


def write_data() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for seed in range(SEEDS):
        for name, shares in ((f"{seed}", HUMAN), (f"{seed}-start", START)):
            rng = random.Random(f"shares:{name}")
            answers = rng.choices(LETTERS, shares, k=TRAIN)
            lines = [json.dumps({"prompt": p, "response": a}) for p, a in zip(prompts()[:TRAIN], answers, strict=True)]
            (FOLDER / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    print(f"{FOLDER}: {2 * SEEDS} files of {TRAIN} prompts")


def log_ratio(policy: Path) -> np.ndarray:
    """Return r of the policy in a model folder, from its log-probs of all answers averaged over test prompts."""
    test_prompts = prompts()[TRAIN:]
    logps = answer_logps(policy, test_prompts, [LETTERS] * len(test_prompts)).mean(0)
    return centred(np.log(HUMAN) - logps)


def collect() -> list[Row]:
    """Return rows with the norm of r and its factor, for table and model, each lambda, seed and iteration."""
    played = [("table", beta, 0, play_table(beta)) for beta in LAMBDAS]
    for page in sorted((RUNS / "derivation").glob("*/*/game.json")):
        folder, config = page.parent, yaml.safe_load((page.parent / "config.yaml").read_text())
        if config["schedule"]["sft_epochs"] > 0:
            continue  # the run that trained the start
        policies = [Path(config["model"]["path"]), *sorted(folder.glob("iter*/policy"))]
        played.append(("model", float(config["loss"]["beta"]), config["seed"], [log_ratio(p) for p in policies]))
    return [
        {
            "game": game,
            "lambda": beta,
            "seed": seed,
            "iter": t,
            "predicted": 1 - 1 / beta,
            "factor": factor(ratios[t], ratios[t + 1]),
            "before": float(np.linalg.norm(ratios[t])),
            "after": float(np.linalg.norm(ratios[t + 1])),
        }
        for game, beta, seed, ratios in played
        for t in range(len(ratios) - 1)
    ]


def draw(rows: Sequence[Row]) -> Figure:
    """Plot predicted and measured factors (left), and the distance from the data by iteration (right)."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 3.3), layout="constrained")
        left, right = figure.subplots(1, 2)
        line = np.linspace(0.28, 6, 200)
        left.plot(line, 1 - 1 / line, color="#333333", linewidth=1, label="1 − 1/λ")
        for i, game in enumerate(("table", "model")):
            points = [
                (b, *_factors(rows, game, b))
                for b in LAMBDAS
                if any(r["game"] == game and r["lambda"] == b for r in rows)
            ]
            if points:
                x, mean, half = zip(*points, strict=True)
                name = {"table": "table, exact", "model": "language model, iteration 0"}[game]
                left.errorbar(
                    x,
                    mean,
                    half,
                    linestyle="",
                    color=COLOURS[i],
                    marker=MARKERS[i],
                    markersize=5,
                    capsize=3,
                    label=name,
                )
        left.set_xscale("log")
        left.set_xticks(LAMBDAS, [f"{value:g}" for value in LAMBDAS])
        left.minorticks_off()
        left.set_xlabel("λ (loss.beta)")
        left.set_ylabel("factor of the log-ratio, one iteration")
        left.legend(loc="lower right")
        for i, beta in enumerate(LAMBDAS):
            for game, style in (("table", ":"), ("model", "-")):
                chosen = [r for r in rows if r["game"] == game and r["lambda"] == beta]
                if not chosen:
                    continue
                last = int(max(r["iter"] for r in chosen))
                sizes = [[r["before"] for r in chosen if r["iter"] == 0]]
                sizes += [[r["after"] for r in chosen if r["iter"] == t] for t in range(last + 1)]
                right.plot(
                    [max(float(np.mean(s)), 1e-4) for s in sizes],
                    style,
                    color=COLOURS[i],
                    marker=MARKERS[i],
                    markersize=4,
                    label=f"λ = {beta:g}" if game == "table" else None,
                )
        right.set_yscale("log")
        right.set_ylim(1e-3, 1e3)
        right.set_xticks(range(ITERATIONS + 1))
        right.set_xlabel("iterations played")
        right.set_ylabel("size of the log-ratio, nats")
        right.set_title("dotted: table; lines: language model", loc="left")
        right.legend(ncols=2, loc="upper left")
    return figure


def _factors(rows: Sequence[Row], game: str, beta: float) -> tuple[float, float]:
    values = [r["factor"] for r in rows if r["game"] == game and r["lambda"] == beta and r["iter"] == 0]
    mean, half = mean_interval(values)
    return mean, 0.0 if math.isnan(half) else half


def table(rows: Sequence[Row]) -> str:
    lines = ["| λ | 1 − 1/λ | table | language model, iteration 0 |", "|---|---|---|---|"]
    for beta in LAMBDAS:
        cells = []
        for game in ("table", "model"):
            if any(r["game"] == game and r["lambda"] == beta for r in rows):
                mean, half = _factors(rows, game, beta)
                cells.append(f"{mean:+.3f}" if game == "table" else f"{mean:+.2f} ± {half:.2f}")
            else:
                cells.append("–")
        lines.append(f"| {beta:g} | {1 - 1 / beta:+.3f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def redraw() -> None:
    """Write results.csv from the run folders, if there are any, then the figure, and print the table."""
    if (RUNS / "derivation").exists():
        write(collect(), HERE / "results.csv")
    rows = read(HERE / "results.csv")
    draw(rows).savefig(HERE / "figure.png", dpi=150)
    print(f"derivation\n\n{table(rows)}\n")


if __name__ == "__main__":
    if sys.argv[1:] != ["data"]:
        raise SystemExit(
            "usage: python -m experiments.derivation.shares data; the next commands are in experiments/derivation/README.md"
        )
    write_data()
