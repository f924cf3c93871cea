"""Estimate the memory that a run needs, before weights are loaded.

Weights, gradients and optimiser states are counted; activations are estimated with formulas for a Llama layer.
`benchmarks/memory_table.py` prints which settings fit on which GPU.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from spin.config.schema import Config
from spin.data.examples import Dataset, Example
from spin.engines.deepspeed import BUCKET
from spin.engines.device_memory import GIB, DeviceMemory
from spin.engines.optimizers import STATES, state_values_per_weight
from spin.models.policy import Policy, weight_files
from spin.runtime.errors import UserError
from spin.runtime.process_group import ProcessGroup
from spin.runtime.tables import Rows

BYTES = {"fp32": 4, "bf16": 2}
NF4 = 0.5 + 0.127 / 8  # bytes per weight: 4 bits plus 0.127 bits for the 8-bit scales of blocks of 64 weights
LIVE = 1_000_000_000  # largest number of weights that ZeRO 3 keeps gathered
RANK = 16  # rank of the adapter that `advice` assumes
COUNTED = ("weights", "masters", "gradients", "optimiser states")
Parts = dict[str, float]  # bytes by purpose


@dataclass(frozen=True)
class Shape:
    """The sizes of a model.

    `weights` counts all weights (tied weights once), `linear` those that quantisation rounds, `adapter` those of the
    adapter, and `largest` those of the largest trained tensor. `queries` and `keys` are the total widths of all heads,
    and `inner` is the width of the feed-forward block.
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
    """The model, settings and lengths that determine how much memory a process needs."""

    shape: Shape
    precision: str
    optimizer: str
    checkpointing: bool
    quantization: str | None
    training_tokens: int  # of the largest micro-batch
    scoring_tokens: int
    row: int  # tokens of the longest item in a batch: a packed row, or one padded row per answer
    head_chunk: int
    decoded: int  # answers that are decoded at a time
    prompt: int  # tokens of the longest prompt
    length: int  # tokens of the longest prompt and its generated answer
    files: int = 0  # bytes of the weight files if they are read into the same memory (on a CPU)
    trains: bool = True
    states: str = "fp32"  # type of the optimiser's states
    passes: int = 2  # micro-batches per step
    zero_stage: int | None = None  # of DeepSpeed; None for training in one process
    ranks: int = 1
    offload: bool = False  # DeepSpeed keeps masters and optimiser states in main memory
    on_cpu: bool = False  # the device's memory is main memory

    @property
    def bytes(self) -> int:
        return BYTES[self.precision]

    @property
    def trained(self) -> int:
        return self.shape.adapter or self.shape.weights


def shape_of(architecture: PretrainedConfig, rank: int = 0) -> Shape:
    """Count the weights of a model and of an adapter of `rank` on its linear layers, without allocating them."""
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


