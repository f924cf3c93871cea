"""The state that all stages of a run share: settings, store, data, and the model in memory."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from spin.config.schema import Config
from spin.data.examples import Dataset, load_dataset
from spin.engines.base import Engine, select_device, select_dtype
from spin.engines.deepspeed import DeepSpeedEngine
from spin.engines.device_memory import release_free_memory
from spin.engines.disk import fp32_bytes
from spin.engines.logps import Forward, choose_forward
from spin.engines.packing import Continuations
from spin.engines.single import SingleEngine
from spin.models.find import find_model
from spin.models.load import load_policy, load_tokenizer, stop_ids
from spin.models.policy import TRAINED_ON, Policy, trained_on
from spin.pipeline.probes import adapter_size, check_start
from spin.runtime.errors import UserError, brief
from spin.runtime.process_group import ProcessGroup, current_group
from spin.runtime.progress import Progress
from spin.runtime.shards import Say
from spin.runtime.store import Store
from spin.runtime.tracking import Tracker


@dataclass
class Run:
    """A run, with at most one model in memory.

    `policies` holds the policy that the run starts from and, with stage=evaluate, the one to compare it with, if any.
    """

    config: Config
    folder: Path
    tracker: Tracker
    ranks: ProcessGroup
    store: Store
    device: torch.device
    dtype: torch.dtype
    policies: list[Policy]
    tokenizer: PreTrainedTokenizerBase
    stop_ids: frozenset[int]
    data: Dataset
    _loaded: tuple[str, PreTrainedModel] | None = field(default=None, init=False)  # policy id and model
    _forwards: dict[str, Forward] = field(default_factory=dict, init=False)  # by policy id

    @property
    def start(self) -> Policy:
        return self.policies[0]

    @property
    def numerics(self) -> dict:
        """The settings that determine the bits of a forward pass, except the number of threads."""
        engine = self.config.engine
        return {
            "precision": str(self.dtype).removeprefix("torch."),
            "device": self.device.type,
            "layout": engine.layout,
            "tokens_per_batch": engine.tokens_per_batch,
            "head_chunk": engine.head_chunk,
        }

    @cached_property
    def policy_bytes(self) -> int:
        """The size in bytes of a policy that this run trains."""
        if self.config.model.adapter == "none" or self.start.base:
            return fp32_bytes(self.start.folder)
        return 4 * adapter_size(self.config, self.start)

    def say(self, text: str) -> None:
        self.tracker.say(text)

    def shard_size(self, count: int) -> int:
        """Return the number of rows per shard, which is small enough that every rank gets some of `count` rows."""
        return min(self.config.checkpoint.shard_size, -(-count // self.ranks.size))

    def progress(self, title: str, total: int, unit: str) -> Progress:
        """Return a progress bar that counts the work of all ranks. All ranks must call this."""
        bar = self.tracker.progress(title, total, unit)
        bar.add_for_all = self.ranks.counter() if self.ranks.size > 1 else None
        return bar

    def load(self, policy: Policy) -> PreTrainedModel:
        """Return the policy's model in the compute dtype, loading it if needed. Releases the model loaded before."""
        if self._loaded is None or self._loaded[0] != policy.id:
            self.release()
            self._loaded = (policy.id, load_policy(policy, self.dtype, self.device))
        return self._loaded[1]

    def release(self) -> None:
        """Free the memory of the loaded model."""
        self._loaded = None
        release_free_memory()

    def forward(self, model: PreTrainedModel, policy: Policy) -> Forward:
        """Return the way to compute this policy's log-probs, chosen by comparison with the model's own forward.

        The choice is made per policy, so that the result of a resumed run does not depend on which policy came first.
        """
        if policy.id not in self._forwards:
            choice = self._choose_forward(model)
            forward, remark = self.ranks.broadcast(choice)  # ranks may have different processors
            if remark and forward not in self._forwards.values():
                self.say(remark)
            self._forwards[policy.id] = forward
        return self._forwards[policy.id]

    def _choose_forward(self, model: PreTrainedModel) -> tuple[Forward, str | None]:
        config, data, engine = self.config, self.data, self.config.engine
        examples = data.train[:5]
        # Two answers per prompt: the log-probs differ if a layout's attention mask does not separate the answers.
        samples = [
            Continuations(first.prompt_ids, (first.real_ids, second.real_ids))
            for first, second in zip(examples, examples[1:] or examples, strict=False)
        ]
        answers = max(2, config.answers_per_prompt)  # an evaluation scores up to two
        lengths = data.all.lengths("prompt_ids") + data.all.lengths("real_ids")
        longest = int(lengths.max()) + answers * config.max_new_tokens
        return choose_forward(model, samples, engine.layout, engine.tokens_per_batch, engine.head_chunk, longest)

    def engine(self, policy: Policy) -> Engine:
        """Return a training engine that starts from `policy`. Releases the loaded model."""
        engine, optimizer = self.config.engine, self.config.optimizer
        if engine.name == "single":
            self.release()
            return SingleEngine(policy, self.dtype, self.device, engine, optimizer)
        if policy.id not in self._forwards:  # must be chosen on an unsharded model
            self.forward(self.load(policy), policy)
        self.release()
        return DeepSpeedEngine(policy, self.dtype, self.device, engine, optimizer, self.ranks)


def prepare_run(config: Config, folder: Path, tracker: Tracker) -> Run:
    """Find the model, read the data and check that they are compatible. No weights are loaded.

    The main process does the work that is not specific to a rank, and sends the results to the other ranks.
    """
    ranks = current_group()
    device = select_device(config.engine)
    dtype = select_dtype(config.engine, device)
    policies = find_policies(config, ranks)
    start = policies[0]
    tokenizer = load_tokenizer(start.tokenizer)
    stops = stop_ids(start.folder_with("generation_config.json"), tokenizer)
    if ranks.is_main_process:
        check_start(config, start, tracker.say)
    data = share_data(partial(read_data, config, policies, tokenizer, stops), tracker.say, ranks)
    # Without the template's end token, a model that was not trained to stop there would continue as the user.
    stops |= {data.end}
    store = Store(Path(config.store.path), tracker.say)
    return Run(config, folder, tracker, ranks, store, device, dtype, policies, tokenizer, stops, data)


def share_data(read: Callable[[Say], Dataset], say: Say, ranks: ProcessGroup) -> Dataset:
    """Return the data set that the main process reads. All ranks read it if one of them cannot access its files."""
    data = read(say) if ranks.is_main_process else None
    path = ranks.broadcast(data.train.path if data else None)
    if ranks.all_reduce_max(not path.exists()):
        return data or read(lambda text: None)
    return ranks.broadcast(data)


def find_policies(config: Config, ranks: ProcessGroup) -> list[Policy]:
    """Return the policies of a run, see `Run`."""
    policies = ranks.broadcast(_find_policies(config) if ranks.is_main_process else None)
    if not all(policy.folder.is_dir() for policy in policies):  # the main process's cache is on another machine
        policies = _find_policies(config)
    return policies


def _find_policies(config: Config) -> list[Policy]:
    cache, models = Path(config.cache.path).expanduser(), [config.model]
    if config.evaluation.against is not None:
        models.append(config.model.model_copy(update={"path": config.evaluation.against}))
    policies = [find_model(model, cache) for model in models]
    if config.stage == "game":
        return policies
    labels = distinct_labels([model.path or model.name for model in models])
    return [replace(policy, label=label) for policy, label in zip(policies, labels, strict=True)]


def distinct_labels(paths: Sequence[str]) -> list[str]:
    """Return a label for each path: its last parts ("iter1/policy"), at least two, and as many as make the labels
    distinct, also as file names. Equal paths are numbered."""
    parts = [Path(path).expanduser().parts for path in paths]
    for length in range(2, max(2, *map(len, parts)) + 1):
        labels = ["/".join(part[-length:]) for part in parts]
        if len({re.sub(r"[^\w.+-]", "-", label) for label in labels}) == len(paths):
            return labels
    return [f"{label}-{number}" if number > 1 else label for number, label in enumerate(labels, 1)]


def read_data(
    config: Config, policies: Sequence[Policy], tokenizer: PreTrainedTokenizerBase, stops: frozenset[int], say: Say
) -> Dataset:
    """Return the examples. Raises UserError if the model lacks a token of an example, or its context is too short."""
    seen = set().union(*(trained_on(policy.folder_with(TRAINED_ON)) for policy in policies))
    cache = Path(config.cache.path).expanduser()
    data = load_dataset(config.data, tokenizer, stops, config.seed, cache, seen, say)
    architecture = AutoConfig.from_pretrained(policies[0].base_or_self.folder, trust_remote_code=False)
    architecture = architecture.get_text_config()
    highest, known = max(data.all.column("highest")), getattr(architecture, "vocab_size", None)
    if known is not None and highest >= known:
        raise UserError(
            f"the tokenizer has tokens that the model has no embedding for, such as {highest} "
            f"({brief(tokenizer.convert_ids_to_tokens(highest), 40)}): the model knows {known}. "
            "Resize its embedding (resize_token_embeddings) and save it, or use its own tokenizer."
        )
    context, new = getattr(architecture, "max_position_embeddings", None), config.max_new_tokens
    answers = np.maximum(data.all.lengths("real_ids"), new)
    longest = int((data.all.lengths("prompt_ids") + answers).max())
    if context is not None and longest > context:
        raise UserError(
            f"sequences of up to {longest} tokens do not fit the model's context of {context}: lower data.max_length, "
            f"data.max_prompt_length or generation.max_new_tokens={new}."
        )
    return data
