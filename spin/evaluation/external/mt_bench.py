"""MT-Bench (Zheng et al. 2023, arXiv 2306.05685): a policy's answers in FastChat's format, graded as in FastChat.

Questions, judge prompts and reference answers are the files of fastchat/llm_judge/data. FastChat's package is not used:
it needs openai < 1, accepts only its own list of judges, and its wheel lacks these files.
"""

import hashlib
import json
import os
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spin.config.schema import Config
from spin.data.examples import Example
from spin.data.messages import Message
from spin.data.templates import encode_prompts, special_texts
from spin.evaluation.external.judges import Judge, in_shards
from spin.evaluation.measures import bootstrap_draws, interval
from spin.generation.answers import AnswerRequest
from spin.generation.sampling import generate_answers
from spin.runtime.errors import UserError, brief, explaining
from spin.runtime.random import seed_of
from spin.runtime.shards import Say, ShardDriver, compute_shards

SOURCE = "take the folder fastchat/llm_judge/data of github.com/lm-sys/FastChat and its mt_bench/question.jsonl"
TURNS = 2
MAX_TOKENS = 1024  # per answer, as in FastChat, unless generation.max_new_tokens is set
# FastChat's sampling temperatures by category; 0.7 for others.
TEMPERATURES = {"extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0, "stem": 0.1, "humanities": 0.1}
WITH_REFERENCE = ("math", "reasoning", "coding")
NO_ANSWER = "ERROR"  # FastChat's text for a missing answer
UNRATED = -1.0  # FastChat's score for a judgment without a rating


@dataclass(frozen=True)
class Question:
    """A question of two user turns."""

    id: int | str
    category: str
    turns: tuple[str, str]


def read_questions(path: str | None) -> list[Question]:
    """Return the questions in a file in the format of FastChat's question.jsonl. Raises UserError."""
    if path is None:
        raise UserError(f"evaluation.questions must be set: {SOURCE}.")
    questions: list[Question] = []
    for number, record in enumerate(_read_records(Path(path)), 1):
        problem = f"evaluation.questions={brief(path, 300)}: record {number} is not a question with two turns"
        with explaining(problem, SOURCE):
            first, second = (text.strip() for text in record["turns"])
            questions.append(Question(record["question_id"], str(record["category"]), (first, second)))
    if len({str(question.id) for question in questions}) < max(1, len(questions)):
        raise UserError(f"evaluation.questions={path}: no question, or two have the same question_id; {SOURCE}.")
    return questions


def read_grading(path: str, questions: Sequence[Question]) -> dict[str, dict]:
    """Return the grading data that belong to FastChat's question.jsonl at `path`: the judge `prompts` by name, and
    `references`, GPT-4's answers by question id. Raises UserError if any is missing."""
    folder = Path(path).expanduser().parent
    names = [f"single{math}-v1{turns}" for math in ("", "-math") for turns in ("", "-multi-turn")]
    ids = [str(question.id) for question in questions if question.category in WITH_REFERENCE]
    with explaining(f"{folder}: a judge prompt or reference answer is missing", SOURCE, (LookupError, TypeError)):
        prompts = {record["name"]: record for record in _read_records(folder.parent / "judge_prompts.jsonl")}
        answers = _read_records(folder / "reference_answer" / "gpt-4.jsonl") if ids else []
        references = {str(record["question_id"]): record["choices"][0]["turns"] for record in answers}
        return {"prompts": {name: prompts[name] for name in names}, "references": {id: references[id] for id in ids}}


def _read_records(path: Path) -> list[dict]:
    """Return the objects in a JSON Lines file. Raises UserError if it can't be read."""
    with explaining(f"evaluation.questions: {brief(path, 300)}: can't be read", SOURCE):
        lines = Path(os.path.expanduser(path)).read_text("utf-8-sig").splitlines()
        return [json.loads(line) for line in lines if line.strip()]


def answer_questions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    config: Config,
    stop_ids: Collection[int],
    advance: Callable[[int], None] = lambda answers: None,
    say: Say = print,
    keep: Callable[[str], ShardDriver] = lambda part: compute_shards,
    ranks: int = 1,
) -> list[dict]:
    """Return the answers to both turns as rows of FastChat's model_answer files. The second prompt has the first turn.

    The benchmark sets the temperature, by category, and top_p (1). `keep(part)` returns the driver for the shards of a
    part, which `ranks` processes share. If the model's context leaves too little budget, an answer is shorter, or "ERROR",
    and `say` lists it. `answer_id` is a hash and `tstamp` is 0, so that equal seeds give equal bytes.
    """
    conversations: list[list[Message]] = [[] for _ in questions]
    context = getattr(model.config, "max_position_embeddings", None) or 2**31
    max_new_tokens, seed = config.generation.max_new_tokens or MAX_TOKENS, seed_of(config.seed, "mt_bench", bits=32)
    short: list[str] = []
    for turn in range(TURNS):
        for question, conversation in zip(questions, conversations, strict=True):
            conversation.append({"role": "user", "content": question.turns[turn]})
        groups: dict[tuple[float, int], list[Example]] = defaultdict(list)
        encoded = encode_prompts(tokenizer, conversations, config.data.template, config.data.template_options)
        for question, (text, ids) in zip(questions, encoded, strict=True):
            budget = max(0, min(max_new_tokens, context - len(ids)))
            example = Example(f"{question.id}/{turn + 1}", text, tuple(ids), "", ())
            groups[TEMPERATURES.get(question.category, 0.7), budget].append(example)
            short += [example.id] if budget < max_new_tokens else []
        replies: dict[str, str] = {}
        for temperature, budget in sorted(group for group in groups if group[1] > 0):
            examples = groups[temperature, budget]
            sampling = config.generation.model_copy(update={"temperature": temperature, "top_p": 1.0})
            part, size = keep(f"{turn + 1}-{temperature:g}-{budget}"), min(256, -(-len(examples) // ranks))
            request = AnswerRequest(tokenizer, examples, sampling, budget, stop_ids, seed, 1, advance, part, size)
            replies |= {answer.id: answer.text for answer in generate_answers(model, request)}
        for question, conversation in zip(questions, conversations, strict=True):
            reply = replies.get(f"{question.id}/{turn + 1}", NO_ANSWER)
            for special in special_texts(tokenizer):  # in the second prompt this text would become a control token
                reply = reply.replace(special, "")
            conversation.append({"role": "assistant", "content": reply.strip()})
    if short:
        short_ids = brief(", ".join(short), 300)
        cut = f"in a context of {context} tokens these answers were cut or had no room ({NO_ANSWER})"
        say(f"MT-Bench: {cut}: question/turn {short_ids}")
    rows = []
    for question, conversation in zip(questions, conversations, strict=True):
        turns = [message["content"] for message in conversation[1::2]]
        answer_id = hashlib.sha256(json.dumps([question.id, turns]).encode()).hexdigest()[:22]  # FastChat's length
        choices = [{"index": 0, "turns": turns}]
        row = {"question_id": question.id, "answer_id": answer_id, "model_id": "", "choices": choices, "tstamp": 0.0}
        rows.append(row)
    return rows


def write_answers(rows: Sequence[dict], model_id: str, folder: Path) -> Path:
    """Write `folder`/model_answer/<model_id>.jsonl in the format of FastChat's gen_judgment.py, and return its path."""
    model_id = re.sub(r"[^\w.+-]", "_", model_id)  # FastChat uses the file name as the model id
    path = folder / "model_answer" / f"{model_id}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({**row, "model_id": model_id}) + "\n" for row in rows), "utf-8")
    return path


def grade_answers(
    rows: Sequence[dict],
    questions: Sequence[Question],
    grading: dict[str, dict],
    judge: Judge,
    advance: Callable[[int], None] = lambda judgments: None,
    keep: ShardDriver = compute_shards,
) -> list[dict]:
    """Return the judge's ratings of both answers to each question (single-answer grading, section 3.1 of the paper).

    `grading` is the result of `read_grading`. The rows have FastChat's keys question_id, turn, score (-1 without a
    rating) and judgment, and additionally category. Raises UserError if the judge does.
    """

    def graded(task: tuple[Question, list[str], int]) -> dict:
        question, answers, turn = task
        judgment = judge(_grading_messages(question, answers, turn, grading))
        facts = {"question_id": str(question.id), "category": question.category, "turn": turn}
        return {**facts, "score": parse_rating(judgment), "judgment": judgment}

    tasks = {}
    for question, row in zip(questions, rows, strict=True):
        for turn in range(1, TURNS + 1):
            tasks[f"{row['answer_id']}/{turn}"] = question, row["choices"][0]["turns"], turn
    return in_shards(graded, tasks, keep, advance)


def _grading_messages(question: Question, answers: Sequence[str], turn: int, grading: dict[str, dict]) -> list[Message]:
    is_math = question.category in WITH_REFERENCE
    prompt = grading["prompts"][f"single{'-math' if is_math else ''}-v1{'-multi-turn' if turn == 2 else ''}"]
    fields = {"question": question.turns[0], "answer": answers[0]}
    for number in range(TURNS):
        fields |= {f"question_{number + 1}": question.turns[number], f"answer_{number + 1}": answers[number]}
        fields[f"ref_answer_{number + 1}"] = grading["references"][str(question.id)][number] if is_math else ""
    content = prompt["prompt_template"].format(**fields)
    return [{"role": "system", "content": prompt["system_prompt"]}, {"role": "user", "content": content}]


def parse_rating(judgment: str) -> float:
    """Return the first number in double brackets, else in single brackets, as FastChat does; -1 unless from 1 to 10."""
    number = r"(\d+(?:\.\d*)?)"  # `\d+\.?\d*` would take hours on a long string of digits
    match = re.search(rf"\[\[{number}\]\]", judgment) or re.search(rf"\[{number}\]", judgment)
    return float(match[1]) if match and 1 <= float(match[1]) <= 10 else UNRATED


def mt_bench_score(judgments: Sequence[dict], resamples: int = 1000, seed: int = 0) -> dict:
    """Return mean ratings (1 to 10, None if all are missing): `score` over both turns, `first_turn`, `second_turn`,
    each with `<name>_interval` (95 %, bootstrap over questions), and `by_category`. `unparsed` counts missing ratings.

    `judgments` come from `grade_answers`, where both turns of a question are adjacent.
    """
    ratings = np.array([judgment["score"] for judgment in judgments], dtype=float).reshape(-1, TURNS)
    ratings[ratings == UNRATED] = np.nan
    n, unparsed = len(ratings), int(np.isnan(ratings).sum())
    draws = [np.arange(n), *bootstrap_draws(n, resamples, seed)]
    result: dict = {"n": n, "verdicts": len(judgments), "unparsed": unparsed}
    for name, columns in {"score": slice(0, 2), "first_turn": slice(0, 1), "second_turn": slice(1, 2)}.items():
        samples = [ratings[draw, columns] for draw in draws]
        means = [float(np.nanmean(sample)) for sample in samples if np.isfinite(sample).any()]
        result[name] = means[0] if means else None
        result[f"{name}_interval"] = interval(means[1:]) if means else None
    result["by_category"] = {}
    for category in dict.fromkeys(judgment["category"] for judgment in judgments):
        rated = [row["score"] for row in judgments if row["category"] == category and row["score"] != UNRATED]
        result["by_category"][category] = sum(rated) / len(rated) if rated else None
    return result
