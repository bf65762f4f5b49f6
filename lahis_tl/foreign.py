"""Head scores of other tools, and how far they agree with ours."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import hypergeom
from torch import Tensor

from lahis_tl.errors import ArtifactError
from lahis_tl.heads import HeadGrid, top_heads
from lahis_tl.scores import HeadScores
from lahis_tl.selection import chance_jaccard, jaccard
from lahis_tl.statistics import rank_correlation

ALL = "all"  # the language of scores that are of none


def import_scores(
    source: str | Path | Tensor | np.ndarray | Mapping[str, Any],
    grid: HeadGrid | None = None,
    *,
    name: str | None = None,
    unit: str = "",
    sign: str = "high: matters",
) -> HeadScores:
    """Scores that another tool gave every head, as ``HeadScores`` to select from, compare and explore.

    >>> import_scores({"0-1": [0.5, 0.7], "1-0": 0.2}, HeadGrid(2, 2), name="retrieval")["all"]
    tensor([[0.0000, 0.6000],
            [0.2000, 0.0000]])

    Args:
        source: a tensor or array [layer, head], as transformer-lens's ``head_detector.detect_head`` gives; a mapping
            "layer-head" → score or list of scores, whose mean is taken, or a .json of it, as retrieval-head
            detection writes (Wu et al. 2024, arXiv 2404.15574); or a .csv, .jsonl or .json of records with the columns
            layer, head, score and perhaps language. Layers and heads count from 0.
        grid: the model's, ``lahis_tl.grid_of(model)``; by default as far as the source reaches, which is only right
            if it names the last layer and the last head. Heads that it does not name get 0.
        name: of the score; by default the file's.

    Raises:
        ArtifactError: the source cannot be read, or lacks a column.
        IndexError: a head is outside the grid.
        ValueError: a score is not a finite number, or a head has two.
    """
    label = name or (Path(source).stem if isinstance(source, (str, Path)) else "imported")
    if isinstance(source, (Tensor, np.ndarray)):
        values = torch.as_tensor(source).detach().float().cpu()
        if values.ndim != 2 or (grid is not None and tuple(values.shape) != grid.shape):
            raise ValueError(
                f"scores of shape {tuple(values.shape)} are not [layer, head]"
                + (f" of {grid}" if grid else "")
            )
        return HeadScores(values[None], (ALL,), label, unit, sign, card={"source": "array"})
    rows = _rows(source)
    if grid is None:
        grid = HeadGrid(int(rows["layer"].max()) + 1, int(rows["head"].max()) + 1)
    languages = tuple(dict.fromkeys(rows["language"]))
    values = torch.zeros(len(languages), *grid.shape)
    for row in rows.to_dict("records"):
        head = grid.check((int(row["layer"]), int(row["head"])))
        values[languages.index(row["language"]), head.layer, head.head] = float(row["score"])
    origin = str(source) if isinstance(source, (str, Path)) else "mapping"
    return HeadScores(values, languages, label, unit, sign, card={"source": origin})


def _rows(source: str | Path | Mapping[str, Any]) -> pd.DataFrame:
    """Columns layer, head, score, language."""
    where = str(source) if isinstance(source, (str, Path)) else "the mapping"
    named = isinstance(source, Mapping)
    table = _of_mapping(source, where) if named else _read(Path(source))
    missing = {"layer", "head", "score"} - set(table.columns)
    if missing or table.empty:
        raise ArtifactError(
            f"{where} needs the columns layer, head and score (or entries 'layer-head'); it has "
            f"{', '.join(map(str, table.columns)) or 'nothing'}"
        )
    if "language" not in table:
        table = table.assign(language=ALL)
    for column in ("layer", "head", "score"):
        numbers = np.asarray(pd.to_numeric(table[column], errors="coerce"), dtype=float)
        bad = ~np.isfinite(numbers)
        if column != "score":
            bad |= numbers != np.floor(numbers)
        if bad.any():
            raise ValueError(
                f"{where}: {column} {table[column].to_list()[bad.argmax()]} is no number"
            )
        table = table.assign(**{column: numbers})
    twice = table.duplicated(["language", "layer", "head"])
    if twice.any():
        row = table[twice].iloc[0]
        raise ValueError(f"{where}: L{row['layer']:.0f}H{row['head']:.0f} has two scores")
    return table


def _read(path: Path) -> pd.DataFrame:
    try:
        if path.suffix == ".csv":
            return pd.read_csv(path, keep_default_na=False)
        if path.suffix == ".jsonl":
            return pd.read_json(path, lines=True)
        if path.suffix != ".json":
            raise ArtifactError(f"cannot read scores from {path}: give .json, .jsonl or .csv")
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArtifactError(f"{path} is damaged: {error}") from error
    return _of_mapping(content, str(path)) if isinstance(content, dict) else pd.DataFrame(content)


def _of_mapping(source: Mapping[str, Any], where: str) -> pd.DataFrame:
    rows = []
    for key, value in source.items():
        layer, dash, head = str(key).partition("-")
        if not (dash and layer.strip().isdigit() and head.strip().isdigit()):
            raise ArtifactError(f"{where}: {key!r} is no 'layer-head', such as '12-3'")
        many = isinstance(value, Sequence) and not isinstance(value, str)
        score = np.mean(value) if many and len(value) else value
        rows.append({"layer": int(layer), "head": int(head), "score": score})
    return pd.DataFrame(rows)


def score_agreement(a: HeadScores, b: HeadScores, top_k: int = 20) -> pd.DataFrame:
    """How far two scores agree: every language of one against every one of the other.

    >>> import torch
    >>> a = HeadScores(torch.tensor([[[3.0, 2.0, 1.0]]]), ("en",), "x")
    >>> score_agreement(a, a, top_k=1)[["rank_correlation", "common", "chance_common"]].to_dict("records")
    [{'rank_correlation': 1.0, 'common': 1, 'chance_common': 0.3333333333333333}]

    Returns:
        language_a, language_b, rank_correlation (Spearman's, all heads; by chance 0), common (heads among both top
        ``top_k``), chance_common, jaccard, chance_jaccard, p (hypergeometric, of so many in common or more).

    Raises:
        ValueError: the scores are of different grids, or ``top_k`` is outside them.
    """
    if a.grid != b.grid:
        raise ValueError(f"the scores are of {a.grid} and {b.grid}")
    size = a.grid.size
    if not 1 <= top_k <= size:
        raise ValueError(f"top_k={top_k} must lie between 1 and {size} heads")
    rows = []
    for first in a.languages:
        for second in b.languages:
            best = top_heads(a[first], top_k), top_heads(b[second], top_k)
            common = len(set(best[0]) & set(best[1]))
            rows.append(
                {"language_a": first, "language_b": second}
                | {"rank_correlation": rank_correlation(a[first], b[second])}
                | {"common": common, "chance_common": top_k * top_k / size}
                | {"jaccard": jaccard(*best), "chance_jaccard": chance_jaccard(top_k, top_k, size)}
                | {"p": float(hypergeom.sf(common - 1, size, top_k, top_k))}
            )
    return pd.DataFrame(rows)
