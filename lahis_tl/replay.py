"""One clean forward pass, kept so that the model can go on from any of its layers.

A head of layer l changes nothing below l, so the residual stream there is computed once and used again
for every head of that layer.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lahis_tl.access import LensModel, Unembedding, final_hidden, is_bridge, unembedding_of
from lahis_tl.losses import chunked_nll, predicted_positions, text_nll
from lahis_tl.masks import hooked_heads

Edit = Callable[[Tensor], Tensor]  # a layer's head outputs z → z with some heads changed


@dataclass(frozen=True)
class Replay:
    """A recorded pass over a batch of texts.

    Attributes:
        residuals: what went into each layer, [text, pos, d_model]; empty where the model's blocks
            cannot be run on their own, and the whole pass is run again instead.
        calls: the other arguments of each block, for ``copies`` times the texts.
        copies: how many versions of the batch one call of ``nll`` computes.
        clean: mean NLL of each text in the recorded pass, nats per token.
    """

    model: LensModel
    ids: Int[Tensor, "text pos"]
    attention_mask: Int[Tensor, "text pos"]
    residuals: list[Tensor]
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]
    copies: int
    clean: Float[Tensor, " text"]

    def nll(self, layer: int, edit: Edit) -> Float[Tensor, "copy text"]:
        """Mean NLL of each text when ``edit`` changes the head outputs of ``layer``.

        ``edit`` sees z for all rows [copy · text, pos, head, d_head], copy-major.
        """
        ids = self.ids.repeat(self.copies, 1)
        attention_mask = self.attention_mask.repeat(self.copies, 1)
        with hooked_heads(self.model, {layer: edit}):
            if not self.residuals:
                return text_nll(self.model, ids, attention_mask).reshape(self.copies, -1)
            hidden = self.residuals[layer].repeat(self.copies, 1, 1)
            for block, (args, options) in zip(
                list(self.model.blocks)[layer:], self.calls[layer:], strict=True
            ):
                hidden = _first(block(hidden, *args, **options))
        unembedding = unembedding_of(self.model)
        assert unembedding is not None  # nothing is kept without one
        rows = _mean_nll(_normalised(self.model, hidden), ids, attention_mask, unembedding)
        return rows.reshape(self.copies, -1)


@torch.no_grad()
def record(
    model: LensModel,
    ids: Int[Tensor, "text pos"],
    attention_mask: Int[Tensor, "text pos"],
    copies: int = 1,
) -> Replay:
    """Run the model on texts padded on the right, and keep what each block was given.

    The blocks are called again later with the very arguments that the model itself made for ``copies``
    times the texts, so that no mask or table of positions has to be built here. Where the last block, called
    again and normalised, does not give the model's own result, the whole pass is run for each edit.
    """
    unembedding = unembedding_of(model)
    if unembedding is None:
        clean = text_nll(model, ids, attention_mask)
        return Replay(model, ids, attention_mask, [], [], copies, clean)
    repeated = ids.repeat(copies, 1)
    with _watched(model) as seen:
        # Padding on the right is behind every real token, so it needs no masking.
        hidden = final_hidden(model, repeated, torch.ones_like(repeated))
    residuals = [x[: len(ids)].clone() for x, _, _ in seen.calls]
    calls = [(args, options) for _, args, options in seen.calls]
    clean = _mean_nll(hidden[: len(ids)], ids, attention_mask, unembedding)
    if len(calls) != model.cfg.n_layers or not _goes_on(model, seen.calls[-1], hidden):
        residuals, calls = [], []
    return Replay(model, ids, attention_mask, residuals, calls, copies, clean)


def _goes_on(model: LensModel, call: tuple[Any, ...], expected: Tensor) -> bool:
    """Whether the last block can be run by itself."""
    residual, args, options = call
    again = _normalised(model, _first(list(model.blocks)[-1](residual, *args, **options)))
    if again.shape != expected.shape:
        return False
    return bool((again - expected).abs().max() <= 1e-3 * expected.abs().max())


class _watched:
    """Notes what the blocks are called with."""

    def __init__(self, model: LensModel):
        self.model = model
        self.calls: list[tuple[Tensor, tuple[Any, ...], dict[str, Any]]] = []

    def __enter__(self) -> "_watched":
        blocks: list[nn.Module] = list(self.model.blocks)
        self._handles = [b.register_forward_pre_hook(self._note, with_kwargs=True) for b in blocks]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _note(self, block: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        options = dict(options)
        hidden = args[0] if args else options.pop("hidden_states")
        self.calls.append((hidden, args[1:], options))


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _normalised(model: LensModel, hidden: Tensor) -> Tensor:
    if is_bridge(model):
        norm = getattr(model, "ln_final", None)
        return hidden if norm is None else norm(hidden)
    return model.ln_final(hidden) if model.cfg.normalization_type else hidden


def _mean_nll(
    hidden: Float[Tensor, "row pos d_model"],
    ids: Int[Tensor, "row pos"],
    attention_mask: Int[Tensor, "row pos"],
    unembedding: Unembedding,
) -> Float[Tensor, " row"]:
    counted = predicted_positions(attention_mask)
    rows = chunked_nll(hidden[:, :-1][counted], ids[:, 1:][counted], unembedding)
    spread = rows.new_zeros(counted.shape).masked_scatter(counted, rows)
    return spread.sum(1) / counted.sum(1)
