"""Estimate the memory that a run needs, before weights are loaded.

Weights, gradients and optimiser states are counted; activations are estimated by formulas for a Llama's layer.
`benchmarks/memory_table.py` prints which settings fit on which GPU.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from spin.config.schema import OptimizerConfig
from spin.engines.deepspeed import BUCKET
from spin.engines.device_memory import GIB, DeviceMemory
from spin.engines.optimizers import state_values_per_weight
from spin.runtime.errors import UserError

BYTES = {"fp32": 4, "bf16": 2}
NF4 = 0.5 + 0.127 / 8  # bytes a weight: 4 bits, and 0.127 bits for the 8-bit scales of blocks of 64 weights
CONTEXT = 0.6 * GIB  # of a GPU, taken by CUDA before any allocation
RESERVED = 0.05  # of a GPU, lost to the allocator's fragmentation
LIVE = 1_000_000_000  # weights that ZeRO 3 keeps gathered at most
RANK = 16  # of the adapter that advice is computed for
COUNTED = ("weights", "masters", "gradients", "optimiser states")


@dataclass(frozen=True)
class Spread:
    """Training on `ranks` processes at a ZeRO `stage`. `offload` keeps masters and optimiser states in main memory, and
    `on_cpu` says that this is the device's."""

    ranks: int
    stage: int
    offload: bool = False
    on_cpu: bool = False


@dataclass(frozen=True)
class Shape:
    """A model's sizes.

    `weights` counts all weights, tied ones once; `linear` those of linear layers other than the output layer, which
    quantisation rounds; `adapter` those of its adapter; `largest` those of the largest trained tensor. `queries` and `keys`
    are the widths of all heads together, `inner` is that of the feed-forward part.
    """

    weights: int
    linear: int
    adapter: int
    largest: int
    layers: int
    width: int
    queries: int
    keys: int
    inner: int
    vocabulary: int


@dataclass(frozen=True)
class Load:
    """The settings and lengths that decide how much memory a process needs."""

    precision: str
    optimizer: str
    checkpointing: bool
    quantization: str | None
    training_tokens: int  # of the largest micro-batch
    scoring_tokens: int
    row: int  # tokens of the longest item in a batch: a packed row, or a padded row for each answer
    head_chunk: int
    decoded: int  # answers that are decoded together
    prompt: int  # tokens of the longest prompt
    length: int  # tokens of the longest prompt and its generated answer
    files: int = 0  # bytes of the weight files, if they are read into the same memory: on a CPU
    plays: bool = True  # False if nothing is trained
    states: str = "fp32"  # the type of the optimiser's averages
    passes: int = 2  # micro-batches of a step
    spread: Spread | None = None


