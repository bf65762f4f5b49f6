"""Error bars and tests: bootstrap over texts, label permutation, empirical p-values.

Plain functions of tensors first; then what they say of a score.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import pandas as pd
import torch
from jaxtyping import Bool, Float
from scipy.stats import binomtest, spearmanr
from torch import Tensor

from lahis_tl.artifacts import Artifact, Card
from lahis_tl.heads import HeadGrid, HeadSet, head_table, top_heads
from lahis_tl.per_text import PerTextHeads
from lahis_tl.scores import method_for, reduce_rows

FEWEST_TEXTS = 4  # of which a bootstrap says anything


class Interval(NamedTuple):
    """A mean, and a percentile-bootstrap interval for it."""

    value: float
    lower: float
    upper: float

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.lower:.3g}, {self.upper:.3g}]"


def check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level={level} must lie between 0 and 1, as in 0.95")


def resample_counts(n: int, draws: int, seed: int) -> Float[Tensor, "draw n"]:
    """How often each of ``n`` texts is in each bootstrap sample; rows sum to ``n``."""
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(0, n, (draws, n), generator=generator)
    return torch.zeros(draws, n).scatter_add_(1, picks, torch.ones(draws, n))


def bootstrap_means(
    values: Float[Tensor, "text *rest"], draws: int = 2000, seed: int = 0
) -> Float[Tensor, "draw *rest"]:
    """Means of bootstrap samples of texts."""
    counts = resample_counts(len(values), draws, seed)
    flat = values.reshape(len(values), -1).float()
    return (counts @ flat / len(values)).reshape(draws, *values.shape[1:])


def mean_interval(
    values: Float[Tensor, " text"], level: float = 0.95, draws: int = 2000, seed: int = 0
) -> Interval:
    """The mean over texts with its percentile interval; of differences within texts, a paired one.

    >>> mean_interval(torch.tensor([1.0, 1.0, 1.0]))
    Interval(value=1.0, lower=1.0, upper=1.0)
    """
    check_level(level)
    means = bootstrap_means(values, draws, seed)
    return percentile_interval(float(values.mean()), means, level)


def percentile_interval(value: float, draws: Float[Tensor, " draw"], level: float) -> Interval:
    tail = (1 - level) / 2
    lower, upper = draws.float().quantile(torch.tensor([tail, 1 - tail])).tolist()
    return Interval(value, lower, upper)


def empirical_p(observed: float, draws: Float[Tensor, " draw"]) -> float:
    """Share of draws at least as high as what was observed, which counts as one of them.

    One-sided; never 0. With 100 draws the smallest is 1/101.

    >>> empirical_p(3.0, torch.tensor([0.0, 1.0, 2.0]))
    0.25
    """
    return (1 + int((draws >= observed).sum())) / (1 + len(draws))


def wilson_interval(successes: int, n: int, level: float = 0.95) -> Interval:
    """A share with its Wilson score interval, sound at 0 and 1 and for small numbers.

    >>> str(wilson_interval(9, 10))
    '0.9 [0.596, 0.982]'
    """
    check_level(level)
    found = binomtest(successes, n).proportion_ci(level, method="wilson")
    return Interval(successes / n, float(found.low), float(found.high))


def rank_correlation(a: Float[Tensor, "..."], b: Float[Tensor, "..."]) -> float:
    """Spearman's, ties ranked alike."""
    result: Any = spearmanr(a.flatten().numpy(), b.flatten().numpy())
    return float(result.statistic)


@dataclass(frozen=True, eq=False)
class ScoreCertainty(Artifact):
    """How certain a score is, by bootstrap over texts.

    Attributes:
        values, lower, upper: [language, layer, head], the score and its percentile interval, in ``unit``.
        selection: [language, layer, head], share of bootstrap samples in which the head is among the top k.
        split_half: language → rank correlation of the scores of two halves of the texts: mean and
            percentiles over random halves. Scores of all texts are more reliable than those of halves.
        split_overlap: language → Jaccard overlap of the halves' top k, likewise.
        top_k, level, draws, seed: settings.
    """

    kind: ClassVar[str] = "score_certainty"
    values: Float[Tensor, "language layer head"]
    lower: Float[Tensor, "language layer head"]
    upper: Float[Tensor, "language layer head"]
    selection: Float[Tensor, "language layer head"]
    languages: tuple[str, ...]
    split_half: Mapping[str, Interval]
    split_overlap: Mapping[str, Interval]
    method: str
    unit: str
    top_k: int
    level: float
    draws: int
    seed: int
    card: Card = field(default_factory=dict, repr=False)

    def __repr__(self) -> str:
        return f"ScoreCertainty({self.method}, top {self.top_k}; {', '.join(self.languages)}; {self.grid})"

    @property
    def grid(self) -> HeadGrid:
        return HeadGrid(*self.values.shape[1:])

    def likely(self, language: str, probability: float = 0.5) -> HeadSet:
        """Heads that are among the top k in at least that share of samples, surest first."""
        chances = self.selection[self.languages.index(language)]
        return top_heads(chances, int((chances >= probability).sum()))

    def to_dataframe(self) -> pd.DataFrame:
        """One row a language and head: language, layer, head, label, score, lower, upper, selection."""
        columns = {"score": self.values, "lower": self.lower, "upper": self.upper}
        return head_table(self.grid, self.languages, {**columns, "selection": self.selection})

    def _tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in ("values", "lower", "upper", "selection")}

    def _content(self) -> Card:
        plain = ("method", "unit", "top_k", "level", "draws", "seed")
        return {
            **{name: getattr(self, name) for name in plain},
            "languages": list(self.languages),
            "split_half": {code: list(i) for code, i in self.split_half.items()},
            "split_overlap": {code: list(i) for code, i in self.split_overlap.items()},
        }

    @classmethod
    def _from_tensors(cls, tensors: dict[str, Tensor], card: Card) -> "ScoreCertainty":
        content = dict(card["content"])
        content["languages"] = tuple(content["languages"])
        for name in ("split_half", "split_overlap"):
            content[name] = {code: Interval(*i) for code, i in content[name].items()}
        return cls(**tensors, **content, card=card)


