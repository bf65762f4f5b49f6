"""Results on disk: one safetensors file with a card in its header, and the card as JSON beside it.

Files are written whole or not at all, and never pickled.
"""

import hashlib
import json
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from lahis_tl.access import LensModel, card_of
from lahis_tl.errors import ArtifactError

_FORMAT = 1
_KEY = "lahis_tl"
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

    def save(self, path: str | Path) -> Path:
        """Write ``path`` (suffix ``.safetensors``) and its card (``.json``); returns the first.

        Raises:
            OSError: no space, no permission; whatever was there before is untouched.
        """
        path = Path(path).with_suffix(".safetensors")
        card = {
            **self.card,
            "kind": self.kind,
            "format": _FORMAT,
            "saved": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "content": self._content(),
        }
        write_tensors(path, self._tensors(), card)
        pretty = json.dumps(card, indent=2, ensure_ascii=False)
        write_atomically(path.with_suffix(".json"), pretty.encode())
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
    tensors, card = read_tensors(Path(path).with_suffix(".safetensors"))
    kind = card.get("kind")
    if kind not in _kinds or card.get("format") != _FORMAT:
        raise ArtifactError(
            f"{path} holds {kind!r} in format {card.get('format')}, which this version does not know"
        )
    if model is not None:
        check_model(path, card, model)
    try:
        return _kinds[kind]._from_tensors(tensors, card)
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{path} is damaged: {error}") from error


def check_model(path: str | Path, card: Card, model: LensModel) -> None:
    """ArtifactError unless the card is about ``model`` (name, revision and grid)."""
    theirs, ours = card.get("model", {}), card_of(model)
    for key in ("name", "revision", "n_layers", "n_heads"):
        if key in theirs and key in ours and theirs[key] != ours[key]:
            raise ArtifactError(
                f"{path} is about another model: its {key} is {theirs[key]!r}, this model's {ours[key]!r}"
            )


def write_tensors(path: Path, tensors: Mapping[str, Tensor], card: Card) -> None:
    """One safetensors file, with the card and a checksum of the tensors in its header."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    sealed = json.dumps({**card, "tensors_sha256": _checksum(plain)}, ensure_ascii=True)
    write_atomically(path, to_bytes(plain, metadata={_KEY: sealed}))


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
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            card = json.loads(metadata[_KEY])
    except (SafetensorError, ValueError, OSError) as error:
        if isinstance(error, ArtifactError):
            raise
        raise ArtifactError(f"{path} is damaged or no safetensors file: {error}") from error
    if not isinstance(card, dict) or card.pop("tensors_sha256", None) != _checksum(tensors):
        raise ArtifactError(f"{path} is damaged: its tensors do not match their checksum")
    return tensors, card


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader finds the old one or the new one, never a part.

    Raises:
        OSError: it could not be written; nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(scratch, 0o644)
        os.replace(scratch, path)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise
