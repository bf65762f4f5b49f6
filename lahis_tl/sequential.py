"""Score texts until the answer is sure enough, with a correction for having looked on the way."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lahis_tl.access import LensModel, grid_of
from lahis_tl.artifacts import Artifact, Card
from lahis_tl.batches import tokenize
from lahis_tl.corpora import Corpus
from lahis_tl.gradients import HeadGradients, head_gradients
from lahis_tl.heads import HeadGrid, HeadSet, top_heads
from lahis_tl.per_text import PerTextHeads
from lahis_tl.scores import ScoreMethod, method_for, reduce_rows, score_method
from lahis_tl.statistics import check_level


@dataclass(frozen=True, eq=False)
class UntilSure(Artifact):
    """How far ``score_until`` went.

    Attributes:
        gradients: of all texts that it took.
        n_texts: language → texts after which it was sure; None where all texts were not enough.
        sets: language → the top k at that point.
        looks: one row a look and language: texts, overlap (lower bound), largest half-width, sure.
        card: the rule it stopped by.
    """

    kind: ClassVar[str] = "until_sure"
    gradients: HeadGradients
    n_texts: Mapping[str, int | None]
    sets: Mapping[str, HeadSet]
    looks: pd.DataFrame
    card: Card = field(default_factory=dict, repr=False)

    def __repr__(self) -> str:
        return f"UntilSure({self})"

    def __str__(self) -> str:
        taken = self.gradients.n_texts
        return "; ".join(
            f"{code}: sure after {n} texts"
            if n is not None
            else f"{code}: not sure after all {taken[code]} texts"
            for code, n in self.n_texts.items()
        )

    def to_dataframe(self) -> pd.DataFrame:
        """The looks."""
        return self.looks

    def _tensors(self) -> dict[str, Tensor]:
        return self.gradients._tensors()

    def _content(self) -> Card:
        return {
            "gradients": {**self.gradients.card, "content": self.gradients._content()},
            "n_texts": dict(self.n_texts),
            "sets": {code: members.flat_indices() for code, members in self.sets.items()},
            "looks": self.looks.to_dict("split", index=False),
        }

    @classmethod
    def _from_tensors(cls, tensors: dict[str, Tensor], card: Card) -> "UntilSure":
        content = card["content"]
        gradients = HeadGradients._from_tensors(tensors, content["gradients"])
        sets = {
            code: HeadSet.from_flat(gradients.grid, flat) for code, flat in content["sets"].items()
        }
        return cls(gradients, content["n_texts"], sets, pd.DataFrame(**content["looks"]), card)


@dataclass(frozen=True)
class StoppingRule:
    """When a score is sure enough.

    Attributes:
        top_k, overlap: at least the share ``overlap`` of the top k would stay if there were no end of
            texts.
        half_widths: instead, the intervals of these heads are to be no wider than ± so much.
        certainty: for each language, over all looks together.
        n_looks: how many looks there will be at most; each spends an equal part of 1 − certainty.
    """

    top_k: int
    overlap: float
    half_widths: Mapping[str, float]
    certainty: float
    n_looks: int
    draws: int = 4000
    seed: int = 0

    def look(
        self, source: PerTextHeads, language: str, method: ScoreMethod
    ) -> tuple[float, float, bool]:
        """Lower bound of the overlap, largest half-width over its bound, and whether that is enough."""
        samples, value = self._bootstrap(source, language, method)
        doubt = (1 - self.certainty) / self.n_looks / max(1, len(self.half_widths))
        inside = torch.zeros_like(value).flatten()
        inside[value.flatten().topk(self.top_k).indices] = 1
        again = samples.flatten(1).topk(self.top_k, 1).indices
        shares = inside[again].mean(1)
        overlap = float(shares.quantile(doubt, interpolation="lower"))
        widest = 0.0
        for label, bound in self.half_widths.items():
            layer, head = HeadGrid(*value.shape).check(label)
            ends = samples[:, layer, head].quantile(torch.tensor([doubt / 2, 1 - doubt / 2]))
            widest = max(widest, float(ends[1] - ends[0]) / 2 / bound)
        sure = widest <= 1 if self.half_widths else overlap >= self.overlap
        return overlap, widest, sure

    def _bootstrap(
        self, source: PerTextHeads, language: str, method: ScoreMethod
    ) -> tuple[Float[Tensor, "draw layer head"], Float[Tensor, "layer head"]]:
        n = source.n_texts[language]
        generator = torch.Generator().manual_seed(self.seed)
        picks = torch.randint(n, (self.draws, n), generator=generator)
        samples = torch.stack([reduce_rows(source, language, rows, method) for rows in picks])
        return samples, reduce_rows(source, language, range(n), method)


def score_until(
    model: LensModel,
    corpus: Corpus,
    method: str = "lahis",
    *,
    top_k: int = 20,
    overlap: float = 0.8,
    half_widths: Mapping[str, float] | None = None,
    certainty: float = 0.95,
    looks: Sequence[int] | None = None,
    curvature_draws: int = 0,
    max_tokens: int | None = 512,
    batch_tokens: int = 1024,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> UntilSure:
    """Go through a corpus text by text until each language's top k is stable, and say how many it took.

    Sure means: with probability ``certainty``, by bootstrap over texts, at least the share ``overlap`` of
    the top k stays. The looks are fixed beforehand and share the error among them (Bonferroni), so that
    looking often does not make one surer.

    >>> result = score_until(model, corpus, top_k=20, certainty=0.95)      # doctest: +SKIP
    >>> print(result)                                                      # doctest: +SKIP
    en: sure after 90 texts; fr: not sure after all 120 texts

    Args:
        half_widths: stop instead when the intervals of these heads are narrow enough, as in
            ``{"L12H3": 0.002}`` (± in the score's unit).
        looks: numbers of texts after which to look; by default from 10 on, each time half as many again, and
            at the end of a language's texts.
        curvature_draws: for ``second_order``, as of ``head_gradients``.
        checkpoint: a folder from which an interrupted run goes on.

    Raises:
        ValueError: a setting out of its range, or a language has fewer texts than the first look needs.
        IndexError: a head is outside the model's grid.
    """
    plans = {code: _plan(code, len(texts), looks) for code, texts in corpus.texts.items()}
    widths = dict(half_widths or {})
    _check_rule(grid_of(model), method, top_k, overlap, widths, certainty, curvature_draws)
    token_ids = tokenize(model, corpus, max_tokens)
    folder = None if checkpoint is None else Path(checkpoint)
    n_sure: dict[str, int | None] = {}
    found: list[HeadGradients] = []
    rows: list[dict[str, Any]] = []
    for code, plan in plans.items():
        rule = StoppingRule(top_k, overlap, widths, certainty, len(plan), seed=seed)
        parts: list[HeadGradients] = []
        n_sure[code] = None
        for done, n in zip([0, *plan], plan, strict=False):
            part = head_gradients(
                model,
                {code: token_ids[code][done:n]},
                max_tokens=max_tokens,
                batch_tokens=batch_tokens,
                curvature_draws=curvature_draws,
                seed=seed,
                checkpoint=folder and folder / f"{code}-{n}",
                progress=progress,
            )
            parts.append(part)
            so_far = HeadGradients.concatenate(parts)
            share, widest, sure = rule.look(so_far, code, method_for(so_far, method))
            rows.append(
                {"language": code, "texts": n, "overlap": share, "width": widest, "sure": sure}
            )
            if sure:
                n_sure[code] = n
                break
        found.append(HeadGradients.concatenate(parts))
    settings = {"method": method, "top_k": top_k, "overlap": overlap, "half_widths": widths}
    settings |= {"certainty": certainty, "looks": plans, "seed": seed}
    gradients = _joined(found, corpus, {"stopping": settings})
    sets = {
        code: top_heads(
            reduce_rows(gradients, code, range(n), method_for(gradients, method)), top_k
        )
        for code, n in gradients.n_texts.items()
    }
    return UntilSure(gradients, n_sure, sets, pd.DataFrame(rows), gradients.card)


def _plan(language: str, available: int, looks: Sequence[int] | None) -> list[int]:
    """The looks at one language's texts, the last one at all of them."""
    plan = default_looks(available) if looks is None else sorted({*looks, available})
    plan = [n for n in plan if n <= available]
    if plan[0] < 4:
        raise ValueError(
            f"the first look at {language!r} would be after {plan[0]} texts; at least 4 are needed "
            f"(there are {available})"
        )
    return plan


def _check_rule(
    grid: HeadGrid,
    method: str,
    top_k: int,
    overlap: float,
    half_widths: Mapping[str, float],
    certainty: float,
    curvature_draws: int,
) -> None:
    check_level(certainty)
    if not 0 < overlap <= 1:
        raise ValueError(f"overlap={overlap} must lie above 0 and not above 1")
    if not 1 <= top_k <= grid.size:
        raise ValueError(f"top_k={top_k} must lie between 1 and {grid.size} heads")
    for label, bound in half_widths.items():
        grid.check(label)
        if bound <= 0:
            raise ValueError(f"the half-width of {label} must be above 0, not {bound}")
    if "curvature" in score_method(method).needs and not curvature_draws:
        raise ValueError(f"the score {method!r} needs curvature_draws=2 or more")


def _joined(parts: list[HeadGradients], corpus: Corpus, extra: dict[str, Any]) -> HeadGradients:
    """Languages side by side; the card tells of the texts that were taken and no others."""
    joined = HeadGradients.side_by_side(parts)
    n_texts = joined.n_texts
    counts = set(n_texts.values())
    taken = replace(
        corpus,
        texts={code: texts[: n_texts[code]] for code, texts in corpus.texts.items()},
        ids=corpus.ids[: counts.pop()] if corpus.ids is not None and len(counts) == 1 else None,
    )
    return replace(joined, card={**joined.card, "corpus": taken.card, **extra})


def default_looks(available: int) -> list[int]:
    """
    >>> default_looks(60)
    [10, 15, 22, 33, 49, 60]
    """
    looks, n = [], 10
    while n < available:
        looks.append(n)
        n = n * 3 // 2
    return [*looks, available]
