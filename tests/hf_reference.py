"""The other road to a head mask: the Hugging Face model, its output projection scaled by hand."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def output_projections(hf: nn.Module) -> list[nn.Module]:
    """The module after the heads of every layer."""
    names = ("self_attn.o_proj", "attn.c_proj", "attention.dense", "self_attention.dense")
    found = [module for name, module in hf.named_modules() if name.endswith(names)]
    assert len(found) == hf.config.num_hidden_layers
    return found


@contextmanager
def scaled_columns(hf: nn.Module, factors: Tensor) -> Iterator[None]:
    """Multiply the projection's input columns of each head by its factor [layer, head]."""
    kept: list[tuple[Tensor, Tensor]] = []
    for module, row in zip(output_projections(hf), factors, strict=True):
        weight: Any = module.weight
        kept.append((weight, weight.data.clone()))
        per_column = row.repeat_interleave(weight.numel() // len(weight) // len(row)).to(weight)
        if type(module).__name__ == "Conv1D":  # stores [in, out]
            weight.data *= row.repeat_interleave(len(weight) // len(row)).to(weight)[:, None]
        else:
            weight.data *= per_column
    try:
        yield
    finally:
        for weight, old in kept:
            weight.data.copy_(old)


@torch.no_grad()
def logits(hf: nn.Module, ids: Tensor) -> Tensor:
    return hf(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits


def text_losses(hf: nn.Module, texts: list[list[int]]) -> Tensor:
    """Mean NLL of each text, one by one, by Hugging Face and plain cross entropy."""
    losses = []
    for text in texts:
        ids = torch.tensor([text])
        losses.append(nn.functional.cross_entropy(logits(hf, ids)[0, :-1], ids[0, 1:]))
    return torch.stack(losses)
