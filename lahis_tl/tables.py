"""Texts in memory and in local files, as rows of language, text and id."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import langcodes
import pandas as pd

from lahis_tl.errors import CorpusError
from lahis_tl.languages import check_language

_AS_WRITTEN: Any = False  # texts of digits stay texts
READERS: dict[str, Callable[..., Any]] = {
    ".csv": lambda path: pd.read_csv(path, keep_default_na=False, dtype=str),
    ".json": lambda path: pd.read_json(path, dtype=_AS_WRITTEN),
    ".jsonl": lambda path: pd.read_json(path, lines=True, dtype=_AS_WRITTEN),
    ".parquet": pd.read_parquet,
}


def of_one_language(
    table: pd.DataFrame, path: Path, wanted: list[str] | None, text_column: str
) -> pd.DataFrame:
    """A table of texts without a language column is in the one that is asked for, or that names the file."""
    if text_column not in table:
        return table
    if wanted is not None and len(wanted) == 1:
        return table.assign(language=wanted[0])
    return table.assign(language=path.stem) if langcodes.tag_is_valid(path.stem) else table


def from_mapping(source: Mapping[str, Sequence[str]]) -> pd.DataFrame:
    rows = [(language, text) for language, texts in source.items() for text in texts]
    empty = [language for language, texts in source.items() if not len(texts)]
    if empty or not rows:
        raise CorpusError(
            f"no texts were given for {', '.join(map(repr, empty)) or 'any language'}"
        )
    # As objects: pandas's own strings cannot hold a lone surrogate.
    return pd.DataFrame(rows, columns=["language", "text"], dtype=object)


def from_folder(folder: Path) -> pd.DataFrame:
    tables = []
    for path in sorted(folder.iterdir()):
        if path.suffix in {".txt", *READERS}:
            table = from_file(path)
            table["language"] = path.stem
            tables.append(table)
    if not tables:
        raise CorpusError(
            f"the folder {folder} holds no file named after a language, such as en.txt or en.jsonl"
        )
    return pd.concat(tables, ignore_index=True)


def from_file(path: Path) -> pd.DataFrame:
    try:
        if path.suffix == ".txt":
            lines = path.read_text(encoding="utf-8").split("\n")
            return pd.DataFrame({"text": [line for line in lines if line.strip()]})
        reader = READERS.get(path.suffix)
        if reader is None:
            raise CorpusError(
                f"cannot read {path.name}: the formats are txt, {', '.join(s[1:] for s in READERS)}"
            )
        return reader(path)
    except (ValueError, OSError, UnicodeDecodeError) as error:
        if isinstance(error, CorpusError):
            raise
        raise CorpusError(f"cannot read {path}: {error}") from error


def normalise(
    table: pd.DataFrame,
    name: str,
    wanted: list[str] | None,
    text_column: str,
    language_column: str | None,
    id_column: str | None,
) -> pd.DataFrame:
    """Columns language and text, and id where the corpus is parallel."""
    if id_column is not None and id_column not in table.columns:
        raise CorpusError(f"{name} has no column {id_column!r}; it has {_columns(table)}")
    if text_column not in table.columns:
        return _from_wide(table, name, wanted, text_column, id_column)
    column = language_column or "language"
    if column not in table.columns:
        raise CorpusError(
            f"{name} does not say which language its texts are in: it has no column {column!r}; name it "
            "by language_column, name the file after the language, or name one language in languages"
        )
    columns = {"language": table[column].map(check_language), "text": table[text_column]}
    if id_column is not None:
        columns["id"] = table[id_column].astype(str)
    return pd.DataFrame(columns)


def _from_wide(
    table: pd.DataFrame,
    name: str,
    wanted: list[str] | None,
    text_column: str,
    id_column: str | None,
) -> pd.DataFrame:
    """A table with a column a language, in rows; its rows are parallel."""
    if id_column is None and "id" in table.columns and "id" not in (wanted or ()):
        id_column = "id"
    codes = {
        column: check_language(column)
        for column in table.columns
        if isinstance(column, str) and column != id_column and langcodes.tag_is_valid(column)
    }
    # Names such as url are codes too, so longer ones count only where they are asked for.
    codes = {c: code for c, code in codes.items() if (code in wanted if wanted else len(c) == 2)}
    if not codes:
        raise CorpusError(
            f"{name} has no column {text_column!r} and no column named after a language; "
            f"it has {_columns(table)}"
        )
    keys = table[id_column].astype(str) if id_column else [str(i) for i in range(len(table))]
    parts = [
        pd.DataFrame({"id": keys, "language": code, "text": table[column]})
        for column, code in codes.items()
    ]
    return pd.concat(parts, ignore_index=True)


def _columns(table: pd.DataFrame) -> str:
    return ", ".join(map(str, table.columns))
