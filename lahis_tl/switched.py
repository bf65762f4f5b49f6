"""Code-switched texts: the loss and the gradients of each language within one text."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Bool
from torch import Tensor
from tqdm.auto import tqdm

from lahis_tl.access import LensModel, context_length, device_of, frozen, grid_of, tokenizer_of
from lahis_tl.batches import Batch, make_batches
from lahis_tl.cards import card_of
from lahis_tl.errors import CorpusError, ModelError
from lahis_tl.evaluation import TextLosses, refuse_text_rows
from lahis_tl.gradients import HeadGradients
from lahis_tl.languages import check_language
from lahis_tl.losses import token_nll
from lahis_tl.masks import HeadMask, masked
from lahis_tl.processes import shows

# Pieces of a text in order, white space included, each with its language; None for names, digits, ...
Pieces: TypeAlias = Sequence[tuple[str, str | None]]


class LabelledText(NamedTuple):
    """Token ids of a text, and the language of each token; None where it has none or two."""

    ids: list[int]
    languages: list[str | None]
    straddling: int  # tokens dropped since they belong to pieces of two languages


@dataclass(frozen=True)
class _Labelled:
    texts: list[LabelledText]
    languages: list[str]

    @property
    def straddling(self) -> int:
        return sum(text.straddling for text in self.texts)

    def counted(self, batch: Batch, language: str) -> Bool[Tensor, "batch pos_minus_1"]:
        """Where a token of the language is predicted."""
        rows = []
        for key in batch.keys:
            labels = self.texts[key.row].languages[1:]
            row = [label == language for label in labels]
            rows.append(torch.tensor(row + [False] * (batch.ids.shape[1] - 1 - len(row))))
        return torch.stack(rows)


def label_tokens(model: LensModel, pieces: Pieces, max_tokens: int | None = 512) -> LabelledText:
    """Tokens of a text of labelled pieces, each with the language of its characters, white space aside.

    >>> label_tokens(model, [("I said: ", "en"), ("bonjour tout le monde", "fr")])   # doctest: +SKIP

    Raises:
        ModelError: the tokenizer does not tell where its tokens stand in the text.
        CorpusError: the text has fewer than two tokens, or a language code is unknown.
    """
    tokenizer = tokenizer_of(model)
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            "code-switched texts need a fast tokenizer, which tells its tokens' offsets"
        )
    text = "".join(piece for piece, _ in pieces)
    owner: list[str | None] = []
    for piece, language in pieces:
        code = None if language is None else check_language(language)
        owner += [code] * len(piece)
    limits = [n for n in (max_tokens, context_length(model)) if n is not None]
    encoded = tokenizer(text, return_offsets_mapping=True, verbose=False)
    ids = encoded["input_ids"][: min(limits, default=None)]
    if len(ids) < 2:
        raise CorpusError(f"the text {text[:40]!r} has {len(ids)} token(s); at least 2 are needed")
    languages: list[str | None] = []
    straddling = 0
    for start, end in encoded["offset_mapping"][: len(ids)]:
        found = {owner[i] for i in range(start, end) if not text[i].isspace()}
        straddling += len(found) > 1
        languages.append(found.pop() if len(found) == 1 else None)
    return LabelledText(list(ids), languages, straddling)


def switched_perplexity(
    model: LensModel,
    texts: Sequence[Pieces],
    mask: HeadMask | None = None,
    *,
    max_tokens: int | None = 512,
    batch_tokens: int = 2048,
) -> TextLosses:
    """The loss of each language's tokens within texts that mix languages.

    >>> switched_perplexity(model, [[("I said: ", "en"), ("bonjour", "fr")]])      # doctest: +SKIP
    TextLosses(en: 4.713, fr: 6.029 nats per token)

    Only texts with a token of the language to predict count for it. The card tells how many tokens
    straddled two languages and were dropped.

    Raises:
        CorpusError, ModelError: as ``label_tokens``.
        ValueError: a mask with a row for each text.
    """
    refuse_text_rows(mask)
    labelled = _label_all(model, texts, max_tokens)
    nll = {code: torch.zeros(len(texts)) for code in labelled.languages}
    n_tokens = {code: torch.zeros(len(texts), dtype=torch.int64) for code in labelled.languages}
    with torch.no_grad(), nullcontext() if mask is None else masked(model, mask):
        for batch in _batches(labelled, batch_tokens):
            rows = [key.row for key in batch.keys]
            losses, counts = _language_losses(model, batch, labelled)
            for code in labelled.languages:
                nll[code][rows] = losses[code].float().cpu()
                n_tokens[code][rows] = counts[code]
    there = {code: n > 0 for code, n in n_tokens.items()}
    return TextLosses(
        nll={code: nll[code][rows] for code, rows in there.items()},
        n_tokens={code: n_tokens[code][rows] for code, rows in there.items()},
        n_bytes={code: torch.zeros_like(n_tokens[code][rows]) for code, rows in there.items()},
        card=_card(model, labelled, max_tokens),
    )


def switched_gradients(
    model: LensModel,
    texts: Sequence[Pieces],
    *,
    max_tokens: int | None = 512,
    batch_tokens: int = 1024,
    progress: bool = True,
) -> HeadGradients:
    """Gradients of the mean NLL of each language's tokens, from the same texts.

    What differs between the languages cannot come from their having other texts; context is shared too. One
    forward pass, and one backward pass a language. Where every text has all languages, the result counts
    as parallel: ``language_heads(..., "tested")`` exchanges the languages within each text.

    >>> grads = switched_gradients(model, texts)                             # doctest: +SKIP
    >>> heads = language_heads(grads, "tested", method="sensitivity")        # doctest: +SKIP

    Raises:
        CorpusError, ModelError: as ``label_tokens``; or a loss is not finite.
    """
    labelled = _label_all(model, texts, max_tokens)
    grid, n_texts = grid_of(model), len(texts)
    room = {code: torch.zeros(n_texts, *grid.shape) for code in labelled.languages}
    losses = {code: torch.zeros(n_texts) for code in labelled.languages}
    n_tokens = {code: torch.zeros(n_texts, dtype=torch.int64) for code in labelled.languages}
    device = device_of(model)
    with tqdm(total=n_texts, unit="text", disable=not shows(progress)) as bar, frozen(model):
        for batch in _batches(labelled, batch_tokens):
            mask = torch.ones(len(batch.keys), *grid.shape, device=device, requires_grad=True)
            rows = [key.row for key in batch.keys]
            with torch.enable_grad(), masked(model, mask):
                by_language, counts = _language_losses(model, batch, labelled)
                for code, loss in by_language.items():
                    (gradient,) = torch.autograd.grad(loss.sum(), mask, retain_graph=True)
                    room[code][rows] = gradient.float().cpu()
                    losses[code][rows] = loss.detach().float().cpu()
                    n_tokens[code][rows] = counts[code]
            bar.update(len(rows))
    there = {code: n > 0 for code, n in n_tokens.items()}
    parallel = all(bool(rows.all()) for rows in there.values())
    card = _card(model, labelled, max_tokens)
    card["corpus"]["parallel"] = parallel
    found = HeadGradients(
        {code: room[code][rows] for code, rows in there.items()},
        {code: losses[code][rows] for code, rows in there.items()},
        {code: n_tokens[code][rows] for code, rows in there.items()},
        card=card,
    )
    if not all(torch.isfinite(values).all() for values in found.gradients.values()):
        raise ModelError("a gradient is not finite (NaN or infinity); load the model in float32")
    return found


def _label_all(model: LensModel, texts: Sequence[Pieces], max_tokens: int | None) -> _Labelled:
    if not texts:
        raise CorpusError("no code-switched texts were given")
    labelled = [label_tokens(model, pieces, max_tokens) for pieces in texts]
    seen = [code for text in labelled for code in text.languages[1:] if code is not None]
    if not seen:
        raise CorpusError("no token of the texts belongs to a language; label their pieces")
    return _Labelled(labelled, list(dict.fromkeys(seen)))


def _batches(labelled: _Labelled, batch_tokens: int) -> list[Batch]:
    return make_batches({"switched": [text.ids for text in labelled.texts]}, batch_tokens)


def _language_losses(
    model: LensModel, batch: Batch, labelled: _Labelled
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Mean NLL of each language's tokens in every text (0 where it has none), and their number."""
    device = device_of(model)
    nll = token_nll(model, batch.ids.to(device), batch.attention_mask.to(device))
    losses, counts = {}, {}
    for code in labelled.languages:
        counted = labelled.counted(batch, code)
        counts[code] = counted.sum(1)
        here = counted.to(nll.device)
        losses[code] = (nll * here).sum(1) / here.sum(1).clamp_min(1)
    return losses, counts


def _card(model: LensModel, labelled: _Labelled, max_tokens: int | None) -> dict:
    return {
        "model": card_of(model),
        "corpus": {
            "source": "code-switched texts",
            "texts": len(labelled.texts),
            "straddling_tokens_dropped": labelled.straddling,
        },
        "settings": {"max_tokens": max_tokens},
    }
