"""Results on disk: one safetensors file with a card in its header, and the card as JSON beside it.

Files are written whole or not at all, and never pickled.
"""

import hashlib
import html
import json
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pandas as pd
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from lahis_tl.access import LensModel
from lahis_tl.cards import card_of
from lahis_tl.errors import ArtifactError
from lahis_tl.processes import is_main

_FORMAT = 1
_ROWS_SHOWN = 8
_KEY, _SEAL, _ORDER = "lahis_tl", "sha256", "tensors"
# Where the class of each kind is registered; imported when a file of that kind is read.
_HOMES = {
    "ablation_effect": "lahis_tl.ablation",
    "attention_mass": "lahis_tl.attention",
    "attention_patterns": "lahis_tl.patterns",
    "token_effects": "lahis_tl.per_token",
    "head_overlap": "lahis_tl.overlaps",
    "selectivity": "lahis_tl.ablation",
    "sweep": "lahis_tl.sweeps",
    "text_losses": "lahis_tl.evaluation",
    "tuned_mask": "lahis_tl.tuning",
    "until_sure": "lahis_tl.sequential",
    "head_gradients": "lahis_tl.gradients",
    "head_effects": "lahis_tl.effects",
    "head_scores": "lahis_tl.scores",
    "score_certainty": "lahis_tl.statistics",
    "specificity_test": "lahis_tl.tested",
    "verified_scores": "lahis_tl.verified",
    "language_heads": "lahis_tl.selection",
}
Card = dict[str, Any]
_kinds: dict[str, "type[Artifact]"] = {}
A = TypeVar("A", bound="Artifact")


class Artifact(ABC):
    """A result that can be saved and loaded; subclasses name their ``kind``."""

    kind: ClassVar[str]
    card: Card

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _kinds[cls.kind] = cls

    @abstractmethod
    def _tensors(self) -> dict[str, Tensor]: ...

    @classmethod
    @abstractmethod
    def _from_tensors(cls: type[A], tensors: dict[str, Tensor], card: Card) -> A: ...

    def _content(self) -> Card:
        """What the result needs besides tensors and card; numbers, strings, lists."""
        return {}

    def _summary(self) -> pd.DataFrame:
        """The few rows that a notebook shows of the result."""
        table = getattr(self, "to_dataframe", pd.DataFrame)
        return table().head(_ROWS_SHOWN)

    def _repr_html_(self) -> str:
        """A notebook's view: what this is, and a small table of it."""
        rows, about = self._summary(), f"<p>{html.escape(repr(self))}</p>"
        if rows.empty:
            return about
        return about + rows.to_html(index=False, escape=True, float_format="{:.4g}".format)

    def save(self, path: str | Path) -> Path:
        """Write ``path`` (suffix ``.safetensors``) and its card (``.json``); returns the first.

        Raises:
            OSError: no space, no permission; whatever was there before is untouched.
        """
        path = _with_suffix(path)
        card = {
            **self.card,
            "kind": self.kind,
            "format": _FORMAT,
            "saved": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "content": self._content(),
        }
        pretty = json.dumps(card, indent=2, ensure_ascii=False).encode("utf-8", "backslashreplace")
        write_together({path: _sealed(self._tensors(), card), path.with_suffix(".json"): pretty})
        return path

    @classmethod
    def load(cls: type[A], path: str | Path, model: LensModel | None = None) -> A:
        """Read a result of this kind; with ``model`` also check that it is about that model.

        Raises:
            ArtifactError: the file is damaged, foreign, of another kind or about another model.
            FileNotFoundError: there is none.
        """
        found = load(path, model)
        if not isinstance(found, cls):
            raise ArtifactError(f"{path} holds {found.kind}, not {cls.kind}")
        return found


def load(path: str | Path, model: LensModel | None = None) -> Any:
    """Read any saved result.

    >>> import lahis_tl as lt
    >>> scores = lt.load("runs/scores.safetensors", model=model)     # doctest: +SKIP

    Raises:
        ArtifactError: the file is damaged, foreign, or about another model than ``model``.
        FileNotFoundError: there is none.
    """
    tensors, card = read_tensors(_with_suffix(path))
    kind = card.get("kind")
    if kind not in _HOMES or card.get("format") != _FORMAT:
        raise ArtifactError(
            f"{path} holds {kind!r} in format {card.get('format')}, which this version does not know"
        )
    if model is not None:
        check_model(path, card, model)
    import_module(_HOMES[kind])  # registers the class
    try:
        return _kinds[kind]._from_tensors(tensors, card)
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{path} is damaged: {error}") from error


def keyed(name: str, mapping: Mapping[Any, Tensor]) -> dict[str, Tensor]:
    """A mapping's tensors under names of their own: ``name/key``; a pair of languages is joined by ``>``.

    >>> import torch
    >>> list(keyed("change", {"fr": torch.ones(1), ("fr", "de"): torch.ones(1)}))
    ['change/fr', 'change/fr>de']
    """
    return {
        f"{name}/{key if isinstance(key, str) else '>'.join(key)}": value
        for key, value in mapping.items()
    }


def unkeyed(name: str, tensors: Mapping[str, Tensor]) -> dict[Any, Tensor]:
    """The mapping that ``keyed`` took apart."""
    found: dict[Any, Tensor] = {}
    for label, value in tensors.items():
        start, _, key = label.partition("/")
        if start == name:
            found[tuple(key.split(">")) if ">" in key else key] = value
    return found


def check_model(path: str | Path, card: Card, model: LensModel) -> None:
    """ArtifactError unless the card is about ``model``: the same grid of heads and the same weights."""
    theirs, ours = card.get("model", {}), card_of(model)
    for key in ("n_layers", "n_heads", "checkpoint_sha256", "weights_sha256"):
        if theirs.get(key) and ours.get(key) and theirs[key] != ours[key]:
            raise ArtifactError(
                f"{path} is about another model: its {key} is {theirs[key]!r}, "
                f"this model's {ours[key]!r} ({theirs.get('name')} and {ours['name']})"
            )


def write_tensors(path: Path, tensors: Mapping[str, Tensor], card: Card) -> None:
    """One safetensors file, with the card and a checksum of card and tensors in its header; by any process."""
    write_together({path: _sealed(tensors, card)}, by_all=True)


def _sealed(tensors: Mapping[str, Tensor], card: Card) -> bytes:
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps({**card, _ORDER: list(plain)})  # the format itself sorts tensors by name
    return to_bytes(plain, metadata={_KEY: text, _SEAL: _checksum(plain, text)})


def read_tensors(path: Path) -> tuple[dict[str, Tensor], Card]:
    """Tensors and card of a file that ``write_tensors`` wrote.

    Raises:
        ArtifactError: damaged or foreign.
        FileNotFoundError: there is none.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if _KEY not in metadata:
                raise ArtifactError(f"{path} was not written by lahis-tl: its header has no card")
            text = metadata[_KEY]
            card = json.loads(text)
            names = card.pop(_ORDER, None) or file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, ValueError, OSError) as error:
        if isinstance(error, ArtifactError):
            raise
        raise ArtifactError(f"{path} is damaged or no safetensors file: {error}") from error
    if metadata.get(_SEAL) != _checksum(tensors, text):
        raise ArtifactError(f"{path} is damaged: its content does not match its checksum")
    return tensors, card


def _checksum(tensors: Mapping[str, Tensor], card: str) -> str:
    digest = hashlib.sha256(card.encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()


def _with_suffix(path: str | Path) -> Path:
    """``scores`` and ``scores.json`` mean ``scores.safetensors``; a dot elsewhere is part of the name."""
    path = Path(path)
    if path.suffix == ".json":
        return path.with_suffix(".safetensors")
    return path if path.suffix == ".safetensors" else path.with_name(path.name + ".safetensors")


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader finds the old one or the new one, never a part.

    Raises:
        OSError: it could not be written; nothing is left behind.
    """
    write_together({path: content})


def write_together(contents: Mapping[Path, bytes], by_all: bool = False) -> None:
    """Write files so that none is replaced before all are safely on the disk.

    Args:
        by_all: also where several processes run and this is not the main one; they all have the same results.
    """
    if not (by_all or is_main()):
        return
    scratch: dict[Path, Path] = {}
    try:
        for path, content in contents.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
            scratch[path] = Path(name)
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o666 & ~_umask())
        for path, name in scratch.items():
            os.replace(name, path)
    except BaseException:
        for name in scratch.values():
            name.unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)  # there is no way to read it without setting it
    os.umask(mask)
    return mask
