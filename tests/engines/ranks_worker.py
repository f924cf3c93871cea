"""One rank of test_deepspeed.py: `torchrun ... -m tests.engines.ranks_worker FOLDER` trains the cases in FOLDER/cases.json.

Each case writes a folder of its name with rows, facts and the policy. `play` also trains a case in one process."""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path

import torch

from spin.config.schema import EngineConfig, GenerationConfig, LossConfig, ModelConfig, OptimizerConfig
from spin.data.examples import Example
from spin.engines.deepspeed import DeepSpeedEngine
from spin.engines.logps import Forward, compute_logps, sequence_logps
from spin.engines.single import SingleEngine
from spin.generation.answers import AnswerRequest
from spin.generation.sampling import generate_answers
from spin.method.objectives import make_objective
from spin.method.pairs import Pair, group_by_prompt, split_responses, to_continuations
from spin.method.training import fit, plan_steps, train_spin
from spin.models.find import find_model
from spin.models.load import load_model, load_policy, load_tokenizer
from spin.models.policy import Policy, content_id
from spin.runtime import process_group as ranks
from spin.runtime.checkpoints import Checkpoints
from spin.runtime.process_group import SINGLE_PROCESS, ProcessGroup
from spin.runtime.shards import ResumableShards
from tests.conftest import random_items

CPU = torch.device("cpu")
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PAIRS = 10  # in batches of 3, so that the ranks' shares differ and the last step has one pair


@dataclass(frozen=True)
class Case:
    """A training run. `objective` is "spin", or one that is not finite for one item in the steps `broken`: in "loss" (and
    gradient), or in the "gradient" alone. `checkpoints` is the folder of the checkpoints, one per step. `cut` is the step
    at which the process dies."""

    name: str
    model: str
    stage: int = 0
    precision: str = "fp32"
    optimizer: str = "rmsprop"
    base: str | None = None
    lr: float = 1e-3
    clip: float = 0.5
    tokens: int = 64  # per micro-batch: fewer than those of most two pairs
    epochs: float = 1
    checkpointing: bool = False
    offload: bool = False
    objective: str = "spin"
    broken: list[int] = field(default_factory=list)
    checkpoints: str | None = None
    cut: int | None = None

    @property
    def policy(self) -> Policy:
        base = Policy("base", Path(self.base), content_id(Path(self.base))) if self.base else None
        return Policy("start", Path(self.model), content_id(Path(self.model), base), base)

    @property
    def forward(self) -> Forward:
        return Forward("packed", "chunked", self.tokens, 16)


class Cut(Exception):
    """The simulated death of the process."""


@lru_cache
def scored_pairs(policy: Policy, precision: str, forward: Forward) -> tuple[list[Pair], dict]:
    """Return pairs and their log-probs under the initial policy, which are the references of `train_spin`."""
    items = random_items(PAIRS, seed=5, longest=30)
    pairs = [Pair(f"p{i}", "", "", "", "stop", item.prompt_ids, *item.responses) for i, item in enumerate(items)]
    values = compute_logps(load_policy(policy, TYPES[precision], CPU), to_continuations(pairs), forward)
    return pairs, {"opponent": split_responses(values, [len(group) for group in group_by_prompt(pairs)])}


def broken_at(case: Case) -> Callable:
    """Return as objective the negative log-prob, not finite for one item, and so on one rank, in the broken steps."""
    steps = plan_steps(PAIRS, case.epochs, 3, 0)

    def objective(batch, logps, indices, step):
        bad = torch.tensor([step in case.broken and i == steps[step][0] for i in indices])
        losses = -logps * torch.where(bad, torch.inf, 1.0)
        logged = torch.where(bad, torch.nan, -logps.detach()) if case.objective == "loss" else -logps.detach()
        return losses, {"loss": logged}

    return objective


def play(case: Case, folder: Path, group: ProcessGroup = SINGLE_PROCESS) -> SingleEngine | DeepSpeedEngine:
    """Train the case, with `SingleEngine` if there is one rank. Return the closed engine."""
    folder = folder / case.name
    options = EngineConfig.from_defaults(
        name="deepspeed",
        zero_stage=case.stage,
        offload_optimizer=case.offload,
        gradient_checkpointing=case.checkpointing,
    )
    optimizer = OptimizerConfig.from_defaults(name=case.optimizer, max_grad_norm=case.clip)
    arguments = (case.policy, TYPES[case.precision], CPU, options, optimizer)
    engine = SingleEngine(*arguments) if group is SINGLE_PROCESS else DeepSpeedEngine(*arguments, group)
    rows: list[dict] = []
    facts: dict = {"passes": 0, "first": None}
    original = engine.logps

    def logps(batch, forward):
        result = original(batch, forward)
        if facts["passes"] == 0 and group is not SINGLE_PROCESS:  # compare with the scores of the policy
            plain = load_policy(case.policy, TYPES[case.precision], CPU)
            with torch.no_grad():
                expected = sequence_logps(plain, batch, forward)
            facts["first"] = (result.detach() - expected).abs().max().item()
        facts["passes"] += 1
        return result

    def log(row: dict) -> None:
        rows.append(row)
        if row["step"] == case.cut:
            raise Cut

    engine.logps = logps  # type: ignore[method-assign]
    checkpoints = Checkpoints(Path(case.checkpoints) if case.checkpoints else None, steps=1, ranks=group)
    settings = dict(lr=case.lr, epochs=case.epochs, batch_size=3, warmup_ratio=0.0, seed=0, log=log)
    try:
        if case.objective == "spin":
            pairs, references = scored_pairs(case.policy, case.precision, case.forward)
            objective = make_objective(LossConfig.from_defaults(beta=0.2), 0)
            train_spin(engine, pairs, references, objective, case.forward, checkpoints=checkpoints, **settings)
        else:
            fit(
                engine,
                random_items(PAIRS, 1, seed=5),
                broken_at(case),
                case.forward,
                checkpoints=checkpoints,
                **settings,
            )
        engine.save(folder / "policy")
        if group is not SINGLE_PROCESS:
            (folder / "state").mkdir(parents=True, exist_ok=True)
            engine.save_state(folder / "state")  # `save` leaves the engine usable
    except Cut:
        pass
    if group is not SINGLE_PROCESS:
        facts["bytes"] = held_bytes(engine)
    if group is not SINGLE_PROCESS and case.base:
        names = {name for name, weight in engine.model.named_parameters() if weight.requires_grad}
        facts["trained"] = sorted(names)
    engine.close()
    if group is not SINGLE_PROCESS:
        try:
            engine.save_state(folder)
        except AssertionError as error:
            facts["after close"] = str(error)
    facts["restored"] = checkpoints.restored.step
    facts["passes of all"] = group.all_reduce_sum(facts["passes"])
    facts["first"] = group.all_reduce_max(facts["first"] or 0.0)
    if group.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "facts.json").write_text(json.dumps(facts))
        (folder / "rows.json").write_text(json.dumps(rows))
    return engine


