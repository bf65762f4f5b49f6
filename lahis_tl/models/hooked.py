"""Hugging Face weights as a HookedTransformer (transformer-lens 3.9), without copying them.

TransformerLens converts only checkpoints on its list of names. Its converters are used here by
architecture instead, with configurations of our own for those that it hard-codes by name (Gemma,
OLMo 2) and a converter of our own for Cohere (Aya-23), which it never had.
"""

import json
import logging
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import einops
import torch
from torch import Tensor, nn

from lahis_tl.access import LensModel
from lahis_tl.errors import ModelError

# Architectures whose configuration transformer-lens reads from config.json.
_READ_BY_TRANSFORMER_LENS = frozenset(
    f"{name}ForCausalLM"
    for name in [
        "GPTNeo",
        "OPT",
        "GPTJ",
        "GPTNeoX",
        "Mistral",
        "Mixtral",
        "Bloom",
        "Llama",
        "Qwen2",
        "Qwen3",
        "Phi",
        "Phi3",
        "Apertus",
    ]
) | {"GPT2LMHeadModel"}
_CONVERTS_BIASES = frozenset({"GPTNeoXForCausalLM", "ApertusForCausalLM"})
# transformer-lens picks converters by these words in a path, whatever the folder holds.
_MISLEADING = ("llama", "gemma")


def why_not_hooked(config: Any) -> str | None:
    """Why a HookedTransformer cannot express a model, or None if it can.

    These are the cases that transformer-lens 3.9 converts without a word into another model.
    """
    architecture = architecture_of(config)
    if architecture not in _READ_BY_TRANSFORMER_LENS | set(_OWN_CONFIGS):
        return f"HookedTransformer has no converter for {architecture}"
    for option in ("attention_bias", "mlp_bias"):
        if getattr(config, option, False) and architecture not in _CONVERTS_BIASES:
            return f"its converter drops the biases of {option}=True"
    if architecture == "CohereForCausalLM" and getattr(config, "use_qk_norm", False):
        return "it has no per-head normalisation of Cohere's queries and keys"
    if (
        architecture == "Olmo2ForCausalLM"
        and config.num_key_value_heads != config.num_attention_heads
    ):
        return "its OLMo 2 converter has no grouped-query heads"
    if architecture in ("LlamaForCausalLM", "Phi3ForCausalLM", "Qwen2ForCausalLM"):
        head_dim = getattr(config, "head_dim", None)
        if head_dim and head_dim * config.num_attention_heads != config.hidden_size:
            return f"it assumes head_dim = hidden_size / heads, not {head_dim}"
    if architecture.startswith("Qwen") and getattr(config, "use_sliding_window", False):
        return "its Qwen converter ignores the sliding window"
    return _why_not_rope(config, architecture)


def _why_not_rope(config: Any, architecture: str) -> str | None:
    rope = getattr(config, "rope_parameters", None) or {}
    known = {"default"} | (
        {"llama3"} if architecture in ("LlamaForCausalLM", "ApertusForCausalLM") else set()
    )
    layouts = rope.values() if any(isinstance(v, dict) for v in rope.values()) else [rope]
    for layout in layouts:
        kind = layout.get("rope_type", "default")
        if kind not in known:
            return f"its {architecture} has no rotary scaling of type {kind!r}"
        partial = layout.get("partial_rotary_factor", 1.0)
        if architecture == "Phi3ForCausalLM" and partial not in (None, 1.0):
            return f"its Phi3 rotates all dimensions, not a share of {partial}"
    return None


def architecture_of(config: Any) -> str:
    """The class name of the Hugging Face model, such as ``LlamaForCausalLM``."""
    return str(config.architectures[0])


def build_hooked(hf: nn.Module) -> nn.Module:
    """A HookedTransformer that shares the weights of a Hugging Face model.

    The parameters are views laid out as Hugging Face stores them. That layout is the one in which
    HookedTransformer's own ``.T.contiguous()`` and rearrangements cost nothing; with parameters
    copied into its nominal layout, every forward pass would copy each weight, and keep the copy
    for the backward pass.
    """
    from transformer_lens import HookedTransformer

    config: Any = hf.config
    cfg = _hooked_config(hf)
    convert = _OWN_WEIGHTS.get(architecture_of(config), _convert_by_transformer_lens)
    weights = convert(hf, cfg)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        model = HookedTransformer(cfg, move_to_device=False)
    _assign(model, weights, cfg)
    return model.to(cfg.device, print_details=False) if cfg.device else model


