"""The generate stage: the opponent answers every training prompt."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from spin.data.examples import Example
from spin.generation.answers import Answer, AnswerRequest
from spin.generation.sampling import generate_answers
from spin.generation.vllm import generate_with_vllm
from spin.models.policy import Policy
from spin.pipeline.context import Run
from spin.pipeline.stage import Stage, Work
from spin.runtime.errors import brief
from spin.runtime.random import seed_of
from spin.runtime.store import Artifact
from spin.runtime.tables import Rows, read_parquet, write_parquet

# If more than this share of answers is cut at the cap, length alone distinguishes them from human answers.
CUT_SHARE = 0.2
# First tokens are reported if their shares on both sides differ by this much, with enough answers to rule out chance.
DISTINGUISHING_SHARE, MIN_ANSWERS = 0.9, 20
# Generation settings that do not determine the answers (names, layout of work) or are separate inputs (num_answers).
NOT_INPUTS = ("name", "num_answers", "python", "tensor_parallel", "data_parallel", "gpu_memory")


@dataclass(frozen=True, eq=False)
class Generate(Stage[Rows[Answer]]):
    """The opponent's answers to the training prompts; with data.generated=file, in iteration 0, those in the data."""

    name = "generate"
    iteration: int

    def takes_file(self, run: Run) -> bool:
        return self.iteration == 0 and run.config.data.generated == "file"

    def inputs(self, run: Run, policy: Policy) -> dict:
        if self.takes_file(run):
            return {"file": ids_in_file(run).digest, "iter": self.iteration}
        return {
            "opponent": policy.id,
            "prompts": run.data.train.digest,
            "answers": run.config.generation.num_answers,
            "seed": run.config.seed,
            "iter": self.iteration,
            "stop_ids": sorted(run.stop_ids),
            **generation_inputs(run, len(run.data.train) * run.config.generation.num_answers),
        }

    def build(self, run: Run, work: Work, policy: Policy) -> dict:
        started = time.perf_counter()
        seed = seed_of(run.config.seed, self.iteration, bits=32)
        if self.takes_file(run):
            answers = answers_in_file(run)
        else:
            answers = answer_prompts(run, work, policy, run.data.train, run.config.generation.num_answers, seed)
        write_parquet(answers.table, work.folder / "answers.parquet")
        tokens = int(answers.lengths("ids").sum())
        row = {
            "answers": len(answers),
            "tokens": tokens,
            "tokens_per_second": tokens / (time.perf_counter() - started + work.earlier_seconds),
            "finished": answers.column("finish_reason").count("stop") / len(answers),
        }
        work.log({"step": 0, **row})
        return row

    def read(self, run: Run, artifact: Artifact, policy: Policy) -> Rows[Answer]:
        answers = read_parquet(Answer, artifact.folder / "answers.parquet")
        cut = answers.column("finish_reason").count("length") / len(answers)
        if cut > CUT_SHARE:
            run.say(
                f"note: {cut:.0%} of the answers were cut at generation.max_new_tokens={run.config.max_new_tokens}: "
                "their length alone distinguishes them from human answers. Raise it if human answers are longer."
            )
        if tokens := distinguishing_tokens(run.data.train.first("real_ids"), answers.first("ids")):
            names = ", ".join(repr(run.tokenizer.decode([token])) for token in tokens)
            run.say(
                f"note: the first token alone ({brief(names)}) distinguishes human from generated answers, and the policy may "
                f"learn little else. Compare them in iter{self.iteration}/pairs.parquet; data.template_options or data.template "
                "may help."
            )
        return answers


def distinguishing_tokens(human: Sequence[int], generated: Sequence[int]) -> list[int]:
    """Return up to 3 tokens, by frequency, that begin nearly all answers of one side and nearly none of the other.

    `human` and `generated` hold the first token of each answer. Tokens that occur only once are ignored.
    """
    if min(len(human), len(generated)) < MIN_ANSWERS:
        return []
    counts = Counter(human), Counter(generated)
    for side, opposite in (counts, counts[::-1]):
        typical = [t for t, n in side.most_common() if n > 1 and n / side.total() > opposite[t] / opposite.total()]
        shares = [sum(tokens[token] for token in typical) / tokens.total() for tokens in (side, opposite)]
        if shares[0] - shares[1] >= DISTINGUISHING_SHARE:
            return typical[:3]
    return []


def ids_in_file(run: Run) -> Rows[Answer]:
    """Return the generated answers that the data contains besides the human ones, with empty texts."""
    answers = []
    for example in run.data.train:
        reason = "stop" if example.rejected[-1] in run.stop_ids else "length"
        answers.append(Answer(example.id, 0, example.rejected, reason, ""))
    return Rows.of(Answer, answers)


def answers_in_file(run: Run) -> Rows[Answer]:
    """Return the answers of `ids_in_file` with their texts."""
    answers = []
    for answer in ids_in_file(run):
        text = str(run.tokenizer.decode(list(answer.ids), skip_special_tokens=True))
        answers.append(replace(answer, text=text))
    return Rows.of(Answer, answers)


def generation_inputs(run: Run, count: int) -> dict:
    """Return the settings that determine `count` answers of a policy, except rounding due to threads and ranks."""
    settings = run.config.generation.model_dump() | {"max_new_tokens": run.config.max_new_tokens}
    settings["shard_size"] = min(run.config.checkpoint.shard_size, count)
    # vLLM forms its own batches. Ours, which are no larger than a shard, affect rounding.
    unused = ("batch_size", "tokens", "shard_size") if settings["engine"] == "vllm" else ("engine",)
    settings = {key: value for key, value in settings.items() if key not in (*NOT_INPUTS, *unused)}
    return {"generation": settings, "precision": run.numerics["precision"], "device": run.device.type}


def answer_prompts(
    run: Run, work: Work, policy: Policy, examples: Sequence[Example], num_answers: int, seed: int
) -> Rows[Answer]:
    """Return `num_answers` answers of the policy per example, generated by all ranks and resumed from stored shards."""
    use_vllm = run.config.generation.engine == "vllm"
    generate: Callable[[AnswerRequest], Rows[Answer]]
    if use_vllm:
        run.release()  # vLLM's processes load the weights from disk
        generate = partial(generate_with_vllm, policy, run.dtype, run.folder)
    else:
        generate = partial(generate_answers, run.load(policy))
    total = len(examples) * num_answers
    with run.progress(work.stage.title, total, "answers") as bar:
        request = AnswerRequest(
            run.tokenizer,
            examples,
            run.config.generation,
            run.config.max_new_tokens,
            run.stop_ids,
            seed=seed,
            num_answers=num_answers,
            advance=bar.advance,
            keep=work.shards("answers", bar, main_process_only=use_vllm),
            shard_size=run.shard_size(total),
        )
        return generate(request)
