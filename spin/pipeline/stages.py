"""The stages of the game: sft, generate, score, train, evaluate.

Each is looked up in the store by what makes it, and only played if it is not there.
"""

import hashlib
import json
import math
import re
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from spin.config.schema import Config, value_at_iteration
from spin.data import examples as data
from spin.data.examples import Example
from spin.engines import device_memory, memory
from spin.engines.base import Engine, select_device, select_dtype
from spin.engines.deepspeed import DeepSpeedEngine, check_deepspeed
from spin.engines.layouts import choose_forward
from spin.engines.logps import Forward, compute_logps
from spin.engines.optimizers import state_values_per_weight
from spin.engines.packing import Continuations
from spin.engines.single import SingleEngine
from spin.evaluation.answer_checks import correct
from spin.evaluation.external.harness import parse_tasks
from spin.evaluation.measures import HeldOut, held_out_of, measures
from spin.evaluation.two_sample import (
    Features,
    check_embedder,
    classifier_scores,
    clusters,
    embed,
    features,
    with_embeddings,
)
from spin.generation import vllm as vllm_engine
from spin.generation.answers import Answer, read_answers, repeat_prompts
from spin.generation.sampling import generate_answers
from spin.method.objectives import mix_references
from spin.method.pairs import (
    Pair,
    as_continuations,
    by_prompt,
    items_of,
    make_pair,
    make_pairs,
    read_pairs,
    to_pairs,
    with_opponent_logps,
)
from spin.method.training import train_sft, train_spin
from spin.models import adapters
from spin.models.find import find_model, fresh_adapter
from spin.models.load import load_policy, load_tokenizer, stop_ids
from spin.models.policy import (
    TRAINED_ON,
    Policy,
    auxiliary_digest,
    content_id,
    note_trained_on,
    trained_on,
    weight_files,
)
from spin.models.quantization import check_bitsandbytes
from spin.models.save import save_merged
from spin.pipeline import external as exams
from spin.runtime import process_group as ranks
from spin.runtime.artifacts import folder_size
from spin.runtime.checkpoints import KEPT, Checkpoints, TrainState, describe_progress
from spin.runtime.errors import UserError
from spin.runtime.progress import Progress
from spin.runtime.shards import ResumableShards
from spin.runtime.signals import Interrupted, deferred
from spin.runtime.store import Artifact, Store, key_of
from spin.runtime.tables import fingerprint, write_parquet
from spin.runtime.tracking import Tracker, to_json_types

# A warning is due when more answers than this are cut at the cap: their length alone then tells them from human ones.
CUT_SHARE = 0.2
ADAPTER = -3  # a fresh adapter's part of the game, for its seed


@dataclass
class Work:
    """What the builder of a stage works with: `folder` becomes the stage, `resume` holds what a next try goes on from,
    `log` takes a row of metrics. `earlier_seconds` is what earlier tries took for what is used of them."""

    folder: Path
    resume: Path
    log: Callable[[dict], None]
    earlier_seconds: float = 0.0

    def earlier(self, seconds: float) -> None:
        self.earlier_seconds += seconds


@dataclass(frozen=True)
class Scored:
    """The pairs of an iteration with their opponent's log-probs, and the stage that holds them. `start`: the same pairs
    with log-probs of the policy that self-play started from, where the loss asks for them."""

    pairs: list[Pair]
    stage: Artifact
    start: "Scored | None" = None


@dataclass(frozen=True)
class Trained:
    """A policy that a stage made."""

    policy: Policy
    stage: Artifact


@dataclass(frozen=True)
class Evaluated:
    """A finished evaluation: of which policy, its answers to the held-out prompts, and its measures."""

    policy: Policy
    iteration: int | None
    stage: Artifact
    held_out: HeldOut
    measures: dict


class Stages:
    """The stages of one run, and all that they share."""

    def __init__(self, config: Config, folder: Path, tracker: Tracker):
        self.config, self.folder, self.tracker = config, folder, tracker
        self.say: Callable[[str], None] = tracker.say
        self.progress: Callable[[str, int, str], Any] = tracker.progress
        self.ranks = ranks.current_group()
        self.store = Store(Path(config.store.path), tracker.say)
        self.device = select_device(config.engine)
        self.dtype = select_dtype(config.engine, self.device)
        cache = Path(config.cache.path).expanduser()
        self.start = find_model(config.model, cache)
        self.tokenizer = load_tokenizer(self.start.tokenizer)
        self.stop_ids = stop_ids(self.start.folder_with("generation_config.json"), self.tokenizer)
        self._check_adapter()
        self.against: Policy | None = None  # with stage=evaluate: what the start is set against
        if config.stage == "evaluate":
            other = config.evaluation.against
            label, *labels = distinct_labels([config.model.path or config.model.name, *([other] if other else [])])
            self.start = replace(self.start, label=label)
            if other is not None:
                self.against = replace(find_model(replace(config.model, path=other), cache), label=labels[0])
        measured = [self.start, *([self.against] if self.against else [])]
        seen = set().union(*(trained_on(policy.folder_with(TRAINED_ON)) for policy in measured))
        self.data = data.load_dataset(config.data, self.tokenizer, self.stop_ids, config.seed, cache, seen)
        self._check_context()
        if config.evaluation.embedder is not None:
            check_embedder(config.evaluation.embedder)
        exams.check(config)
        if config.optimizer.name.endswith("8bit"):
            check_bitsandbytes(f"optimizer.name={config.optimizer.name}")
        if self.start.base_or_self.quantization:
            check_bitsandbytes(f"model.quantization={self.start.base_or_self.quantization}")
        if config.engine.name == "deepspeed":
            check_deepspeed()
        if config.generation.engine == "vllm":
            start = self.start
            rank = adapters.largest_rank(start.folder) if start.base else config.model.lora_rank
            vllm_engine.check_vllm(
                config.generation, start.base_or_self.quantization, rank if config.model.adapter == "lora" else 0
            )
        # All settings that decide the bits of a forward pass; threads and the like do not.
        self.numerics: dict[str, Any] = {
            "precision": str(self.dtype).removeprefix("torch."),
            "device": self.device.type,
            "layout": config.engine.layout,
            "tokens_per_row": config.engine.tokens_per_row,
            "tokens_per_batch": config.engine.tokens_per_batch,
            "head_chunk": config.engine.head_chunk,
        }
        # What the stages cost when they were played, in this run or an earlier one.
        self.seconds: dict[str, float] = {}
        self.peak_memory_gib = 0.0
        self.played = 0
        self.used: list[str] = []
        self._loaded: tuple[str, PreTrainedModel] | None = None
        self._forwards: dict[str, Forward] = {}

    # --- models -------------------------------------------------------------------------------------------------------

    def model(self, policy: Policy) -> PreTrainedModel:
        """The policy in memory, in the compute type. One model at a time."""
        if self._loaded is None or self._loaded[0] != policy.id:
            self.release()
            self._loaded = (policy.id, load_policy(policy, self.dtype, self.device))
        return self._loaded[1]

    load_model = model

    def forward(self, model: PreTrainedModel, policy: Policy) -> Forward:
        """How this policy's log-probs are computed, settled on its first use by comparing with its own forward.

        For each policy by itself: what a resumed run finds must not depend on which policy came first.
        """
        if policy.id not in self._forwards:
            examples = self.data.train[:5]
            # Two different answers to one prompt: an answer that sees the other would show.
            items = [
                Continuations(one.prompt_ids, (one.real_ids, other.real_ids))
                for one, other in zip(examples, examples[1:] or examples, strict=False)
            ]
            engine = self.config.engine
            found, remark = choose_forward(
                model,
                items,
                engine.layout,
                engine.tokens_per_row,
                engine.tokens_per_batch,
                engine.head_chunk,
                self._longest(),
            )
            found, remark = self.ranks.broadcast((found, remark))  # all go one way, on whatever processors
            if remark and found not in self._forwards.values():
                self.tracker.say(remark)
            self._forwards[policy.id] = found
        return self._forwards[policy.id]

    def _longest(self) -> int:
        """The most tokens of a prompt, its human answer, and the generated ones (an evaluation scores two)."""
        examples = [*self.data.train, *self.data.held_out]
        answers = max(2, self.config.generation.answers)
        return max(len(e.prompt_ids) + len(e.real_ids) for e in examples) + answers * self.config.max_new_tokens

    def _check_context(self) -> None:
        """Raise UserError if a sequence of the run can be longer than the model's context."""
        context = getattr(
            AutoConfig.from_pretrained(self.start.base_or_self.folder, trust_remote_code=False),
            "max_position_embeddings",
            None,
        )
        new = self.config.max_new_tokens
        longest = max(len(e.prompt_ids) + max(len(e.real_ids), new) for e in [*self.data.train, *self.data.held_out])
        if context is not None and longest > context:
            raise UserError(
                f"sequences of up to {longest} tokens do not fit the model's context of {context}: lower data.max_length, "
                f"data.max_prompt_length or generation.max_new_tokens={new}."
            )

    def _check_adapter(self) -> None:
        """Raise UserError if the start and model.adapter do not go together; before any weight is loaded."""
        config = self.config.model
        if config.adapter == "none":
            if self.start.base and self.config.stage == "game":
                raise UserError(
                    f"model.path={config.path} is a LoRA adapter: set model.adapter=lora to go on with it, or merge it into "
                    "its base first."
                )
        elif self.start.base:
            self.tracker.say(f"model.path={config.path} is a LoRA adapter, which is trained on as it is.")
        else:
            self._adapter_size()  # names targets that are not there

    @property
    def _lora(self) -> adapters.Lora:
        config = self.config.model
        targets = config.lora_targets  # their order changes nothing
        names = targets if isinstance(targets, str) else sorted(set(targets))
        return adapters.Lora(config.lora_rank, config.lora_alpha, names)

    def release(self) -> None:
        """Take the model out of memory, for another one to come."""
        self._loaded = None
        device_memory.release_free_memory()

    def engine(self, policy: Policy) -> Engine:
        """A training engine that starts from `policy`; whatever model was in memory leaves first."""
        repeat_prompts, optimizer = self.config.engine, self.config.optimizer
        if repeat_prompts.name == "deepspeed":
            if policy.id not in self._forwards:  # settled on a model that is whole
                self.forward(self.model(policy), policy)
            self.release()
            return DeepSpeedEngine(policy, self.dtype, self.device, repeat_prompts, optimizer, self.ranks)
        self.release()
        engine = SingleEngine(policy, self.dtype, self.device, repeat_prompts, optimizer)
        self.forward(engine.model, policy)
        return engine

    # --- stages -------------------------------------------------------------------------------------------------------

    def stage(
        self, name: str, title: str, labels: dict, inputs: dict, build: Callable[[Work], dict], by_rank_0: bool = False
    ) -> Artifact:
        """Find the stage in the store or play it. Its metrics are logged either way, so a run's record is whole.

        `labels` (iteration, policy) go onto each row: they are this run's names, not part of what made the stage. All ranks
        build it together, and what rank 0 makes of it is kept; or `by_rank_0` alone.
        """

        def recorded(folder: Path) -> dict:
            with (folder / "metrics.jsonl").open("w") as file:

                def log(row: dict) -> None:
                    file.write(json.dumps(to_json_types(row)) + "\n")
                    file.flush()
                    self.tracker.log({**labels, "stage": name, **row})

                resume = self.store.resume(name, inputs)
                if found := describe_progress(resume):
                    self.tracker.say(f"{title}: going on from {found}")
                work = Work(folder, resume, log)
                facts = build(work)
            peak = peak_memory_gib() if by_rank_0 else self.ranks.all_reduce_max(peak_memory_gib())
            return facts | {"peak_memory_gib": peak, "earlier_seconds": work.earlier_seconds}

        reference = f"{name}/{key_of(inputs)}"
        self.used.append(reference)
        if self.ranks.is_main_process:
            self.store.refer(self.folder, [reference])
        stage = self._stored(name, inputs, recorded, by_rank_0)
        if stage.reused:
            self.tracker.say(f"{title}: done before, reused")
            for row in stage.rows():
                self.tracker.log({**labels, "stage": name, **row}, reused=True)
        else:
            self.played += 1
        self.seconds[name] = self.seconds.get(name, 0.0) + stage.manifest["seconds"]
        self.peak_memory_gib = max(self.peak_memory_gib, stage.manifest["facts"]["peak_memory_gib"])
        return stage

    def _stored(self, name: str, inputs: dict, build: Callable[[Path], dict], by_rank_0: bool) -> Artifact:
        """Rank 0 keeps the store, and has the others build with it where a stage is not there."""

        def together(folder: Path) -> dict:
            if not by_rank_0:
                self.ranks.broadcast(True)
            return build(folder)

        stage = None
        if self.ranks.is_main_process:
            stage = self.store.get(name, inputs, together)
            self.ranks.broadcast(False)
        else:
            while self.ranks.broadcast():
                with tempfile.TemporaryDirectory() as scratch:
                    build(Path(scratch))
        self.ranks.raise_if_stopped()
        return self.ranks.broadcast(stage)

    def generate(self, opponent: Policy, iteration: int) -> list[Answer]:
        """The opponent's answers to all training prompts."""
        examples = repeat_prompts(self.data.train, self.config.generation.answers)
        inputs = {
            "opponent": opponent.id,
            "prompts": fingerprint(examples),
            "seed": self.config.seed,
            "iter": iteration,
            "stop_ids": sorted(self.stop_ids),
            **self._generation_inputs(),
        }

        title = f"iter {iteration}: generate"

        def build(work: Work) -> dict:
            started = time.perf_counter()
            answers = self._answers(work, opponent, examples, title, _seed(self.config.seed, iteration))
            tokens = sum(len(answer.ids) for answer in answers)
            seconds = time.perf_counter() - started + work.earlier_seconds
            write_parquet(answers, work.folder / "answers.parquet")
            finished = sum(answer.finish_reason == "stop" for answer in answers) / len(answers)
            row = {
                "answers": len(answers),
                "tokens": tokens,
                "tokens_per_second": tokens / seconds,
                "finished": finished,
            }
            work.log({"step": 0, **row})
            return row

        stage = self.stage("generate", title, {"iter": iteration}, inputs, build)
        answers = read_answers(stage.folder / "answers.parquet")
        cut = sum(answer.finish_reason == "length" for answer in answers) / len(answers)
        if cut > CUT_SHARE:
            self.tracker.say(
                f"note: {cut:.0%} of the answers were cut at generation.max_new_tokens={self.config.max_new_tokens}: "
                "length alone tells them from human ones. Raise it if it is well below the human answers' length."
            )
        return answers

    def score(self, opponent: Policy, iteration: int, answers: list[list[Answer]], start: Policy) -> Scored:
        """The pairs of this iteration and those replayed from earlier ones (`answers[k]`: iteration k's), all with
        log-probs of the present opponent, and where the reference is made of it, of `start`, iteration 0's opponent."""
        pairs, dropped = make_pairs(self.data.train, answers[iteration], iteration)
        for earlier in replayed(self.config.schedule.replay, iteration):
            more, more_dropped = make_pairs(self.data.train, answers[earlier], earlier)
            pairs += more
            dropped = {reason: count + more_dropped[reason] for reason, count in dropped.items()}
        if not pairs:
            raise UserError(
                f"iteration {iteration}: no pair is left, every answer is empty or equals the human one "
                f"({counted(dropped)}): there is nothing to learn. Sample with generation.temperature=1, or add data."
            )
        title, labels = f"iter {iteration}: score", dict[str, Any](iter=iteration)
        scored = self._score(opponent, iteration, pairs, dropped, title, labels)
        if self.config.loss.reference == "opponent" or start.id == opponent.id:
            return scored
        title, labels = f"{title} under {start.label}", {**labels, "under": start.label}
        return replace(scored, start=self._score(start, iteration, pairs, dropped, title, labels))

    def _score(
        self, policy: Policy, iteration: int, pairs: list[Pair], dropped: dict[str, int], title: str, labels: dict
    ) -> Scored:
        """The pairs with log-probs of `policy` in the place of the opponent's."""
        inputs = {"opponent": policy.id, "iter": iteration, "pairs": fingerprint(pairs), "numerics": self.numerics}
        items = items_of(pairs)

        def build(work: Work) -> dict:
            started = time.perf_counter()
            model = self.model(policy)
            forward = self.forward(model, policy)
            with self.tracker.progress(title, len(items), _unit(items, pairs)) as bar:
                logps = self._logps(work, model, policy, items, bar)
            scored = with_opponent_logps(pairs, to_pairs(logps, [len(item.responses) for item in items]))
            write_parquet(scored, work.folder / "pairs.parquet")
            rate = len(pairs) / (time.perf_counter() - started + work.earlier_seconds)
            row = {
                "pairs": len(pairs),
                "logps/real": _mean([p.opponent_logp_real for p in scored]),
                "logps/generated": _mean([p.opponent_logp_generated for p in scored]),
                "pairs_per_second": rate,
            }
            work.log({"step": 0, **row})
            return {"pairs": len(pairs), "dropped": dropped, "layout": forward.layout, "head": forward.head}

        stage = self.stage("score", title, labels, inputs, build)
        scored = read_pairs(stage.folder / "pairs.parquet")
        assert fingerprint(scored) == inputs["pairs"], f"{stage.folder}: its rows are not the pairs that were scored"
        return Scored(scored, stage)

    def train(self, opponent: Policy, iteration: int, scored: Scored) -> Trained:
        """The main player: starts as the opponent, learns to tell its answers from the human ones."""
        config, pairs = self.config, scored.pairs
        beta, lr = value_at_iteration(config.loss.beta, iteration), value_at_iteration(config.optimizer.lr, iteration)
        settings: dict[str, Any] = {
            "lr": lr,
            "epochs": value_at_iteration(config.schedule.epochs, iteration),
            "batch_size": config.schedule.batch_size,
            "warmup_ratio": config.schedule.warmup_ratio,
            "seed": _seed(config.seed, iteration),
        }
        inputs = {
            "start": opponent.id,
            "scores": scored.stage.key,
            "beta": beta,
            "link": config.loss.link,
            **settings,
            **self._training_inputs(opponent),
            **self._variant_inputs(scored),
        }
        title = f"iter {iteration}: train"

        def build(work: Work) -> dict:
            def learn(engine: Engine, **common) -> TrainState:
                return train_spin(
                    engine,
                    pairs,
                    beta=beta,
                    link=config.loss.link,
                    reference_logps=self._reference_logps(scored),
                    length_normalised=config.loss.length_normalised,
                    sft_weight=config.loss.sft_weight,
                    **common,
                    **settings,
                )

            shown = {"loss": "loss", "margin": "rewards/margins"}
            prompts = by_prompt(pairs)
            total = _total(len(prompts), settings["epochs"])
            return self._train(work, opponent, title, total, _unit(prompts, pairs), shown, learn)

        stage = self.stage("train", title, {"iter": iteration}, inputs, build)
        return self._trained(f"iter{iteration}", stage)

    def sft(self) -> Trained:
        """Fine-tune the start on the human answers: SPIN's opponent at t = 0 is an SFT model of the same data."""
        config = self.config
        settings: dict[str, Any] = {
            "lr": config.schedule.sft_lr,
            "epochs": config.schedule.sft_epochs,
            "batch_size": config.schedule.batch_size,
            "warmup_ratio": config.schedule.warmup_ratio,
            "seed": _seed(config.seed, -1),
        }
        inputs = {
            "start": self.start.id,
            "examples": fingerprint(self.data.train),
            **settings,
            **self._training_inputs(self.start),
        }
        items = [Continuations(example.prompt_ids, (example.real_ids,)) for example in self.data.train]

        def build(work: Work) -> dict:
            def learn(engine: Engine, **common) -> TrainState:
                return train_sft(engine, items, **common, **settings)

            total = _total(len(items), settings["epochs"])
            return self._train(work, self.start, "SFT", total, "examples", {"loss": "loss"}, learn)

        return self._trained("sft", self.stage("sft", "SFT", {"iter": None}, inputs, build))

    def evaluate(self, policy: Policy, iteration: int | None, before: Evaluated | None) -> Evaluated:
        """Held-out measures of `policy`, and against `before`, its opponent, where it is the product of an iteration."""
        examples, resamples = self.data.held_out, self.config.evaluation.bootstrap
        inputs = {
            "policy": policy.id,
            "prompts": fingerprint(examples),
            "seed": self.config.seed,
            "stop_ids": sorted(self.stop_ids),
            "opponent": _content(before.held_out.pairs) if before else None,
            "bootstrap": resamples,
            "check": self.config.data.check,
            "embedder": self._embedder_id(),
            "numerics": self.numerics,
            **self._generation_inputs(),
        }
        title = f"evaluate {policy.label}"

        def build(work: Work) -> dict:
            # The same random numbers for every policy: differences between policies are not differences of luck.
            answers = self._answers(work, policy, examples, title, _seed(self.config.seed, -2))
            by_id = {answer.id: answer for answer in answers}
            model = self.model(policy)
            pairs = [make_pair(example, by_id[example.id]) for example in examples]
            items = as_continuations(pairs)
            if before:
                items = [
                    Continuations(item.prompt_ids, (*item.responses, theirs.generated_ids))
                    for item, theirs in zip(items, before.held_out.pairs, strict=True)
                ]
            logps = self._logps(work, model, policy, items).view(len(pairs), -1)
            if not self.ranks.is_main_process:
                return {}
            scored = with_opponent_logps(pairs, logps[:, :2])
            found = self._features(scored)
            held_out = HeldOut(
                scored,
                logps[:, 2].tolist() if before else None,
                classifier_scores(found),
                clusters(found, self.config.seed),
                correct(scored, self.config.data.check),
            )
            write_parquet(scored, work.folder / "held_out.parquet")
            result = measures(held_out, before.held_out if before else None, resamples, self.config.seed)
            facts = {"measures": result, "per_prompt": held_out.per_prompt}
            (work.folder / "evaluation.json").write_text(json.dumps(facts, indent=2) + "\n")
            work.log({"step": 0, **result})
            return result

        stage = self.stage("evaluate", title, {"iter": iteration, "policy": policy.label}, inputs, build)
        facts = json.loads((stage.folder / "evaluation.json").read_text())
        pairs = read_pairs(stage.folder / "held_out.parquet")
        held_out = held_out_of(pairs, facts["per_prompt"])
        samples = [
            {"prompt": p.prompt, "real": p.real, "generated": p.generated}
            for p in pairs[: self.config.evaluation.samples]
        ]
        self.tracker.samples(policy.label, samples, stage.reused)
        return Evaluated(policy, iteration, stage, held_out, facts["measures"])

    def merge(self, policy: Policy) -> Artifact:
        """A policy that is an adapter put into its base, as a whole model folder: `merged/` in the stage's."""
        title = f"merge {policy.label}"

        def build(work: Work) -> dict:
            self.release()
            check_room(self.store, self.merged_bytes, title)
            save_merged(policy, work.folder / "merged")
            return {}

        labels = {"iter": None, "policy": policy.label}
        return self.stage("merge", title, labels, {"policy": policy.id}, build, by_rank_0=True)

    def harness(self, policy: Policy, iteration: int | None) -> list[dict]:
        """Benchmarks of the lm-evaluation-harness: a stage for each task."""
        labels = {"iter": iteration, "policy": policy.label}
        rows = []
        for task in parse_tasks(self.config.evaluation.harness or []):
            inputs = exams.harness_inputs(self, policy, task)
            build = partial(exams.build_harness, context=self, policy=policy, task=task)
            stage = self.stage("harness", f"{task.task} of {policy.label}", labels, inputs, build, by_rank_0=True)
            rows.append(exams.read_harness(stage))
        return rows

    def mt_bench(self, policy: Policy, iteration: int | None) -> dict:
        """Answers to MT-Bench's questions, graded where there is a judge."""
        title, labels = f"MT-Bench of {policy.label}", {"iter": iteration, "policy": policy.label}
        build = partial(exams.build_mt_bench, context=self, policy=policy, title=title)
        inputs = exams.mt_bench_inputs(self, policy)
        return exams.read_mt_bench(self.stage("mt_bench", title, labels, inputs, build, by_rank_0=True))

    def compare(self, policy: Policy, iteration: int | None, now: Evaluated, before: Evaluated) -> dict:
        """A judge's preference between a policy and its opponent."""
        title = f"judge {policy.label} against {before.policy.label}"
        labels = {"iter": iteration, "policy": policy.label}
        pairs, opponents = now.held_out.pairs, before.held_out.pairs
        build = partial(exams.build_compare, context=self, pairs=pairs, opponents=opponents, title=title)
        inputs = exams.compare_inputs(self, pairs, opponents)
        stage = self.stage("compare", title, labels, inputs, build, by_rank_0=True)
        return exams.read_compare(stage, policy.label, before.policy.label)

    def _features(self, pairs: Sequence[Pair]) -> Features:
        """What the two-sample tests see of the held-out answers."""
        prompts, real, own = ([getattr(p, name) for p in pairs] for name in ("prompt", "real", "generated"))
        found = features(prompts, real, own)
        if (model := self.config.evaluation.embedder) is None:
            return found
        return with_embeddings(found, embed(model, [*prompts, *prompts], [*real, *own], self.device))

    def _embedder_id(self) -> str | None:
        model = self.config.evaluation.embedder
        return content_id(Path(model).expanduser()) if model and Path(model).expanduser().is_dir() else model

    @property
    def merged_bytes(self) -> int:
        """What an adapter that is put into its base takes on the disk."""
        return fp32_bytes(self.start.base_or_self.folder)

    def check_memory(self) -> None:
        """Say how much memory the stages need, and what to change where that may be too much; nothing is loaded yet.

        Raises UserError if it surely is too much.
        """
        config, whole = self.config, self.start.base_or_self.folder
        architecture = AutoConfig.from_pretrained(whole, trust_remote_code=False)
        shape = memory.shape_of(architecture)
        if config.model.adapter == "lora":
            numbers = fp32_bytes(self.start.folder) // 4 if self.start.base else self._adapter_size()
            shape = memory.with_adapter(shape, numbers)
        examples = [*self.data.train, *self.data.held_out]
        new, engine, padded = config.max_new_tokens, config.engine, config.engine.layout == "padded"
        prompt = max(len(e.prompt_ids) for e in examples)
        # A pair shares its prompt in a packed row; in padded ones it has two rows.
        row = max(
            len(e.prompt_ids) + (max(len(e.real_ids), new) if padded else len(e.real_ids) + new) for e in examples
        )
        pair = 2 * row if padded else row
        batch = max(engine.tokens_per_batch, row)
        pairs = -(-config.schedule.batch_size // self.ranks.size)  # of a step, on this rank
        load = memory.Load(
            precision="fp32" if self.dtype == torch.float32 else "bf16",
            optimizer=config.optimizer.name,
            checkpointing=engine.gradient_checkpointing,
            quantization=self.start.base_or_self.quantization,
            training_tokens=min(batch, max(row, pairs * pair)),
            scoring_tokens=min(batch, max(row, len(examples) * pair)),
            row=row,
            head_chunk=engine.head_chunk,
            decoded=max(
                1, min(config.generation.batch_size, len(examples), config.generation.tokens // (prompt + new))
            ),
            prompt=prompt,
            length=prompt + new,
            files=sum(path.stat().st_size for path in weight_files(whole)) if self.device.type == "cpu" else 0,
            plays=config.stage == "game",
            states=config.optimizer.states,
            passes=-(-pairs * pair // batch),
            mask=max(engine.tokens_per_row, row) if engine.layout == "masked" else 0,
            spread=memory.Spread(
                self.ranks.size, engine.zero_stage, engine.offload_optimizer and self.device.type != "cpu"
            )
            if engine.name == "deepspeed"
            else None,
        )

        def adapted() -> memory.Shape:
            return memory.shape_of(architecture, memory.RANK)

        line, warning = memory.check_memory(
            shape, load, device_memory.free_memory(self.device, self.ranks.here), adapted
        )
        self.tracker.say(line)
        if warning:
            self.tracker.say(warning)

    def _adapter_size(self) -> int:
        """How many numbers a fresh adapter has."""
        return adapters.num_parameters(adapters.empty_model(self.start.folder, self._lora)[0])

    def training_bytes(self, stages: int) -> int:
        """What so many training stages may take on the disk: a policy each, and the checkpoints of one at a time."""
        if self.start.base or self.config.model.adapter == "none":
            policy = fp32_bytes(self.start.folder)
        else:
            policy = 4 * self._adapter_size()
        return stages * policy + int(KEPT * policy * (1 + state_values_per_weight(self.config.optimizer)))

    # --- what several stages need -------------------------------------------------------------------------------------

    def _answers(self, work: Work, policy: Policy, examples: Sequence[Example], title: str, seed: int) -> list[Answer]:
        config, by_vllm = self.config, self.config.generation.engine == "vllm"
        if by_vllm:
            self.release()
        with self.tracker.progress(title, len(examples), "answers") as bar:

            def found(rows: int, seconds: float) -> None:
                bar.skip(rows)
                work.earlier(seconds)

            # Loaded weights for ours, the stored ones for vLLM's processes.
            answer = (
                partial(vllm_engine.generate_with_vllm, policy, self.dtype)
                if by_vllm
                else partial(generate_answers, self.model(policy))
            )
            advance = self._counting(bar)
            answers = answer(
                self.tokenizer,
                examples,
                config.generation,
                config.max_new_tokens,
                self.stop_ids,
                seed,
                advance,
                ResumableShards(work.resume / "answers", self.tracker.say, found, self.ranks, by_rank_0=by_vllm),
                self._shard_size(len(examples)),
            )
            advance(0)
            return answers

    def _counting(self, bar: Progress) -> Callable[[int], None]:
        """`bar.advance` for what all ranks do."""
        if self.ranks.size == 1:
            return bar.advance
        counter, shown = self.ranks.counter(), 0

        def advance(count: int) -> None:
            nonlocal shown
            before, shown = shown, counter.add(count)
            bar.advance(shown - before)

        return advance

    def _shard_size(self, count: int) -> int:
        """Of `count` rows: no rank has to stand by."""
        return min(self.config.checkpoint.shard_size, -(-count // self.ranks.size))

    def _logps(
        self,
        work: Work,
        model: PreTrainedModel,
        policy: Policy,
        items: Sequence[Continuations],
        bar: Progress | None = None,
    ) -> Tensor:
        responses = sum(len(item.responses) for item in items)

        def found(rows: int, seconds: float) -> None:
            work.earlier(seconds)
            if bar:
                bar.skip(round(rows * len(items) / responses))

        keep = ResumableShards(work.resume / "scores", self.tracker.say, found, self.ranks)
        advance = self._counting(bar) if bar else lambda items: None
        logps = compute_logps(model, items, self.forward(model, policy), advance, keep, self._shard_size(len(items)))
        advance(0)
        return logps

    def _train(
        self,
        work: Work,
        start: Policy,
        title: str,
        total: int,
        unit: str,
        shown: dict[str, str],
        learn: Callable[..., TrainState],
    ) -> dict:
        """Train from `start` by `learn`, from where an earlier try stopped, and save the policy. Returns facts.

        `shown` are the values beside the progress bar, by their names in the rows.
        """
        if self.ranks.is_main_process:
            check_room(
                self.store, self.training_bytes(1) - folder_size(work.resume), f"{title}: a policy and its checkpoints"
            )
            if self.config.model.adapter == "lora" and not start.base:
                model, seed = self.config.model, _seed(self.config.seed, ADAPTER)
                start = fresh_adapter(start, self._lora, seed, model, work.resume / "adapter")
        start = self.ranks.broadcast(start)
        kept = self.config.checkpoint
        checkpoints = Checkpoints(work.resume / "training", kept.minutes, kept.steps, self.tracker.say, self.ranks)
        engine = self.engine(start)
        with self.tracker.progress(title, total, unit) as bar:

            def log(row: dict) -> None:
                work.log(row)
                if row["step"] < checkpoints.restored.step:
                    bar.skip(row["pairs"])
                else:
                    bar.advance(row["pairs"], **{name: row[key] for name, key in shown.items()})

            state = learn(engine, forward=self.forward(engine.model, start), log=log, checkpoints=checkpoints)
        work.earlier(checkpoints.restored.seconds)
        try:
            with deferred():
                engine.save(work.folder / "policy")
                engine.close()
                if not self.ranks.is_main_process:
                    return {}
                note_trained_on(
                    work.folder / "policy",
                    trained_on(start.folder_with(TRAINED_ON)) | {e.opening for e in self.data.train},
                )
        except Interrupted:
            with deferred():
                checkpoints.write(engine, state)
            raise
        return {"policy": content_id(work.folder / "policy", start.base), "skipped_steps": state.skipped}

    def _generation_inputs(self) -> dict:
        settings = {**asdict(self.config.generation), "max_new_tokens": self.config.max_new_tokens}
        for key in ("name", "answers", "python", "tensor_parallel", "data_parallel", "gpu_memory"):
            settings.pop(key)
        # Another engine rounds, and draws, in other ways; it decodes as many together as it likes.
        for key in ("batch_size", "tokens") if settings["engine"] == "vllm" else ("engine",):
            settings.pop(key)
        return {"generation": settings, "precision": self.numerics["precision"], "device": self.device.type}

    def _variant_inputs(self, scored: Scored) -> dict:
        """What the loss has beside link and beta; nothing for plain SPIN, whose keys stay as they were."""
        loss = self.config.loss
        found: dict[str, Any] = {}
        if loss.sft_weight:
            found["sft_weight"] = loss.sft_weight
        if loss.length_normalised:
            found["length_normalised"] = True
        if scored.start:
            found["start_scores"] = scored.start.stage.key
            found["alpha"] = self._alpha()
        return found

    def _alpha(self) -> float:
        """The opponent's weight in a reference that the start has a part in."""
        return self.config.loss.alpha if self.config.loss.reference == "mixture" else 0.0

    def _reference_logps(self, scored: Scored) -> Tensor | None:
        """[pairs, 2]; None where the reference is the opponent."""
        return mix_references(_logps_of(scored), _logps_of(scored.start), self._alpha()) if scored.start else None

    def _training_inputs(self, start: Policy) -> dict:
        # The files beside the weights (tokenizer, template, ...) go with every policy that is made of them.
        files = auxiliary_digest(self.start.tokenizer)
        inputs = {"optimizer": {**asdict(self.config.optimizer), "lr": None}, "numerics": self.numerics, "files": files}
        # Of ranks and what each keeps: nothing, they change roundings as threads do.
        if self.config.engine.name != "single":
            inputs["engine"] = self.config.engine.name
        # A fresh one; an adapter that is trained on has its own settings.
        if self.config.model.adapter == "lora" and not start.base:
            inputs["adapter"] = {**asdict(self._lora), "seed": self.config.seed}
        return inputs

    def _trained(self, label: str, stage: Artifact) -> Trained:
        base = self.start.base_or_self if self.config.model.adapter == "lora" else None
        return Trained(Policy(label, stage.folder / "policy", stage.manifest["facts"]["policy"], base), stage)


def check_room(store: Store, needed: int, what: str) -> None:
    """Raise UserError if the store's disk has not `needed` bytes left for `what`."""
    store.path.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(store.path).free
    if free < needed:
        raise UserError(
            f"store.path={store.path}: {free / 2**30:.1f} GiB are free, but {what} may take {needed / 2**30:.1f} GiB. "
            "Free some space (`python -m spin store clean`) or give another store.path."
        )


def fp32_bytes(folder: Path) -> int:
    """The size of a model folder's weights, were they all fp32."""
    total = 0
    for path in weight_files(folder):
        with safe_open(path, "pt") as file:
            total += sum(4 * math.prod(file.get_slice(name).get_shape()) for name in file.keys())
    return total


def replayed(replay: str, iteration: int) -> list[int]:
    """Which earlier iterations' pairs join those of `iteration`."""
    return {"none": [], "previous": list(range(iteration))[-1:], "all": list(range(iteration))}[replay]


def _seed(seed: int, part: int) -> int:
    """A seed of its own for each part of the game."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{part}".encode()).digest()[:4], "big")


def _content(pairs: Sequence[Pair]) -> str:
    """A hash of all that pairs hold, log-probs included."""
    return hashlib.sha256(json.dumps([asdict(pair) for pair in pairs]).encode()).hexdigest()


def distinct_labels(paths: Sequence[str]) -> list[str]:
    """Names for policies by their folders: the last two parts of each path ("iter1/policy"), more where these are equal,
    and a number behind equal paths. They also differ as file names."""
    parts = [Path(path).expanduser().parts for path in paths]
    for length in range(2, max(2, *map(len, parts)) + 1):
        labels = ["/".join(part[-length:]) for part in parts]
        if len({re.sub(r"[^\w.+-]", "-", label) for label in labels}) == len(paths):
            return labels
    return [f"{label}-{number}" if number > 1 else label for number, label in enumerate(labels, 1)]


def _logps_of(scored: Scored) -> Tensor:
    """[pairs, 2]: of the real and the generated response."""
    return torch.tensor([[p.opponent_logp_real, p.opponent_logp_generated] for p in scored.pairs])


def _unit(prompts: Sequence, pairs: Sequence[Pair]) -> str:
    """What progress is counted in: several pairs of a prompt are computed together."""
    return "pairs" if len(prompts) == len(pairs) else "prompts"


def _total(count: int, epochs: float) -> int:
    return max(1, round(count * epochs))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in counts.items() if count)


def peak_memory_gib() -> float:
    """The most memory that this process has held: on the GPU where it computed there, else resident."""
    devices = range(torch.cuda.device_count())
    if on_gpu := max((torch.cuda.max_memory_allocated(device) for device in devices), default=0):
        return on_gpu / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20  # bytes on macOS, KiB on Linux
