"""What the package needs of a model, for both of TransformerLens's classes.

A HookedTransformer and a TransformerBridge differ in how they tokenise, report unknown hooks and
build their logits. The functions here hide that; they never import TransformerLens.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from lahis_tl.errors import ModelError
from lahis_tl.heads import HeadGrid

# A HookedTransformer or a TransformerBridge; no type is common to both and to both version lines.
LensModel: TypeAlias = Any


@dataclass
class ModelRecord:
    """What is known of a model beyond the module itself; filled in by ``load_model``."""

    tokenizer: Any = None
    card: dict[str, Any] = field(default_factory=dict)
    ends: frozenset[int] = (
        frozenset()
    )  # tokens that close a text, by the checkpoint's generation config


_records: "WeakKeyDictionary[nn.Module, ModelRecord]" = WeakKeyDictionary()
_points: "WeakKeyDictionary[nn.Module, dict[str, list[nn.Module]]]" = WeakKeyDictionary()
_has_plain_unembedding: "WeakKeyDictionary[nn.Module, bool]" = WeakKeyDictionary()


def remember(model: LensModel, record: ModelRecord) -> None:
    _records[model] = record


def record_of(model: LensModel) -> ModelRecord | None:
    return _records.get(model)


def is_bridge(model: LensModel) -> bool:
    return hasattr(model, "original_model")


def grid_of(model: LensModel) -> HeadGrid:
    """The model's layers × query heads.

    Raises:
        ModelError: it is neither a HookedTransformer nor a TransformerBridge.
    """
    cfg = getattr(model, "cfg", None)
    if cfg is None or not hasattr(model, "hook_dict"):
        raise ModelError(
            f"{type(model).__name__} is neither a HookedTransformer nor a TransformerBridge; "
            "load it with lahis_tl.load_model."
        )
    return HeadGrid(int(cfg.n_layers), int(cfg.n_heads))


def head_points(model: LensModel) -> list[nn.Module]:
    """The HookPoint of every layer's head outputs z [batch, pos, head, d_head].

    Raises:
        ModelError: some layer has no ``hook_z``.
    """
    return layer_points(model, "attn.hook_z")


def layer_points(model: LensModel, name: str) -> list[nn.Module]:
    """The HookPoint of that name in every layer.

    Resolved once for each model: the lookup is slow on some versions, and ``run_with_hooks``
    of the 3.9 bridge ignores a name that it does not know.

    Raises:
        ModelError: some layer has none.
    """
    grid = grid_of(model)
    points = _points.setdefault(model, {})
    if name not in points:
        table = model.hook_dict
        names = [f"blocks.{layer}.{name}" for layer in range(grid.n_layers)]
        missing = [each for each in names if each not in table]
        if missing:
            raise ModelError(
                f"{model_name(model)} gives no per-head output: {len(missing)} of {len(names)} layers "
                f"lack a hook such as {missing[0]!r}. Models without softmax attention heads in every "
                "layer (state-space, hybrid) cannot be masked or looked at head by head."
            )
        points[name] = [table[each] for each in names]
    return points[name]


def model_name(model: LensModel) -> str:
    card = _records[model].card if model in _records else {}
    return str(card.get("name") or getattr(model.cfg, "model_name", type(model).__name__))


def tokenizer_of(model: LensModel) -> Any:
    """The Hugging Face tokenizer whose ids the package feeds to the model.

    Raises:
        ModelError: the model has none.
    """
    record = _records.get(model)
    tokenizer = record.tokenizer if record else getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise ModelError(
            f"{model_name(model)} has no tokenizer, so texts cannot be read; "
            "pass token ids, or set model.tokenizer."
        )
    return tokenizer


def end_tokens(model: LensModel) -> frozenset[int]:
    """Tokens that close a generated text: the tokenizer's own, and those of the checkpoint (a chat turn's end)."""
    record, own = _records.get(model), getattr(tokenizer_of(model), "eos_token_id", None)
    known = record.ends if record else frozenset[int]()
    return known if own is None else known | {int(own)}


def context_length(model: LensModel) -> int | None:
    """Most tokens that one text may have, None where the model names no limit."""
    limit = getattr(model.cfg, "n_ctx", None)
    return int(limit) if limit else None


def device_of(model: LensModel) -> torch.device:
    return next(model.parameters()).device


def dtype_of(model: LensModel) -> torch.dtype:
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


def is_quantized(model: LensModel) -> bool:
    """Whether weights are packed integers, as bitsandbytes stores them."""
    return any(not p.is_floating_point() for p in model.parameters())


@contextmanager
def frozen(model: LensModel) -> Iterator[None]:
    """No parameter asks for a gradient inside the block; a user's own model is put back after it."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def output_projection(model: LensModel, layer: int) -> Float[Tensor, "d_model head d_head"]:
    """The weights by which a layer's heads write to the residual stream; a view of the model's own.

    Raises:
        ModelError: the layer has no such matrix.
    """
    n_heads = grid_of(model).n_heads
    attention = model.blocks[layer].attn
    if not is_bridge(model):
        return rearrange(attention.W_O, "head d_head d_model -> d_model head d_head")
    module: Any = getattr(getattr(attention, "o", None), "original_component", None)
    if not isinstance(getattr(module, "weight", None), Tensor):
        raise ModelError(f"{model_name(model)}: layer {layer} has no output projection of its own")
    if not module.weight.is_floating_point():
        raise ModelError(
            f"{model_name(model)}: the output projection of layer {layer} is quantised"
        )
    transposed = type(module).__name__ == "Conv1D"  # GPT-2 stores [in, out]
    weight = module.weight.T if transposed else module.weight
    return weight.unflatten(1, (n_heads, -1))


