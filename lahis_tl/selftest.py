"""Does the mask act on this model? Three checks that every loaded model has to pass."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lahis_tl.access import (
    LensModel,
    device_of,
    dtype_of,
    frozen,
    full_logits,
    grid_of,
    head_points,
    is_quantized,
    model_name,
    output_projection,
)
from lahis_tl.errors import ModelError
from lahis_tl.heads import Head
from lahis_tl.losses import text_nll
from lahis_tl.masks import HeadMask, hooked_heads, masked


@dataclass(frozen=True)
class Tolerance:
    """Bounds of the checks, in units of the logits' standard deviation or as a share."""

    rms: float  # of the difference of two logits that should agree
    peak: float  # the same, largest entry
    slope: float  # relative, gradient against finite difference
    step: float  # of the finite difference


TOLERANCES = {
    # Rotary tables, norms and softmax stay in float32 in most Hugging Face models.
    torch.float64: Tolerance(1e-5, 1e-4, 1e-2, 1e-2),
    torch.float32: Tolerance(1e-4, 1e-3, 2e-2, 2e-2),
    torch.bfloat16: Tolerance(3e-2, 3e-1, 2e-1, 1e-1),
    torch.float16: Tolerance(1e-2, 1e-1, 1e-1, 1e-1),
}


def logit_difference(ours: Tensor, reference: Tensor) -> tuple[float, float]:
    """Root mean square and largest difference, over the reference's standard deviation."""
    spread = reference.double().std().clamp_min(1e-30)
    difference = (ours.double() - reference.double()).abs() / spread
    return float(difference.square().mean().sqrt()), float(difference.max())


def check_logits(
    what: str, ours: Tensor, reference: Tensor, dtype: torch.dtype
) -> dict[str, float]:
    """Figures of the comparison; ModelError if the two differ beyond rounding."""
    bound = TOLERANCES[dtype]
    if not torch.isfinite(reference).all():
        raise ModelError(f"{what}: the reference logits contain NaN or infinity")
    rms, peak = logit_difference(ours, reference)
    if not (rms <= bound.rms and peak <= bound.peak):
        raise ModelError(
            f"{what}: logits differ by {rms:.2g} (root mean square) and {peak:.2g} (largest) of their "
            f"standard deviation, more than the {bound.rms:g} and {bound.peak:g} that rounding to "
            f"{str(dtype).removeprefix('torch.')} explains"
        )
    return {"rms": rms, "max": peak}


def probe_ids(d_vocab: int, device: torch.device, length: int = 48) -> Tensor:
    """Two fixed sequences of token ids, long enough for windows and rotary positions to matter."""
    generator = torch.Generator().manual_seed(20251107)
    return torch.randint(0, d_vocab, (2, length), generator=generator).to(device)


