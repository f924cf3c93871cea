"""What a run needs of memory, told before weights are loaded: counted where it can be (weights, gradients, states),
estimated where it can't (activations).

`python -m spin memory` prints which settings fit which card, model size by model size.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from spin.config.schema import OptimizerConfig
from spin.engines.device_memory import GIB, DeviceMemory
from spin.engines.optimizers import state_values_per_weight
from spin.runtime.errors import UserError

BYTES = {"fp32": 4, "bf16": 2}
NF4 = (
    0.5 + 0.127 / 8
)  # bytes a weight: 4 bits, and 0.127 for the scales of blocks of 64, which are in 8 bits themselves
CONTEXT = 0.6 * GIB  # of a GPU: what CUDA takes before anything is allocated
BUCKET = 500_000_000  # numbers that DeepSpeed reduces together
LIVE = 1_000_000_000  # weights that it keeps gathered at most
RESERVED = 0.05  # of a card: what its allocator can't use for being in pieces


@dataclass(frozen=True)
class Spread:
    """A training that `ranks` processes share: ZeRO `stage`, and whether masters and states lie in the machine's memory,
    which is another one than the device's."""

    ranks: int
    stage: int
    offload: bool = False


def bytes_per_weight(
    precision: str, optimizer: str, states: str = "fp32", passes: int = 2, spread: Spread | None = None
) -> dict[str, float]:
    """What training holds for each weight that it changes, in `SingleEngine`: the model's own is its master in fp32, and
    the half of it in bf16. Gradients of one pass are as the model makes them; those of several are summed in fp32.

    With `spread`, what a rank of `DeepSpeedEngine` holds: masters are whole beside the weights, gradients of stage 1 and
    above are summed in fp32."""
    if spread is not None:
        rounds, width = precision == "bf16", BYTES[precision]
        part = 1 / spread.ranks if spread.stage else 1.0
        # At stage 0 all of them are widened for the update; at stage 1 the sums are kept whole.
        gradients = {0: width + 4 * rounds, 1: 4 + width * rounds}.get(spread.stage, 4 * part)
        return {
            "weights": width * (part if spread.stage == 3 else 1),
            "masters": 0 if spread.offload else 4 * part * (rounds or spread.stage > 0),
            "gradients": 0 if spread.offload and spread.stage > 1 else gradients,
            "optimiser states": 0
            if spread.offload
            else 4 * part * state_values_per_weight(OptimizerConfig.from_defaults(name=optimizer)),
        }
    return {
        "weights": BYTES[precision],
        "masters": 0 if precision == "fp32" else 2,
        "gradients": 4 if passes > 1 else BYTES[precision],
        "optimiser states": 4 * state_values_per_weight(OptimizerConfig.from_defaults(name=optimizer, states=states)),
    }


@dataclass(frozen=True)
class Shape:
    """A model by its sizes. `weights` counts all, tied ones once; `linear` those in linear layers but the output's, which
    quantisation rounds; `adapter` those of its adapter; `largest` those of the largest tensor that is trained.

    Activations grow with `layers`, `width` (of the states between layers), `queries`, `keys` (of all heads together),
    `inner` (of the feed-forward part) and `vocabulary`.
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
    """The settings and the data, as far as memory goes: the most tokens of a training and of a scoring batch, the longest
    item, prompts that are decoded together and the most tokens that one of them comes to, of which `prompt` at first."""

    precision: str
    optimizer: str
    checkpointing: bool
    quantization: str | None
    training_tokens: int
    scoring_tokens: int
    row: int
    head_chunk: int
    decoded: int
    prompt: int
    length: int
    files: int = 0  # bytes of the weights on the disk, where they are read into the same memory: on the CPU
    plays: bool = True  # False where nothing is trained
    states: str = "fp32"  # what the optimiser's averages are kept in
    passes: int = 2  # batches of a step
    mask: int = 0  # tokens of a row under a dense mask; packed rows have none
    spread: Spread | None = None  # over several processes; what is told is what one of them needs


@dataclass(frozen=True)
class Needed:
    """The most that a stage holds, in bytes, by what it is for."""

    stage: str
    parts: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def shape_of(architecture: PretrainedConfig, rank: int = 0) -> Shape:
    """Count a model's weights, with those of an adapter of `rank` beside all linear layers but the output's, without
    memory for any of them."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(architecture, trust_remote_code=False)
    head = model.get_output_embeddings()
    linear = [part.weight for part in model.modules() if isinstance(part, torch.nn.Linear) and part is not head]
    sizes = [weight.numel() for weight in model.parameters()]
    adapter = [rank * sum(weight.shape) for weight in linear]
    text = architecture.get_text_config()
    heads = text.num_attention_heads
    head_width = getattr(text, "head_dim", None) or text.hidden_size // heads
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


