"""Scores of heads: reductions of per-text gradients, by name from a registry."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lahis_tl.artifacts import Artifact, Card
from lahis_tl.heads import HeadGrid, HeadSet, head_table, top_heads
from lahis_tl.per_text import PerTextHeads

Gradients = Float[Tensor, "text layer head"]
Reduction = Callable[..., Float[Tensor, "layer head"]]


@dataclass(frozen=True)
class ScoreMethod:
    """A registered score: what it needs of each text, how to reduce that, how to read the result."""

    name: str
    reduce: Reduction
    unit: str
    sign: str
    needs: tuple[str, ...]


_methods: dict[str, ScoreMethod] = {}


def register_score(
    name: str, *, unit: str, sign: str, needs: Sequence[str] = ("gradients",)
) -> Callable[[Reduction], Reduction]:
    """Add a score under a name; use it by ``score(grads, method=name)``.

    >>> @register_score("median", unit="nats per token", sign="high: matters")
    ... def median(gradients):
    ...     return gradients.abs().median(0).values
    >>> "median" in score_methods()
    True
    >>> del _methods["median"]

    Args:
        unit: of the values.
        sign: what a high value means.
        needs: which per-text values the function takes, in this order: ``gradients`` and ``curvature`` of
            ``head_gradients``, ``effects`` of ``exact_effects``; each [text, layer, head].

    Raises:
        ValueError: the name is taken.
    """

    def add(reduce: Reduction) -> Reduction:
        if name in _methods:
            raise ValueError(f"there is a score {name!r} already; choose another name")
        _methods[name] = ScoreMethod(name, reduce, unit, sign, tuple(needs))
        return reduce

    return add


def score_methods() -> list[str]:
    """Names of all registered scores."""
    return list(_methods)


def score_method(name: str) -> ScoreMethod:
    if name not in _methods:
        raise ValueError(f"there is no score {name!r}; registered are {', '.join(_methods)}")
    return _methods[name]


def method_for(source: PerTextHeads, name: str | None = None) -> ScoreMethod:
    """The score, if ``source`` has what it needs; by default ``lahis``, or ``exact`` of effects.

    Raises:
        ValueError: there is no such score, it needs other values, or these are not known for all heads.
    """
    chosen = score_method(name or ("exact" if source.main == "effects" else "lahis"))
    missing = [part for part in chosen.needs if part not in source.parts]
    if missing:
        raise ValueError(
            f"the score {chosen.name!r} needs {' and '.join(chosen.needs)}, but these are only "
            f"{' and '.join(source.parts)}: {_HOW_TO_GET.get(missing[0], 'they were not computed')}"
        )
    for part in chosen.needs:
        for code, values in source.parts[part].items():
            if torch.isnan(values).any():
                raise ValueError(
                    f"the {part} of {code!r} are not known for all heads (NaN), but a score ranks all of "
                    "them; compute them for all heads, or read those that there are (.heads) from the values"
                )
    return chosen


_HOW_TO_GET = {
    "gradients": "compute them by head_gradients(model, corpus)",
    "curvature": "ask for it by head_gradients(model, corpus, curvature_draws=2)",
    "effects": "compute them by exact_effects(model, corpus)",
}


def reduce_rows(
    source: PerTextHeads,
    language: str,
    rows: Sequence[int] | Tensor,
    method: ScoreMethod,
    **options: Any,
) -> Float[Tensor, "layer head"]:
    """The score of a language from some of its texts."""
    return method.reduce(*(source.parts[part][language][rows] for part in method.needs), **options)


@register_score("lahis", unit="nats per token", sign="high: more of the head lowers the loss")
def lahis(gradients: Gradients) -> Float[Tensor, "layer head"]:
    """The paper's importance: mean of |m·g| over texts, counted where g < 0 (arXiv 2511.07498).

    Non-negative. The mask is fixed at 1, so m·g = g.

    >>> lahis(torch.tensor([[[-0.2]], [[0.4]]]))
    tensor([[0.1000]])
    """
    return (-gradients).clamp_min(0).mean(0)


@register_score("lahis_code", unit="millinats per token", sign="high: matters, and mostly helps")
def lahis_code(gradients: Gradients) -> Float[Tensor, "layer head"]:
    """What the authors' code computes: mean |g|·1000 times the share of texts with g < 0.

    A product of means where the paper has a mean of products; their mask moves between texts, see
    ``lahis_tl.authors.lahis_code`` for that.

    >>> lahis_code(torch.tensor([[[-0.2]], [[0.4]]]))
    tensor([[150.]])
    """
    return gradients.abs().mean(0) * 1000 * (gradients < 0).to(gradients.dtype).mean(0)


@register_score("sensitivity", unit="nats per token", sign="high: matters, for better or worse")
def sensitivity(gradients: Gradients) -> Float[Tensor, "layer head"]:
    """Mean |g| over texts (Michel et al. 2019, arXiv 1905.10650)."""
    return gradients.abs().mean(0)


@register_score("taylor", unit="nats per token", sign="positive: removal raises the loss")
def taylor(gradients: Gradients) -> Float[Tensor, "layer head"]:
    """Minus the mean gradient: to first order, the rise of the loss when the head is removed."""
    return -gradients.mean(0)


SATURATION = 1.0  # per nat: at h = 1 second_order's correction is half of the plain quadratic one


@register_score(
    "second_order",
    unit="nats per token",
    sign="positive: removal raises the loss",
    needs=("gradients", "curvature"),
)
def second_order(
    gradients: Gradients, curvature: Gradients, alpha: float = 0.5, saturation: float = SATURATION
) -> Float[Tensor, "layer head"]:
    """Mean of −g + α·h / (1 + s·h): the rise of the loss when the head is removed, h the Fisher information.

    To second order a text's rise is −g + ½·h; the curve flattens on the way from m = 1 to 0, the more the larger
    h is, so the correction saturates, text by text (s in 1 / nats): single texts have a hundred times the
    curvature of the others and would rule the mean. ``verified_scores`` ablates the heads of large h
    instead of trusting this.

    >>> second_order(torch.tensor([[[-0.2]]]), torch.tensor([[[0.4]]]), saturation=0.0)
    tensor([[0.4000]])
    """
    return (alpha * curvature / (1 + saturation * curvature) - gradients).mean(0)


@register_score(
    "exact", unit="nats per token", sign="positive: removal raises the loss", needs=("effects",)
)
def exact(effects: Gradients) -> Float[Tensor, "layer head"]:
    """Mean rise of the loss when the head is ablated: what the other scores estimate."""
    return effects.mean(0)


@dataclass(frozen=True, eq=False)
class HeadScores(Artifact):
    """One number for each language and head.

    Attributes:
        values: float32 [language, layer, head].
        languages: names of the first axis.
        method: name of the score.
        unit: of the values.
        sign: what a high value means.
        n_texts: texts behind each language's scores.
    """

    kind: ClassVar[str] = "head_scores"
    values: Float[Tensor, "language layer head"]
    languages: tuple[str, ...]
    method: str
    unit: str = ""
    sign: str = ""
    n_texts: tuple[int, ...] = ()
    card: Card = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if len(self.languages) != len(self.values):
            raise ValueError(
                f"values of shape {tuple(self.values.shape)} need {len(self.values)} languages, "
                f"not {len(self.languages)}: {', '.join(self.languages)}"
            )
        if not torch.isfinite(self.values).all():
            raise ValueError(f"the {self.method} scores contain NaN or infinity")

    def __repr__(self) -> str:
        return f"HeadScores({self.method}; {', '.join(self.languages)}; {self.grid})"

    def __getitem__(self, language: str) -> Float[Tensor, "layer head"]:
        if language not in self.languages:
            raise KeyError(f"no scores for {language!r}; there are {', '.join(self.languages)}")
        return self.values[self.languages.index(language)]

    @property
    def grid(self) -> HeadGrid:
        return HeadGrid(*self.values.shape[1:])

    @property
    def labels(self) -> list[str]:
        """Labels of the heads, layer-major."""
        return self.grid.labels

    def top(self, k: int, language: str) -> HeadSet:
        """The ``k`` heads of highest score in a language, best first."""
        return top_heads(self[language], k)

    def select(self, languages: Iterable[str]) -> "HeadScores":
        """Only these languages, in this order."""
        chosen = tuple(languages)
        counts = dict(zip(self.languages, self.n_texts, strict=True)) if self.n_texts else {}
        return HeadScores(
            torch.stack([self[language] for language in chosen]),
            chosen,
            self.method,
            self.unit,
            self.sign,
            tuple(counts[language] for language in chosen) if counts else (),
            self.card,
        )

    def to_dataframe(self) -> pd.DataFrame:
        """One row a language and head: language, layer, head, label, score, rank (1 = highest)."""
        frame = head_table(self.grid, self.languages, {"score": self.values})
        ranks = frame.groupby("language")["score"].rank(ascending=False, method="first")
        return frame.assign(rank=ranks.astype(int))

    def _summary(self) -> pd.DataFrame:
        """Each language's five best heads."""
        best = {code: self.top(min(5, self.grid.size), code) for code in self.languages}
        return pd.DataFrame(
            [
                {
                    "language": code,
                    "best heads": ", ".join(f"{h.label} {self[code][h]:.3g}" for h in heads),
                }
                for code, heads in best.items()
            ]
        )

    def _tensors(self) -> dict[str, Tensor]:
        return {"values": self.values}

    def _content(self) -> Card:
        names = ("languages", "method", "unit", "sign", "n_texts")
        return {name: getattr(self, name) for name in names}

    @classmethod
    def _from_tensors(cls, tensors: dict[str, Tensor], card: Card) -> "HeadScores":
        content: Card = card["content"]
        listed = {name: tuple(content[name]) for name in ("languages", "n_texts")}
        return cls(tensors["values"], card=card, **{**content, **listed})


