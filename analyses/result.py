"""What an experiment gives back, and what experiments share: heads and gradients, finished parts."""

import hashlib
import json
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go

import lahis_tl as lt
from lahis_tl.access import LensModel
from lahis_tl.artifacts import Artifact
from lahis_tl.errors import ArtifactError
from lahis_tl.processes import exchange, is_main
from lahis_tl.records import load_records, save_records

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """Tables, figures and what they come to.

    Attributes:
        name: of the experiment.
        tables: by name, the main one first.
        figures: by name.
        verdict: one paragraph, written from the figures, whichever way they came out.
        card: model, texts and settings behind it.
        records: by name, the rows that tables and figures were made from (generated texts among them), so that
            both can be made again without the model.
        artifacts: by name, the same for what is too large for rows.
    """

    name: str
    tables: Mapping[str, pd.DataFrame]
    figures: Mapping[str, go.Figure]
    verdict: str
    card: Mapping[str, Any] = field(default_factory=dict, repr=False)
    records: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict, repr=False)
    artifacts: Mapping[str, Artifact] = field(default_factory=dict, repr=False)

    @property
    def dataframe(self) -> pd.DataFrame:
        """The main table."""
        return next(iter(self.tables.values()))

    def __str__(self) -> str:
        parts = [
            f"{name}\n{table.round(4).to_string(index=False)}"
            for name, table in self.tables.items()
        ]
        return "\n\n".join([*parts, self.verdict])

    def save(self, folder: str | Path) -> Path:
        """Write tables as CSV, records as JSON lines, artifacts, one page with all figures, each as PNG where kaleido
        is there, the verdict.

        Returns:
            the page.
        """
        folder = Path(folder)
        if not is_main():
            return folder / f"{self.name}.html"
        folder.mkdir(parents=True, exist_ok=True)
        for name, table in self.tables.items():
            table.to_csv(folder / f"{name}.csv", index=False)
        about = json.dumps(self.card, indent=2, default=str)
        (folder / "card.json").write_text(about, encoding="utf-8")
        (folder / "verdict.txt").write_text(self.verdict + "\n", encoding="utf-8")
        for name, rows in self.records.items():
            save_records(folder / name, rows, self.card)
        for name, artifact in self.artifacts.items():
            artifact.save(folder / name)
        for name, figure in self.figures.items():
            try:
                lt.plots.write(figure, folder / f"{name}.png", data=False)
            except RuntimeError as error:
                logger.warning("%s.png is left out: %s", name, error)
        return lt.plots.write_page(
            folder / f"{self.name}.html",
            f"{self.name}",
            list(self.figures.values()),
            {"Verdict": {"": self.verdict}},
        )


def part_of(checkpoint: str | Path | None, name: str) -> Path | None:
    """The folder of one of several runs that keep their parts in one place, if any are kept."""
    return None if checkpoint is None else Path(checkpoint) / name


class Parts:
    """Rows that an experiment has finished, so that an interrupted run goes on where it stopped.

    Args:
        folder: where to keep them; None keeps nothing.
        settings: what the rows depend on, with the model's card as ``model``; other settings have other rows.
    """

    def __init__(self, folder: str | Path | None, settings: Mapping[str, Any]):
        # Of the model its weights and dtype: figures of its self-test differ with the number of threads.
        known = ("name", "checkpoint_sha256", "weights_sha256", "dtype", "class")
        model = {key: value for key, value in settings.get("model", {}).items() if key in known}
        about = {key: value for key, value in settings.items() if key != "heads"}
        text = json.dumps({**about, "model": model}, sort_keys=True, default=str)
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        self.folder = None if folder is None else Path(folder) / digest

    def rows(self, name: str, make: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
        """The rows of that name: read if they are there, else made and kept."""
        if self.folder is None:
            return make()
        path = self.folder / f"{name.replace(' ', '_')}.jsonl"

        def read() -> list[dict[str, Any]] | None:
            try:
                return load_records(path)[0]
            except (FileNotFoundError, ArtifactError):  # none yet, or torn by a kill
                return None

        kept, *_ = exchange(
            read
        )  # the main process's word, so that all of them make the rows, or none
        if kept is not None:
            return kept
        found = make()
        save_records(path, found, {})
        return found


def model_of(model: LensModel | str, **options: Any) -> LensModel:
    """The model itself, or the one of that name."""
    return lt.load_model(model, **options) if isinstance(model, str) else model


def choose_and_set_aside(
    model: LensModel,
    languages: Sequence[str],
    n: int,
    test_texts: int,
    method: str,
    rule: str,
    seed: int,
    rule_options: Mapping[str, Any],
    gradients: str | Path | None = None,
    reserved: Collection[str] = (),
    **options: Any,
) -> tuple[lt.HeadGradients, lt.LanguageHeads, lt.Corpus]:
    """Gradients on ``n`` bundled texts a language, heads by a score and a rule, and other texts to test on.

    Args:
        method: the score; for the tested rule, what it tests.
        gradients: see ``shared_gradients``.
        reserved: ids of texts that something else is tested on.
        options: of ``head_gradients``.
    """
    scoring, rest = lt.load_corpus("bundled", languages).split(n, seed=seed)
    grads = shared_gradients(model, scoring, gradients, **options)
    heads = (
        lt.language_heads(grads, rule, method=method, **rule_options)
        if rule == "tested"
        else lt.language_heads(lt.score(grads, method), rule, **rule_options)
    )
    if reserved:
        rest = rest.without(reserved)
    return grads, heads, rest.sample(test_texts, seed=seed)


def shared_gradients(
    model: LensModel, scoring: lt.Corpus, folder: str | Path | None, **options: Any
) -> lt.HeadGradients:
    """``head_gradients``, kept in a folder language by language for other experiments on the same texts.

    Args:
        folder: of gradients of this model; None keeps nothing.
    """
    if folder is None:
        return lt.head_gradients(model, scoring, **options)
    found = []
    for code in scoring.languages:
        texts = scoring.select([code])
        place = Path(folder) / f"{code}-{texts.sha256[:12]}-{options.get('max_tokens')}"
        found.append(lt.head_gradients(model, texts, checkpoint=place, **options))
    together = lt.HeadGradients.side_by_side(found)
    return replace(together, card={**together.card, "corpus": scoring.card})


def scored_ids(languages: Sequence[str], n: int, seed: int) -> frozenset[str]:
    """Ids of the bundled texts that ``choose_and_set_aside`` scores."""
    scoring, _ = lt.load_corpus("bundled", languages).split(n, seed=seed)
    return frozenset(scoring.ids or ())


def under(rows: pd.DataFrame, condition: str) -> pd.DataFrame:
    """Rows of one condition."""
    return pd.DataFrame(rows[rows["condition"] == condition])


def means_by_draw(rows: pd.DataFrame, column: str) -> list[float]:
    """Mean of a column under each random set of heads (``draw``)."""
    return [float(group[column].mean()) for _, group in rows.groupby("draw")]
