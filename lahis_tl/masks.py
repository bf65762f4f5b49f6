"""The head mask, the one instrument of this package.

A mask multiplies each head's output z before the output projection. Ones change nothing, zeros
ablate, factors above one enhance; gradients with respect to it score heads.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lahis_tl.access import LensModel, grid_of, head_points, unembedding_of
from lahis_tl.heads import Head, HeadGrid, HeadLike, HeadSet


@dataclass(frozen=True, eq=False)
class HeadMask:
    """Factors for every head, for all texts alike or for each text of a batch.

    >>> from lahis_tl.heads import HeadGrid
    >>> mask = HeadMask.scaling(["L0H1"], 0.0, grid=HeadGrid(2, 3))
    >>> mask.factors
    tensor([[1., 0., 1.],
            [1., 1., 1.]])

    Attributes:
        factors: float32, [layer, head] or [text, layer, head]; no unit; 1 leaves the head as it is.
        fill: what a head gives where its factor is 0, [layer, head, d_head]; zeros where None. The
            masked output is ``m·z + (1 − m)·fill``: mean ablation with the head's mean output.

    Raises:
        ValueError: the factors have another number of dimensions or are not finite, or ``fill`` is for
            another grid.
    """

    factors: Float[Tensor, "..."]
    fill: Float[Tensor, "layer head d_head"] | None = None

    def __post_init__(self) -> None:
        if self.factors.ndim not in (2, 3):
            raise ValueError(
                f"a head mask has shape [layer, head] or [text, layer, head], not {tuple(self.factors.shape)}"
            )
        if not torch.isfinite(self.factors).all():
            raise ValueError(
                "the factors of a head mask must be finite numbers; some are NaN or infinity"
            )
        if self.fill is not None and self.fill.shape[:2] != self.factors.shape[-2:]:
            raise ValueError(
                f"fill is for {tuple(self.fill.shape[:2])} heads but the mask for {tuple(self.factors.shape[-2:])}"
            )

    @property
    def grid(self) -> HeadGrid:
        return HeadGrid(*self.factors.shape[-2:])

    @classmethod
    def ones(cls, grid: HeadGrid, texts: int | None = None) -> "HeadMask":
        """A mask that changes nothing."""
        shape = grid.shape if texts is None else (texts, *grid.shape)
        return cls(torch.ones(shape))

    @classmethod
    def scaling(
        cls,
        heads: HeadSet | Iterable[HeadLike],
        factor: float,
        grid: HeadGrid | None = None,
    ) -> "HeadMask":
        """Multiply ``heads`` by ``factor`` and leave the others: 0 ablates, above 1 enhances.

        Args:
            heads: a ``HeadSet``, or any labels or (layer, head) pairs together with ``grid``.
            factor: a finite number.
            grid: the model's grid (``lahis_tl.grid_of(model)``); known where heads are a ``HeadSet``.

        Raises:
            IndexError: a head is outside the grid.
            ValueError: ``factor`` is not finite, or the grid is unknown.
        """
        return cls(_scaled_ones(heads, factor, grid))

    @classmethod
    def mean_ablation(
        cls,
        heads: HeadSet | Iterable[HeadLike],
        means: Float[Tensor, "layer head d_head"],
    ) -> "HeadMask":
        """Replace the output of ``heads`` by ``means`` (see ``lahis_tl.mean_head_outputs``)."""
        return cls(_scaled_ones(heads, 0.0, HeadGrid(*means.shape[:2])), fill=means)

    def heads(self) -> HeadSet:
        """The heads that this mask changes in any text, layer-major."""
        changed = (self.factors.detach() != 1).reshape(-1, *self.grid.shape).any(0)
        return HeadSet(self.grid, (Head(*pair) for pair in changed.nonzero().tolist()))


def _scaled_ones(
    heads: HeadSet | Iterable[HeadLike], factor: float, grid: HeadGrid | None
) -> Float[Tensor, "layer head"]:
    if not math.isfinite(factor):
        raise ValueError(f"the factor of a head must be a finite number, not {factor}")
    if grid is None:
        if not isinstance(heads, HeadSet):
            raise ValueError(
                "heads given as labels or pairs need grid=lahis_tl.grid_of(model), so that they can be checked"
            )
        grid = heads.grid
    factors = torch.ones(grid.shape)
    for layer, head in HeadSet(grid, heads):
        factors[layer, head] = factor
    return factors


class _ScaleHeads(torch.autograd.Function):
    """z · factors with the gradient of the factors summed in float32, whatever z's dtype."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, factors: Tensor) -> Tensor:
        ctx.save_for_backward(z, factors)
        return z * factors.to(z.dtype)[..., None, :, None]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (grad,) = grads
        z, factors = ctx.saved_tensors
        grad_z = grad_factors = None
        if ctx.needs_input_grad[0]:
            grad_z = grad * factors.to(z.dtype)[..., None, :, None]
        if ctx.needs_input_grad[1]:
            wide = torch.promote_types(z.dtype, torch.float32)
            per_text = (grad * z).sum(dim=(1, 3), dtype=wide)  # [batch, head]
            if factors.ndim == 1:
                per_text = per_text.sum(0)
            grad_factors = per_text.to(factors.dtype)
        return grad_z, grad_factors