def load_of(
    shape: Shape,
    config: Config,
    data: Dataset,
    base: Policy,
    device: torch.device,
    dtype: torch.dtype,
    ranks: ProcessGroup,
) -> Load:
    """Return the sizes that determine a run's peak memory on one rank."""
    engine, generation = config.engine, config.generation
    new, is_on_cpu = config.max_new_tokens, device.type == "cpu"
    prompt = int(data.all.lengths("prompt_ids").max())

    def longest(examples: Rows[Example], num_answers: int) -> int:
        prompts, answers = examples.lengths("prompt_ids"), examples.lengths("real_ids")
        if engine.layout == "padded":  # one row per answer
            return int(((1 + num_answers) * (prompts + np.maximum(answers, new))).max(initial=0))
        return int((prompts + answers + num_answers * new).max(initial=0))

    # An evaluation scores two generated answers per prompt: the policy's and its opponent's.
    measured = data.held_out + data.validation
    train_row, held_out_row = longest(data.train, config.answers_per_prompt), longest(measured, 2)
    row = max(train_row, held_out_row)
    scored = max(len(data.train) * train_row, len(measured) * held_out_row)
    batch = max(engine.tokens_per_batch, train_row)
    items = -(-config.schedule.batch_size // ranks.size)  # per step, on this rank
    answers = max(len(data.train) * generation.num_answers, len(measured))
    return Load(
        shape,
        precision="fp32" if dtype == torch.float32 else "bf16",
        optimizer=config.optimizer.name,
        checkpointing=engine.gradient_checkpointing,
        quantization=base.quantization,
        training_tokens=min(batch, items * train_row),
        scoring_tokens=min(max(engine.tokens_per_batch, row), scored),
        row=row,
        head_chunk=engine.head_chunk,
        decoded=max(1, min(generation.batch_size, answers, generation.tokens // (prompt + new))),
        prompt=prompt,
        length=prompt + new,
        files=sum(path.stat().st_size for path in weight_files(base.folder)) if is_on_cpu else 0,
        trains=config.stage == "game",
        states=config.optimizer.states,
        passes=-(-items * train_row // batch),
        zero_stage=engine.zero_stage if engine.name == "deepspeed" else None,
        ranks=ranks.size,
        offload=engine.offload_optimizer,
        on_cpu=is_on_cpu,
    )


def bytes_per_weight(load: Load) -> Parts:
    """Return the bytes that training holds per trained weight, by purpose.

    In `SingleEngine` an fp32 weight is its own master, a bf16 weight has 2 more bytes for its master, and sums of
    gradients are fp32. In `DeepSpeedEngine` a rank has separate fp32 masters, and fp32 gradients from stage 1 on.
    """
    width, stage, is_bf16 = load.bytes, load.zero_stage, load.precision == "bf16"
    state_bytes = 4 * state_values_per_weight(load.optimizer, load.states)
    if stage is None:
        sizes = (width, 2 * is_bf16, 4 if load.passes > 1 else width, state_bytes)
        return dict(zip(COUNTED, sizes, strict=True))
    part = 1 / load.ranks if stage else 1.0
    on_device = not load.offload or load.on_cpu
    weights = width * (part if stage == 3 else 1)
    masters = on_device * 4 * part * (is_bf16 or stage > 0)
    gradients = (width, 4, 4 * part, on_device * 4 * part)[stage]
    return dict(zip(COUNTED, (weights, masters, gradients, on_device * part * state_bytes), strict=True))


# --- stages -----------------------------------------------------------------------------------------------------------


def training(load: Load) -> Parts:
    """Return the peak memory of a step. In one process it is at the start of the backward pass or in the update."""
    shape, width, tokens = load.shape, load.bytes, load.training_tokens
    constant = {name: load.trained * size for name, size in bytes_per_weight(load).items()}
    constant["weights"] = _weights(load)
    layer = tokens * _kept_by_layer(load)
    between_layers = tokens * shape.width * width
    activations = shape.layers * between_layers + layer if load.checkpointing else shape.layers * layer
    if load.quantization:  # one layer at a time is dequantised
        activations += shape.width * max(shape.inner, shape.queries) * width
    head = _head(load, tokens, trained=not shape.adapter) + 3 * between_layers
    passing = {"activations": activations, "output layer": head}
    if load.zero_stage is not None:
        moments = _moments_of_rank(load, load.zero_stage, constant, passing)
    else:
        update = max(2 * 4 * shape.largest, layer)  # quotient and denominator of one tensor at a time
        moments = [{**constant, **passing}, {**constant, "update": update}]
        if load.passes == 1:  # there are no gradients at the start of the backward pass
            del moments[0]["gradients"]
    return max(moments, key=total)


def _moments_of_rank(load: Load, stage: int, constant: Parts, passing: Parts) -> list[Parts]:
    """Return a rank's memory before the backward pass, while gradients are summed, in the update and in a checkpoint.

    It includes the copies that DeepSpeed's stage_1_and_2.py and stage3.py make.
    """
    width, is_bf16, trained, largest = load.bytes, load.precision == "bf16", load.trained, load.shape.largest
    part = trained / load.ranks if stage else trained
    bucket, gathered = min(trained, BUCKET), 0.0
    gradients, states = constant.pop("gradients"), constant["optimiser states"]
    if stage == 3:
        gathered = width * min(load.shape.weights, LIVE)
        constant["weights"] /= load.ranks
        constant |= {"gradients": gradients, "buckets": 4 * bucket}  # allocated once
    if load.offload and load.on_cpu:  # second copies of gradients, and of weights on their way to the "device"
        constant["offload"] = 4 * part + (0 if stage == 3 else width * (part + 2 * largest))
    before = {**constant, **passing, "gathered weights": gathered}
    if load.passes > 1:
        before["gradients"] = gradients
    if stage in (1, 2) and not load.on_cpu:  # allocated with the first gradient; on a CPU, memory counts once written
        before["buckets"] = (4 if stage == 1 else width) * bucket
    # Gradients are moved into a bucket, flattened into a copy and, at stage 2, converted to fp32 in another copy. At
    # stage 1 the full gradients serve as the bucket, and a rank's part is added. Gloo copies the tensors it scatters.
    buckets = (
        width * bucket,
        4 * (bucket + part),
        (2 * width + 4 * is_bf16) * bucket,
        4 * bucket * (3 if load.on_cpu else 2),
    )[stage]
    summing = {**constant, "gradients": gradients, "buckets": buckets}
    if stage > 1:  # summing begins as soon as the first bucket is full
        remaining = 1 - bucket / trained
        summing["activations"] = remaining * passing["activations"]
        summing["gathered weights"] = max(remaining * gathered, width * largest if stage == 3 else 0)
    # Stage 0 converts all gradients to fp32 and updates one tensor at a time; at other stages a rank's part of all
    # weights is one tensor. The update needs as many temporary values as there are states.
    if stage == 0:
        update = {"gradients": gradients, "update": 4 * trained * is_bf16 + states * largest / trained}
    else:
        update = {"update": states + (0 if load.offload and not load.on_cpu else 4 * part)}
    moments = [before, summing, {**constant, **update}]
    if load.on_cpu:  # masters are set aside, and all states gathered
        moments.append({**constant, "checkpoint": 4 * part + states * trained / part})
    return moments


def scoring(load: Load) -> Parts:
    """Return the peak memory of computing log-probs without gradients, with activations of one layer at a time."""
    activations = load.scoring_tokens * _passing(load)
    head = _head(load, load.scoring_tokens, trained=False)
    return {"weights": _weights(load), "activations": activations, "output layer": head}


def generating(load: Load) -> Parts:
    """Return the peak memory of decoding: the full key-value cache, and the larger of prefill and sampling."""
    shape, width = load.shape, load.bytes
    cache = 2 * shape.layers * shape.keys * width * load.decoded * load.length
    prefill = load.decoded * load.prompt * (_passing(load) + load.prompt * width)
    # Logits, probabilities and their cumulative sums, and a second copy of one layer's cache while it grows.
    sampling = load.decoded * shape.vocabulary * (width + 16) + cache / shape.layers
    return {"weights": _weights(load), "key-value cache": cache, "activations": max(prefill, sampling)}


def loading(load: Load) -> Parts:
    """Return the memory of the base's weights and of their files, which stay mapped until the last one is read."""
    base = replace(load, shape=replace(load.shape, adapter=0))
    return {"weights": _weights(base), "files": load.files}


def stages(load: Load) -> dict[str, Parts]:
    """Return the peak memory of each stage by name."""
    peaks = {"generating": generating(load), "scoring": scoring(load)}
    peaks |= {"training": training(load)} if load.trains else {}
    return peaks | ({"loading": loading(load)} if load.files else {})


def total(parts: Parts) -> float:
    return sum(parts.values())


def peak(load: Load) -> float:
    """Return the peak memory in bytes of the largest stage."""
    return max(map(total, stages(load).values()))


def _weights(load: Load) -> float:
    """Return the bytes of the weights of the model and its adapter."""
    shape = load.shape
    linear = shape.linear * (NF4 if load.quantization else load.bytes)
    return linear + load.bytes * (shape.weights - shape.linear + shape.adapter)


def _kept_by_layer(load: Load) -> float:
    """Return the bytes per token that a layer stores for its backward pass (see `activations.py`)."""
    # Inputs and outputs of two norms; rotated queries, keys, values, the attention output; factors of the feed-forward
    # block, and with checkpointing their product.
    shape, factors = load.shape, 3 if load.checkpointing else 2
    return load.bytes * (4 * shape.width + 3 * shape.queries + 2 * shape.keys + factors * shape.inner)


def _passing(load: Load) -> float:
    """Return the bytes per token that a layer holds at its peak without gradients."""
    shape = load.shape
    return load.bytes * (2 * shape.width + max(5 * shape.queries, 3 * shape.inner)) + 8 * shape.width


def _head(load: Load, tokens: int, trained: bool) -> float:
    """Return the bytes of the output layer: logits of a chunk of words, in fp32 and in the compute type.

    If it is trained, this includes its gradient, that of the (tied) embeddings, and their sum.
    """
    width, vocabulary = load.bytes, load.shape.vocabulary
    logits = tokens * min(load.head_chunk, vocabulary) * (4 + width)
    return logits + (load.shape.width * vocabulary * 3 * width if trained else 0)


# --- check and advice -------------------------------------------------------------------------------------------------


def check_memory(load: Load, device: DeviceMemory, architecture: PretrainedConfig) -> list[str]:
    """Return a line with the memory that the run needs and, if that exceeds the free memory, a warning with advice.

    Raises UserError if the counted part, without estimates, exceeds the total memory of the device.
    """
    stage, worst = max(stages(load).items(), key=lambda item: total(item[1]))
    shown = {"process": device.before, **worst}
    needed = device.before + total(worst)
    parts = ", ".join(f"{name} {format_gib(size)}" for name, size in shown.items() if size >= 0.05 * GIB)
    line = (
        f"memory needed: about {format_gib(needed)} GiB ({stage}{': ' if parts else ''}{parts}), "
        f"{format_gib(device.free)} GiB free"
    )
    if needed <= device.free:
        return [line]
    changes = advice(load, device, architecture)
    counted = {name: worst[name] for name in COUNTED if worst.get(name)}
    if total(counted) > device.total:
        raise UserError(
            f"{stage} needs {format_gib(total(counted))} GiB for {' + '.join(counted)} alone, and the device has "
            f"{format_gib(device.total)} GiB in all: {changes}."
        )
    return [line, f"note: that may not fit: {changes}."]


def advice(load: Load, device: DeviceMemory, architecture: PretrainedConfig) -> str:
    """Return advice on settings that make the run fit. Settings that keep finished stages are tried first."""

    def missing(load: Load) -> float:
        return sum(max(0.0, device.before + total(parts) - device.free) for parts in stages(load).values())

    is_single = load.zero_stage is None
    smaller = {name: min(load.row, getattr(load, name)) for name in ("training_tokens", "scoring_tokens")}
    optimizer = f"{load.optimizer}8bit" if is_single and load.optimizer in STATES else load.optimizer
    adapted = load.shape if load.shape.adapter else shape_of(architecture, RANK)
    # Settings and the fields that they change, in order of increasing cost.
    changes: list[tuple[str, dict[str, Any]]] = [
        ("engine.gradient_checkpointing=true", {"checkpointing": True}),
        ("engine.zero_stage=3", {"zero_stage": None if is_single else 3}),
        ("engine.offload_optimizer=true", {"offload": True}),
        ("generation.batch_size=8", {"decoded": min(8, load.decoded)}),
        (f"engine.tokens_per_batch={load.row}", {**smaller, "passes": 2}),
        (f"optimizer={optimizer}", {"optimizer": optimizer}),
        ("model.adapter=lora", {"shape": adapted}),
        ("model.quantization=nf4", {"quantization": "nf4" if is_single else None}),
    ]
    settings: list[str] = []
    for setting, fields in changes if load.trains else changes[:5]:
        changed = replace(load, **fields)
        if missing(changed) < missing(load):
            settings.append(setting)
            load = changed
    needed = format_gib(device.before + peak(load))
    if missing(load) or not settings:
        even = f"even {' '.join(settings)} needs about {needed} GiB: " if settings else ""
        return f"{even}take a smaller model or more memory"
    keeps_stages = {*settings} <= {setting for setting, _ in changes[:3]}
    effect = "finished stages are kept" if keeps_stages else "all stages are computed again"
    return f"set {' '.join(settings)} (then about {needed} GiB; {effect})"


def format_gib(size: float) -> str:
    return f"{size / GIB:.1f}"
