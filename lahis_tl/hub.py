"""Texts of hub data sets, through ``datasets``."""

from dataclasses import dataclass
from typing import Any

import pandas as pd

from lahis_tl.errors import CorpusError
from lahis_tl.languages import flores_code

_SHUFFLE_BUFFER = 10_000


@dataclass(frozen=True)
class HubLayout:
    """How a known data set is laid out; ``{language}`` and ``{flores}`` stand for the code."""

    config: str
    split: str
    id_column: str | None = None


KNOWN = {
    "wikimedia/wikipedia": HubLayout("20231101.{language}", "train"),
    "openlanguagedata/flores_plus": HubLayout("{flores}", "dev", "id"),
}


def from_hub(
    name: str,
    languages: list[str] | None,
    n: int | None,
    seed: int,
    split: str | None,
    text_column: str,
    language_column: str | None,
    id_column: str | None,
    config: str | None,
    revision: str | None,
) -> tuple[pd.DataFrame, str | None]:
    """Rows with columns language, text and, if parallel, the id column; and that column's name.

    Each language is streamed. Without ids only ``n`` texts (and some to spare for those that are left
    out) are read from a shuffled window; with ids all rows are, so that languages can be matched.
    """
    layout = KNOWN.get(name)
    if languages is None:
        raise CorpusError(f"name the languages to read from the hub data set {name!r}")
    if layout is not None:
        config, split = config or layout.config, split or layout.split
        id_column = id_column or layout.id_column
    if id_column is None and n is None:
        raise CorpusError(f"say how many texts a language to read from {name!r} with n=...")
    tables = []
    for language in languages:
        rows = _open(name, language, split or "train", config, revision)
        if config is None or ("{language}" not in config and "{flores}" not in config):
            rows = rows.filter(
                lambda row, code=language: row.get(language_column or "language") == code
            )
        if id_column is None and n is not None:
            rows = rows.shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER).take(n + n // 5 + 20)
        tables.append(_read(rows, name, language, text_column, id_column))
    return pd.concat(tables, ignore_index=True), id_column


def _open(name: str, language: str, split: str, config: str | None, revision: str | None) -> Any:
    import datasets

    chosen = config and config.format(language=language, flores=flores_code(language))
    try:
        return datasets.load_dataset(name, chosen, split=split, revision=revision, streaming=True)
    except Exception as error:  # datasets raises many kinds for a wrong name and for no network
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise CorpusError(
            f"cannot open the hub data set {name!r}, configuration {chosen!r}, for {language!r}: {reason}. "
            "Check name and configuration, the network (HF_HUB_OFFLINE), and for gated data sets that "
            "you accepted the terms; local files and 'bundled' need no hub"
        ) from error


def _read(
    rows: Any, name: str, language: str, text_column: str, id_column: str | None
) -> pd.DataFrame:
    found = []
    for row in rows:
        if text_column not in row:
            raise CorpusError(f"{name!r} has no column {text_column!r}; it has {', '.join(row)}")
        found.append({"language": language, text_column: row[text_column]})
        if id_column is not None:
            found[-1][id_column] = row[id_column]
    if not found:
        raise CorpusError(f"{name!r} has no rows for {language!r}")
    return pd.DataFrame(found)
