"""Prompts as token ids, in batches, with a head mask for each."""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lahis_tl.access import LensModel, context_length, grid_of, tokenizer_of
from lahis_tl.masks import HeadMask

Masks = HeadMask | Tensor | Sequence[HeadMask | None] | None


def prompt_ids(model: LensModel, prompts: Sequence[str], max_new_tokens: int) -> list[list[int]]:
    """Token ids of prompts, with the tokenizer's own special tokens in front.

    Raises:
        ValueError: there is none, one is empty, or one leaves no room in the context.
    """
    if not prompts:
        raise ValueError("there is no prompt")
    tokenizer, limit = tokenizer_of(model), context_length(model)
    encoded = open_ids(tokenizer, prompts)
    for i, ids in enumerate(encoded):
        if not ids:
            raise ValueError(f"prompt {i} ({prompts[i]!r}) has no token to go on from")
        if limit is not None and len(ids) + max_new_tokens > limit:
            raise ValueError(
                f"prompt {i} has {len(ids)} tokens; with {max_new_tokens} new ones that exceeds the model's "
                f"context of {limit}. Shorten it ({prompts[i][:40]!r}...) or lower max_new_tokens"
            )
    return encoded


def open_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts that are to go on: without the end that some tokenizers put to every text."""
    clean = [text.encode("utf-8", "replace").decode() for text in texts]
    encoded = [list(ids) for ids in tokenizer(clean, verbose=False)["input_ids"]]
    closing = tokenizer.eos_token_id
    for text, ids in zip(clean, encoded, strict=True):
        if len(ids) > 1 and ids[-1] == closing and not text.endswith(str(tokenizer.eos_token)):
            ids.pop()
    return encoded


def decoding_groups(
    encoded: Sequence[Sequence[int]], new_tokens: int, batch_tokens: int
) -> list[list[int]]:
    """Indices of prompts that run together: of like length, the longest first."""
    order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i]))
    groups, start = [], 0
    while start < len(order):
        longest = len(encoded[order[start]]) + new_tokens
        size = max(1, batch_tokens // longest)
        groups.append(order[start : start + size])
        start += size
    return groups


def mask_rows(
    model: LensModel, mask: Masks, n_prompts: int, rows: Sequence[int]
) -> HeadMask | None:
    """The mask of some of the prompts, [text, layer, head], in their order; None where nothing is masked.

    Raises:
        ValueError: as many masks as prompts are needed and others were given.
    """
    if mask is None:
        return None
    fill = None
    mask = HeadMask(mask) if isinstance(mask, Tensor) else mask
    if isinstance(mask, HeadMask):
        if mask.grid != grid_of(model):
            raise ValueError(f"the mask is for {mask.grid}, but the model has {grid_of(model)}")
        factors, fill = mask.factors, mask.fill
        if factors.ndim == 2:
            factors = factors.expand(n_prompts, *factors.shape)
    else:
        ones = torch.ones(grid_of(model).shape)
        masks = list(mask)
        if len(masks) != n_prompts:
            raise ValueError(
                f"{len(masks)} masks for {n_prompts} prompts: one for all or one for each"
            )
        wrong = [m.grid for m in masks if m is not None and m.grid != grid_of(model)]
        if wrong:
            raise ValueError(f"a mask is for {wrong[0]}, but the model has {grid_of(model)}")
        if any(m is not None and (m.factors.ndim != 2 or m.fill is not None) for m in masks):
            raise ValueError(
                "masks of single prompts have shape [layer, head] and no fill; give one HeadMask for a fill"
            )
        factors = torch.stack([ones if m is None else m.factors for m in masks])
    if len(factors) != n_prompts:
        raise ValueError(
            f"{len(factors)} masks for {n_prompts} prompts: one for all or one for each"
        )
    return HeadMask(factors[list(rows)], fill)


def mask_card(mask: Masks) -> Any:
    """What a card says of a mask: factors of the heads that it changes; of many, for each prompt."""
    if mask is None:
        return None
    mask = HeadMask(mask) if isinstance(mask, Tensor) else mask
    if not isinstance(mask, HeadMask):
        return [mask_card(each) for each in mask]
    if mask.factors.ndim == 3:
        return [mask_card(HeadMask(row)) for row in mask.factors.detach()]
    factors = {head.label: float(mask.factors[head]) for head in mask.heads()}
    return factors if mask.fill is None else {**factors, "fill": True}


def mask_hash(mask: Masks) -> str:
    """Tells masks apart to the last bit, fill included."""
    digest = hashlib.sha256()
    for each in [mask] if mask is None or isinstance(mask, (HeadMask, Tensor)) else mask:
        whole = HeadMask(each) if isinstance(each, Tensor) else each
        for tensor in () if whole is None else (whole.factors, whole.fill):
            content = (
                b"" if tensor is None else tensor.detach().cpu().contiguous().numpy().tobytes()
            )
            digest.update(len(content).to_bytes(8, "big") + content)
        digest.update(b"/")
    return digest.hexdigest()
