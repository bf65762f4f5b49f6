"""Rows on disk, one JSON object a line, so that every figure can be made again without the model."""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lahis_tl.artifacts import Card, write_together
from lahis_tl.errors import ArtifactError


def save_records(
    path: str | Path, records: Iterable[Mapping[str, Any]], card: Mapping[str, Any]
) -> Path:
    """Write one JSON object a line (suffix ``.jsonl``), and a card with their checksum beside it (``.json``)."""
    path = _jsonl(path)
    lines = [json.dumps(_plain(row), ensure_ascii=False, allow_nan=False) + "\n" for row in records]
    content = "".join(lines).encode("utf-8", "backslashreplace")
    about = {**card, "records_sha256": hashlib.sha256(content).hexdigest()}
    pretty = json.dumps(about, indent=2, ensure_ascii=False).encode("utf-8", "backslashreplace")
    write_together({path: content, path.with_suffix(".json"): pretty})
    return path


def load_records(path: str | Path) -> tuple[list[dict[str, Any]], Card]:
    """Read what ``save_records`` wrote.

    Raises:
        ArtifactError: the lines do not match the checksum of their card, or are no JSON.
        FileNotFoundError: one of the two is missing.
    """
    path = _jsonl(path)
    content, about = path.read_bytes(), path.with_suffix(".json").read_text(encoding="utf-8")
    try:
        card = json.loads(about)
        if hashlib.sha256(content).hexdigest() != card.pop("records_sha256"):
            raise ArtifactError(f"{path} is damaged: it does not match the checksum on its card")
        return [json.loads(line) for line in content.decode().split("\n") if line], card
    except (ValueError, KeyError, AttributeError) as error:
        raise ArtifactError(f"{path} is damaged: {error}") from error


def _jsonl(path: str | Path) -> Path:
    """The path with its suffix; a dot elsewhere is a part of the name."""
    path = Path(path)
    return path if path.suffix == ".jsonl" else path.with_name(path.name + ".jsonl")


def _plain(value: Any) -> Any:
    """JSON knows no NaN: what is not there is null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, (list, tuple)) else value