def _assign(model: LensModel, weights: dict[str, Tensor], cfg: Any) -> None:
    device, dtype = torch.device(cfg.device), cfg.dtype
    cast = {
        name: weight.detach().to(device, dtype if weight.is_floating_point() else weight.dtype)
        for name, weight in weights.items()
    }
    found = model.load_state_dict(cast, strict=False, assign=True)
    parameters = dict(model.named_parameters())
    unset = [name for name in found.missing_keys if name in parameters]
    for name in [name for name in unset if _is_absent_by_design(name, cfg)]:
        with torch.no_grad():
            parameters[name].zero_()
        unset.remove(name)
    unused = [
        name
        for name in found.unexpected_keys
        if cast[name].any() and not name.endswith(("mask", "IGNORE"))
    ]
    if unset or unused:
        raise ModelError(
            f"the conversion to HookedTransformer left weights unset {unset[:3]} or unused {unused[:3]}"
        )


def _is_absent_by_design(name: str, cfg: Any) -> bool:
    """Biases that the architecture lacks, and learned positions where it has others."""
    if name == "pos_embed.W_pos":
        return cfg.positional_embedding_type != "standard"
    return name.rsplit(".", 1)[-1].lstrip("_").startswith("b")


def _hooked_config(hf: nn.Module) -> Any:
    from transformer_lens import HookedTransformerConfig

    config: Any = hf.config
    architecture = architecture_of(config)
    parameter = next(hf.parameters())
    if architecture in _OWN_CONFIGS:
        fields = {
            **_common_fields(config),
            **_OWN_CONFIGS[architecture](config),
            "original_architecture": architecture,
            "model_name": architecture,
            "default_prepend_bos": True,
            "init_weights": False,
        }
        cfg = HookedTransformerConfig.from_dict(
            {**fields, "dtype": parameter.dtype, "device": str(parameter.device)}
        )
    else:
        cfg = _config_by_transformer_lens(config, parameter)
    if cfg.positional_embedding_type == "rotary":  # the cap of 2048 is for masks no longer built
        cfg.n_ctx = getattr(config, "max_position_embeddings", cfg.n_ctx)
    cfg.tokenizer_name = None
    return cfg


def _config_by_transformer_lens(config: Any, parameter: Tensor) -> Any:
    from transformer_lens import loading_from_pretrained as loading

    fields = config.to_dict()
    fields.setdefault("n_ctx", fields.get("n_positions"))  # asked of GPT-2
    with _neutral_folder() as folder:
        (folder / "config.json").write_text(json.dumps(fields, default=str))
        level = logging.root.level
        logging.root.setLevel(logging.ERROR)
        try:
            return loading.get_pretrained_model_config(
                str(folder), hf_cfg=fields, dtype=parameter.dtype, device=str(parameter.device)
            )
        finally:
            logging.root.setLevel(level)


def _convert_by_transformer_lens(hf: nn.Module, cfg: Any) -> dict[str, Tensor]:
    from transformer_lens import loading_from_pretrained as loading

    with _neutral_folder() as folder:
        return loading.get_pretrained_state_dict(str(folder), cfg, hf_model=hf, dtype=cfg.dtype)


class _neutral_folder(tempfile.TemporaryDirectory):
    """A temporary folder whose path does not look like a model family to transformer-lens."""

    def __init__(self) -> None:
        bases = [Path(tempfile.gettempdir()), Path.cwd(), Path("/")]
        base = next(b for b in bases if not any(w in str(b).lower() for w in _MISLEADING))
        super().__init__(dir=base, prefix="config-")

    def __enter__(self) -> Path:  # type: ignore[override]
        return Path(super().__enter__())


