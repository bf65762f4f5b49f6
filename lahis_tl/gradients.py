"""Gradients of each text's loss with respect to the head mask, for every head in one pass."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from lahis_tl.access import LensModel, device_of, frozen, grid_of
from lahis_tl.artifacts import Card
from lahis_tl.batches import (
    Batch,
    TextKey,
    TokenIds,
    halving,
    make_batches,
    require_finite,
    tokenize,
)
from lahis_tl.cards import card_of
from lahis_tl.corpora import Corpus
from lahis_tl.curvature import batch_curvature
from lahis_tl.losses import text_nll
from lahis_tl.masks import masked
from lahis_tl.per_text import PerTextHeads
from lahis_tl.processes import shared_out, shows
from lahis_tl.shards import ShardStore


@dataclass(frozen=True, eq=False, repr=False)
class HeadGradients(PerTextHeads):
    """dL/dm of every text, L its mean next-token NLL and m the head mask at 1.

    Attributes:
        gradients: language → float32 [text, layer, head], in nats per token and unit of mask. Negative
            where more of the head lowers the loss, so where it helps.
        losses: language → float32 [text], mean NLL in nats per token.
        n_tokens: language → int64 [text], number of predicted tokens.
        curvature: language → float32 [text, layer, head], the diagonal Fisher information of the mask for
            mean NLL, in nats per token and squared unit of mask; empty where it was not asked for.
        curvature_error: its standard error over the draws of labels, likewise.
        card: birth certificate: model, corpus, settings.
    """

    kind: ClassVar[str] = "head_gradients"
    main: ClassVar[str] = "gradients"
    gradients: Mapping[str, Float[Tensor, "_text layer head"]]
    losses: Mapping[str, Float[Tensor, "_text"]]
    n_tokens: Mapping[str, Int[Tensor, "_text"]]
    curvature: Mapping[str, Float[Tensor, "_text layer head"]] = field(default_factory=dict)
    curvature_error: Mapping[str, Float[Tensor, "_text layer head"]] = field(default_factory=dict)
    card: Card = field(default_factory=dict, repr=False)

    @property
    def _values(self) -> Mapping[str, Float[Tensor, "_text layer head"]]:
        return self.gradients


def head_gradients(
    model: LensModel,
    corpus: Corpus | TokenIds,
    *,
    max_tokens: int | None = 512,
    batch_tokens: int = 1024,
    curvature_draws: int = 0,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> HeadGradients:
    """The gradient of each text's loss with respect to every head's factor, one pass a batch.

    The mask is expanded to one row a text, so a single backward pass of the summed losses gives every
    text its own gradient. No parameter is differentiated, nor anything below the first layer's
    heads; the logits never exist whole.

    >>> grads = head_gradients(model, load_corpus("bundled", ["en", "fr"]))      # doctest: +SKIP
    >>> grads["fr"].shape                                                        # doctest: +SKIP
    torch.Size([80, 30, 9])

    Args:
        model: a HookedTransformer or TransformerBridge.
        corpus: texts, or token ids by language as they should be fed.
        max_tokens: longer texts are cut there; None for the model's context.
        batch_tokens: most tokens, padding included, in one pass; bounds memory, does not change results but
            for which labels are drawn for the curvature.
        curvature_draws: labels to draw for the curvature, which ``second_order`` needs: one more forward
            pass, and one more backward pass a draw; at least 2, for an error. 0 for no curvature.
        seed: of those draws.
        checkpoint: a folder to which finished batches go, and from which an interrupted run goes on.

    Raises:
        CorpusError: a text with fewer than two tokens.
        ValueError: one draw of labels.
        ModelError: no per-head output, or a loss or gradient that is not finite, with the text's name.
        ArtifactError: ``checkpoint`` belongs to a run with other settings, or another run is writing to it.
    """
    if curvature_draws < 0 or curvature_draws == 1:
        raise ValueError(f"curvature_draws={curvature_draws} must be 0, or 2 and more")
    token_ids = tokenize(model, corpus, max_tokens)
    batches = make_batches(token_ids, batch_tokens)
    settings: dict[str, Any] = {"max_tokens": max_tokens, "batch_tokens": batch_tokens}
    if curvature_draws:
        settings |= {"curvature_draws": curvature_draws, "seed": seed}
    card = {
        "model": card_of(model),
        "corpus": corpus.card if isinstance(corpus, Corpus) else {"source": "token ids"},
        "settings": settings,
    }
    store = ShardStore(checkpoint, card, token_ids)
    found: dict[str, dict[str, Tensor]] = {}
    texts = sum(map(len, token_ids.values()))
    with store, tqdm(total=texts, unit="text", disable=not shows(progress)) as bar:
        for keys, part in _each_batch(model, batches, store, curvature_draws, seed):
            for name, values in part.items():
                if name not in found:
                    found[name] = _room(token_ids, values)
                for row, (code, index) in enumerate(keys):
                    found[name][code][index] = values[row]
            bar.update(len(keys))
    found["n_tokens"] = {c: torch.tensor([len(ids) - 1 for ids in t]) for c, t in token_ids.items()}
    return HeadGradients(**found, card=card)


def _room(token_ids: TokenIds, values: Tensor) -> dict[str, Tensor]:
    return {code: values.new_empty(len(t), *values.shape[1:]) for code, t in token_ids.items()}


def _each_batch(
    model: LensModel, batches: list[Batch], store: ShardStore, draws: int, seed: int
) -> Iterator[tuple[list[TextKey], dict[str, Tensor]]]:
    def compute(batch: Batch, number: int) -> dict[str, Tensor]:
        gradient, loss = batch_gradients(model, batch)
        part = {"gradients": gradient, "losses": loss}
        if draws:
            curvature = batch_curvature(model, batch, draws, seed=1_000_003 * seed + number)
            require_finite("curvature", curvature.sum(0), batch)
            part["curvature"] = curvature.mean(0)
            part["curvature_error"] = curvature.std(0) / draws**0.5
        return part

    def work(number: int, batch: Batch) -> list[tuple[list[TextKey], dict[str, Tensor]]]:
        part = store.read(number)
        if part is None:
            part = halving(batch, lambda piece: compute(piece, number))
            store.write(number, part)
        return [(batch.keys, part)]

    return shared_out(batches, work)


def batch_gradients(
    model: LensModel, batch: Batch
) -> tuple[Float[Tensor, "text layer head"], Float[Tensor, " text"]]:
    """Gradients and losses of one batch, on the CPU.

    Raises:
        ModelError: one of them is not finite.
    """
    device, grid = device_of(model), grid_of(model)
    mask = torch.ones(len(batch.keys), *grid.shape, device=device, requires_grad=True)
    with frozen(model), torch.enable_grad(), masked(model, mask):
        loss = text_nll(model, batch.ids.to(device), batch.attention_mask.to(device))
        require_finite("loss", loss, batch)
        (gradient,) = torch.autograd.grad(loss.sum(), mask)
    gradient = gradient.float().cpu()
    require_finite("gradient", gradient, batch)
    return gradient, loss.detach().float().cpu()
