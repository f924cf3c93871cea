"""Layers that store fewer activations for the backward pass than autograd does, and recompute those that are cheap.

An RMSNorm of transformers stores its input in fp32 and the normalised input; here it stores only its unchanged input. A
gated feed-forward block stores the gate before and after its activation function, the other factor and their product;
here it stores only the results of the two matrix products. In both passes the model's own code runs on pieces that fit
the processor's cache. Results are bitwise identical, with less memory and less memory traffic.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

PIECE = {"cpu": 2**18}  # elements per piece, by device type: a piece fits a CPU's cache
LARGE_PIECE = 2**26  # for GPUs


def save_less_for_backward(model: nn.Module, in_checkpoints: bool = False) -> None:
    """Replace the forward methods of RMSNorms and gated feed-forward blocks in `model`; leave other modules unchanged.

    With `in_checkpoints` (gradient checkpointing, which recomputes whole layers in the backward pass) a feed-forward
    block stores its product while its layer runs: recomputing it would keep its factors from the first pass alive.
    """
    for module in model.modules():
        module_ref = weakref.ref(module)  # a reference cycle would be freed only by the garbage collector
        if _is_row_norm(module):
            module.forward = partial(_norm, module_ref)
        elif _is_gated(module):
            module.forward = partial(_feed_forward, module_ref, not in_checkpoints)


def _is_row_norm(module: nn.Module) -> bool:
    """Return whether the module is an RMSNorm over the last dimension whose only parameter is its weight."""
    weights = dict(module.named_parameters())
    return type(module).__name__.endswith("RMSNorm") and list(weights) == ["weight"] and weights["weight"].ndim == 1


@torch.no_grad()
def _is_gated(module: nn.Module) -> bool:
    """Return whether `_feed_forward` and the module's own forward are bitwise equal on a random input."""
    parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")]
    if not all(isinstance(part, nn.Module) for part in parts):
        return False
    weight = next(module.parameters())
    dtype = weight.dtype if weight.is_floating_point() else torch.bfloat16
    width = getattr(module.gate_proj, "in_features", 0)
    states = torch.randn(1, 3, width, generator=torch.Generator().manual_seed(0)).to(weight.device, dtype)
    try:
        return torch.equal(module(states), _feed_forward(weakref.ref(module), False, states))
    except (RuntimeError, TypeError, ValueError):
        return False


def _norm(module_ref: Callable[[], Any], states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    module = module_ref()
    forward = partial(type(module).forward, module)
    if args or kwargs or states.shape[-1:] != module.weight.shape:  # a gated norm, or a norm over groups
        return forward(states, *args, **kwargs)
    return _Recompute.apply(forward, (module.weight,), states, module.weight)


def _feed_forward(
    module_ref: Callable[[], Any], forget_product: bool, states: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    module = module_ref()
    if args or kwargs:
        return type(module).forward(module, states, *args, **kwargs)

    def multiply(gate: Tensor, up: Tensor) -> Tensor:
        return module.act_fn(gate) * up

    gate, up = module.gate_proj(states), module.up_proj(states)
    weights = tuple(module.act_fn.parameters())  # some activation functions have parameters
    product = _Recompute.apply(multiply, weights, gate, up, *weights)
    if not forget_product:
        return module.down_proj(product)
    address, size = product.data_ptr(), product.numel()

    def pack(tensor: Tensor) -> Tensor | torch.Size:
        return tensor.shape if tensor.data_ptr() == address and tensor.numel() == size else tensor

    def unpack(packed: Tensor | torch.Size) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        return _by_pieces(multiply, (gate.detach(), up.detach())).view(packed)

    with saved_tensors_hooks(pack, unpack):
        return module.down_proj(product)


class _Recompute(torch.autograd.Function):
    """The result of function(*inputs), recomputed in the backward pass, so that only the inputs are stored.

    The function must process each row (last dimension) independently. `tensors` are the inputs, then its `weights`.
    """

    @staticmethod
    def forward(ctx, function, weights, *tensors):
        inputs = tensors[: len(tensors) - len(weights)]
        ctx.function, ctx.weights = function, weights
        ctx.save_for_backward(*inputs)
        return _by_pieces(function, inputs)

    @staticmethod
    def backward(ctx, *grads):
        inputs = ctx.saved_tensors
        trained = [weight for weight in ctx.weights if weight.requires_grad]
        *rows, above = (_rows(x) for x in (*inputs, grads[0]))
        row_grads = [torch.empty_like(row) for row in rows]
        sums = [torch.zeros_like(weight, dtype=torch.float32) for weight in trained]
        for part in _pieces(above):
            with torch.enable_grad():
                pieces = [row[part].detach().requires_grad_() for row in rows]
                result = ctx.function(*pieces)
            new = torch.autograd.grad(result, [*pieces, *trained], above[part])
            for row_grad, grad in zip(row_grads, new[: len(rows)], strict=True):
                row_grad[part] = grad
            for total, grad in zip(sums, new[len(rows) :], strict=True):
                total += grad
        of_inputs = [grad.view_as(tensor) for grad, tensor in zip(row_grads, inputs, strict=True)]
        of_weights = {id(weight): total.to(weight.dtype) for weight, total in zip(trained, sums, strict=True)}
        return None, None, *of_inputs, *(of_weights.get(id(weight)) for weight in ctx.weights)


def _by_pieces(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Tensor:
    """Return function(*inputs), computed in pieces and without gradients, in the shape of the inputs."""
    rows = [_rows(x) for x in inputs]
    result = torch.empty_like(rows[0])
    with torch.no_grad():
        for part in _pieces(result):
            result[part] = function(*(row[part] for row in rows))
    return result.view_as(inputs[0])


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _pieces(rows: Tensor) -> Iterator[slice]:
    size = max(1, PIECE.get(rows.device.type, LARGE_PIECE) // rows.shape[1])
    for start in range(0, len(rows), size):
        yield slice(start, start + size)