def _apply(
    z: Float[Tensor, "batch pos head d_head"],
    factors: Float[Tensor, "*text head"],
    fill: Float[Tensor, "head width"] | None,
) -> Float[Tensor, "batch pos head d_head"]:
    if factors.ndim == 2 and factors.shape[0] != z.shape[0]:
        raise ValueError(
            f"the mask is for {factors.shape[0]} texts but the model was called with {z.shape[0]}"
        )
    factors = factors.to(z.device)
    if fill is None:
        return _ScaleHeads.apply(z, factors)  # type: ignore[return-value]
    if fill.shape[-1] != z.shape[-1]:
        raise ValueError(
            f"fill has d_head {fill.shape[-1]} but the model's heads have {z.shape[-1]}"
        )
    # In this form a factor of exactly 1 leaves z exactly as it is, also in half precision.
    replaced = (1 - factors).to(z.dtype)[..., None, :, None] * fill.to(z.device, z.dtype)
    return _ScaleHeads.apply(z, factors) + replaced  # type: ignore[operator]


@contextmanager
def hooked_heads(
    model: LensModel, transforms: Mapping[int, Callable[[Tensor], Tensor | None]]
) -> Iterator[None]:
    """Let ``transforms[layer]`` see, and replace if it returns one, the head outputs z of a layer.

    The hooks come off when the block ends, also by an exception; other hooks stay.
    """
    with hooked_points(head_points(model), transforms):
        yield


@contextmanager
def hooked_points(
    points: Sequence[nn.Module], transforms: Mapping[int, Callable[[Tensor], Tensor | None]]
) -> Iterator[None]:
    """As ``hooked_heads``, at any row of HookPoints."""
    added = []
    try:
        for layer, transform in transforms.items():
            point: Any = points[layer]
            point.add_hook(lambda z, hook, transform=transform: transform(z))
            added.append((point, point.fwd_hooks[-1]))
        yield
    finally:
        for point, entry in added:
            entry.hook.remove()
            point.fwd_hooks[:] = [other for other in point.fwd_hooks if other is not entry]


@contextmanager
def masked(
    model: LensModel, mask: HeadMask | Tensor, layers: Sequence[int] | None = None
) -> Iterator[None]:
    """Run the model with its heads scaled by ``mask``; works on any call, ``generate`` included.

    >>> with masked(model, HeadMask.scaling(heads.specific["fr"], 0.0)):     # doctest: +SKIP
    ...     model.generate("La capitale de la France est")

    A backward pass under activation checkpointing must run inside the block.

    Args:
        model: a HookedTransformer or TransformerBridge.
        mask: a ``HeadMask`` or a bare tensor of factors, [layer, head] or [text, layer, head].
        layers: those whose heads are scaled; where only their factors have gradients, nothing below them is
            differentiated. By default all of a mask with gradients, else those with a factor other than 1.

    Raises:
        ValueError: the mask's grid differs from the model's, or its texts from the batch's.
        ModelError: the model gives no per-head output.

    Warns:
        UserWarning: no forward pass of ``model`` ran inside the block, so the mask did nothing.
    """
    mask = mask if isinstance(mask, HeadMask) else HeadMask(mask)
    grid = grid_of(model)
    if mask.grid != grid:
        raise ValueError(
            f"the mask has shape {tuple(mask.factors.shape)}, for {mask.grid}, "
            f"but the model has {grid}"
        )
    if mask.factors.ndim == 3:
        unembedding_of(model)  # probes the model once, with a batch of its own
    calls = [0]

    def transform(z: Tensor, layer: int) -> Tensor:
        calls[0] += 1
        fill = None if mask.fill is None else mask.fill[layer]
        return _apply(z, mask.factors[..., layer, :], fill)

    if layers is None and mask.factors.requires_grad:
        layers = list(range(grid.n_layers))
    elif layers is None:  # layers whose factors are all 1 need no hook
        per_layer = (mask.factors != 1).transpose(-2, 0).reshape(grid.n_layers, -1)
        layers = per_layer.any(1).nonzero().flatten().tolist()
    with hooked_heads(model, {layer: partial(transform, layer=layer) for layer in layers}):
        yield
    if layers and not calls[0]:
        warnings.warn(
            "no forward pass of this model ran inside masked(): the mask had no effect",
            stacklevel=3,
        )
