"""How far the best heads of two languages are the same, how sure that is, and what chance would give."""

from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, ClassVar

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lahis_tl.artifacts import Artifact, Card, keyed, unkeyed
from lahis_tl.per_text import PerTextHeads
from lahis_tl.scores import method_for, reduce_rows
from lahis_tl.statistics import (
    Interval,
    check_level,
    empirical_p,
    in_top,
    percentile_interval,
    set_jaccard,
)


@dataclass(frozen=True, eq=False)
class HeadOverlap(Artifact):
    """Jaccard overlap of the top k heads of every two languages.

    Attributes:
        intervals: (language, language) → overlap with its bootstrap interval over texts.
        chance: (language, language) → float32 [draw], overlaps of sets that are as large in every layer (or
            in the whole network) but otherwise random.
        top_k, within, method: settings.
    """

    kind: ClassVar[str] = "head_overlap"
    intervals: dict[tuple[str, str], Interval]
    chance: dict[tuple[str, str], Float[Tensor, "_draw"]]
    top_k: int
    within: str
    method: str
    card: Card = field(default_factory=dict, repr=False)

    def __repr__(self) -> str:
        pairs = ", ".join(f"{a}-{b}: {i}" for (a, b), i in self.intervals.items())
        return f"HeadOverlap(top {self.top_k} by {self.method}; {pairs})"

    def to_dataframe(self) -> pd.DataFrame:
        """One row a pair: overlap with interval, mean and 97.5 % level of chance, one-sided p."""
        return pd.DataFrame(
            [
                {
                    "a": a,
                    "b": b,
                    "jaccard": interval.value,
                    "lower": interval.lower,
                    "upper": interval.upper,
                    "chance": float(self.chance[a, b].mean()),
                    "chance_upper": float(self.chance[a, b].quantile(0.975)),
                    "p": empirical_p(interval.value, self.chance[a, b]),
                }
                for (a, b), interval in self.intervals.items()
            ]
        )

    def _tensors(self) -> dict[str, Tensor]:
        return keyed("chance", self.chance)

    def _content(self) -> Card:
        intervals = [[*pair, *interval] for pair, interval in self.intervals.items()]
        plain = {"top_k": self.top_k, "within": self.within, "method": self.method}
        return {"intervals": intervals, **plain}

    @classmethod
    def _from_tensors(cls, tensors: dict[str, Tensor], card: Card) -> "HeadOverlap":
        content = dict(card["content"])
        intervals = {(a, b): Interval(*values) for a, b, *values in content.pop("intervals")}
        return cls(intervals, unkeyed("chance", tensors), **content, card=card)


def head_overlap(
    source: PerTextHeads,
    method: str | None = None,
    *,
    top_k: int = 20,
    within: str = "layer",
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
    **options: Any,
) -> HeadOverlap:
    """Overlap of the best heads of every two languages.

    >>> head_overlap(grads, "lahis", top_k=20).to_dataframe()      # doctest: +SKIP

    The bootstrap of parallel texts takes the same texts in both languages. A sample's best heads are
    noisier than those of all texts, so the interval leans downwards.

    Args:
        within: what chance keeps: ``"layer"`` shuffles the heads within each layer, so that two languages
            which merely use the same layers do not look alike; ``"network"`` shuffles all.

    Raises:
        ValueError: fewer than two languages, ``top_k`` beyond the grid, unknown ``within``.
    """
    check_level(level)
    if within not in ("layer", "network"):
        raise ValueError(f"within {within!r} is not one of layer, network")
    if len(source.languages) < 2:
        raise ValueError(f"overlap compares languages and needs two; there are {source!r}")
    if not 1 <= top_k <= source.grid.size:
        raise ValueError(f"top_k={top_k} must lie between 1 and {source.grid.size} heads")
    chosen = method_for(source, method)
    best, samples = {}, {}
    for code, n in source.n_texts.items():
        generator = torch.Generator().manual_seed(seed)  # the same texts where there are as many
        picks = torch.randint(n, (draws, n), generator=generator)
        whole = reduce_rows(source, code, range(n), chosen, **options)
        resampled = [reduce_rows(source, code, rows, chosen, **options) for rows in picks]
        best[code] = in_top(whole[None], top_k)
        samples[code] = in_top(torch.stack(resampled), top_k)
    generator = torch.Generator().manual_seed(seed + 1)
    intervals, chance = {}, {}
    for a, b in combinations(source.languages, 2):
        value = float(set_jaccard(best[a], best[b]))
        intervals[a, b] = percentile_interval(value, set_jaccard(samples[a], samples[b]), level)
        chance[a, b] = set_jaccard(best[a], _shuffled(best[b], within, draws, generator))
    return HeadOverlap(intervals, chance, top_k, within, chosen.name, source.origin)


def _shuffled(
    chosen: Bool[Tensor, "1 layer head"], within: str, draws: int, generator: torch.Generator
) -> Bool[Tensor, "draw layer head"]:
    rows = chosen if within == "layer" else chosen.flatten(1)[:, None]
    keys = torch.rand(draws, *rows.shape[1:], generator=generator)
    return rows.expand_as(keys).gather(2, keys.argsort(2)).reshape(draws, *chosen.shape[1:])
