"""From texts to padded batches of token ids."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lahis_tl.access import LensModel, context_length, tokenizer_of
from lahis_tl.corpora import Corpus
from lahis_tl.errors import CorpusError, ModelError

logger = logging.getLogger(__name__)

TokenIds = Mapping[str, Sequence[Sequence[int]]]  # language → texts → ids


class TextKey(NamedTuple):
    """One text of a corpus."""

    language: str
    row: int


class Batch(NamedTuple):
    """Texts of similar length, padded on the right."""

    keys: list[TextKey]
    ids: Int[Tensor, "batch pos"]
    attention_mask: Int[Tensor, "batch pos"]


def tokenize(
    model: LensModel, corpus: Corpus | TokenIds, max_tokens: int | None = None
) -> dict[str, list[list[int]]]:
    """Token ids of each text, with the tokenizer's own special tokens, cut at ``max_tokens``
    and at the model's context.

    Ids that are given instead of texts are only cut and checked.

    Raises:
        CorpusError: a text has fewer than two tokens, so that no token is predicted.
        ValueError: ``max_tokens`` is below 2.
    """
    limit = context_length(model)
    if max_tokens is not None and max_tokens < 2:
        raise ValueError(f"max_tokens={max_tokens}: at least 2 tokens are needed to predict one")
    cut = min((bound for bound in (max_tokens, limit) if bound is not None), default=None)
    if isinstance(corpus, Corpus):
        tokenizer = tokenizer_of(model)
        found = {language: _encode(tokenizer, texts) for language, texts in corpus.texts.items()}
    else:
        found = {language: [list(ids) for ids in texts] for language, texts in corpus.items()}
    empty = [language for language, texts in found.items() if not texts]
    if empty or not found:
        raise CorpusError(
            f"there is no text to tokenise in {', '.join(map(repr, empty)) or 'the corpus'}"
        )
    for language, texts in found.items():
        for index, ids in enumerate(texts):
            if len(ids[:cut]) < 2:
                raise CorpusError(
                    f"text {index} of {language!r} has {len(ids)} token(s); at least 2 are needed to "
                    "predict one. Drop it, or raise min_chars in load_corpus"
                )
    return {language: [ids[:cut] for ids in texts] for language, texts in found.items()}


def _encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    # A lone surrogate cannot be encoded as UTF-8; the replacement character stands for it.
    clean = [text.encode("utf-8", "replace").decode("utf-8") for text in texts]
    return [list(ids) for ids in tokenizer(clean, verbose=False)["input_ids"]]


def make_batches(token_ids: TokenIds, batch_tokens: int) -> list[Batch]:
    """Batches over all languages by falling length; ``batch_tokens`` bounds padded tokens in each.

    A text longer than the bound makes a batch of its own. Texts of like length come together, so
    little is padding, and the longest come first, so that memory runs out at once or never.
    """
    if batch_tokens < 2:
        raise ValueError(f"batch_tokens={batch_tokens} must be at least 2")
    keys = [
        TextKey(language, i) for language, texts in token_ids.items() for i in range(len(texts))
    ]
    keys.sort(key=lambda key: -len(token_ids[key.language][key.row]))
    batches: list[Batch] = []
    start = 0
    while start < len(keys):
        longest = len(token_ids[keys[start].language][keys[start].row])
        group = keys[start : start + max(1, batch_tokens // longest)]
        batches.append(_pad(group, token_ids))
        start += len(group)
    return batches


def _pad(keys: list[TextKey], token_ids: TokenIds) -> Batch:
    rows = [torch.tensor(token_ids[key.language][key.row]) for key in keys]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=0)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return Batch(keys, ids, mask)


def halving(batch: Batch, compute: Callable[[Batch], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What ``compute`` gives, rows in the batch's order; where memory runs out, of halves of the batch.

    Raises:
        ModelError: a single text does not fit.
    """
    try:
        return compute(batch)
    except torch.OutOfMemoryError as error:
        if len(batch.keys) == 1:
            language, index = batch.keys[0]
            raise ModelError(
                f"out of memory on text {index} of {language!r} alone, {batch.ids.shape[1]} tokens: lower max_tokens, "
                "or load the model in bfloat16 or on more devices"
            ) from error
    # Outside the handler, whose traceback would keep what the failed pass had allocated.
    middle = len(batch.keys) // 2
    logger.warning(
        "out of memory on %d texts of %d tokens; going on with %d at a time (lower batch_tokens to avoid this)",
        *(len(batch.keys), batch.ids.shape[1], middle),
    )
    halves = [
        halving(Batch(batch.keys[rows], batch.ids[rows], batch.attention_mask[rows]), compute)
        for rows in (slice(middle), slice(middle, None))
    ]
    return {name: torch.cat([half[name] for half in halves]) for name in halves[0]}


def require_finite(what: str, values: Float[Tensor, "batch *rest"], batch: Batch) -> None:
    """
    Raises:
        ModelError: some value of a text is NaN or infinity; names the text.
    """
    good = torch.isfinite(values.detach().reshape(len(batch.keys), -1)).all(1)
    if not good.all():
        language, index = batch.keys[int((~good).nonzero()[0])]
        raise ModelError(
            f"the {what} of text {index} of {language!r} is not finite (NaN or infinity): the model "
            "overflows there. Load it in float32 or bfloat16, or leave the text out"
        )
