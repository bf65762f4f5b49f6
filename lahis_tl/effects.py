"""What removing each head really does to the loss: one ablation a head, the exact answer to a score's claim."""

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from lahis_tl.access import LensModel, device_of, grid_of, run_layers
from lahis_tl.artifacts import Card
from lahis_tl.batches import Batch, TextKey, TokenIds, make_batches, require_finite, tokenize
from lahis_tl.cards import card_of
from lahis_tl.corpora import Corpus
from lahis_tl.heads import Head, HeadLike, HeadSet
from lahis_tl.masks import hooked_heads
from lahis_tl.means import mean_head_outputs
from lahis_tl.per_text import PerTextHeads
from lahis_tl.processes import shared_out, shows
from lahis_tl.replay import Replay, record
from lahis_tl.shards import ShardStore

ABLATIONS = ("zero", "mean", "resample")


@dataclass(frozen=True, eq=False, repr=False)
class HeadEffects(PerTextHeads):
    """The change of each text's loss when one head is ablated.

    Attributes:
        effects: language → float32 [text, layer, head], nats per token; positive where the removal raises
            the loss, so where the head helps. NaN for heads that were not ablated.
        losses: language → float32 [text], mean NLL of the unchanged model, nats per token.
        n_tokens: language → int64 [text], number of predicted tokens.
        ablation: ``"zero"``, ``"mean"`` or ``"resample"``.
        card: birth certificate: model, corpus, settings.
    """

    kind: ClassVar[str] = "head_effects"
    main: ClassVar[str] = "effects"
    effects: Mapping[str, Float[Tensor, "_text layer head"]]
    losses: Mapping[str, Float[Tensor, "_text"]]
    n_tokens: Mapping[str, Int[Tensor, "_text"]]
    ablation: str = "zero"
    card: Card = field(default_factory=dict, repr=False)

    @property
    def _values(self) -> Mapping[str, Float[Tensor, "_text layer head"]]:
        return self.effects

    @property
    def heads(self) -> HeadSet:
        """The heads that were ablated, layer-major."""
        done = ~torch.stack([torch.isnan(e).any(0) for e in self.effects.values()]).any(0)
        return HeadSet(self.grid, (Head(*pair) for pair in done.nonzero().tolist()))


