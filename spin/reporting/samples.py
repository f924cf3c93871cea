"""Sample answers for report.html, which shows them side by side and can search and sort them."""

from collections.abc import Sequence
from typing import Any

from spin.evaluation.measures import HeldOut, held_out_margins

# Limits of a set: prompts, characters per text, and total characters.
MOST_PROMPTS, MOST_CHARACTERS, BUDGET = 200, 4000, 1_000_000


def sample_set(name: str, policies: Sequence[tuple[str, HeldOut, HeldOut | None]]) -> dict[str, Any]:
    """Return as many of the `total` prompts as the limits allow, with the human answer and that of each policy.

    `policies`: label, answers, and the opponent's answers if there is a margin over it. An answer has "text" and
    "tokens". A policy's answer also has "gap" (nats per token: log p of the human answer minus that of its own answer)
    and, if known, "score" (the classifier's, higher for more human) and "margin".
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
