"""Finished parts of a long run, so that it goes on where it stopped."""

import hashlib
import json
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import Tensor

from lahis_tl.artifacts import read_tensors, write_atomically, write_tensors
from lahis_tl.errors import ArtifactError
from lahis_tl.processes import exchange, is_main

# A model is known by its weights, not by the name or path under which it was loaded; texts by their hash, not by how
# they were read.
_INCIDENTAL = ("checks", "versions", "machine", "name", "loaded_by", "fingerprints")
_INCIDENTAL += ("source", "dropped", "history", "origin")


class ShardStore:
    """Numbered parts in a folder, with the settings that they were computed under; used in a ``with`` block.

    Args:
        folder: None keeps nothing.
        settings: what the parts depend on; a folder with other settings is refused.
        content: what the parts are about (token ids); only its hash is kept.
    """

    def __init__(self, folder: str | Path | None, settings: dict[str, Any], content: Any):
        self.folder = None if folder is None else Path(folder)
        self._lock: FileLock | None = None
        if self.folder is None:
            return
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        wanted = json.dumps({**settings, "content_sha256": digest}, default=str)
        self._wanted: dict[str, Any] = json.loads(wanted)
        known = json.dumps(_essential(self._wanted), sort_keys=True)
        # Parts bear it too: on disks of several machines they may outlive their manifest.
        self._digest = hashlib.sha256(known.encode()).hexdigest()[:16]

    def __enter__(self) -> "ShardStore":
        """Keep other runs out of the folder until the block ends, however it ends.

        Raises:
            ArtifactError: the folder belongs to a run with other settings, or another run is writing to it.
        """
        exchange(self._open)
        return self

    def __exit__(self, *_: Any) -> None:
        if self._lock is not None:
            self._lock.release()

    def _open(self) -> None:
        if self.folder is None or not is_main():
            return
        lock = FileLock(self.folder / ".lock")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
            self._lock = lock
        except Timeout as error:
            raise ArtifactError(
                f"another run is writing to {self.folder}; wait for it, or use another folder"
            ) from error
        except PermissionError:
            pass  # a finished run can be read where nothing can be written
        try:
            self._check_manifest(self.folder / "run.json")
        except BaseException:
            self.__exit__()
            raise

    def _check_manifest(self, manifest: Path) -> None:
        if not manifest.is_file():
            write_atomically(manifest, json.dumps(self._wanted, indent=2).encode())
            return
        try:
            found = json.loads(manifest.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ArtifactError(
                f"{manifest} is damaged ({error}); delete the folder to start anew"
            ) from error
        differing = _differences(found, self._wanted)
        if differing:
            raise ArtifactError(
                f"{self.folder} belongs to another run: {'; '.join(differing)}. "
                "Use another folder, or delete this one to start anew"
            )

    def read(self, number: int) -> dict[str, Tensor] | None:
        """The finished part, or None if it is not there, damaged or another run's (it is then made again)."""
        if self.folder is None:
            return None
        try:
            tensors, card = read_tensors(self._path(number))
        except (FileNotFoundError, ArtifactError):
            return None
        return tensors if card.get("run") == self._digest else None

    def read_all(self, count: int) -> dict[int, dict[str, Tensor]]:
        """Those of the first ``count`` parts that are finished."""
        found = {number: self.read(number) for number in range(count)}
        return {number: part for number, part in found.items() if part is not None}

    def write(self, number: int, tensors: dict[str, Tensor]) -> None:
        if self.folder is not None:
            write_tensors(self._path(number), tensors, {"part": number, "run": self._digest})

    def _path(self, number: int) -> Path:
        assert self.folder is not None
        return self.folder / f"part-{number:06d}.safetensors"


def _essential(settings: Any) -> Any:
    """Settings without what does not matter to the parts."""
    if not isinstance(settings, dict):
        return settings
    return {k: _essential(v) for k, v in settings.items() if k not in _INCIDENTAL}


def _differences(found: Any, wanted: Any, at: str = "") -> list[str]:
    if isinstance(found, dict) and isinstance(wanted, dict):
        keys = [key for key in {**found, **wanted} if key not in _INCIDENTAL]
        return [
            d for key in keys for d in _differences(found.get(key), wanted.get(key), f"{at}.{key}")
        ]
    return [] if found == wanted else [f"{at[1:]} was {found!r}, now {wanted!r}"]
