"""Compute a saved result again from what its card says, and see whether it is the same."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lahis_tl.access import LensModel
from lahis_tl.artifacts import Artifact, Card, check_model, load
from lahis_tl.corpora import Corpus, load_corpus, restored
from lahis_tl.effects import HeadEffects, exact_effects
from lahis_tl.errors import ArtifactError
from lahis_tl.gradients import HeadGradients, head_gradients
from lahis_tl.models import load_model, transformer_lens_version
from lahis_tl.scores import HeadScores, score, score_methods


@dataclass(frozen=True, eq=False)
class Rerun:
    """A result computed again, beside the one on disk.

    Attributes:
        result: the new one.
        difference: largest absolute difference between the numbers of both, in their unit; 0 where all are equal to
            the bit.
        largest: the largest absolute number of the old one, to judge the difference by.
        changed: what is another now, such as the version of a library or the number of threads.
    """

    result: Artifact
    difference: float
    largest: float
    changed: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        same = (
            "the same to the bit"
            if self.difference == 0
            else f"differs by at most {self.difference:.2g} (largest number: {self.largest:.2g})"
        )
        return f"{same}; changed since: {', '.join(self.changed) or 'nothing'}"


def rerun(
    path: str | Path,
    *,
    corpus: Corpus | str | Path | None = None,
    model: LensModel | None = None,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> Rerun:
    """Compute a saved result again: same checkpoint, same texts, same settings, all by its card.

    With the same library versions, device and number of threads the numbers are the same to the bit.

    >>> print(rerun("out/run/gradients.safetensors"))                            # doctest: +SKIP
    the same to the bit; changed since: nothing

    Args:
        path: gradients, scores made of them or of exact effects, or exact effects; the file or its card.
        corpus: where its texts are now, or the corpus; needed where they came from memory, a file or a folder.
            Other sources, hub data sets included, are read again with the options on the card.
        model: the model, where it was not made by ``load_model``.

    Raises:
        ArtifactError: the result is of a kind that cannot be run from its card, or about another model.
        CorpusError: its texts are not there.
        FileNotFoundError: there is no such result.
    """
    old = load(path)
    run = _run_of(old, path)
    card = old.card
    if model is None:
        model = _model(card["model"], device)
    check_model(str(path), card, model)
    texts = corpus if isinstance(corpus, Corpus) else _texts(card["corpus"], corpus)
    new = run(model, restored(texts, card["corpus"]), progress)
    difference, largest = _compare(old._tensors(), new._tensors())
    return Rerun(new, difference, largest, tuple(_changes(card["model"], new.card["model"])))


def _run_of(old: Artifact, path: Any) -> Callable[[LensModel, Corpus, bool], Artifact]:
    settings = old.card.get("settings", {})
    if isinstance(old, HeadGradients):
        return lambda model, corpus, progress: head_gradients(
            model, corpus, **settings, progress=progress
        )
    if isinstance(old, HeadEffects):
        return lambda model, corpus, progress: exact_effects(
            model, corpus, old.heads, **settings, progress=progress
        )
    if isinstance(old, HeadScores) and old.method in score_methods():
        make = exact_effects if "ablation" in settings else head_gradients
        return lambda model, corpus, progress: score(
            make(model, corpus, **settings, progress=progress), old.method
        )
    what = f"{old.kind} by {old.method}" if isinstance(old, HeadScores) else old.kind
    raise ArtifactError(
        f"{path} holds {what}; gradients, exact effects, and scores of these can be run again by their card. "
        "Other results follow from them: run those again first"
    )


def _model(card: Card, device: str | torch.device | None) -> LensModel:
    if card.get("loaded_by") != "lahis_tl.load_model":
        raise ArtifactError(
            f"the model of this result, {card.get('name')}, was not made by load_model; give it as model="
        )
    revision = card.get("revision")
    local = revision is None or ":" in revision or Path(card["name"]).expanduser().exists()
    hooked = card["class"] == "HookedTransformer" and transformer_lens_version().major < 4
    return load_model(
        card["name"],
        dtype=card["dtype"],
        device=device,
        backend="hooked" if hooked else "auto",
        revision=None if local or revision == "random" else revision,
    )


def _texts(card: Card, source: str | Path | None) -> Corpus:
    if source is None and card["source"] in ("memory", "token ids"):
        raise ArtifactError(
            f"the texts of this result came from {card['source']}; give them as corpus="
        )
    options = {"languages": list(card["texts"]), **card.get("origin", {})}
    if source is None:
        return load_corpus(card["source"].partition("@")[0], **options)
    if Path(
        source
    ).exists():  # whole: the texts are known by their hashes, in whatever order they stand now
        options.pop("n", None)
    return load_corpus(source, **options)


def _compare(old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> tuple[float, float]:
    """The largest difference, infinite where one has a number and the other none; the largest old number."""
    difference, largest = 0.0, 0.0
    for name, values in old.items():
        before, after = values.double(), new[name].double()
        if before.shape != after.shape or not torch.equal(before.isnan(), after.isnan()):
            difference = float("inf")
            continue
        before, after = before.nan_to_num(), after.nan_to_num()
        difference = max(difference, float((before - after).abs().max()))
        largest = max(largest, float(before.abs().max()))
    return difference, largest


def _changes(old: Card, new: Card) -> list[str]:
    found = []
    for part in ("versions", "machine"):
        before, after = old.get(part, {}), new.get(part, {})
        found += [f"{k} {before.get(k)} → {v}" for k, v in after.items() if before.get(k) != v]
    return found