def with_adapter(shape: Shape, numbers: int) -> Shape:
    """The same model with an adapter of so many numbers, which alone is trained."""
    return replace(shape, adapter=numbers, largest=min(shape.largest, numbers))


# --- stages -----------------------------------------------------------------------------------------------------------


def training(shape: Shape, load: Load) -> Needed:
    """What training holds at its worst moment: before the backward pass, where the activations are whole and a step's only
    pass has made no gradients yet, or after it, in the update."""
    spread = load.spread
    per = bytes_per_weight(load.precision, load.optimizer, load.states, load.passes, spread)
    width = BYTES[load.precision]
    trained = shape.adapter or shape.weights
    parts = {name: trained * size for name, size in per.items()}
    parts["weights"] = _resting(shape, load) + shape.adapter * width
    if spread and spread.stage == 3:
        parts["weights"] /= spread.ranks
        parts["gathered weights"] = min(shape.weights, LIVE) * width
    if spread and spread.stage:
        parts["buckets"] = min(trained, BUCKET) * (width + 4)
    tokens = load.training_tokens
    layer = tokens * _kept_by_layer(shape, width, load.checkpointing)
    between = tokens * shape.width * width  # two layers
    activations = shape.layers * between + layer if load.checkpointing else shape.layers * layer
    activations += tokens * load.mask * (1 + width)
    head = _head(shape, load, tokens, trained=not shape.adapter) + 3 * tokens * shape.width * width
    # Tensor by tensor: the denominator and what is divided by it; a rank's part of all is one tensor.
    update = 2 * 4 * (trained / spread.ranks if spread and spread.stage else shape.largest)
    if spread and spread.offload:
        update = 0
    if load.quantization:  # a layer at a time is widened
        activations += shape.width * max(shape.inner, shape.queries) * width
    before = {**parts, "activations": activations, "output layer": head}
    if load.passes == 1 and spread is None:
        del before["gradients"]
    after = {**parts, "update": max(update, layer)}
    return max((Needed("training", moment) for moment in (before, after)), key=lambda needed: needed.total)


def scoring(shape: Shape, load: Load) -> Needed:
    """Log-probs without gradients: one layer at a time."""
    width = BYTES[load.precision]
    activations = load.scoring_tokens * (_passing(shape, width) + load.mask * (1 + width))
    return Needed(
        "scoring",
        {
            "weights": _resting(shape, load) + shape.adapter * width,
            "activations": activations,
            "output layer": _head(shape, load, load.scoring_tokens, trained=False),
        },
    )


def generating(shape: Shape, load: Load) -> Needed:
    """The key-value cache at its longest, and what the last token's distribution takes."""
    width = BYTES[load.precision]
    cache = 2 * shape.layers * shape.keys * width * load.decoded * load.length
    prefill = load.decoded * load.prompt * (_passing(shape, width) + load.prompt * width)
    # Probabilities, their running sum and what they are made of; and one layer's cache twice, while it grows.
    drawing = load.decoded * shape.vocabulary * (width + 16) + cache / shape.layers
    return Needed(
        "generating",
        {
            "weights": _resting(shape, load) + shape.adapter * width,
            "key-value cache": cache,
            "activations": max(prefill, drawing),
        },
    )


def loading(shape: Shape, load: Load) -> Needed:
    """The weights beside the files that they are rounded from, which are mapped until the last is read."""
    return Needed("loading", {"weights": _resting(shape, load), "files": load.files})


def stages(shape: Shape, load: Load) -> list[Needed]:
    """What each stage needs, the largest first."""
    played = [generating(shape, load), scoring(shape, load), *([training(shape, load)] if load.plays else [])]
    played += [loading(shape, load)] if load.files else []
    return sorted(played, key=lambda needed: -needed.total)


def _resting(shape: Shape, load: Load) -> float:
    """The model's own weights, whether or not they are trained."""
    width = BYTES[load.precision]
    if load.quantization:
        return NF4 * shape.linear + width * (shape.weights - shape.linear)
    return width * shape.weights


def _kept_by_layer(shape: Shape, width: int, checkpointing: bool) -> float:
    """Bytes a token that a Llama's layer keeps for its backward (`spin.activations`): inputs and results of two norms, rotated
    queries, keys, values, attention's result (of a GPU in both layouts), the factors of the feed-forward part, and their
    product with `checkpointing`."""
    return width * (4 * shape.width + 3 * shape.queries + 2 * shape.keys + (3 if checkpointing else 2) * shape.inner)


