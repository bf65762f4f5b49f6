"""A model to work out by hand: one layer, two heads, no norm, attention uniform over the past.

Token a embeds to (1, 0), token b to (0, 1). Head 0 reads the first coordinate and writes (1, 2) times
it; head 1 reads the second and writes (3, 4). The unembedding is the identity.
"""

import warnings
from typing import Any

import torch
from torch import nn

CONFIG: dict[str, Any] = {
    "n_layers": 1,
    "d_model": 2,
    "n_ctx": 8,
    "d_head": 1,
    "n_heads": 2,
    "d_vocab": 2,
    "attn_only": True,
    "normalization_type": None,
}
A, B = 0, 1
WRITES = torch.tensor([[1.0, 2.0], [3.0, 4.0]])  # [head, d_model]


def micro_hooked() -> nn.Module:
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = HookedTransformer(HookedTransformerConfig(**CONFIG))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.embed.W_E.copy_(torch.eye(2))
        model.unembed.W_U.copy_(torch.eye(2))
        model.blocks[0].attn.W_V.copy_(torch.eye(2)[:, :, None])
        model.blocks[0].attn.W_O.copy_(WRITES[:, None, :])
    return model.requires_grad_(False).eval()


def micro_bridge() -> nn.Module:
    from transformer_lens.model_bridge import TransformerBridge

    model = TransformerBridge.boot_native({**CONFIG, "act_fn": "relu"})
    values = {"tok_embed": torch.eye(2), "head": torch.eye(2), ".v.": torch.eye(2), ".o.": WRITES.T}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.zero_()
            for part, value in values.items():
                if part in name and name.endswith("weight"):
                    parameter.copy_(value)
    return model.requires_grad_(False).eval()
