"""The dose and its response: more and more heads taken away, or the same heads scaled by several factors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lahis_tl.ablation import beside_controls, refuse_scored_texts
from lahis_tl.access import LensModel
from lahis_tl.artifacts import Artifact, Card, keyed, unkeyed
from lahis_tl.batches import TokenIds
from lahis_tl.controls import matched_random_heads
from lahis_tl.corpora import Corpus
from lahis_tl.evaluation import Evaluator
from lahis_tl.heads import HeadSet
from lahis_tl.masks import HeadMask


@dataclass(frozen=True, eq=False)
class Sweep(Artifact):
    """The change of the loss along a row of masks.

    Attributes:
        what: what is varied, ``"heads"`` or ``"factor"``.
        steps: its values.
        change: float32 [step, text] by language, nats per token.
        controls: float32 [step, draw] by language, mean change under matched random sets.
    """

    kind: ClassVar[str] = "sweep"
    what: str
    steps: tuple[float, ...]
    change: Mapping[str, Float[Tensor, "step _text"]]
    controls: Mapping[str, Float[Tensor, "step _draw"]]
    card: Card = field(default_factory=dict, repr=False)

    def to_dataframe(self, level: float = 0.95) -> pd.DataFrame:
        """One row a step and language, with the columns of ``beside_controls``."""
        rows = []
        for code, values in self.change.items():
            for step, change, draws in zip(self.steps, values, self.controls[code], strict=True):
                found = beside_controls(change, draws, level)
                rows.append({self.what: step, "language": code, **found})
        return pd.DataFrame(rows)

    def _tensors(self) -> dict[str, Tensor]:
        return {**keyed("change", self.change), **keyed("controls", self.controls)}

    def _content(self) -> Card:
        return {"what": self.what, "steps": list(self.steps)}

    @classmethod
    def _from_tensors(cls, tensors: dict[str, Tensor], card: Card) -> "Sweep":
        content = card["content"]
        change, controls = unkeyed("change", tensors), unkeyed("controls", tensors)
        return cls(content["what"], tuple(content["steps"]), change, controls, card)


def sweep_heads(
    model: LensModel,
    corpus: Corpus | TokenIds,
    ranked: HeadSet,
    counts: Sequence[int] = (1, 2, 5, 10, 20),
    **options: Any,
) -> Sweep:
    """Take the first 1, 2, 5, ... heads of a ranking away.

    Args:
        ranked: heads, best first, as ``scores.top(20, "fr")``.
        options: as in ``sweep_factors``, and ``factor``.

    Raises:
        ValueError: a count beyond the ranking.
    """
    if not counts or min(counts) < 1 or max(counts) > len(ranked):
        raise ValueError(
            f"counts {list(counts)} must lie between 1 and the {len(ranked)} ranked heads"
        )
    factor = options.pop("factor", 0.0)
    settings = [(ranked[:k], factor) for k in counts]
    return _sweep(model, corpus, "heads", [float(k) for k in counts], settings, **options)


def sweep_factors(
    model: LensModel,
    corpus: Corpus | TokenIds,
    heads: HeadSet,
    factors: Sequence[float] = (0.0, 0.5, 1.5, 2.0, 3.0),
    **options: Any,
) -> Sweep:
    """Scale the same heads by several factors: the dose and its response.

    Args:
        options: ``draws`` (20), ``match``, ``seed`` of the random sets; ``scored``, the card of the result
            that the heads came from; ``max_tokens``, ``batch_tokens``, ``progress``; ``checkpoint``, a folder to
            which finished sets go, and from which an interrupted run goes on.
    """
    return _sweep(model, corpus, "factor", factors, [(heads, f) for f in factors], **options)


def _sweep(
    model: LensModel,
    corpus: Corpus | TokenIds,
    what: str,
    steps: Sequence[float],
    settings: Sequence[tuple[HeadSet, float]],
    *,
    draws: int = 20,
    match: str = "nearest",
    scored: Mapping[str, Any] | None = None,
    seed: int = 0,
    max_tokens: int | None = 512,
    batch_tokens: int = 2048,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> Sweep:
    refuse_scored_texts(scored, corpus)
    evaluator = Evaluator(model, corpus, max_tokens, batch_tokens)
    matched = partial(matched_random_heads, match=match, seed=seed)
    taken = [[heads, *matched(heads, draws)] for heads, _ in settings]
    masks = [
        HeadMask.scaling(each, factor)
        for group, (_, factor) in zip(taken, settings, strict=True)
        for each in group
    ]
    about = {"what": what, "steps": list(steps), "draws": draws, "match": match, "seed": seed}
    plain, *rest = evaluator.nll([None, *masks], progress, checkpoint, about)
    moved = (torch.stack(rest) - plain).split([len(group) for group in taken])
    controls = [evaluator.language_means(group[1:]) for group in moved]
    fewest = min(map(len, controls))
    by_step = torch.stack([group[0] for group in moved])
    drawn = torch.stack([means[:fewest] for means in controls])
    return Sweep(
        what=what,
        steps=tuple(steps),
        change={code: by_step[:, rows] for code, rows in evaluator.rows.items()},
        controls={code: drawn[:, :, i] for i, code in enumerate(evaluator.languages)},
        card=evaluator.card,
    )
