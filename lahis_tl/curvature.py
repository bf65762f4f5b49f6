"""How the loss bends as a head's factor moves: the diagonal Fisher information of the head mask."""

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lahis_tl.access import (
    LensModel,
    device_of,
    final_hidden,
    frozen,
    full_logits,
    grid_of,
    unembedding_of,
)
from lahis_tl.batches import Batch
from lahis_tl.losses import drawn_label_gradients, predicted_positions
from lahis_tl.masks import masked


def batch_curvature(
    model: LensModel, batch: Batch, draws: int, seed: int
) -> Float[Tensor, "draw text layer head"]:
    """One estimate of the curvature of each text's mean NLL for every draw of labels, on the CPU.

    Labels are drawn for every position from the model's own prediction; the gradient of their summed
    NLL, squared, over the number of positions. Labels are independent given the text and their score
    has mean zero, so that its expectation is the diagonal of the Gauss-Newton matrix of the mean NLL. One
    forward pass, and one backward pass a draw.

    Returns:
        non-negative, in nats per token and squared unit of mask.
    """
    device, grid = device_of(model), grid_of(model)
    attention_mask = batch.attention_mask.to(device)
    counts = predicted_positions(attention_mask).sum(1)[:, None, None]
    mask = torch.ones(len(batch.keys), *grid.shape, device=device, requires_grad=True)
    found = []
    with frozen(model), torch.enable_grad(), masked(model, mask):
        for output, gradient in _drawn(model, batch.ids.to(device), attention_mask, draws, seed):
            (score,) = torch.autograd.grad(output, mask, gradient, retain_graph=True)
            found.append((score.square() / counts).float().cpu())
    return torch.stack(found)


def _drawn(
    model: LensModel,
    ids: Int[Tensor, "text pos"],
    attention_mask: Int[Tensor, "text pos"],
    draws: int,
    seed: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """The model's output, and for each draw the gradient of the drawn labels' summed NLL there."""
    counted = predicted_positions(attention_mask)
    everywhere = torch.ones_like(attention_mask)  # padding on the right needs no mask
    unembedding = unembedding_of(model)
    if unembedding is not None:
        hidden = final_hidden(model, ids, everywhere)[:, :-1][counted]
        generator = torch.Generator(unembedding.weight.device).manual_seed(seed)
        gradients = drawn_label_gradients(hidden.detach(), unembedding, draws, generator)
        for gradient in gradients:
            yield hidden, gradient
        return
    logits = full_logits(model, ids, everywhere)[:, :-1][counted]
    p = logits.detach().float().softmax(-1)
    generator = torch.Generator(p.device).manual_seed(seed)
    labels = torch.multinomial(p, draws, replacement=True, generator=generator)
    for drawn in labels.T:
        gradient = p.scatter_add(1, drawn[:, None], torch.full_like(p[:, :1], -1))
        yield logits, gradient.to(logits.dtype)