@dataclass(frozen=True)
class Needed:
    """The peak of a stage in bytes, by purpose."""

    stage: str
    parts: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def shape_of(architecture: PretrainedConfig, rank: int = 0) -> Shape:
    """Count a model's weights and those of an adapter of `rank` beside its linear layers, without allocating them."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(architecture, trust_remote_code=False)
    head = model.get_output_embeddings()
    linear = [part.weight for part in model.modules() if isinstance(part, torch.nn.Linear) and part is not head]
    sizes = [weight.numel() for weight in model.parameters()]
    adapter = [rank * sum(weight.shape) for weight in linear]
    text = architecture.get_text_config()
    heads = getattr(text, "num_attention_heads", None) or 0  # none in a state space
    head_width = getattr(text, "head_dim", None) or text.hidden_size // max(1, heads)
    return Shape(
        weights=sum(sizes),
        linear=sum(weight.numel() for weight in linear),
        adapter=sum(adapter),
        largest=max(adapter if rank else sizes),
        layers=text.num_hidden_layers,
        width=text.hidden_size,
        queries=heads * head_width,
        keys=(getattr(text, "num_key_value_heads", None) or heads) * head_width,
        inner=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        vocabulary=text.vocab_size,
    )


def bytes_per_weight(
    precision: str, optimizer: str, states: str = "fp32", passes: int = 2, spread: Spread | None = None
) -> dict[str, float]:
    """Bytes that training holds for each trained weight.

    In `SingleEngine` an fp32 weight is its own master, and a bf16 one is completed by 2 bytes. The gradients of one
    micro-batch have the model's type, sums of several are fp32. With `spread`, of a rank of `DeepSpeedEngine`: masters are
    fp32 beside the weights, and gradients at stage 1 and above are summed in fp32, whole ones at stage 1.
    """
    width, bf16 = BYTES[precision], precision == "bf16"
    state_bytes = 4 * state_values_per_weight(OptimizerConfig.from_defaults(name=optimizer, states=states))
    if spread is None:
        sizes = (width, 2 * bf16, 4 if passes > 1 else width, state_bytes)
        return dict(zip(COUNTED, sizes, strict=True))
    part = 1 / spread.ranks if spread.stage else 1.0
    on_device = not spread.offload or spread.on_cpu
    weights = width * (part if spread.stage == 3 else 1)
    masters = on_device * 4 * part * (bf16 or spread.stage > 0)
    gradients = (width, 4, 4 * part, on_device * 4 * part)[spread.stage]
    return dict(zip(COUNTED, (weights, masters, gradients, on_device * part * state_bytes), strict=True))


# --- stages -----------------------------------------------------------------------------------------------------------


def training(shape: Shape, load: Load) -> Needed:
    """The largest of the moments of a step. In one process: before the backward pass, with all activations (and no gradients
    yet, if a step has one micro-batch), or in the update."""
    width, tokens = BYTES[load.precision], load.training_tokens
    per_weight = bytes_per_weight(load.precision, load.optimizer, load.states, load.passes, load.spread)
    held = {name: (shape.adapter or shape.weights) * size for name, size in per_weight.items()}
    held["weights"] = _weights(shape, load)
    layer = tokens * _kept_by_layer(shape, width, load.checkpointing)
    between_layers = tokens * shape.width * width
    activations = shape.layers * between_layers + layer if load.checkpointing else shape.layers * layer
    if load.quantization:  # a layer at a time is widened
        activations += shape.width * max(shape.inner, shape.queries) * width
    head = _head(shape, load, tokens, trained=not shape.adapter) + 3 * between_layers
    passing = {"activations": activations, "output layer": head}
    if load.spread:
        moments = _moments_of_rank(shape, load, load.spread, held, passing)
    else:
        update = max(2 * 4 * shape.largest, layer)  # the quotient and the denominator, a tensor at a time
        moments = [{**held, **passing}, {**held, "update": update}]
        if load.passes == 1:
            del moments[0]["gradients"]
    return max((Needed("training", moment) for moment in moments), key=lambda needed: needed.total)


def _moments_of_rank(
    shape: Shape, load: Load, spread: Spread, held: dict[str, float], passing: dict[str, float]
) -> list[dict[str, float]]:
    """What a rank holds before the backward pass, when gradients are summed over ranks, in the update, and on a CPU while
    rank 0 gathers a checkpoint. The copies are those that DeepSpeed's stage_1_and_2.py and stage3.py make."""
    stage, width, bf16 = spread.stage, BYTES[load.precision], load.precision == "bf16"
    trained = shape.adapter or shape.weights
    part = trained / spread.ranks if stage else trained
    bucket, gathered = min(trained, BUCKET), 0.0
    gradients, states = held.pop("gradients"), held["optimiser states"]
    if stage == 3:
        gathered = width * min(shape.weights, LIVE)
        held["weights"] /= spread.ranks
        held |= {"gradients": gradients, "buckets": 4 * bucket}  # allocated once
    if spread.offload and spread.on_cpu:  # second copies: of gradients, and of weights on their way to the "device"
        held["offload"] = 4 * part + (0 if stage == 3 else width * (part + 2 * shape.largest))
    before = {**held, **passing, "gathered weights": gathered}
    if load.passes > 1:
        before["gradients"] = gradients
    if stage in (1, 2) and not spread.on_cpu:  # allocated with the first gradient; a CPU takes memory as it is written
        before["buckets"] = (4 if stage == 1 else width) * bucket
    # Gradients are moved into a bucket, flattened into a copy and, at stage 2, widened into another. At stage 1 the whole
    # gradients are the bucket, and a rank's part is added. Gloo copies what it scatters.
    buckets = (
        width * bucket,
        4 * (bucket + part),
        (2 * width + 4 * bf16) * bucket,
        4 * bucket * (3 if spread.on_cpu else 2),
    )[stage]
    summing = {**held, "gradients": gradients, "buckets": buckets}
    if stage > 1:  # which begins as soon as the first bucket is full
        left = 1 - bucket / trained
        summing["activations"] = left * passing["activations"]
        summing["gathered weights"] = max(left * gathered, width * shape.largest if stage == 3 else 0)
    # Stage 0 widens all gradients and updates a tensor at a time; a rank's part of all weights is one tensor. The update
    # takes as many temporary values as there are states.
    if stage == 0:
        update = {"gradients": gradients, "update": 4 * trained * bf16 + states * shape.largest / trained}
    else:
        update = {"update": states + (0 if spread.offload and not spread.on_cpu else 4 * part)}
    moments = [before, summing, {**held, **update}]
    if spread.on_cpu:  # parts are put aside, and all states gathered
        moments.append({**held, "checkpoint": 4 * part + states * trained / part})
    return moments


