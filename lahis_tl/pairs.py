"""Prompts and what should come after them, as token ids; the loss of the second alone."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from lahis_tl.access import LensModel, context_length, device_of, grid_of, tokenizer_of
from lahis_tl.evaluation import refuse_text_rows
from lahis_tl.losses import token_nll
from lahis_tl.masks import HeadMask, masked
from lahis_tl.processes import shows
from lahis_tl.prompts import decoding_groups, open_ids


@dataclass(frozen=True)
class EncodedPair:
    """Token ids of prompt and target together, and how many of them are the prompt's."""

    ids: tuple[int, ...]
    n_prompt: int


Pair = tuple[str, str]


def encode_pairs(model: LensModel, pairs: Sequence[Pair | EncodedPair]) -> list[EncodedPair]:
    """(prompt, target) texts as token ids.

    Both are tokenised together, as the model would meet them, and cut where the prompt's own tokens end, so that no
    part of the prompt can count as the target.

    Raises:
        ValueError: no pair; a target without a token, or one that the tokenizer joins with the prompt's end; or a pair
            longer than the context: none is cut in silence.
    """
    if not pairs:
        raise ValueError("there is no pair of prompt and target")
    found = [
        pair if isinstance(pair, EncodedPair) else _encoded(model, i, pair)
        for i, pair in enumerate(pairs)
    ]
    limit = context_length(model)
    for i, pair in enumerate(found):
        if not 0 < pair.n_prompt < len(pair.ids):
            raise ValueError(
                f"pair {i} has {pair.n_prompt} prompt tokens of {len(pair.ids)}: prompt and target need at least "
                "one token each"
            )
        if limit is not None and len(pair.ids) > limit:
            raise ValueError(
                f"pair {i} has {len(pair.ids)} tokens, more than the model's context of {limit}; shorten its "
                "prompt or leave it out"
            )
    return found


def _encoded(model: LensModel, index: int, pair: Pair) -> EncodedPair:
    tokenizer = tokenizer_of(model)
    prompt, target = pair
    alone, whole = open_ids(tokenizer, [prompt, prompt + target])
    if list(whole[: len(alone)]) != list(alone):
        raise ValueError(
            f"the tokenizer joins the target {target!r} of pair {index} with the prompt's end {prompt[-20:]!r}; "
            "put the space between them at the head of the target"
        )
    if len(whole) == len(alone):
        raise ValueError(f"the target {target!r} of pair {index} has no token")
    return EncodedPair(tuple(whole), len(alone))


def pad_pairs(
    pairs: Sequence[EncodedPair],
) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"], Bool[Tensor, "batch pos_minus_1"]]:
    """Ids, attention mask, and which tokens (from the second on) are targets."""
    rows = [torch.tensor(pair.ids) for pair in pairs]
    ids = pad_sequence(rows, batch_first=True)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    place = torch.arange(1, ids.shape[1])[None]
    starts = torch.tensor([pair.n_prompt for pair in pairs])[:, None]
    return ids, mask, (place >= starts) & mask[:, 1:].bool()


def pair_nll(model: LensModel, pairs: Sequence[EncodedPair]) -> Float[Tensor, " pair"]:
    """Mean NLL of each target's tokens in nats; differentiable with respect to a mask around it."""
    ids, mask, wanted = pad_pairs(pairs)
    device = device_of(model)
    nll = token_nll(model, ids.to(device), mask.to(device), wanted)
    return nll.sum(1) / wanted.sum(1).to(nll.device)


@torch.no_grad()
def target_losses(
    model: LensModel,
    pairs: Sequence[Pair | EncodedPair],
    mask: HeadMask | None = None,
    *,
    batch_tokens: int = 2048,
    progress: bool = True,
) -> Float[Tensor, " pair"]:
    """Mean NLL of each target after its prompt, nats per token, under a head mask if one is given.

    >>> target_losses(model, [("The capital of France is", " Paris")])       # doctest: +SKIP
    """
    refuse_text_rows(mask)
    encoded = encode_pairs(model, pairs)
    found = torch.empty(len(encoded))
    factors = HeadMask.ones(grid_of(model)) if mask is None else mask
    with (
        tqdm(total=len(encoded), unit="pair", disable=not shows(progress)) as bar,
        masked(model, factors),
    ):
        for group in decoding_groups([pair.ids for pair in encoded], 0, batch_tokens):
            found[group] = pair_nll(model, [encoded[i] for i in group]).float().cpu()
            bar.update(len(group))
    return found
