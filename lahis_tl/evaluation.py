"""How well a model predicts texts, under any head mask: nats per token, bits per byte, perplexity."""

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from lahis_tl.access import LensModel, device_of, model_name, record_of
from lahis_tl.artifacts import Artifact, Card, keyed, unkeyed
from lahis_tl.batches import Batch, TokenIds, make_batches, tokenize
from lahis_tl.cards import card_of
from lahis_tl.corpora import Corpus
from lahis_tl.errors import ModelError
from lahis_tl.losses import text_nll
from lahis_tl.masks import HeadMask, masked
from lahis_tl.processes import exchange, is_main, shared_out, shows
from lahis_tl.shards import ShardStore
from lahis_tl.statistics import Interval, percentile_interval, resample_counts


@dataclass(frozen=True, eq=False)
class TextLosses(Artifact):
    """The loss of every text.

    Attributes:
        nll: language → float32 [text], mean next-token NLL in nats per token.
        n_tokens: language → int64 [text], number of predicted tokens.
        n_bytes: language → int64 [text], their length as UTF-8; 0 where the model has no tokenizer.
    """

    kind: ClassVar[str] = "text_losses"
    nll: Mapping[str, Float[Tensor, "_text"]]
    n_tokens: Mapping[str, Int[Tensor, "_text"]]
    n_bytes: Mapping[str, Int[Tensor, "_text"]]
    card: Card = field(default_factory=dict, repr=False)

    def __repr__(self) -> str:
        values = ", ".join(f"{code}: {self.per_token(code).value:.3f}" for code in self.nll)
        return f"TextLosses({values} nats per token)"

    def per_token(self, language: str, level: float = 0.95, seed: int = 0) -> Interval:
        """NLL in nats per token over all tokens of the language; the interval is over texts."""
        return self._ratio(language, self.n_tokens[language], 1.0, level, seed)

    def bits_per_byte(self, language: str, level: float = 0.95, seed: int = 0) -> Interval:
        """Bits per UTF-8 byte: comparable between tokenizers, and roughly between languages of a script.

        Raises:
            ValueError: the bytes are not known.
        """
        if not self.n_bytes[language].all():
            raise ValueError(
                "the texts' bytes are not known: bits per byte need a tokenizer and unlabelled texts"
            )
        return self._ratio(language, self.n_bytes[language], 1 / math.log(2), level, seed)

    def mean_exp(self, language: str) -> float:
        """The authors' perplexity: the mean over texts of exp(mean NLL). A few texts can rule it."""
        return float(self.nll[language].double().exp().mean())

    def _ratio(
        self, language: str, size: Int[Tensor, " text"], scale: float, level: float, seed: int
    ) -> Interval:
        total = self.nll[language].double() * self.n_tokens[language] * scale
        counts = resample_counts(len(total), 2000, seed).double()
        draws = (counts @ total) / (counts @ size.double())
        return percentile_interval(float(total.sum() / size.sum()), draws, level)

    def to_dataframe(self, level: float = 0.95) -> pd.DataFrame:
        """One row a language: nats per token and bits per byte with intervals, exp of the first, mean of exp."""
        rows = []
        for code in self.nll:
            nats = self.per_token(code, level)
            row = {"language": code, "nats_per_token": nats.value}
            row |= {"nats_lower": nats.lower, "nats_upper": nats.upper}
            if self.n_bytes[code].all():
                bits = self.bits_per_byte(code, level)
                row |= {"bits_per_byte": bits.value}
                row |= {"bits_lower": bits.lower, "bits_upper": bits.upper}
            row |= {"perplexity": math.exp(nats.value), "mean_exp": self.mean_exp(code)}
            rows.append({**row, "texts": len(self.nll[code])})
        return pd.DataFrame(rows)

    def _tensors(self) -> dict[str, Tensor]:
        sizes = {**keyed("n_tokens", self.n_tokens), **keyed("n_bytes", self.n_bytes)}
        return {**keyed("nll", self.nll), **sizes}

    @classmethod
    def _from_tensors(cls, tensors: dict[str, Tensor], card: Card) -> "TextLosses":
        nll, *sizes = (unkeyed(name, tensors) for name in ("nll", "n_tokens", "n_bytes"))
        return cls(nll, *sizes, card=card)


def perplexity(
    model: LensModel,
    corpus: Corpus | TokenIds,
    mask: HeadMask | None = None,
    *,
    max_tokens: int | None = 512,
    batch_tokens: int = 2048,
    progress: bool = True,
) -> TextLosses:
    """The loss of each text, under a head mask if one is given.

    >>> plain = perplexity(model, corpus)                                               # doctest: +SKIP
    >>> without = perplexity(model, corpus, HeadMask.scaling(heads.specific["fr"], 0))   # doctest: +SKIP
    >>> without.to_dataframe()[["language", "bits_per_byte"]]                           # doctest: +SKIP

    Raises:
        CorpusError: a text with fewer than two tokens.
        ModelError: a loss that is not finite.
        ValueError: the mask is not for this model.
    """
    evaluator = Evaluator(model, corpus, max_tokens, batch_tokens)
    (nll,) = evaluator.nll([mask], progress)
    sizes = evaluator.sizes()
    return TextLosses(evaluator.by_language(nll), *sizes, card=evaluator.card)