def scoring(shape: Shape, load: Load) -> Needed:
    """Log-probs without gradients: the activations of one layer at a time."""
    width, tokens = BYTES[load.precision], load.scoring_tokens
    activations = tokens * _passing(shape, width)
    head = _head(shape, load, tokens, trained=False)
    return Needed("scoring", {"weights": _weights(shape, load), "activations": activations, "output layer": head})


def generating(shape: Shape, load: Load) -> Needed:
    """The key-value cache at its longest, and the larger of the prefill and the sampling of a token."""
    width = BYTES[load.precision]
    cache = 2 * shape.layers * shape.keys * width * load.decoded * load.length
    prefill = load.decoded * load.prompt * (_passing(shape, width) + load.prompt * width)
    # Logits, probabilities and their sums; and a second copy of one layer's cache while it grows.
    sampling = load.decoded * shape.vocabulary * (width + 16) + cache / shape.layers
    activations = max(prefill, sampling)
    return Needed(
        "generating", {"weights": _weights(shape, load), "key-value cache": cache, "activations": activations}
    )


def loading(shape: Shape, load: Load) -> Needed:
    """The base's weights beside the files that they are rounded from, which stay mapped until the last is read."""
    return Needed("loading", {"weights": _weights(replace(shape, adapter=0), load), "files": load.files})


def stages(shape: Shape, load: Load) -> list[Needed]:
    """The peak of each stage, the largest first."""
    peaks = [generating(shape, load), scoring(shape, load)]
    peaks += [training(shape, load)] if load.plays else []
    peaks += [loading(shape, load)] if load.files else []
    return sorted(peaks, key=lambda needed: -needed.total)


def _weights(shape: Shape, load: Load) -> float:
    """Bytes of the model's weights and its adapter's."""
    width = BYTES[load.precision]
    linear = shape.linear * (NF4 if load.quantization else width)
    return linear + width * (shape.weights - shape.linear + shape.adapter)


def _kept_by_layer(shape: Shape, width: int, checkpointing: bool) -> float:
    """Bytes a token that a layer keeps for its backward pass (`activations.py`): inputs and results of two norms, rotated
    queries, keys, values, attention's result, the factors of the feed-forward part, and with `checkpointing` their product."""
    return width * (4 * shape.width + 3 * shape.queries + 2 * shape.keys + (3 if checkpointing else 2) * shape.inner)


def _passing(shape: Shape, width: int) -> float:
    """Bytes a token that a layer holds at its peak without gradients."""
    return width * (2 * shape.width + max(5 * shape.queries, 3 * shape.inner)) + 8 * shape.width


def _head(shape: Shape, load: Load, tokens: int, trained: bool) -> float:
    """The output layer: logits of a chunk of the vocabulary in fp32 and in the compute type, and if it is trained its
    gradient, the (tied) embeddings' and their sum."""
    width = BYTES[load.precision]
    logits = tokens * min(load.head_chunk, shape.vocabulary) * (4 + width)
    return logits + (shape.width * shape.vocabulary * 3 * width if trained else 0)


