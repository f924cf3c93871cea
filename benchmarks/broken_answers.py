"""Are broken answers caught? The held-out measures of a game's last policy, and of what is broken on purpose.

    python benchmarks/broken_answers.py            the default game (played first, if that has not been done)
    python benchmarks/broken_answers.py experiment=smoke

Every kind takes the place of the policy's answers: the policy scores them, and all measures are taken as usual.
Printed as a table in markdown.
"""

import random
import shlex
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

COLUMNS = ("human_likelier", "classifier_auc", "mauve", "length_auc", "rouge_l", "distinct_2", "diversity", "finished")


def broken(answers: list[str], human: list[str]) -> dict[str, list[str] | None]:
    """Answers of each kind, in the place of `answers`; None for these as they are."""
    rng = random.Random(0)
    word_by_word = [" ".join(rng.sample(text.split(), len(text.split()))) for text in human]
    return {
        "the policy's answers": None,
        "human answers to other prompts": human[1:] + human[:1],
        "one word repeated": [" ".join(["the"] * max(1, len(text.split()))) for text in human],
        "one answer to all prompts": [answers[0]] * len(answers),
        "human answers, words shuffled": word_by_word,
    }


def main(words: list[str]) -> dict[str, dict]:
    from spin.config.hydra import load
    from spin.data.templates import encode_responses
    from spin.engines.logps import compute_logps
    from spin.evaluation.measures import HeldOut, measures
    from spin.evaluation.two_sample import classifier_scores, clusters, features
    from spin.game import turns
    from spin.method.pairs import as_continuations
    from spin.runtime.tracking import Tracker

    config = load("tracking.wandb=disabled", *words)
    folder = ROOT / "outputs" / config.name
    stages = Stages(config, folder, Tracker(folder, name="", config={}, rank=1))
    *_, last = turns(config, stages)
    assert last.evaluated and last.policy
    pairs, model = last.evaluated.held_out.pairs, stages.model(last.policy)
    prompts = [(pair.prompt, list(pair.prompt_ids)) for pair in pairs]
    end = pairs[0].real_ids[-1]

    found = {}
    for kind, texts in broken([pair.generated for pair in pairs], [pair.real for pair in pairs]).items():
        if texts is None:
            found[kind] = last.evaluated.measures
            continue
        ids = [(*one, end) for one in encode_responses(stages.tokenizer, prompts, texts, config.data.template)]
        changed = [
            replace(pair, generated=text, generated_ids=one, finish_reason="stop")
            for pair, text, one in zip(pairs, texts, ids, strict=True)
        ]
        logps = compute_logps(model, as_continuations(changed), stages.forward(model, last.policy)).view(-1, 2)
        x = features([p.prompt for p in changed], [p.real for p in changed], texts)
        policy_logps = dict(zip(("real", "generated"), logps.double().numpy().T, strict=True))
        held_out = HeldOut(changed, policy_logps, classifier_scores(x), clusters(x, config.seed))
        found[kind] = measures(held_out, None, config.evaluation.bootstrap, config.seed)
    return found


def show(found: dict[str, dict], words: list[str]) -> None:
    n = next(iter(found.values()))["n"]
    print(f"\n`{shlex.join(['python', 'benchmarks/broken_answers.py', *words])}`, {n} held-out prompts:\n")
    print("| answers | " + " | ".join(COLUMNS) + " |\n|---" + "|---" * len(COLUMNS) + "|")
    for kind, row in found.items():
        cells = [
            f"{row[key]:.2f} [{row[f'{key}_interval'][0]:.2f}, {row[f'{key}_interval'][1]:.2f}]" for key in COLUMNS
        ]
        print(f"| {kind} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    show(main(sys.argv[1:]), sys.argv[1:])