def check_mask_acts(model: LensModel) -> dict[str, Any]:
    """Run the self-test; a model on which the mask does not act as it should is refused.

    1. Every layer's hook fires once, and a mask of ones leaves the logits as they are.
    2. Zero for one head (first, middle and last layer) equals zeroing its rows of the output projection.
    3. The gradient of the mask agrees with a finite difference along itself.

    Returns:
        the figures, for the model's card.

    Raises:
        ModelError: with the figures, if a check fails.
    """
    grid, device = grid_of(model), device_of(model)
    # Quantised layers compute in half precision whatever the other weights are.
    dtype = torch.bfloat16 if is_quantized(model) else dtype_of(model)
    limit = getattr(model.cfg, "n_ctx", None) or 48
    ids = probe_ids(model.cfg.d_vocab, device, min(16, int(limit)))
    attention_mask = torch.ones_like(ids)
    with torch.no_grad():
        plain = full_logits(model, ids, attention_mask)
        _check_every_layer_fires(model, ids, attention_mask)
        figures: dict[str, Any] = {"ones": _check_ones(model, ids, attention_mask, plain, dtype)}
        for layer in sorted({0, grid.n_layers // 2, grid.n_layers - 1}):
            head = Head(layer, (layer + 1) % grid.n_heads)
            with masked(model, HeadMask.scaling([head], 0.0, grid)):
                ours = full_logits(model, ids, attention_mask)
            with _projection_zeroed(model, head):
                reference = full_logits(model, ids, attention_mask)
            what = f"{model_name(model)}: a zero mask on {head.label} is not the head's removal"
            figures[f"zero {head.label}"] = check_logits(what, ours, reference, dtype)
    figures["slope"] = _check_gradient(model, ids, attention_mask, dtype)
    return figures


def _check_every_layer_fires(model: LensModel, ids: Tensor, attention_mask: Tensor) -> None:
    n_layers = len(head_points(model))
    fired = [0] * n_layers

    def count(layer: int) -> Any:
        def note(z: Tensor) -> None:
            fired[layer] += 1

        return note

    with hooked_heads(model, {layer: count(layer) for layer in range(n_layers)}):
        full_logits(model, ids, attention_mask)
    wrong = {layer: times for layer, times in enumerate(fired) if times != 1}
    if wrong:
        raise ModelError(
            f"{model_name(model)}: head hooks should fire once in a forward pass, but layer: times is {wrong}"
        )


def _check_ones(
    model: LensModel, ids: Tensor, attention_mask: Tensor, plain: Tensor, dtype: torch.dtype
) -> dict[str, float]:
    ones = torch.ones(grid_of(model).shape, requires_grad=True)  # keeps a hook on every layer
    with masked(model, ones), torch.no_grad():
        same = full_logits(model, ids, attention_mask)
    what = f"{model_name(model)}: a mask of ones changes the model"
    return check_logits(what, same, plain, dtype)


@contextmanager
def _projection_zeroed(model: LensModel, head: Head) -> Iterator[None]:
    """The other road to a zero mask: the head's part of the output projection, or of its input, set to 0."""
    if is_quantized(model):  # packed weights have no part to set
        with _projection_input_zeroed(model, head):
            yield
        return
    part = output_projection(model, head.layer).data[:, head.head]
    kept = part.clone()
    try:
        part.zero_()
        yield
    finally:
        part.copy_(kept)


@contextmanager
def _projection_input_zeroed(model: LensModel, head: Head) -> Iterator[None]:
    width = model.cfg.d_head
    columns = slice(head.head * width, (head.head + 1) * width)

    def zero(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        given = args[0].clone()
        given[..., columns] = 0
        return (given, *args[1:])

    handle = model.blocks[head.layer].attn.o.original_component.register_forward_pre_hook(zero)
    try:
        yield
    finally:
        handle.remove()


def _check_gradient(
    model: LensModel, ids: Tensor, attention_mask: Tensor, dtype: torch.dtype
) -> dict[str, float]:
    bound = TOLERANCES[dtype]
    mask = torch.ones(grid_of(model).shape, requires_grad=True)
    with frozen(model), torch.enable_grad(), masked(model, mask):
        (gradient,) = torch.autograd.grad(text_nll(model, ids, attention_mask).sum(), mask)
    norm = float(gradient.norm())
    if not (norm > 0 and torch.isfinite(gradient).all()):
        raise ModelError(f"{model_name(model)}: the gradient of the head mask is {norm}")
    direction = gradient.double() / norm
    tried = []
    for step in (bound.step, bound.step / 4, bound.step / 16):  # shorter where the loss bends much
        high, low = (
            _loss_along(model, ids, attention_mask, sign * step * direction) for sign in (1, -1)
        )
        slope = (high - low) / (2 * step)
        # Rounding of the two losses limits what their difference can say.
        eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
        noise = 4 * eps * abs(high) / step
        if abs(slope - norm) <= bound.slope * norm + noise:
            return {"gradient_norm": norm, "finite_difference": slope}
        tried.append(f"{slope:.4g} (step {step:.2g}, noise {noise:.1g})")
    raise ModelError(
        f"{model_name(model)}: the mask's gradient has norm {norm:.4g}, but by finite differences the "
        f"loss rises along it by {', '.join(tried)}"
    )


@torch.no_grad()
def _loss_along(model: LensModel, ids: Tensor, attention_mask: Tensor, shift: Tensor) -> float:
    with masked(model, torch.ones_like(shift) + shift):
        return float(text_nll(model, ids, attention_mask).double().sum())
