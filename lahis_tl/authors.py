"""The procedures of the authors' code (Liu et al. 2025), exact to their figures, for comparison.

Written from their published settings. They differ from the sound way that the rest of this package
takes: the mask is bfloat16 and moves while it scores, sums are kept in bfloat16, perplexity is a mean
of exponentials.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from lahis_tl.access import LensModel, device_of, frozen, grid_of
from lahis_tl.batches import TokenIds, tokenize
from lahis_tl.cards import card_of
from lahis_tl.corpora import Corpus
from lahis_tl.gradients import head_gradients
from lahis_tl.heads import HeadSet
from lahis_tl.losses import text_nll
from lahis_tl.masks import HeadMask, masked
from lahis_tl.pairs import EncodedPair, pair_nll
from lahis_tl.processes import is_main, shows
from lahis_tl.scores import HeadScores, score
from lahis_tl.shards import ShardStore

_LEARNING_RATE = 1e-2
_WEIGHT_DECAY = 0.01
_SCALE = 1000


def lahis_code(
    model: LensModel,
    corpus: Corpus | TokenIds,
    *,
    moving_mask: bool = True,
    max_tokens: int | None = 2048,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> HeadScores:
    """The importance matrix of the authors' code, language by language.

    The mean of |g|·m·1000 times the share of texts with g·m < 0. With ``moving_mask`` as they do it: one
    text at a time, m in bfloat16 from 1 on, an AdamW step (1e-2, weight decay 0.01) after every text,
    so that later texts are scored on a changed model, and the sum kept in bfloat16. Without it: the
    same formula in float32 with m fixed at 1, batched.

    Args:
        checkpoint: a folder for finished languages (with the mask fixed: batches), from which an interrupted run
            goes on.

    Returns:
        scores in millinats per token; their order of texts is the corpus's.

    Raises:
        ArtifactError: ``checkpoint`` belongs to a run with other settings.
    """
    if not moving_mask:
        options: dict[str, Any] = {"checkpoint": checkpoint, "progress": progress}
        return score(head_gradients(model, corpus, max_tokens=max_tokens, **options), "lahis_code")
    token_ids = tokenize(model, corpus, max_tokens)
    card = {
        "model": card_of(model),
        "corpus": corpus.card if isinstance(corpus, Corpus) else {"source": "token ids"},
        "settings": {"moving_mask": True, "max_tokens": max_tokens},
    }
    values = []
    with ShardStore(checkpoint, card, token_ids) as store:
        for number, (language, texts) in enumerate(token_ids.items()):
            part = store.read(number)
            if part is None:
                part = {"matrix": _moving_mask_matrix(model, texts, language, progress)}
                if is_main():
                    store.write(number, part)
            values.append(part["matrix"])
    return HeadScores(
        values=torch.stack(values),
        languages=tuple(token_ids),
        method="lahis_code, moving mask",
        unit="millinats per token",
        sign="high: matters, and mostly helps",
        n_texts=tuple(len(texts) for texts in token_ids.values()),
        card=card,
    )


def _moving_mask_matrix(
    model: LensModel, texts: Sequence[Sequence[int]], language: str, progress: bool
) -> Float[Tensor, "layer head"]:
    mask = nn.Parameter(
        torch.ones(grid_of(model).shape, dtype=torch.bfloat16, device=device_of(model))
    )
    optimizer = torch.optim.AdamW([mask], lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
    total = torch.zeros_like(mask, requires_grad=False)
    negative = torch.zeros(mask.shape, device=mask.device)
    for ids in tqdm(texts, desc=language, unit="text", disable=not shows(progress)):
        with frozen(model), torch.enable_grad(), masked(model, mask):
            (mask.grad,) = torch.autograd.grad(text_nll(model, *_one(model, ids)).sum(), mask)
        with torch.no_grad():
            total += mask.grad.abs() * mask * _SCALE
            negative += mask.grad * mask < 0
        optimizer.step()
    mean = (total / len(texts)).float()  # divided in bfloat16, as they do
    return (mean * (negative / len(texts))).detach().cpu()


def soft_mask(
    model: LensModel, pairs: Sequence[EncodedPair], heads: HeadSet, epochs: int = 2
) -> Float[Tensor, "layer n_heads"]:
    """The tuned mask of the authors' code: one pair at a time in the order given, loss on the answer's tokens.

    The whole mask is bfloat16 and decays; the gradient is zeroed outside the heads, and only rounding keeps the
    other entries at 1. The sound way is ``lahis_tl.tune_mask``.
    """
    mask = nn.Parameter(
        torch.ones(grid_of(model).shape, dtype=torch.bfloat16, device=device_of(model))
    )
    optimizer = torch.optim.AdamW([mask], lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
    chosen = HeadMask.scaling(heads, 0.0).factors.to(mask.device) == 0
    for _ in range(epochs):
        for pair in pairs:
            with frozen(model), torch.enable_grad(), masked(model, mask):
                (grad,) = torch.autograd.grad(pair_nll(model, [pair]).sum(), mask)
            mask.grad = grad * chosen
            optimizer.step()
    return mask.detach().float().cpu()


def _one(model: LensModel, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    batch = torch.tensor([list(ids)], device=device_of(model))
    return batch, torch.ones_like(batch)


@torch.no_grad()
def mean_exp_perplexity(
    model: LensModel,
    texts: Sequence[Sequence[int]],
    mask: HeadMask | None = None,
) -> float:
    """The authors' perplexity: the mean over texts of exp(mean NLL). A few texts can rule it."""
    mask = mask or HeadMask.ones(grid_of(model))
    with masked(model, mask):
        values = [float(text_nll(model, *_one(model, ids)).double().exp()) for ids in texts]
    return sum(values) / len(values)