def refuse_text_rows(mask: HeadMask | None) -> None:
    """
    Raises:
        ValueError: the mask has a row for each text, whose order batches do not keep.
    """
    if mask is not None and mask.factors.ndim == 3:
        raise ValueError(
            f"a mask of shape {tuple(mask.factors.shape)} has a row for each text of one call of the model; "
            "here texts are batched by length, so give one [layer, head] for all"
        )


class Evaluator:
    """Texts tokenised and batched once, to be evaluated under many masks.

    Texts of all languages stand in one row, language by language in the corpus's order.
    """

    def __init__(
        self,
        model: LensModel,
        corpus: Corpus | TokenIds,
        max_tokens: int | None = 512,
        batch_tokens: int = 2048,
    ):
        self.model = model
        self.token_ids = tokenize(model, corpus, max_tokens)
        self.batches = make_batches(self.token_ids, batch_tokens)
        self.languages = list(self.token_ids)
        starts = torch.tensor([0, *(len(texts) for texts in self.token_ids.values())]).cumsum(0)
        self.rows = {
            code: slice(int(starts[i]), int(starts[i + 1])) for i, code in enumerate(self.languages)
        }
        self.n_texts = int(starts[-1])
        self.card = {
            "model": card_of(model),
            "corpus": corpus.card if isinstance(corpus, Corpus) else {"source": "token ids"},
            "settings": {"max_tokens": max_tokens, "batch_tokens": batch_tokens},
        }

    @torch.no_grad()
    def nll(
        self,
        masks: Sequence[HeadMask | None],
        progress: bool = True,
        checkpoint: str | Path | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> Float[Tensor, "mask text"]:
        """Mean NLL of every text under each mask, nats per token.

        Args:
            checkpoint: a folder for finished masks, from which an interrupted run goes on.
            about: what the masks came from, to say how another run's folder differs.

        Raises:
            ValueError: a mask with a row for each text; texts are batched by length here.
            ModelError: a loss that is not finite.
            ArtifactError: ``checkpoint`` belongs to a run with other settings.
        """
        for mask in masks:
            refuse_text_rows(mask)
        factors = [None if mask is None else mask.factors.tolist() for mask in masks]
        settings = {**self.card, **(about or {})}
        store = ShardStore(checkpoint, settings, [self.token_ids, factors])
        found = torch.empty(len(masks), self.n_texts)
        total, hidden = len(masks) * len(self.batches), not shows(progress)
        with store, tqdm(total=total, unit="batch", disable=hidden) as bar:
            # All processes must leave out the same masks, so one of them looks.
            kept, *_ = exchange(lambda: store.read_all(len(masks)))
            for i, part in kept.items():
                found[i] = part["nll"]
            bar.update(len(kept) * len(self.batches))
            jobs = [(i, b) for i in range(len(masks)) if i not in kept for b in self.batches]
            left = dict.fromkeys((i for i, _ in jobs), len(self.batches))
            for i, rows, values in shared_out(jobs, partial(self._batch_nll, masks)):
                found[i, rows] = values
                left[i] -= 1
                if not left[i]:
                    self._require_finite(found[i])
                    if is_main():
                        store.write(i, {"nll": found[i]})
                bar.update()
        return found

    def _batch_nll(
        self, masks: Sequence[HeadMask | None], number: int, job: tuple[int, Batch]
    ) -> list[tuple[int, list[int], Tensor]]:
        i, batch = job
        mask, device = masks[i], device_of(self.model)
        with nullcontext() if mask is None else masked(self.model, mask):
            ids, attention_mask = batch.ids.to(device), batch.attention_mask.to(device)
            values = text_nll(self.model, ids, attention_mask)
        return [(i, self._rows_of(batch), values.float().cpu())]

    def _require_finite(self, losses: Float[Tensor, " text"]) -> None:
        if not torch.isfinite(losses).all():
            raise ModelError(
                f"{model_name(self.model)}: {int((~torch.isfinite(losses)).sum())} losses are not finite; "
                "load it in float32 or bfloat16"
            )

    def by_language(self, values: Float[Tensor, "text *rest"]) -> dict[str, Tensor]:
        return {code: values[rows] for code, rows in self.rows.items()}

    def language_means(
        self, values: Float[Tensor, "*some text"]
    ) -> Float[Tensor, "*some language"]:
        """Mean over the texts of each language."""
        return torch.stack([values[..., rows].mean(-1) for rows in self.rows.values()], -1)

    def sizes(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Number of predicted tokens, and of their bytes, of every text."""
        tokens = {c: torch.tensor([len(ids) - 1 for ids in t]) for c, t in self.token_ids.items()}
        record = record_of(self.model)
        tokenizer = record.tokenizer if record else getattr(self.model, "tokenizer", None)
        if tokenizer is None:
            return tokens, {code: torch.zeros_like(n) for code, n in tokens.items()}

        def length(ids: Sequence[int]) -> int:
            return len(tokenizer.decode(list(ids), skip_special_tokens=True).encode())

        n_bytes = {
            code: torch.tensor([max(1, length(ids) - length(ids[:1])) for ids in texts])
            for code, texts in self.token_ids.items()
        }
        return tokens, n_bytes

    def _rows_of(self, batch: Batch) -> list[int]:
        return [self.rows[key.language].start + key.row for key in batch.keys]