def _passing(shape: Shape, width: int) -> float:
    """Bytes a token that a layer holds at its worst moment where nothing is kept."""
    return width * (2 * shape.width + max(5 * shape.queries, 3 * shape.inner)) + 8 * shape.width


def _head(shape: Shape, load: Load, tokens: int, trained: bool) -> float:
    """The output layer: logits of a piece of the vocabulary in fp32 beside those in the compute type, and where it is
    trained its gradient and, tied, that of the embeddings and their sum."""
    width = BYTES[load.precision]
    piece = min(load.head_chunk, shape.vocabulary)
    logits = tokens * piece * (4 + (width if width < 4 else 4))
    return logits + (shape.width * shape.vocabulary * 3 * width if trained else 0)


def check_memory(
    shape: Shape, load: Load, room: DeviceMemory, has_adapter: Callable[[], Shape]
) -> tuple[str, str | None]:
    """One line that says what the run needs, and one that warns where it is more than there is free, with what to change.

    `has_adapter` gives the shape that an adapter would make. Raises UserError where what is counted, and not estimated,
    is more than the device has in all.
    """
    worst = stages(shape, load)[0]
    shown = {"process": room.before, **worst.parts} if room.before else worst.parts
    parts = ", ".join(f"{name} {_gib(size)}" for name, size in shown.items() if size >= 0.05 * GIB)
    line = (
        f"memory needed: about {_gib(room.before + worst.total)} GiB ({worst.stage}{': ' if parts else ''}{parts}), "
        f"{_gib(room.free)} GiB free"
    )
    counted = sum(worst.parts.get(name, 0.0) for name in ("weights", "masters", "gradients", "optimiser states"))
    if room.before + worst.total <= room.free:
        return line, None
    change = advice(shape, load, room, has_adapter)
    if counted > room.total:
        raise UserError(
            f"{worst.stage} needs {_gib(counted)} GiB for {_listed(worst.parts)} alone, and there are {_gib(room.total)} GiB "
            f"in all: {change}."
        )
    return line, f"note: that may not fit: {change}."


def _listed(parts: dict[str, float]) -> str:
    names = [name for name in ("weights", "masters", "gradients", "optimiser states") if parts.get(name)]
    return ", ".join(names[:-1]) + " and " + names[-1] if len(names) > 1 else names[0]


def advice(shape: Shape, load: Load, room: DeviceMemory, has_adapter: Callable[[], Shape]) -> str:
    """The fewest changes, in the order of what they cost, that make it fit."""
    words: list[str] = []
    for change, shape_then, then in _smaller(shape, load, has_adapter):
        words.append(change)
        shape, load = shape_then, then
        needed = room.before + stages(shape, load)[0].total
        if needed <= room.free:
            return f"set {' '.join(words)} (then about {_gib(needed)} GiB)"
    return (
        f"even {' '.join(words)} needs about {_gib(needed)} GiB: take a smaller model or more memory"
        if words
        else ("take a smaller model or more memory")
    )


def _smaller(shape: Shape, load: Load, has_adapter: Callable[[], Shape]) -> Iterator[tuple[str, Shape, Load]]:
    """One change after another, each on top of those before."""
    if load.decoded > 8:
        load = replace(load, decoded=8)
        yield "generation.batch_size=8", shape, load
    if not load.plays:
        return
    if not load.checkpointing:
        load = replace(load, checkpointing=True)
        yield "engine.gradient_checkpointing=true", shape, load
    if load.training_tokens > load.row:
        load = replace(load, training_tokens=load.row, scoring_tokens=load.row, passes=2)
        yield f"engine.tokens_per_batch={load.row}", shape, load
    if (spread := load.spread) is not None:
        if spread.stage < 3:
            spread = replace(spread, stage=3)
            load = replace(load, spread=spread)
            yield "engine.zero_stage=3", shape, load
        if not spread.offload:
            load = replace(load, spread=replace(spread, offload=True))
            yield "engine.offload_optimizer=true", shape, load
        if not shape.adapter:
            yield "model.adapter=lora", has_adapter(), load
        return
    if not shape.adapter:
        if load.optimizer in ("rmsprop", "adamw"):
            load = replace(load, optimizer=f"{load.optimizer}8bit")
            yield f"optimizer={load.optimizer}", shape, load
        shape = has_adapter()
        yield "model.adapter=lora", shape, load
    if not load.quantization:
        load = replace(load, quantization="nf4")
        yield "model.quantization=nf4", shape, load


def _gib(size: float) -> str:
    return f"{size / GIB:.1f}"


RANK = 16
