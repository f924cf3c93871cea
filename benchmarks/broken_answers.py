"""Compare the held-out measures of a game's last policy with those of deliberately broken answers.

    python benchmarks/broken_answers.py            the default game, played first if necessary
    python benchmarks/broken_answers.py experiment=smoke

Each kind of broken answers replaces the policy's answers: the policy scores them, and all measures are computed as usual.
Prints a markdown table.
"""

import random
import shlex
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.workload import open_game

COLUMNS = ("human_likelier", "classifier_auc", "mauve", "length_auc", "rouge_l", "distinct_2", "diversity", "finished")


def break_answers(answers: list[str], human: list[str]) -> dict[str, list[str]]:
    """Return the broken answers of each kind, as many as there are `answers`."""
    rng = random.Random(0)
    return {
        "human answers to other prompts": human[1:] + human[:1],
        "one word repeated": [" ".join(["the"] * max(1, len(text.split()))) for text in human],
        "one answer to all prompts": [answers[0]] * len(answers),
        "human answers, words shuffled": [" ".join(rng.sample(text.split(), len(text.split()))) for text in human],
    }


def measure_answers(words: list[str]) -> dict[str, dict]:
    """Return the measures of the policy's answers and of each kind of broken answers. `words` are the game's settings."""
    from spin.data.templates import encode_responses
    from spin.engines.logps import compute_logps
    from spin.engines.packing import Continuations
    from spin.evaluation.measures import HeldOut, measures
    from spin.evaluation.two_sample import classifier_scores, clusters, features
    from spin.game import declare
    from spin.pipeline.stage import Player

    run = open_game(["tracking.wandb=disabled", *words])
    config, player = run.config, Player(run)
    records, _ = declare(run)
    last = records[-1]
    for stage in [stage for record in records for stage in record.stages]:
        player.play(stage)
    assert last.evaluation is not None, "held-out prompts are needed: data.held_out"
    policy, evaluation = player.results[last.policy], player.result(last.evaluation)
    pairs, model = evaluation.held_out.pairs, run.load(policy)
    forward = run.forward(model, policy)
    prompts = [(pair.prompt, list(pair.prompt_ids)) for pair in pairs]
    real, end = [pair.real for pair in pairs], pairs[0].real_ids[-1]

    results = {"the policy's answers": evaluation.measures}
    for kind, texts in break_answers([pair.generated for pair in pairs], real).items():
        encoded = encode_responses(run.tokenizer, prompts, texts, config.data.template)
        broken = [
            replace(pair, generated=text, generated_ids=(*ids, end), finish_reason="stop")
            for pair, text, ids in zip(pairs, texts, encoded, strict=True)
        ]
        items = [Continuations(pair.prompt_ids, (pair.real_ids, pair.generated_ids)) for pair in broken]
        logps = compute_logps(model, items, forward).view(-1, 2).double().numpy()
        observed = features([pair.prompt for pair in pairs], real, texts)
        by_response = {"real": logps[:, 0], "generated": logps[:, 1]}
        held_out = HeldOut(broken, by_response, classifier_scores(observed), clusters(observed, config.seed))
        results[kind] = measures(held_out, None, config.evaluation.bootstrap, config.seed)
    return results


def show(results: dict[str, dict], words: list[str]) -> None:
    first = next(iter(results.values()))
    columns = [key for key in COLUMNS if key in first]  # measures with too few prompts are missing
    print(f"\n`{shlex.join(['python', 'benchmarks/broken_answers.py', *words])}`, {first['n']} held-out prompts:\n")
    print("| answers | " + " | ".join(columns) + " |\n|---" + "|---" * len(columns) + "|")
    for kind, row in results.items():
        intervals = {key: "[{:.2f}, {:.2f}]".format(*row[f"{key}_interval"]) for key in columns}
        print(f"| {kind} | " + " | ".join(f"{row[key]:.2f} {intervals[key]}" for key in columns) + " |")


if __name__ == "__main__":
    show(measure_answers(sys.argv[1:]), sys.argv[1:])
