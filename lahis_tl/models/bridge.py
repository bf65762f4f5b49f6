"""A Hugging Face model wrapped as a TransformerBridge."""

import logging
from typing import Any

from packaging.version import Version
from torch import nn

from lahis_tl.errors import ModelError
from lahis_tl.models.hooked import architecture_of

# Bridges before this version rotate the wrong pairs of dimensions in Cohere's attention.
_COHERE_SINCE = Version("4.2")


def why_not_bridge(config: Any, version: Version) -> str | None:
    """Why the installed transformer-lens cannot bridge a model rightly, or None if it can."""
    architecture = architecture_of(config)
    if architecture.startswith("Cohere") and version < _COHERE_SINCE:
        return (
            f"the bridge of transformer-lens {version} computes {architecture} wrongly "
            f"(rotary pairs); use transformer-lens >= {_COHERE_SINCE}"
        )
    return None


def build_bridge(hf: nn.Module, name: str) -> nn.Module:
    """A TransformerBridge around a Hugging Face model, which it changes in place."""
    transformers_logger = logging.getLogger("transformers")
    level = transformers_logger.level
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    transformers_logger.setLevel(level)  # the import silences it for the whole process
    config: Any = hf.config
    try:
        bridge = build_bridge_from_module(
            hf, architecture_of(config), hf_config=config, tokenizer=None, model_name=name
        )
    except Exception as error:  # adapters fail in many ways on a variant they do not know
        reason = str(error) or type(error).__name__
        raise ModelError(
            f"TransformerBridge cannot wrap {architecture_of(config)}: {reason}"
        ) from error
    for module in bridge.modules():
        if "_pattern" in vars(module):
            module.register_forward_hook(_forget_pattern)
    return bridge


def _forget_pattern(module: Any, *_: Any) -> None:
    """Fused attention keeps its last pattern, with its graph, for nobody: a layer's worth of memory each."""
    module._pattern = None
