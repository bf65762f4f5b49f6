"""From scores to heads: language-specific and language-general, by named rules."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from decimal import ROUND_CEILING, ROUND_FLOOR, ROUND_HALF_UP, Decimal
from typing import Any, ClassVar

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from scipy.stats import hypergeom
from torch import Tensor

from lahis_tl.artifacts import Artifact, Card
from lahis_tl.heads import HeadGrid, HeadSet, top_heads
from lahis_tl.per_text import PerTextHeads
from lahis_tl.scores import HeadScores, score
from lahis_tl.tested import adjusted_p, specificity_test

_ROUNDINGS = {"down": ROUND_FLOOR, "up": ROUND_CEILING, "nearest": ROUND_HALF_UP}


@dataclass(frozen=True, eq=False)
class LanguageHeads(Artifact):
    """Heads by language.

    Attributes:
        specific: language → its own heads, best first.
        general: heads of many languages, best first.
        kept: language → all heads that the rule kept for it, general ones included.
        rule, options: how they were chosen.
        method: the score behind them.
    """

    kind: ClassVar[str] = "language_heads"
    specific: Mapping[str, HeadSet]
    general: HeadSet
    kept: Mapping[str, HeadSet]
    rule: str
    options: Mapping[str, Any]
    method: str
    card: Card = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        grids = {
            heads.grid for heads in (*self.specific.values(), *self.kept.values(), self.general)
        }
        if len(grids) != 1:
            raise ValueError(f"all sets need one grid, but have {', '.join(map(str, grids))}")

    def __repr__(self) -> str:
        sizes = ", ".join(f"{code}: {len(heads)}" for code, heads in self.specific.items())
        return f"LanguageHeads(specific {sizes}; general: {len(self.general)}; rule {self.rule})"

    @property
    def languages(self) -> list[str]:
        return list(self.specific)

    @property
    def grid(self) -> HeadGrid:
        return self.general.grid

    @property
    def counts(self) -> Int[Tensor, "layer head"]:
        """How many languages keep each head."""
        counts = torch.zeros(self.grid.size, dtype=torch.int64)
        for heads in self.kept.values():
            counts[heads.flat_indices()] += 1
        return counts.reshape(self.grid.shape)

    def to_dataframe(self) -> pd.DataFrame:
        """One row a chosen head: set (a language or "general"), rank from 1, layer, head, label."""
        sets = [*self.specific.items(), ("general", self.general)]
        return pd.DataFrame(
            [
                {"set": name, "rank": rank, "layer": h.layer, "head": h.head, "label": h.label}
                for name, heads in sets
                for rank, h in enumerate(heads, start=1)
            ],
            columns=["set", "rank", "layer", "head", "label"],
        )

    def _summary(self) -> pd.DataFrame:
        sets = [*self.specific.items(), ("general", self.general)]
        return pd.DataFrame(
            [{"set": name, "heads": " ".join(heads.labels)} for name, heads in sets]
        )

    def _tensors(self) -> dict[str, Tensor]:
        sets = {"general": self.general}
        sets |= {f"specific/{code}": heads for code, heads in self.specific.items()}
        sets |= {f"kept/{code}": heads for code, heads in self.kept.items()}
        return {
            name: torch.tensor(heads.flat_indices(), dtype=torch.int64)
            for name, heads in sets.items()
        }

    def _content(self) -> Card:
        return {
            "languages": self.languages,
            "rule": self.rule,
            "options": dict(self.options),
            "method": self.method,
            "grid": list(self.grid.shape),
        }

    @classmethod
    def _from_tensors(cls, tensors: dict[str, Tensor], card: Card) -> "LanguageHeads":
        content = card["content"]
        grid = HeadGrid(*content["grid"])

        def heads(name: str) -> HeadSet:
            return HeadSet.from_flat(grid, tensors[name].tolist())

        codes = content["languages"]
        return cls(
            specific={code: heads(f"specific/{code}") for code in codes},
            general=heads("general"),
            kept={code: heads(f"kept/{code}") for code in codes},
            rule=content["rule"],
            options=content["options"],
            method=content["method"],
            card=card,
        )


def language_heads(
    source: HeadScores | PerTextHeads,
    rule: str = "authors",
    **options: Any,
) -> LanguageHeads:
    """Choose language-specific and language-general heads.

    >>> heads = language_heads(scores)                                      # doctest: +SKIP
    >>> heads = language_heads(scores, "contrastive", fraction=0.02, rounding="up")   # doctest: +SKIP
    >>> heads = language_heads(grads, "tested", fdr=0.05, method="sensitivity")       # doctest: +SKIP

    Args:
        source: scores; or gradients or exact effects, scored by ``lahis`` or ``exact``. The tested rule
            needs the latter, since it compares texts.
        rule: ``"authors"`` (options ``quantile``, ``min_languages``; see ``authors_rule``),
            ``"contrastive"`` (``fraction``, ``rounding``; see ``contrastive_rule``) or ``"tested"``
            (``fdr``, ``method``, ``ratio``, ``min_share``, ``permutations``, ``seed``; see ``tested_rule``).

    Raises:
        ValueError: unknown rule, an option out of its range, or scores where per-text values are needed.
        TypeError: an option that the rule does not have.
    """
    if rule not in RULES:
        raise ValueError(f"there is no rule {rule!r}; there are {', '.join(RULES)}")
    if rule == "tested":
        if isinstance(source, HeadScores):
            raise ValueError(
                "the tested rule compares texts, but scores are means over texts; give it the "
                "gradients or exact effects that they come from"
            )
        return tested_rule(source, **options)
    scores = source if isinstance(source, HeadScores) else score(source)
    return RULES[rule](scores, **options)


def authors_rule(
    scores: HeadScores, quantile: float = 0.96, min_languages: int | None = None
) -> LanguageHeads:
    """The rule of the authors' code, exact to it.

    Each language keeps the heads strictly above the ``quantile`` of its scores, best first. A head kept
    by ``min_languages`` languages is general; the rest of a language's list is specific to it (to it or
    to a few: a head of three languages is specific to all three).

    Args:
        quantile: between 0 and 1; theirs is 0.96.
        min_languages: theirs is 4; None for 4, or all where there are two or three.
    """
    if not 0 < quantile < 1:
        raise ValueError(f"quantile={quantile} must lie between 0 and 1")
    n_languages = len(scores.languages)
    needed = max(2, min(4, n_languages)) if min_languages is None else int(min_languages)
    if min_languages is not None and not 1 <= needed <= n_languages:
        raise ValueError(
            f"min_languages={needed}: no head can be kept by so many, there are {n_languages} languages"
        )
    kept = {code: _above_quantile(scores[code], quantile) for code in scores.languages}
    votes = Counter(head for heads in kept.values() for head in heads)
    general = [head for head, count in votes.most_common() if count >= needed]
    options = {"quantile": float(quantile), "min_languages": needed}
    return _language_heads(
        scores.grid, kept, general, "authors", options, scores.method, scores.card
    )


def _above_quantile(values: Float[Tensor, "layer head"], quantile: float) -> HeadSet:
    flat = values.flatten()
    above = int((flat > flat.quantile(quantile)).sum())
    return top_heads(values, above)


def contrastive_rule(
    scores: HeadScores, fraction: float = 0.02, rounding: str = "nearest"
) -> LanguageHeads:
    """Specific: highest share of the language's score minus the mean share elsewhere. General: highest
    share in the language where it is lowest.

    Shares take away that some languages have larger scores altogether. A head can be general only if it
    is specific to no language.

    Args:
        fraction: of all heads, for each language and for the general ones.
        rounding: of the number of heads, ``"down"``, ``"up"`` or ``"nearest"``.
    """
    if len(scores.languages) < 2:
        raise ValueError("the contrastive rule compares languages and needs at least two")
    totals = scores.values.sum((1, 2), keepdim=True)
    if (scores.values < 0).any() or (totals <= 0).any():
        raise ValueError(
            f"the contrastive rule needs non-negative scores to take shares of; {scores.method} has negative ones"
        )
    count = head_count(scores.grid.size, fraction, rounding)
    shares = scores.values / totals
    elsewhere = (shares.sum(0) - shares) / (len(shares) - 1)
    contrast = shares - elsewhere
    kept = {code: top_heads(contrast[i], count) for i, code in enumerate(scores.languages)}
    taken = {head for heads in kept.values() for head in heads}
    lowest = top_heads(shares.min(0).values, scores.grid.size)
    general = [head for head in lowest if head not in taken][:count]
    options = {"fraction": float(fraction), "rounding": rounding}
    return _language_heads(
        scores.grid, kept, general, "contrastive", options, scores.method, scores.card
    )


def tested_rule(
    source: PerTextHeads,
    fdr: float = 0.05,
    method: str | None = None,
    ratio: float = 2.0,
    min_share: float | None = None,
    permutations: int = 20_000,
    seed: int = 0,
    **options: Any,
) -> LanguageHeads:
    """Heads that pass a permutation test, at a false discovery rate of ``fdr``.

    Specific: the head's share of the score in the language is more than ``ratio`` times that elsewhere, best
    contrast first. General: above a random head's share in every language, and specific to none, highest
    lowest share first. See ``specificity_test``.

    Args:
        fdr: expected share of wrong ones among the heads found, by Benjamini-Hochberg: of the specific heads
            of all languages together; of the general ones, those counted that are specific to some.
        method: the score whose per-text values are tested; ``lahis`` by default, of effects ``exact``.
        ratio: 1 for any difference, however small.
        min_share: heads of a smaller mean share over all languages are not looked at, so that significant
            trifles are left out; 1 / (heads × languages) if None, which an average head would have
            that matters in one language alone.

    Raises:
        ValueError: ``fdr`` is not between 0 and 1, or there are too few texts.
    """
    if not 0 < fdr < 1:
        raise ValueError(f"fdr={fdr} must lie between 0 and 1")
    test = specificity_test(
        source, method, ratio=ratio, permutations=permutations, seed=seed, **options
    )
    least = 1 / (test.grid.size * len(test.languages)) if min_share is None else min_share
    # The mean over languages is the same however they are exchanged, so that choosing by it is fair.
    looked_at = (test.share.mean(0) >= least).expand_as(test.specific_p)
    q = torch.ones_like(test.specific_p)
    q[looked_at] = adjusted_p(test.specific_p[looked_at])
    specific = {
        code: _passing(q[i] <= fdr, test.contrast[i]) for i, code in enumerate(test.languages)
    }
    to_some = (q <= fdr).any(0)
    general = _passing((test.general_q <= fdr) & ~to_some, test.share.amin(0))
    settings = {
        "fdr": float(fdr),
        "ratio": float(ratio),
        "min_share": least,
        "permutations": permutations,
        "seed": seed,
    }
    return _language_heads(
        test.grid,
        {code: HeadSet(test.grid, [*heads, *general]) for code, heads in specific.items()},
        list(general),
        "tested",
        settings,
        test.method,
        source.origin,
    )


def _passing(passed: Bool[Tensor, "layer head"], values: Float[Tensor, "layer head"]) -> HeadSet:
    """The heads that passed, of highest value first."""
    return top_heads(torch.where(passed, values, -torch.inf), int(passed.sum()))


RULES: dict[str, Callable[..., LanguageHeads]] = {
    "authors": authors_rule,
    "contrastive": contrastive_rule,
    "tested": tested_rule,
}


def _language_heads(
    grid: HeadGrid,
    kept: dict[str, HeadSet],
    general: list[Any],
    rule: str,
    options: dict[str, Any],
    method: str,
    card: Card,
) -> LanguageHeads:
    shared = set(general)
    specific = {
        code: HeadSet(grid, (head for head in heads if head not in shared))
        for code, heads in kept.items()
    }
    return LanguageHeads(
        specific=specific,
        general=HeadSet(grid, general),
        kept=kept,
        rule=rule,
        options=options,
        method=method,
        card={k: card[k] for k in ("model", "corpus", "settings") if k in card},
    )


def head_count(n_heads: int, fraction: float, rounding: str = "nearest") -> int:
    """How many of ``n_heads`` a fraction is. The authors' code cuts, their paper rounds up.

    >>> head_count(672, 0.02, "down"), head_count(672, 0.02, "up")
    (13, 14)

    Raises:
        ValueError: the fraction is not between 0 and 1, or comes to no head.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction={fraction} must lie above 0 and not above 1")
    if rounding not in _ROUNDINGS:
        raise ValueError(f"rounding {rounding!r} is not one of {', '.join(_ROUNDINGS)}")
    exact = n_heads * Decimal(str(fraction))
    count = int(exact.to_integral_value(_ROUNDINGS[rounding]))
    if count == 0:
        raise ValueError(
            f"a fraction of {fraction} of {n_heads} heads, rounded {rounding}, is no head"
        )
    return count


def jaccard(a: HeadSet, b: HeadSet) -> float:
    """Share of common heads among all heads of two sets; 1 for two empty ones.

    >>> grid = HeadGrid(1, 4)
    >>> jaccard(HeadSet(grid, ["L0H0", "L0H1"]), HeadSet(grid, ["L0H1", "L0H2"]))
    0.3333333333333333
    """
    union = set(a) | set(b)
    return len(set(a) & set(b)) / len(union) if union else 1.0


def chance_jaccard(size_a: int, size_b: int, n_heads: int) -> float:
    """Expected Jaccard overlap of two random sets of heads (hypergeometric, exact).

    >>> round(chance_jaccard(1, 1, 4), 3)
    0.25
    """
    if size_a + size_b == 0:
        return 1.0
    common = range(min(size_a, size_b) + 1)
    chances = hypergeom.pmf(list(common), n_heads, size_a, size_b)
    return float(sum(p * k / (size_a + size_b - k) for k, p in zip(common, chances, strict=True)))