# --- is there enough? -------------------------------------------------------------------------------------------------


def check_memory(
    shape: Shape, load: Load, device: DeviceMemory, has_adapter: Callable[[], Shape]
) -> tuple[str, str | None]:
    """Return a line that says what the run needs, and a warning with advice if that exceeds the free memory, else None.

    `has_adapter` returns the shape with a new adapter. Raises UserError if weights, gradients and states alone, which are
    counted and not estimated, exceed all memory of the device.
    """
    worst = stages(shape, load)[0]
    shown = {"process": device.before, **worst.parts}
    parts = ", ".join(f"{name} {format_gib(size)}" for name, size in shown.items() if size >= 0.05 * GIB)
    line = (
        f"memory needed: about {format_gib(device.before + worst.total)} GiB ({worst.stage}{': ' if parts else ''}{parts}), "
        f"{format_gib(device.free)} GiB free"
    )
    if device.before + worst.total <= device.free:
        return line, None
    changes = advice(shape, load, device, has_adapter)
    counted = {name: worst.parts[name] for name in COUNTED if worst.parts.get(name)}
    if sum(counted.values()) > device.total:
        raise UserError(
            f"{worst.stage} needs {format_gib(sum(counted.values()))} GiB for {' + '.join(counted)} alone, and the device has "
            f"{format_gib(device.total)} GiB in all: {changes}."
        )
    return line, f"note: that may not fit: {changes}."


def advice(shape: Shape, load: Load, device: DeviceMemory, has_adapter: Callable[[], Shape]) -> str:
    """The settings that make the run fit: first those that keep finished stages, then those that are part of the stages'
    keys. A setting that does not help is left out."""

    def missing(shape: Shape, load: Load) -> float:
        return sum(max(0.0, device.before + needed.total - device.free) for needed in stages(shape, load))

    settings: list[str] = []
    kept = True
    for setting, keeps_stages, change in _changes(load, has_adapter):
        changed = change(shape, load)
        if missing(*changed) < missing(shape, load):
            settings.append(setting)
            kept = kept and keeps_stages
            shape, load = changed
    needed = format_gib(device.before + stages(shape, load)[0].total)
    if missing(shape, load) or not settings:
        even = f"even {' '.join(settings)} needs about {needed} GiB: " if settings else ""
        return f"{even}take a smaller model or more memory"
    effect = "finished stages are kept" if kept else "all stages are computed again"
    return f"set {' '.join(settings)} (then about {needed} GiB; {effect})"


Change = Callable[[Shape, Load], tuple[Shape, Load]]


def _changes(load: Load, has_adapter: Callable[[], Shape]) -> list[tuple[str, bool, Change]]:
    """Settings in the order of what they cost, whether finished stages are kept with them, and what they change."""

    def of_load(**fields) -> Change:
        return lambda shape, load: (shape, replace(load, **fields))

    def of_spread(**fields) -> Change:
        return lambda shape, load: (shape, replace(load, spread=load.spread and replace(load.spread, **fields)))

    smaller = {name: min(load.row, getattr(load, name)) for name in ("training_tokens", "scoring_tokens")}
    changes = [
        ("engine.gradient_checkpointing=true", True, of_load(checkpointing=True)),
        ("engine.zero_stage=3", True, of_spread(stage=3)),
        ("engine.offload_optimizer=true", True, of_spread(offload=True)),
        ("generation.batch_size=8", False, of_load(decoded=min(8, load.decoded))),
        (f"engine.tokens_per_batch={load.row}", False, of_load(**smaller, passes=2)),
    ]
    if not load.plays:
        return changes
    if load.spread is None and load.optimizer in ("rmsprop", "adamw"):
        name = f"{load.optimizer}8bit"
        changes.append((f"optimizer={name}", False, of_load(optimizer=name)))
    changes.append(("model.adapter=lora", False, lambda shape, load: (shape if shape.adapter else has_adapter(), load)))
    if load.spread is None:
        changes.append(("model.quantization=nf4", False, of_load(quantization="nf4")))
    return changes


def format_gib(size: float) -> str:
    return f"{size / GIB:.1f}"
