"""The routers of mixture-of-experts models, and the auxiliary loss that balances the load of the experts."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

from spin.engines.packing import Batch


def find_routers(model: PreTrainedModel) -> list[tuple[nn.Module, int]]:
    """Return the routers of `model`, each with the index of its logits among its outputs.

    The list is empty if the model is dense, or if transformers has no auxiliary loss for its kind of router.
    """
    recorder = (getattr(model, "_can_record_outputs", None) or {}).get("router_logits")
    config = model.config.get_text_config()
    has_loss = hasattr(config, "router_aux_loss_coef") and hasattr(config, "num_experts_per_tok")
    if not has_loss or not isinstance(recorder, OutputRecorder):
        return []
    return [(module, recorder.index) for module in model.modules() if isinstance(module, recorder.target_class)]


@contextlib.contextmanager
def record_router_logits(model: PreTrainedModel | None) -> Iterator[list[Tensor]]:
    """Yield a list that collects each router's logits, [tokens, experts], during forward passes within the context.

    Without a model the list stays empty.
    """
    recorded: list[Tensor] = []
    hooks = [
        router.register_forward_hook(lambda module, args, outputs, index=index: recorded.append(outputs[index]))
        for router, index in (find_routers(model) if model else [])
    ]
    try:
        yield recorded
    finally:
        for hook in hooks:
            hook.remove()


def balance_losses(model: PreTrainedModel, logits: list[Tensor], batch: Batch, layout: str) -> Tensor:
    """Return the load-balancing loss of each sequence prompt + response: fp32 [batch.responses], with gradients.

        loss = mean over layers of E sum_e f_e p_e

    E is the number of experts, f_e the fraction of tokens routed to expert e, p_e its mean probability (Switch
    Transformer, arXiv 2101.03961, equations 4 to 6). With k experts per token the f_e sum to k, and the loss is k if
    the load is balanced. `logits` holds one tensor per layer, from one forward pass.
    """
    top_k, count = model.config.get_text_config().num_experts_per_tok, logits[0].shape[-1]
    probs = torch.stack([layer.reshape(-1, count).float().softmax(-1) for layer in logits], dim=1)
    chosen = torch.zeros_like(probs).scatter_(-1, probs.detach().topk(top_k, dim=-1).indices, 1.0)
    values = torch.stack([chosen, probs], dim=1).flatten(1)  # flattened from [tokens, 2, layers, experts]
    values = torch.cat([values, values.new_ones(len(values), 1)], dim=1)
    sums = _sum_by_sequence(values, batch.attention_mask.to(values.device), layout)
    shares = sums[:, :-1] / sums[:, -1:]
    picked, mass = shares.view(len(sums), 2, len(logits), count).unbind(1)
    return count * (picked * mass).sum(-1).mean(-1)


def _sum_by_sequence(values: Tensor, mask: Tensor, layout: str) -> Tensor:
    """Sum `values`, [tokens of the batch, n], over each prompt + response: [responses, n]. `mask` as in `Batch`."""
    if layout == "padded":
        return (values.view(*mask.shape, -1) * mask[..., None]).sum(1)
    table = mask[0, 0]  # of lengths: each row has a prompt and its responses
    part = torch.arange(table.numel(), device=table.device).repeat_interleave(table.flatten())
    sums = values.new_zeros(table.numel(), values.shape[1]).index_add(0, part, values[: len(part)])
    sums = sums.view(*table.shape, -1)
    return (sums[:, :1] + sums[:, 1:])[table[:, 1:] > 0]
