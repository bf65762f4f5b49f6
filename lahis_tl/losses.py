"""Next-token loss of each text in float32, without a full copy of the logits."""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lahis_tl.access import LensModel, Unembedding, final_hidden, full_logits, unembedding_of

# One block of float32 logits holds this many numbers (64 MB): enough rows for a product to run at full speed.
_BLOCK = 2**24


class _ChunkedNLL(torch.autograd.Function):
    """NLL of each row's target, block by block over rows.

    The gradient with respect to the hidden states is computed with the block's logits at hand, so
    they are neither kept nor computed twice: one product forward, one backward, as a plain loss needs.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, unembedding: Unembedding) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        needs_grad = ctx.needs_input_grad[0]
        nll = torch.empty(len(hidden), dtype=wide, device=hidden.device)
        grad = torch.empty_like(hidden) if needs_grad else None
        for rows in _row_blocks(len(hidden), len(unembedding.weight)):
            into = None if grad is None else grad[rows]
            nll[rows] = _block_nll(hidden[rows], targets[rows], unembedding, into)
        if grad is not None:
            ctx.save_for_backward(grad)
        return nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad,) = ctx.saved_tensors
        return grad * grads[0][:, None].to(grad.dtype), None, None


def _block_nll(
    hidden: Tensor, targets: Tensor, unembedding: Unembedding, gradient: Tensor | None
) -> Tensor:
    """NLL of one block's rows, and into ``gradient`` its slope; a function, so that no block outlives its turn."""
    home, hidden = hidden.device, hidden.to(unembedding.weight.device)
    logits = unembedding(hidden)
    slope = None if gradient is None else _softcap_slope(logits, unembedding)
    target = targets[:, None].to(logits.device)
    log_p = logits.log_softmax(-1)
    del logits
    nll = -log_p.gather(1, target)[:, 0]
    if gradient is not None:
        d_logits = log_p.exp_()
        d_logits.scatter_add_(1, target, torch.full_like(target, -1, dtype=d_logits.dtype))
        if slope is not None:
            d_logits *= slope
        if unembedding.scale != 1.0:
            d_logits *= unembedding.scale
        gradient.copy_(d_logits.to(hidden.dtype) @ unembedding.weight)
    return nll.to(home)


def _softcap_slope(logits: Tensor, unembedding: Unembedding) -> Tensor | None:
    cap = unembedding.softcap
    return None if cap is None else 1 - (logits / cap) ** 2