def score_certainty(
    source: PerTextHeads,
    method: str | None = None,
    *,
    top_k: int = 20,
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
    **options: Any,
) -> ScoreCertainty:
    """Bootstrap a score over the texts: intervals, chance of each head to be chosen, reliability.

    >>> certainty = score_certainty(grads, "lahis", top_k=20)        # doctest: +SKIP
    >>> certainty.likely("fr", 0.95)                                 # doctest: +SKIP
    HeadSet([L1H2, L0H4, L12H3], 30 layers × 9 heads)

    Args:
        source: gradients, or exact effects (whose score is their mean).
        method: a registered score, ``lahis`` by default; None for effects.
        top_k: how many heads a set would have.
        options: of the score.

    Raises:
        ValueError: fewer than four texts in a language, ``top_k`` beyond the grid, unknown score.
    """
    check_level(level)
    if not 1 <= top_k <= source.grid.size:
        raise ValueError(f"top_k={top_k} must lie between 1 and {source.grid.size} heads")
    few = [code for code, n in source.n_texts.items() if n < FEWEST_TEXTS]
    if few:
        raise ValueError(
            f"{', '.join(few)}: at least {FEWEST_TEXTS} texts are needed to resample them"
        )
    chosen = method_for(source, method)
    tail = torch.tensor([(1 - level) / 2, (1 + level) / 2])
    generator = torch.Generator().manual_seed(seed)
    columns: dict[str, list[Tensor]] = {"values": [], "lower": [], "upper": [], "selection": []}
    split_half, split_overlap = {}, {}
    for code, n in source.n_texts.items():
        whole = torch.arange(n)
        columns["values"].append(reduce_rows(source, code, whole, chosen, **options).float())
        picks = torch.randint(0, n, (draws, n), generator=generator)
        samples = torch.stack(
            [reduce_rows(source, code, rows, chosen, **options) for rows in picks]
        )
        lower, upper = samples.float().flatten(1).quantile(tail, 0).reshape(2, *source.grid.shape)
        columns["lower"].append(lower)
        columns["upper"].append(upper)
        columns["selection"].append(in_top(samples, top_k).float().mean(0))
        halves = []
        for _ in range(100):
            order = torch.randperm(n, generator=generator)
            parts = (order[: n // 2], order[n // 2 : 2 * (n // 2)])
            halves.append([reduce_rows(source, code, rows, chosen, **options) for rows in parts])
        rho = torch.tensor([rank_correlation(a, b) for a, b in halves])
        first, second = (in_top(torch.stack(half), top_k) for half in zip(*halves, strict=True))
        common = set_jaccard(first, second)
        split_half[code] = percentile_interval(float(rho.mean()), rho, level)
        split_overlap[code] = percentile_interval(float(common.mean()), common, level)
    return ScoreCertainty(
        **{name: torch.stack(tensors) for name, tensors in columns.items()},
        languages=tuple(source.languages),
        split_half=split_half,
        split_overlap=split_overlap,
        method=chosen.name,
        unit=chosen.unit,
        top_k=top_k,
        level=level,
        draws=draws,
        seed=seed,
        card=source.origin,
    )


def in_top(values: Float[Tensor, "draw layer head"], k: int) -> Bool[Tensor, "draw layer head"]:
    """Which heads are among the ``k`` of highest value, in each draw."""
    flat = values.flatten(1)
    chosen = torch.zeros_like(flat, dtype=torch.bool)
    return chosen.scatter_(1, flat.topk(k, 1).indices, True).reshape(values.shape)


def set_jaccard(
    a: Bool[Tensor, "#draw layer head"], b: Bool[Tensor, "#draw layer head"]
) -> Float[Tensor, " draw"]:
    """Jaccard overlap of two sets of heads, draw by draw."""
    return (a & b).sum((1, 2)) / (a | b).sum((1, 2))
