"""What taking sets of heads away does to each language, held against matched random sets."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lahis_tl.access import LensModel
from lahis_tl.artifacts import Artifact, Card, keyed, unkeyed
from lahis_tl.batches import TokenIds
from lahis_tl.controls import matched_random_heads
from lahis_tl.corpora import Corpus, shared_texts
from lahis_tl.evaluation import Evaluator
from lahis_tl.heads import Head, HeadGrid, HeadSet
from lahis_tl.masks import HeadMask
from lahis_tl.selection import LanguageHeads
from lahis_tl.statistics import (
    Interval,
    bootstrap_means,
    empirical_p,
    mean_interval,
    percentile_interval,
)


def beside_controls(
    change: Float[Tensor, " text"], draws: Float[Tensor, " draw"], level: float
) -> dict[str, float]:
    """A change of the loss with its paired interval over texts, what random sets do, and a one-sided p.

    ``change``, ``lower``, ``upper``; ``control_mean`` and the controls' central range ``control_lower``,
    ``control_upper``, all in nats per token; ``p``; the numbers of ``texts`` and ``draws``.
    """
    interval = mean_interval(change, level)
    return {
        "change": interval.value,
        "lower": interval.lower,
        "upper": interval.upper,
        "control_mean": float(draws.mean()),
        "control_lower": float(draws.quantile((1 - level) / 2)),
        "control_upper": float(draws.quantile((1 + level) / 2)),
        "p": empirical_p(interval.value, draws),
        "texts": len(change),
        "draws": len(draws),
    }


@dataclass(frozen=True, eq=False)
class AblationEffect(Artifact):
    """The change of the loss when a set of heads is scaled, beside matched random sets.

    Attributes:
        heads, factor: what was scaled, and by what (0: taken away).
        change: language → float32 [text], nats per token; positive where the loss rises.
        controls: language → float32 [draw], mean change under each random set.
        control_sets: those sets.
    """

    kind: ClassVar[str] = "ablation_effect"
    heads: HeadSet
    factor: float
    change: Mapping[str, Float[Tensor, "_text"]]
    controls: Mapping[str, Float[Tensor, "_draw"]]
    control_sets: Sequence[HeadSet] = field(repr=False)
    card: Card = field(default_factory=dict, repr=False)

    def __repr__(self) -> str:
        means = ", ".join(f"{code}: {float(v.mean()):+.3f}" for code, v in self.change.items())
        return f"AblationEffect({len(self.heads)} heads × {self.factor:g}; {means} nats per token)"

    def to_dataframe(self, level: float = 0.95) -> pd.DataFrame:
        """One row a language, with the columns of ``beside_controls``."""
        rows = []
        for code, change in self.change.items():
            rows.append({"language": code, **beside_controls(change, self.controls[code], level)})
        return pd.DataFrame(rows)

    def _tensors(self) -> dict[str, Tensor]:
        sets = torch.tensor([members.flat_indices() for members in self.control_sets])
        return {**keyed("change", self.change), **keyed("controls", self.controls), "sets": sets}

    def _content(self) -> Card:
        grid = list(self.heads.grid.shape)
        return {"grid": grid, "heads": self.heads.flat_indices(), "factor": self.factor}

    @classmethod
    def _from_tensors(cls, tensors: dict[str, Tensor], card: Card) -> "AblationEffect":
        content = card["content"]
        grid = HeadGrid(*content["grid"])
        return cls(
            heads=HeadSet.from_flat(grid, content["heads"]),
            factor=content["factor"],
            change=unkeyed("change", tensors),
            controls=unkeyed("controls", tensors),
            control_sets=[HeadSet.from_flat(grid, row) for row in tensors["sets"].tolist()],
            card=card,
        )


def ablation_effect(
    model: LensModel,
    corpus: Corpus | TokenIds,
    heads: HeadSet,
    *,
    factor: float = 0.0,
    draws: int = 100,
    match: str = "nearest",
    exclude: Sequence[Head] = (),
    controls: Sequence[HeadSet] | None = None,
    scored: Mapping[str, Any] | None = None,
    seed: int = 0,
    max_tokens: int | None = 512,
    batch_tokens: int = 2048,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> AblationEffect:
    """Scale a set of heads, and as many random ones of the same layers ``draws`` times over.

    >>> effect = ablation_effect(model, unseen, heads.specific["fr"])      # doctest: +SKIP
    >>> effect.to_dataframe()[["language", "change", "control_mean", "p"]]  # doctest: +SKIP

    Args:
        corpus: texts on which the heads were *not* chosen.
        factor: what the heads are multiplied by; 0 takes them away.
        draws, match, exclude, seed: of the random sets, see ``matched_random_heads``.
        controls: sets to compare with instead, as those of ``score_matched_heads``.
        scored: the card of the result that the heads came from; texts of it are refused.
        checkpoint: a folder to which finished sets go, and from which an interrupted run goes on.

    Raises:
        ValueError: the set is empty, cannot be matched, or texts were scored before.
        ArtifactError: ``checkpoint`` belongs to a run with other settings.
    """
    refuse_scored_texts(scored, corpus)
    sets = (
        matched_random_heads(heads, draws, match=match, exclude=exclude, seed=seed)
        if controls is None
        else list(controls)
    )
    evaluator = Evaluator(model, corpus, max_tokens, batch_tokens)
    masks = [HeadMask.scaling(members, factor) for members in (heads, *sets)]
    about = {"heads": heads.labels, "factor": factor, "draws": draws, "match": match, "seed": seed}
    plain, *rest = evaluator.nll([None, *masks], progress, checkpoint, about)
    changes = torch.stack(rest) - plain
    means = evaluator.language_means(changes[1:])
    return AblationEffect(
        heads=heads,
        factor=factor,
        change=evaluator.by_language(changes[0]),
        controls={code: means[:, i] for i, code in enumerate(evaluator.languages)},
        control_sets=sets,
        card=evaluator.card,
    )


def refuse_scored_texts(card: Mapping[str, Any] | None, corpus: Corpus | TokenIds) -> None:
    """
    Raises:
        ValueError: some texts are those of the scores, so that a test on them would flatter.
    """
    if card is None or not isinstance(corpus, Corpus):
        return
    common = shared_texts(card, corpus)
    if common:
        counts = ", ".join(f"{n} in {code}" for code, n in common.items())
        raise ValueError(
            f"these texts were scored already ({counts}); test on others: "
            "scoring, testing = corpus.split(...)"
        )


@dataclass(frozen=True, eq=False)
class Selectivity(Artifact):
    """Languages × languages: heads of the row off, text of the column.

    Attributes:
        rows, columns: languages of the heads and of the texts.
        change: (row, column) → float32 [text], nats per token; positive where the loss rises.
        controls: float32 [row, draw, column], mean change under matched random sets.
    """

    kind: ClassVar[str] = "selectivity"
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    change: Mapping[tuple[str, str], Float[Tensor, "_text"]]
    controls: Float[Tensor, "row draw column"]
    card: Card = field(default_factory=dict, repr=False)

    def __repr__(self) -> str:
        return f"Selectivity({len(self.rows)} × {len(self.columns)}; diagonal minus rest {self.contrast()})"

    @property
    def matrix(self) -> Float[Tensor, "row column"]:
        """Mean change of the loss, nats per token."""
        return torch.tensor(
            [[float(self.change[r, c].mean()) for c in self.columns] for r in self.rows]
        )

    def contrast(self, row: str | None = None, level: float = 0.95) -> Interval:
        """Change in the heads' own language minus the mean change in the others.

        Of one row, or the mean over rows; the interval is over texts, of a parallel corpus resampled
        together in all languages.
        """
        rows = self.rows if row is None else (row,)
        means = {key: change.mean() for key, change in self.change.items()}
        draws = {key: bootstrap_means(change) for key, change in self.change.items()}
        value = float(self._contrast(means, rows))
        return percentile_interval(value, self._contrast(draws, rows), level)

    def p_value(self, row: str | None = None) -> float:
        """Share of matched random sets whose contrast is at least as high; one-sided."""
        controls = {
            (r, c): self.controls[i, :, j]
            for i, r in enumerate(self.rows)
            for j, c in enumerate(self.columns)
        }
        rows = self.rows if row is None else (row,)
        return empirical_p(self.contrast(row).value, self._contrast(controls, rows))

    def _contrast(
        self, values: Mapping[tuple[str, str], Tensor], rows: Sequence[str]
    ) -> Float[Tensor, "*draw"]:
        """Own language minus the mean of the others, mean over rows."""
        each = []
        for r in rows:
            others = [values[r, c] for c in self.columns if c != r]
            each.append(values[r, r] - torch.stack(others).mean(0))
        return torch.stack(each).mean(0)

    def to_dataframe(self, level: float = 0.95) -> pd.DataFrame:
        """One row a cell: heads_of, text_in, and the columns of ``beside_controls``."""
        table = []
        for i, r in enumerate(self.rows):
            for j, c in enumerate(self.columns):
                found = beside_controls(self.change[r, c], self.controls[i, :, j], level)
                table.append({"heads_of": r, "text_in": c, **found})
        return pd.DataFrame(table)

    def _tensors(self) -> dict[str, Tensor]:
        return {**keyed("change", self.change), "controls": self.controls}

    def _content(self) -> Card:
        return {"rows": list(self.rows), "columns": list(self.columns)}

    @classmethod
    def _from_tensors(cls, tensors: dict[str, Tensor], card: Card) -> "Selectivity":
        rows, columns = (tuple(card["content"][name]) for name in ("rows", "columns"))
        return cls(rows, columns, unkeyed("change", tensors), tensors["controls"], card)


def selectivity(
    model: LensModel,
    heads: LanguageHeads | Mapping[str, HeadSet],
    corpus: Corpus,
    *,
    factor: float = 0.0,
    draws: int = 100,
    match: str = "nearest",
    seed: int = 0,
    max_tokens: int | None = 512,
    batch_tokens: int = 2048,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> Selectivity:
    """Take each language's heads away and measure the loss in every language.

    >>> result = selectivity(model, heads, unseen)      # doctest: +SKIP
    >>> result.contrast("fr"), result.p_value("fr")     # doctest: +SKIP

    Args:
        heads: language-specific heads; of a ``LanguageHeads`` the languages that have any. Its card says
            which texts were scored; they are refused.
        draws, match, seed: of the random sets of each row; general heads are never among them.
        checkpoint: a folder to which finished sets go, and from which an interrupted run goes on.

    Raises:
        ValueError: fewer than two languages of texts, no heads, a row whose language has no texts, or
            texts that were scored.
        ArtifactError: ``checkpoint`` belongs to a run with other settings.
    """
    sets, general, card = _sets_of(heads)
    refuse_scored_texts(card, corpus)
    absent = [code for code in sets if code not in corpus.languages]
    if absent or len(corpus.languages) < 2:
        raise ValueError(
            f"selectivity needs texts in at least two languages and in those of the heads; the corpus has "
            f"{', '.join(corpus.languages)}, not {', '.join(absent) or 'a second one'}"
        )
    evaluator = Evaluator(model, corpus, max_tokens, batch_tokens)
    matched = partial(matched_random_heads, match=match, exclude=general, seed=seed)
    taken = {row: [members, *matched(members, draws)] for row, members in sets.items()}
    masks = [HeadMask.scaling(each, factor) for group in taken.values() for each in group]
    about = {"heads": {row: members.labels for row, members in sets.items()}, "factor": factor}
    about |= {"draws": draws, "match": match, "seed": seed}
    plain, *rest = evaluator.nll([None, *masks], progress, checkpoint, about)
    moved = (torch.stack(rest) - plain).split([len(group) for group in taken.values()])
    change: dict[tuple[str, str], Tensor] = {}
    for row, (own, *_) in zip(taken, moved, strict=True):
        change |= {(row, c): values for c, values in evaluator.by_language(own).items()}
    controls = [evaluator.language_means(group[1:]) for group in moved]
    fewest = min(map(len, controls))
    return Selectivity(
        rows=tuple(sets),
        columns=tuple(evaluator.languages),
        change=change,
        controls=torch.stack([means[:fewest] for means in controls]),
        card=evaluator.card,
    )


def _sets_of(
    heads: LanguageHeads | Mapping[str, HeadSet],
) -> tuple[dict[str, HeadSet], Sequence[Head], Mapping[str, Any] | None]:
    if isinstance(heads, LanguageHeads):
        sets, general, card = dict(heads.specific), list(heads.general), heads.card
    else:
        sets, general, card = dict(heads), [], None
    sets = {code: members for code, members in sets.items() if len(members)}
    if not sets:
        raise ValueError("no language has specific heads, so there is nothing to take away")
    return sets, general, card
