"""The answers that report.html shows side by side, searches and sorts by the numbers here."""

from collections.abc import Sequence
from typing import Any

from spin.evaluation.measures import HeldOut, held_out_margins

# What a set has at most: prompts, characters of a text, and characters in all.
MOST_PROMPTS, MOST_CHARACTERS, BUDGET = 200, 4000, 1_000_000


def sample_set(name: str, policies: Sequence[tuple[str, HeldOut, HeldOut | None]]) -> dict[str, Any]:
    """The first prompts, as many as the limits allow, of `total`, with the human answer and that of each policy.

    `policies`: label, answers, and the answers of its opponent if there is a margin over it. An answer has "text" and
    "tokens"; that of a policy also "gap" (nats per token: log p of the human answer less that of its own), and "score"
    (how human the classifier finds it) and "margin" where they are known.
    """
    pairs, columns, budget = policies[0][1].pairs, [], BUDGET
    rows: list[dict] = []
    for _, held_out, before in policies:
        numbers = {} if held_out.scores is None else {"score": held_out.scores[1]}
        columns.append(numbers | ({"margin": held_out_margins(held_out, before)} if before else {}))
    for i, pair in enumerate(pairs[:MOST_PROMPTS]):
        answers: list[dict[str, Any]] = [{"text": _cut(pair.real), "tokens": len(pair.real_ids)}]
        for (_, held_out, _), numbers in zip(policies, columns, strict=True):
            answered, logps = held_out.pairs[i], {name: values[i] for name, values in held_out.policy_logps.items()}
            gap = logps["real"] / len(answered.real_ids) - logps["generated"] / len(answered.generated_ids)
            answer = {"text": _cut(answered.generated), "tokens": len(answered.generated_ids), "gap": gap}
            answers.append(answer | {name: values[i] for name, values in numbers.items()})
        budget -= len(pair.prompt) + sum(len(answer["text"]) for answer in answers)
        if budget < 0 and rows:
            break
        rows.append({"id": pair.id, "prompt": _cut(pair.prompt), "answers": answers})
    return {"name": name, "labels": ["human", *(label for label, _, _ in policies)], "total": len(pairs), "rows": rows}


def _cut(text: str) -> str:
    return text if len(text) <= MOST_CHARACTERS else text[:MOST_CHARACTERS] + " […]"