def exact_effects(
    model: LensModel,
    corpus: Corpus | TokenIds,
    heads: HeadSet | Iterable[HeadLike] | None = None,
    *,
    ablation: str = "zero",
    max_tokens: int | None = 512,
    batch_tokens: int = 2048,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> HeadEffects:
    """Ablate each head alone and measure the change of every text's mean NLL.

    Layers below the head are not computed again, and a batch is filled up with several ablations where
    there are few texts. On average half of the layers and the whole unembedding remain for each head.

    >>> effects = exact_effects(model, corpus)                       # doctest: +SKIP
    >>> effects["fr"].mean(0)[12, 3]      # nats per token that L12H3 is worth in French   # doctest: +SKIP
    tensor(0.0131)

    Args:
        heads: which to ablate; all if None.
        ablation: ``"zero"``; ``"mean"``, the head's mean output over the corpus; or ``"resample"``, its
            output at the same position of another text of the language (begun again where that one is
            shorter), the pairs drawn by ``seed``.
        max_tokens: longer texts are cut there; None for the model's context.
        batch_tokens: most tokens in one pass; bounds memory, does not change results.
        checkpoint: a folder to which finished parts go, and from which an interrupted run goes on.

    Raises:
        CorpusError: a text with fewer than two tokens.
        IndexError: a head is outside the model's grid.
        ModelError: no per-head output, or a loss that is not finite.
        ValueError: an unknown ablation; or ``"resample"`` with one text in a language.
        ArtifactError: ``checkpoint`` belongs to a run with other settings.
    """
    grid = grid_of(model)
    chosen = HeadSet(grid, grid.labels if heads is None else heads)
    if ablation not in ABLATIONS:
        raise ValueError(f"ablation {ablation!r} is not one of {', '.join(ABLATIONS)}")
    if not len(chosen):
        raise ValueError("no heads to ablate were given")
    token_ids = tokenize(model, corpus, max_tokens)
    settings = {
        "max_tokens": max_tokens,
        "batch_tokens": batch_tokens,
        "ablation": ablation,
        "seed": seed,
    }
    card = {
        "model": card_of(model),
        "corpus": corpus.card if isinstance(corpus, Corpus) else {"source": "token ids"},
        "settings": settings,
    }
    replacing = _Replacement(model, token_ids, ablation, seed, max_tokens, batch_tokens)
    store = ShardStore(checkpoint, {**card, "heads": chosen.labels}, token_ids)
    batches = make_batches(token_ids, batch_tokens)
    effects = {
        code: torch.full((len(texts), *grid.shape), float("nan"))
        for code, texts in token_ids.items()
    }
    losses = {code: torch.empty(len(texts)) for code, texts in token_ids.items()}
    total = len(chosen) * sum(map(len, token_ids.values()))
    with (
        store,
        tqdm(total=total, unit="ablation", unit_scale=True, disable=not shows(progress)) as bar,
    ):
        for keys, layer, part in _each_part(model, batches, chosen, replacing, store, batch_tokens):
            columns = [head.head for head in chosen if head.layer == layer]
            for row, (code, index) in enumerate(keys):
                effects[code][index, layer, columns] = part["effects"][row]
                losses[code][index] = part["losses"][row]
            bar.update(len(keys) * len(columns))
    n_tokens = {c: torch.tensor([len(ids) - 1 for ids in t]) for c, t in token_ids.items()}
    return HeadEffects(effects, losses, n_tokens, ablation, card)


def _each_part(
    model: LensModel,
    batches: list[Batch],
    heads: HeadSet,
    replacing: "_Replacement",
    store: ShardStore,
    batch_tokens: int,
) -> Iterator[tuple[list[TextKey], int, dict[str, Tensor]]]:
    """Batch by batch and layer by layer; a batch whose parts are all finished is not run at all."""
    layers = sorted({head.layer for head in heads})

    def work(number: int, batch: Batch) -> Iterator[tuple[list[TextKey], int, dict[str, Tensor]]]:
        replay: Replay | None = None
        for place, layer in enumerate(layers):
            at = number * len(layers) + place
            part = store.read(at)
            if part is None:
                members = [head for head in heads if head.layer == layer]
                if replay is None:
                    replay = _record(model, batch, heads, batch_tokens)
                    replacing.prepare(batch)
                part = _layer_effects(replay, batch, layer, members, replacing)
                store.write(at, part)
            yield batch.keys, layer, part

    return shared_out(batches, work)


def _record(model: LensModel, batch: Batch, heads: HeadSet, batch_tokens: int) -> Replay:
    device = device_of(model)
    in_layer = [head.layer for head in heads]
    most = max(in_layer.count(layer) for layer in set(in_layer))
    room = max(1, min(most, batch_tokens // batch.ids.numel()))
    copies = -(-most // -(-most // room))  # no more than the fullest layer's passes need
    replay = record(model, batch.ids.to(device), batch.attention_mask.to(device), copies)
    require_finite("loss", replay.clean, batch)
    return replay


@torch.no_grad()
def _layer_effects(
    replay: Replay, batch: Batch, layer: int, heads: list[Head], replacing: "_Replacement"
) -> dict[str, Tensor]:
    found = []
    for start in range(0, len(heads), replay.copies):
        group = heads[start : start + replay.copies]
        nll = replay.nll(layer, partial(replacing.edit, layer=layer, heads=group))
        found.append(nll[: len(group)])
    changed = torch.cat(found).T - replay.clean[:, None]
    require_finite("loss", changed, batch)
    return {"effects": changed.float().cpu(), "losses": replay.clean.float().cpu()}


class _Replacement:
    """What an ablated head puts out instead."""

    def __init__(
        self,
        model: LensModel,
        token_ids: Mapping[str, Sequence[Sequence[int]]],
        ablation: str,
        seed: int,
        max_tokens: int | None,
        batch_tokens: int,
    ):
        self.model, self.ablation, self.token_ids = model, ablation, token_ids
        if ablation == "mean":
            self.means = mean_head_outputs(
                model, token_ids, max_tokens=max_tokens, batch_tokens=batch_tokens, progress=False
            )
        if ablation == "resample":
            self.donors = {
                code: _derangement(len(texts), f"{seed}/{code}", code)
                for code, texts in token_ids.items()
            }

    def prepare(self, batch: Batch) -> None:
        """Get ready for a batch: run the donors of its texts and keep their head outputs."""
        self.n_texts = len(batch.keys)
        if self.ablation != "resample":
            return
        width = batch.ids.shape[1]
        donors = [self.token_ids[code][self.donors[code][row]][:width] for code, row in batch.keys]
        ids = torch.tensor([[*text, *[0] * (width - len(text))] for text in donors])
        position = torch.stack([torch.arange(width) % len(text) for text in donors])
        self.outputs = _head_outputs(self.model, ids, position)

    def edit(self, z: Tensor, layer: int, heads: list[Head]) -> Tensor:
        """``z`` [copy · text, pos, head, d_head] with ``heads[i]`` replaced in the i-th copy."""
        changed = z.clone()
        for copy, head in enumerate(heads):
            rows = slice(copy * self.n_texts, (copy + 1) * self.n_texts)
            changed[rows, :, head.head] = self._fill(layer, head.head).to(z.device, z.dtype)
        return changed

    def _fill(self, layer: int, head: int) -> Tensor:
        if self.ablation == "mean":
            return self.means[layer, head]
        if self.ablation == "resample":
            return self.outputs[layer][:, :, head]
        return torch.zeros(())


def _derangement(n: int, seed: str, language: str) -> list[int]:
    """Another text for each text: one random cycle through all."""
    if n < 2:
        raise ValueError(f"resample ablation needs two texts or more, but {language!r} has {n}")
    order = random.Random(seed).sample(range(n), n)
    partner = [0] * n
    for i, row in enumerate(order):
        partner[row] = order[(i + 1) % n]
    return partner


def _head_outputs(
    model: LensModel, ids: Int[Tensor, "text pos"], position: Int[Tensor, "text pos"]
) -> list[Float[Tensor, "text pos head d_head"]]:
    """z of every layer, for each text taken at ``position``."""
    kept: list[Tensor] = [torch.empty(0)] * grid_of(model).n_layers

    def keep(z: Tensor, layer: int) -> None:
        rows = torch.arange(len(z), device=z.device)[:, None]
        kept[layer] = z[rows, position.to(z.device)]

    hooks = {layer: partial(keep, layer=layer) for layer in range(len(kept))}
    with torch.no_grad(), hooked_heads(model, hooks):  # type: ignore[arg-type]
        run_layers(model, ids.to(device_of(model)))
    return kept
