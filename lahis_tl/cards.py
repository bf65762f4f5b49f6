"""Birth certificates: what a model is, where it came from, under which versions."""

import hashlib
import platform
import warnings
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from lahis_tl.access import (
    LensModel,
    device_of,
    dtype_of,
    grid_of,
    is_bridge,
    model_name,
    output_projection,
    record_of,
)
from lahis_tl.errors import ModelError


def card_of(model: LensModel) -> dict[str, Any]:
    """The birth certificate of a model, as it is written on every result.

    >>> card_of(model)["architecture"]      # doctest: +SKIP
    'LlamaForCausalLM'

    Warns:
        UserWarning: transformer-lens processed the weights of a user's own model in a way that
            changes what removing a head means.
    """
    record = record_of(model)
    if record and record.card:
        now = {"weights_sha256": weights_fingerprint(model), "machine": machine(model)}
        return {**record.card, **now}
    return {
        "name": model_name(model),
        **describe(model, getattr(model, "tokenizer", None)),
        "weight_processing": _weight_processing(model),
        "loaded_by": "user",
    }


def describe(model: LensModel, tokenizer: Any) -> dict[str, Any]:
    """What can be read off any model."""
    grid = grid_of(model)
    return {
        "class": type(model).__name__,
        "n_layers": grid.n_layers,
        "n_heads": grid.n_heads,
        "dtype": str(dtype_of(model)).removeprefix("torch."),
        "weights_sha256": weights_fingerprint(model),
        "tokenizer_sha256": tokenizer_hash(tokenizer),
        "versions": library_versions(),
        "machine": machine(model),
    }


def weights_fingerprint(model: LensModel) -> str | None:
    """A hash of a sample of every layer's output projection, rounded to bfloat16.

    The same for one checkpoint on either class and in float32 or bfloat16; None for a model without
    such matrices.
    """
    digest = hashlib.sha256()
    for layer in range(grid_of(model).n_layers):
        try:
            weight = output_projection(model, layer).detach().flatten(1)
        except (ModelError, AttributeError):
            return None
        steps = [max(1, size // 64) for size in weight.shape]
        sample = weight[:: steps[0], :: steps[1]].to(torch.bfloat16).float().cpu()
        digest.update(sample.contiguous().numpy().tobytes())
    return digest.hexdigest()


def checkpoint_fingerprint(hf: nn.Module) -> str:
    """A hash of a sample of every matrix of a Hugging Face model, rounded to bfloat16.

    Tells checkpoints apart that share their output projections, which ``weights_fingerprint`` does not;
    taken at loading, it does not see later changes.
    """
    digest = hashlib.sha256()
    for name, parameter in hf.named_parameters():
        if parameter.ndim < 2 or not parameter.is_floating_point():
            continue
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 1024)].to(torch.bfloat16).float().cpu()
        digest.update(name.encode() + sample.contiguous().numpy().tobytes())
    return digest.hexdigest()


def tokenizer_hash(tokenizer: Any) -> str | None:
    """A hash of vocabulary, merges and special tokens."""
    if tokenizer is None:
        return None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(text.encode()).hexdigest()


def library_versions() -> dict[str, str]:
    packages = ("lahis-tl", "transformer-lens", "torch", "transformers", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def machine(model: LensModel) -> dict[str, Any]:
    """What rounding depends on besides versions."""
    return {
        "device": str(device_of(model)),
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
    }


def _weight_processing(model: LensModel) -> str:
    """What transformer-lens did to the weights, as far as it shows; warns where it matters for heads."""
    done = []
    if is_bridge(model):
        if getattr(model, "compatibility_mode", False):
            done.append("compatibility mode")
    else:
        if getattr(model.cfg, "normalization_type", None) in ("LNPre", "RMSPre"):
            done.append("layer norm folded")
        attention = [block.attn for block in model.blocks]
        if any(a.b_O.any() for a in attention) and not any(a.b_V.any() for a in attention):
            done.append("value biases folded")
    if done:
        warnings.warn(
            f"the weights of {model_name(model)} were processed ({', '.join(done)}): where the model has "
            "value biases they now sit in b_O, so a zeroed head keeps its bias. Prefer "
            "lahis_tl.load_model, or HookedTransformer.from_pretrained_no_processing",
            stacklevel=3,
        )
    return ", ".join(done) or "none seen"