def rows_at_once(vocab: int) -> int:
    """How many positions' logits exist at a time."""
    return max(1, _BLOCK // vocab)


def _row_blocks(n_rows: int, width: int) -> list[slice]:
    step = rows_at_once(width)
    return [slice(start, start + step) for start in range(0, n_rows, step)]


def chunked_nll(
    hidden: Float[Tensor, "row d_model"],
    targets: Int[Tensor, " row"],
    unembedding: Unembedding,
) -> Float[Tensor, " row"]:
    """−log p(target) of each row in nats, float32 (float64 for float64 input).

    Differentiable once, with respect to the hidden states alone.
    """
    return _ChunkedNLL.apply(hidden, targets, unembedding)  # type: ignore[return-value]


@torch.no_grad()
def drawn_label_gradients(
    hidden: Float[Tensor, "row d_model"],
    unembedding: Unembedding,
    draws: int,
    generator: torch.Generator,
) -> Float[Tensor, "draw row d_model"]:
    """d NLL / d hidden for labels that are drawn from the model's own prediction, ``draws`` for each row.

    All draws share one product with the unembedding: the gradient is that of the expected label less
    the drawn label's row.
    """
    weight = unembedding.weight
    home, hidden = hidden.device, hidden.to(weight.device)
    found = hidden.new_empty(draws, *hidden.shape)
    for rows in _row_blocks(len(hidden), len(weight)):
        logits = unembedding(hidden[rows])
        slope = _softcap_slope(logits, unembedding)
        slope = torch.ones_like(logits[:1, :1]).expand_as(logits) if slope is None else slope
        slope = slope * unembedding.scale
        p = logits.softmax(-1)
        labels = torch.multinomial(p, draws, replacement=True, generator=generator)
        expected = (p * slope).to(hidden.dtype) @ weight
        at_label = slope.gather(1, labels).to(hidden.dtype)[..., None] * weight[labels]
        found[:, rows] = expected - at_label.transpose(0, 1)
    return found.to(home)


def predicted_positions(
    attention_mask: Int[Tensor, "batch pos"],
) -> Bool[Tensor, "batch pos_minus_1"]:
    """Where a real token predicts a real token."""
    return (attention_mask[:, 1:] * attention_mask[:, :-1]).bool()


def token_nll(
    model: LensModel,
    ids: Int[Tensor, "batch pos"],
    attention_mask: Int[Tensor, "batch pos"],
    wanted: Bool[Tensor, "batch pos_minus_1"] | None = None,
) -> Float[Tensor, "batch pos_minus_1"]:
    """NLL of each next token in nats, 0 where there is no real token to predict.

    float32, and computed without a full copy of the logits unless the unembedding itself is trained.

    >>> ids = torch.tensor([[5, 6, 7]])
    >>> token_nll(model, ids, torch.ones_like(ids)).shape      # doctest: +SKIP
    torch.Size([1, 2])

    Args:
        wanted: only these tokens, counted from the second; the others cost no product with the unembedding.
    """
    valid = predicted_positions(attention_mask)
    valid = valid if wanted is None else valid & wanted.to(valid.device)
    targets = ids[:, 1:][valid]
    unembedding = unembedding_of(model)
    trained = unembedding is not None and unembedding.weight.requires_grad
    if _padded_right(attention_mask):
        # No real token looks ahead to the padding, so it needs no masking; and rows of padding with
        # nothing to attend to give NaN in some models with attention windows.
        attention_mask = torch.ones_like(attention_mask)
    else:  # positions must be counted from the mask, which the model's own forward pass does
        unembedding = None
    if unembedding is None or (trained and torch.is_grad_enabled()):
        logits = full_logits(model, ids, attention_mask)[:, :-1][valid]
        rows = _plain_nll(logits, targets.to(logits.device))
    else:
        hidden = final_hidden(model, ids, attention_mask)[:, :-1]
        rows = chunked_nll(hidden[valid], targets.to(hidden.device), unembedding)
    out = rows.new_zeros(valid.shape)
    return out.masked_scatter(valid.to(rows.device), rows)


def _plain_nll(
    logits: Float[Tensor, "row vocab"], targets: Int[Tensor, " row"]
) -> Float[Tensor, " row"]:
    wide = torch.promote_types(logits.dtype, torch.float32)
    blocks = [
        nn.functional.cross_entropy(logits[rows].to(wide), targets[rows], reduction="none")
        for rows in _row_blocks(len(targets), logits.shape[-1])
    ]
    return torch.cat(blocks)


def _padded_right(attention_mask: Int[Tensor, "batch pos"]) -> bool:
    return bool((attention_mask[:, 1:] <= attention_mask[:, :-1]).all())


def text_nll(
    model: LensModel,
    ids: Int[Tensor, "batch pos"],
    attention_mask: Int[Tensor, "batch pos"],
) -> Float[Tensor, " batch"]:
    """Mean next-token NLL of each text in nats per token, float32.

    >>> text_nll(model, ids, torch.ones_like(ids)).shape       # doctest: +SKIP
    torch.Size([1])

    Args:
        ids: token ids, padded on either side.
        attention_mask: 1 for real tokens, 0 for padding.

    Raises:
        ValueError: a text has fewer than two real tokens in a row, so that none is predicted.
    """
    counts = predicted_positions(attention_mask).sum(1)
    if (counts == 0).any():
        row = int((counts == 0).nonzero()[0])
        raise ValueError(f"text {row} of the batch has no token to predict; at least 2 are needed")
    nll = token_nll(model, ids, attention_mask)
    return nll.sum(1) / counts.to(nll.device)