def held_bytes(engine: DeepSpeedEngine) -> dict[str, int]:
    """Return the bytes that this rank holds by purpose; a shared storage counts once."""

    def bytes_of(tensors) -> int:
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    weights = [getattr(weight, "ds_tensor", weight) for weight in engine.model.parameters()]
    parts = engine._parts()
    if engine.stage == 0 and engine.dtype != torch.float32:
        parts = list(engine._whole_masters().values())
    states = [
        value
        for state in engine.optimizer.state.values()
        for name, value in state.items()
        if isinstance(value, torch.Tensor) and name != "step"
    ]
    addresses = {tensor.untyped_storage().data_ptr() for tensor in weights}
    return {
        "weights": bytes_of(weights),
        "masters": bytes_of([part for part in parts if part.untyped_storage().data_ptr() not in addresses]),
        "optimiser states": bytes_of(states),
    }


# --- generating and scoring -------------------------------------------------------------------------------------------


def examples() -> list[Example]:
    items = random_items(13, 1, seed=8)
    return [Example(f"e{i}", "", item.prompt_ids, "", ()) for i, item in enumerate(items)]


def answer_and_score(model_folder: Path, keep, size: int) -> tuple[list[dict], list[float]]:
    """Return the model's answers and log-probs, computed in shards of `size`."""
    model = load_model(model_folder, torch.float32, CPU)
    settings = GenerationConfig.from_defaults(batch_size=3, temperature=1.0)
    tokenizer = load_tokenizer(model_folder)
    request = AnswerRequest(tokenizer, examples(), settings, 12, {1}, 0, keep=keep("answers"), shard_size=size)
    answers = generate_answers(model, request)
    forward = Forward("packed", "chunked", 64, 16)
    logps = compute_logps(model, random_items(13, seed=9), forward, keep=keep("scores"), shard_size=size)
    return [asdict(answer) for answer in answers], logps.tolist()


def share_work(folder: Path, model_folder: Path, group: ProcessGroup) -> dict:
    """Generate and score in shards together, repeat it with one shard damaged, and use the whole process group."""
    messages: list[str] = []

    def keep(name: str) -> ResumableShards:
        return ResumableShards(folder / name, messages.append, ranks=group)

    first = answer_and_score(model_folder, keep, 2)
    group.barrier()
    if group.is_main_process:
        path = folder / "answers" / "00002" / "rows.parquet"
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 4
        path.write_bytes(content)
    group.barrier()
    repeated = answer_and_score(model_folder, keep, 2)
    if group.rank == 1:  # transformers would write on rank 0 only
        find_model(ModelConfig.from_defaults(path="builtin:tiny"), folder / "cache")
    claimed = []
    for number in group.claim_indices():
        if number >= 200:
            break
        claimed.append(number)
    group.claim_indices()  # a queue is counted even if no rank takes from it
    add = group.counter()
    add(group.rank + 1)
    group.barrier()
    return {
        "first": first,
        "again": repeated,
        "messages": messages,
        "taken": claimed,
        "files": sorted(path.name for path in (folder / "cache").glob("tiny-*/*")),
        "counted": add(0),
        "shared": group.broadcast({"rank": group.rank}),
        "most": group.all_reduce_max(group.rank),
        "total": group.all_reduce_sum(0.5),
        "mean": group.mean(torch.tensor([1.0, 2.0, 6.0][: 3 * group.rank])),  # empty on rank 0
        "firsts": group.is_first_to_fail() + 2 * group.is_first_to_fail(),
    }


def main(folder: Path) -> None:
    group = ranks.join_group("deepspeed", "cpu")
    job = json.loads((folder / "cases.json").read_text())
    torch.manual_seed(group.rank)  # the random state must not matter
    for case in job["cases"]:
        play(Case(**case), folder, group)
    if job["shared"]:
        results = share_work(folder / "shared", Path(job["shared"]), group)
        (folder / f"shared-{group.rank}.json").write_text(json.dumps(results))
    group.barrier()
    ranks.leave_group()
    ranks.exit_process()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
