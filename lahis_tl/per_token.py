"""On which tokens a head works: its gradient times activation, split over the positions of a text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lahis_tl.access import LensModel, device_of, frozen, grid_of
from lahis_tl.artifacts import Card, keyed
from lahis_tl.batches import Batch, TokenIds, make_batches, require_finite, tokenize
from lahis_tl.cards import card_of
from lahis_tl.corpora import Corpus
from lahis_tl.heads import HeadLike
from lahis_tl.losses import text_nll
from lahis_tl.masks import hooked_heads, masked
from lahis_tl.patterns import OnSamples, SampleTokens, readable_samples


@dataclass(frozen=True, eq=False, repr=False)
class TokenEffects(OnSamples):
    """A head's effect on a text's loss, position by position, to first order.

    Attributes:
        tokens: language → texts → tokens to read.
        effects: language → texts, float32 [layer, head, pos], nats per token of the text's mean NLL; positive
            where removing the head's output at that position raises the loss, so where it helps. The sum over
            positions, averaged over texts, is the head's ``taylor`` score.
    """

    kind: ClassVar[str] = "token_effects"
    main: ClassVar[str] = "effects"
    tokens: SampleTokens
    effects: Mapping[str, Sequence[Float[Tensor, "layer head _pos"]]]
    card: Card = field(default_factory=dict, repr=False)

    @property
    def _values(self) -> Mapping[str, Sequence[Tensor]]:
        return self.effects

    def to_dataframe(self, head: HeadLike) -> pd.DataFrame:
        """One row a token: language, text (row), position, token, effect of the head there."""
        layer, number = self.grid.check(head)
        return pd.DataFrame(
            [
                {"language": code, "text": i, "position": pos, "token": token, "effect": value}
                for code, texts in self.effects.items()
                for i, values in enumerate(texts)
                for pos, (token, value) in enumerate(
                    zip(self.tokens[code][i], values[layer, number].tolist(), strict=True)
                )
            ]
        )

    def _tensors(self) -> dict[str, Tensor]:
        return keyed("effects", {code: torch.cat(list(e), 2) for code, e in self.effects.items()})

    @classmethod
    def _from_tensors(cls, tensors: dict[str, Tensor], card: Card) -> "TokenEffects":
        tokens = card["content"]["tokens"]
        effects = {
            code: list(tensors[f"effects/{code}"].split([len(t) for t in texts], 2))
            for code, texts in tokens.items()
        }
        return cls(tokens, effects, card)


def token_effects(
    model: LensModel,
    corpus: Corpus | TokenIds,
    *,
    max_tokens: int | None = 64,
    batch_tokens: int = 1024,
) -> TokenEffects:
    """Gradient times activation of every head at every position of each text, one pass a batch.

    >>> effects = token_effects(model, load_corpus("bundled", ["fr"], n=4))     # doctest: +SKIP
    >>> effects.to_dataframe("L12H3").nlargest(5, "effect")                     # doctest: +SKIP
    >>> plots.token_text(effects, "L12H3")                                      # doctest: +SKIP

    Args:
        corpus: texts, or token ids by language as they should be fed; a few, all positions of all heads are kept.
        max_tokens: longer texts are cut there; None for the model's context.
        batch_tokens: most tokens, padding included, in one pass; does not change results.

    Raises:
        CorpusError: a text with fewer than two tokens.
        ModelError: no per-head output, or a loss or gradient that is not finite.
    """
    token_ids = tokenize(model, corpus, max_tokens)
    found: dict[str, list[Tensor]] = {c: [torch.empty(0)] * len(t) for c, t in token_ids.items()}
    for batch in make_batches(token_ids, batch_tokens):
        effects = _batch_effects(model, batch)
        for row, (code, index) in enumerate(batch.keys):
            found[code][index] = effects[row, ..., : len(token_ids[code][index])].clone()
    return TokenEffects(
        readable_samples(model, token_ids),
        found,
        {
            "model": card_of(model),
            "corpus": corpus.card if isinstance(corpus, Corpus) else {"source": "token ids"},
            "settings": {"max_tokens": max_tokens},
        },
    )


def _batch_effects(model: LensModel, batch: Batch) -> Float[Tensor, "text layer head pos"]:
    """−⟨dL/dz, z⟩ of every head and position; the sum over positions is minus the mask's gradient."""
    device, grid = device_of(model), grid_of(model)
    found: dict[int, Tensor] = {}

    def watch(z: Float[Tensor, "text pos head d_head"], layer: int) -> Tensor:
        kept = z.detach()

        def keep(grad: Tensor) -> None:
            wide = torch.promote_types(kept.dtype, torch.float32)
            found[layer] = -(grad * kept).sum(-1, dtype=wide).transpose(1, 2).float().cpu()

        z.register_hook(keep)
        return z  # bridges show hooks a view of z, which is on the way to the loss only if it is given back

    watches = {layer: partial(watch, layer=layer) for layer in range(grid.n_layers)}
    mask = torch.ones(len(batch.keys), *grid.shape, device=device, requires_grad=True)
    with (
        frozen(model),
        torch.enable_grad(),
        masked(model, mask),
        hooked_heads(model, watches),
    ):
        loss = text_nll(model, batch.ids.to(device), batch.attention_mask.to(device))
        require_finite("loss", loss, batch)
        torch.autograd.grad(loss.sum(), mask)
    effects = torch.stack([found[layer] for layer in range(grid.n_layers)], 1)
    require_finite("gradient", effects, batch)
    return effects