def score(source: PerTextHeads, method: str | None = None, **options: Any) -> HeadScores:
    """Reduce per-text values to one score for each language and head.

    >>> scores = score(grads, method="lahis")      # doctest: +SKIP
    >>> scores.top(3, "fr")                        # doctest: +SKIP
    HeadSet([L12H3, L7H0, L28H8], 30 layers × 9 heads)

    Args:
        source: gradients, or exact effects.
        method: a registered score; ``lahis`` by default, of effects ``exact``.
        options: of the score, as ``alpha`` of ``second_order``.

    Raises:
        ValueError: no such method, one that needs other values, or it returned another shape.
    """
    chosen = method_for(source, method)
    values = []
    for language, n in source.n_texts.items():
        value = reduce_rows(source, language, range(n), chosen, **options)
        if tuple(value.shape) != source.grid.shape:
            raise ValueError(
                f"the score {chosen.name!r} returned shape {tuple(value.shape)} for {language!r}, "
                f"not {source.grid.shape}"
            )
        values.append(value)
    return HeadScores(
        values=torch.stack(values).float(),
        languages=tuple(source.languages),
        method=chosen.name,
        unit=chosen.unit,
        sign=chosen.sign,
        n_texts=tuple(source.n_texts.values()),
        card={**source.origin, **({"options": options} if options else {})},
    )