def final_hidden(
    model: LensModel,
    ids: Int[Tensor, "batch pos"],
    attention_mask: Int[Tensor, "batch pos"],
) -> Float[Tensor, "batch pos d_model"]:
    """The normalised last residual stream, that is, the input of the unembedding."""
    if is_bridge(model):
        backbone = model.original_model.base_model
        return backbone(
            input_ids=ids, attention_mask=attention_mask, use_cache=False
        ).last_hidden_state
    left = (
        getattr(model.tokenizer, "padding_side", "right") == "left"
    )  # it would look for pads itself
    needed = left or not bool(attention_mask.all())
    # Told of no mask, HookedTransformer need not look up each text's rotary positions on its own.
    residual = model(
        ids,
        attention_mask=attention_mask if needed else None,
        stop_at_layer=model.cfg.n_layers,
    )
    return model.ln_final(residual) if model.cfg.normalization_type else residual


def full_logits(
    model: LensModel,
    ids: Int[Tensor, "batch pos"],
    attention_mask: Int[Tensor, "batch pos"],
) -> Float[Tensor, "batch pos vocab"]:
    """The model's logits by its own forward pass; token ids and mask always go together."""
    return model(ids, attention_mask=attention_mask, return_type="logits")


def run_layers(model: LensModel, ids: Int[Tensor, "batch pos"]) -> None:
    """Run the layers for what hooks see of them; the logits are computed only if that is inevitable.

    Padding on the right needs no mask: no real token looks ahead to it. With one, rows of padding that
    have nothing to attend to give NaN in some models with attention windows.
    """
    run = full_logits if unembedding_of(model) is None else final_hidden
    run(model, ids, torch.ones_like(ids))


@dataclass(frozen=True)
class Unembedding:
    """From the final hidden state to logits: ``softcap(scale · (hidden @ weight.T + bias))``."""

    weight: Float[Tensor, "vocab d_model"]
    bias: Float[Tensor, " vocab"] | None = None
    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, hidden: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows vocab"]:
        logits = nn.functional.linear(hidden, self.weight, self.bias)
        logits = logits.to(torch.promote_types(hidden.dtype, torch.float32))
        logits = logits * self.scale if self.scale != 1.0 else logits
        return self.softcap * torch.tanh(logits / self.softcap) if self.softcap else logits


def unembedding_of(model: LensModel) -> Unembedding | None:
    """The model's unembedding, or None where it is not a linear map with known scaling.

    Checked once against the model's own logits, so that an architecture with another kind of
    output (extra projections, several heads) is computed by its own forward pass instead. Only that
    verdict is kept: the weights are read at each call, since they may be moved or edited.
    """
    candidate = _read_unembedding(model)
    if model not in _has_plain_unembedding:
        verdict = candidate is not None and _reproduces_logits(model, candidate)
        _has_plain_unembedding[model] = verdict
    return candidate if _has_plain_unembedding[model] else None


def _read_unembedding(model: LensModel) -> Unembedding | None:
    if not is_bridge(model):
        cap = getattr(model.cfg, "output_logits_soft_cap", -1.0)
        return Unembedding(
            weight=model.unembed.W_U.T,
            bias=_nonzero(model.unembed.b_U),
            softcap=cap if cap and cap > 0 else None,
        )
    hf = model.original_model
    head = hf.get_output_embeddings() if hasattr(hf, "get_output_embeddings") else None
    head = getattr(head, "original_component", head)
    if head is None or not hasattr(head, "weight") or not hasattr(hf, "base_model"):
        return None
    config: Mapping[str, Any] = hf.config.to_dict()
    scale = float(config.get("logit_scale") or 1.0) / float(config.get("logits_scaling") or 1.0)
    cap = config.get("final_logit_softcapping")
    return Unembedding(head.weight, _nonzero(getattr(head, "bias", None)), scale, cap)


def _nonzero(bias: Tensor | None) -> Tensor | None:
    return bias if bias is not None and bool(bias.any()) else None


@torch.no_grad()
def _reproduces_logits(model: LensModel, unembedding: Unembedding) -> bool:
    ids = torch.arange(1, 9, device=device_of(model))[None] % unembedding.weight.shape[0]
    mask = torch.ones_like(ids)
    try:
        ours = unembedding(final_hidden(model, ids, mask)).float()
    except (AttributeError, RuntimeError, TypeError):
        return False
    theirs = full_logits(model, ids, mask).float()
    if ours.shape != theirs.shape:
        return False
    tolerance = {torch.float32: 1e-4, torch.float64: 1e-8}.get(dtype_of(model), 3e-2)
    return bool((ours - theirs).abs().max() <= tolerance * theirs.std().clamp_min(1e-12))