def _common_fields(config: Any) -> dict[str, Any]:
    """What the gated rotary architectures below have in common."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {
        "d_model": config.hidden_size,
        "d_head": head_dim,
        "n_heads": config.num_attention_heads,
        "n_key_value_heads": config.num_key_value_heads,
        "d_mlp": config.intermediate_size,
        "n_layers": config.num_hidden_layers,
        "n_ctx": config.max_position_embeddings,
        "d_vocab": config.vocab_size,
        "act_fn": getattr(config, "hidden_activation", None) or config.hidden_act,
        "eps": getattr(config, "rms_norm_eps", None),
        "normalization_type": "RMS",
        "positional_embedding_type": "rotary",
        "rotary_dim": head_dim,
        "rotary_adjacent_pairs": False,
        "gated_mlp": True,
        "final_rms": True,
    }


def _rope_theta(config: Any, layer_type: str | None = None) -> float:
    rope = config.rope_parameters
    return float((rope[layer_type] if layer_type else rope)["rope_theta"])


def _cohere(config: Any) -> dict[str, Any]:
    return {
        "normalization_type": "LN",
        "final_rms": False,
        "eps": config.layer_norm_eps,
        "rotary_base": _rope_theta(config),
        "rotary_adjacent_pairs": True,
        "parallel_attn_mlp": True,
    }


def _gemma(config: Any) -> dict[str, Any]:
    return {"rotary_base": _rope_theta(config), "act_fn": "gelu_pytorch_tanh"}


def _windowed(config: Any) -> dict[str, Any]:
    kinds = {"sliding_attention": "local", "full_attention": "global"}
    return {
        "use_local_attn": True,
        "window_size": config.sliding_window,
        "attn_types": [kinds[kind] for kind in config.layer_types],
        "use_normalization_before_and_after": True,
        "attn_scale": config.query_pre_attn_scalar**0.5,
    }


def _gemma2(config: Any) -> dict[str, Any]:
    return {
        **_windowed(config),
        "rotary_base": _rope_theta(config),
        "attn_scores_soft_cap": config.attn_logit_softcapping or -1.0,
        "output_logits_soft_cap": config.final_logit_softcapping or -1.0,
    }


def _gemma3(config: Any) -> dict[str, Any]:
    return {
        **_windowed(config),
        "rotary_base": _rope_theta(config, "full_attention"),
        "rotary_base_local": _rope_theta(config, "sliding_attention"),
        "use_qk_norm": True,
    }


def _olmo2(config: Any) -> dict[str, Any]:
    return {
        "n_key_value_heads": None,
        "rotary_base": _rope_theta(config),
        "attn_types": ["global"] * config.num_hidden_layers,
    }


_OWN_CONFIGS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "CohereForCausalLM": _cohere,
    "GemmaForCausalLM": _gemma,
    "Gemma2ForCausalLM": _gemma2,
    "Gemma3ForCausalLM": _gemma3,
    "Olmo2ForCausalLM": _olmo2,
}


def _convert_cohere(hf: Any, cfg: Any) -> dict[str, Tensor]:
    """Cohere's weights (Aya-23): one norm for attention and MLP, logits times ``logit_scale``."""
    weights: dict[str, Tensor] = {"embed.W_E": hf.model.embed_tokens.weight}
    for index, layer in enumerate(hf.model.layers):
        at = f"blocks.{index}"
        attention, mlp = layer.self_attn, layer.mlp
        for norm in ("ln1", "ln2"):
            weights[f"{at}.{norm}.w"] = layer.input_layernorm.weight
        for ours, theirs, heads in (
            ("W_Q", attention.q_proj, cfg.n_heads),
            ("_W_K", attention.k_proj, cfg.n_key_value_heads),
            ("_W_V", attention.v_proj, cfg.n_key_value_heads),
        ):
            weights[f"{at}.attn.{ours}"] = einops.rearrange(
                theirs.weight, "(head d_head) d_model -> head d_model d_head", head=heads
            )
        weights[f"{at}.attn.W_O"] = einops.rearrange(
            attention.o_proj.weight,
            "d_model (head d_head) -> head d_head d_model",
            head=cfg.n_heads,
        )
        weights[f"{at}.mlp.W_gate"] = mlp.gate_proj.weight.T
        weights[f"{at}.mlp.W_in"] = mlp.up_proj.weight.T
        weights[f"{at}.mlp.W_out"] = mlp.down_proj.weight.T
    weights["ln_final.w"] = hf.model.norm.weight
    weights["unembed.W_U"] = (hf.lm_head.weight * hf.config.logit_scale).T
    return weights


_OWN_WEIGHTS: dict[str, Callable[[Any, Any], dict[str, Tensor]]] = {
    "CohereForCausalLM": _convert_cohere
}


def empty_cache(model: nn.Module, batch: int) -> Any:
    """Keys and values for a HookedTransformer to fill while it decodes ``batch`` texts."""
    from transformer_lens import TransformerLensKeyValueCache

    config: Any = model.cfg
    return TransformerLensKeyValueCache.init_cache(config, config.device, batch)
