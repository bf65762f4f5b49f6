"""Screen all heads by gradients and curvature, then ablate those whose removal may cost most."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lahis_tl.access import LensModel, unembedding_of
from lahis_tl.artifacts import Card
from lahis_tl.batches import TokenIds, tokenize
from lahis_tl.corpora import Corpus
from lahis_tl.effects import exact_effects
from lahis_tl.gradients import HeadGradients, head_gradients
from lahis_tl.heads import Head, HeadSet, top_heads
from lahis_tl.scores import SATURATION, HeadScores, second_order


@dataclass(frozen=True, eq=False, repr=False)
class VerifiedScores(HeadScores):
    """Effects of all heads: exact for some, estimated by ``second_order`` for the rest.

    Attributes:
        verified: [language, layer, head], whether the value is an exact effect.
        error: [language, layer, head], the estimate's standard error over the draws of labels; 0 for exact
            effects. It does not hold what the estimate's form leaves out.
    """

    kind: ClassVar[str] = "verified_scores"
    verified: Bool[Tensor, "language layer head"] | None = None
    error: Float[Tensor, "language layer head"] | None = None

    def __repr__(self) -> str:
        counts = ", ".join(f"{code}: {len(self.exact(code))}" for code in self.languages)
        return f"VerifiedScores(exact heads {counts}; {self.grid})"

    @property
    def cost(self) -> float:
        """Arithmetic that was needed, as a share of what ablating every head takes."""
        return float(self.card["settings"]["cost"])

    def exact(self, language: str) -> HeadSet:
        """The heads whose effect is exact, layer-major."""
        assert self.verified is not None
        mask = self.verified[self.languages.index(language)]
        return HeadSet(self.grid, (Head(*pair) for pair in mask.nonzero().tolist()))

    def to_dataframe(self) -> pd.DataFrame:
        """One row a language and head, as of scores, with ``exact`` and the estimate's ``error``."""
        assert self.verified is not None
        assert self.error is not None
        return (
            super()
            .to_dataframe()
            .assign(exact=self.verified.flatten().numpy(), error=self.error.flatten().numpy())
        )

    def _tensors(self) -> dict[str, Tensor]:
        assert self.verified is not None
        assert self.error is not None
        return {"values": self.values, "verified": self.verified, "error": self.error}

    @classmethod
    def _from_tensors(cls, tensors: dict[str, Tensor], card: Card) -> "VerifiedScores":
        plain = HeadScores._from_tensors({"values": tensors["values"]}, card)
        extra = {name: tensors[name] for name in ("verified", "error")}
        return cls(**{**vars(plain), **extra})


def verified_scores(
    model: LensModel,
    corpus: Corpus | TokenIds,
    *,
    budget: float = 0.15,
    curvature_draws: int = 2,
    max_tokens: int | None = 512,
    batch_tokens: int = 2048,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> VerifiedScores:
    """The effect of every head's removal, at a fraction of the cost of removing every head.

    Gradients and curvature of all texts estimate every effect (``second_order``). Its saturation is a guess where
    the curvature is large, so heads are ablated in the order of −g + ½·h, what their removal may cost without
    it, over the arithmetic that finding out takes; as many as the budget allows. (To fit the
    saturation to their exact effects made the other estimates worse: what saturates is the heads of large
    curvature, and those are the ones that are ablated.) What a head does beyond that
    form, such as holding a language that the model gives up without it, only its removal shows: a head that
    was not ablated may matter more than is said of it.

    >>> scores = verified_scores(model, corpus)      # doctest: +SKIP
    >>> scores.exact("fr"), scores.cost              # doctest: +SKIP

    Args:
        budget: arithmetic, as a share of that of ``exact_effects`` for all heads; screening itself takes a
            few percent of it.
        curvature_draws: labels drawn for the curvature, 2 or more.
        checkpoint: a folder from which an interrupted run goes on.

    Raises:
        ValueError: the budget does not pay for the screening, or is not between 0 and 1.
    """
    if not 0 < budget <= 1:
        raise ValueError(f"budget={budget} must lie above 0 and not above 1")
    folder = None if checkpoint is None else Path(checkpoint)
    costs = Costs.of(model)
    screening = costs.screening(curvature_draws)
    if screening > budget:
        raise ValueError(
            f"budget={budget} does not pay for the screening, which takes {screening:.3f} of exact effects' "
            "cost; raise it, or draw fewer labels"
        )
    token_ids = tokenize(model, corpus, max_tokens)
    grads = head_gradients(
        model,
        corpus,
        max_tokens=max_tokens,
        batch_tokens=batch_tokens,
        curvature_draws=curvature_draws,
        seed=seed,
        checkpoint=folder and folder / "gradients",
        progress=progress,
    )
    exact: dict[str, Tensor] = {}
    spent = 0.0
    for code, texts in token_ids.items():
        possible = second_order(grads[code], grads.curvature[code], saturation=0.0)
        chosen, cost = costs.affordable(possible, budget - screening)
        spent += (screening + cost) / len(token_ids)
        exact[code] = torch.full(grads.grid.shape, float("nan"))
        if len(chosen):
            effects = exact_effects(
                model,
                {code: texts},
                chosen,
                max_tokens=max_tokens,
                batch_tokens=batch_tokens,
                checkpoint=folder and folder / f"exact-{code}",
                progress=progress,
            )
            exact[code] = effects[code].mean(0)
    values, verified, errors = [], [], []
    for code, found in exact.items():
        value, error = _estimate(grads, code)
        known = ~torch.isnan(found)
        values.append(torch.where(known, found, value))
        verified.append(known)
        errors.append(error.masked_fill(known, 0))
    settings: dict[str, Any] = {**grads.card["settings"], "budget": budget, "cost": spent}
    return VerifiedScores(
        values=torch.stack(values),
        languages=tuple(token_ids),
        method="verified",
        unit="nats per token",
        sign="positive: removal raises the loss",
        n_texts=tuple(map(len, token_ids.values())),
        card={**grads.origin, "settings": settings},
        verified=torch.stack(verified),
        error=torch.stack(errors),
    )


def _estimate(
    grads: HeadGradients, language: str
) -> tuple[Float[Tensor, "layer head"], Float[Tensor, "layer head"]]:
    """``second_order`` and its standard error over the draws of labels, texts given."""
    gradient, curvature = grads[language], grads.curvature[language]
    value = second_order(gradient, curvature)
    slope = 0.5 / (1 + SATURATION * curvature) ** 2
    error = (slope * grads.curvature_error[language]).square().sum(0).sqrt() / len(gradient)
    return value, error


@dataclass(frozen=True)
class Costs:
    """Products with weights for one token, by layer and for the unembedding: what a forward pass costs.

    Every weight counts once, so experts that a token does not visit count too, and attention over the text,
    which has no weights, does not.
    """

    layers: Float[Tensor, " layer"]
    unembedding: float
    n_heads: int

    @classmethod
    def of(cls, model: LensModel) -> "Costs":
        layers = [sum(p.numel() for p in block.parameters()) for block in model.blocks]
        unembedding = unembedding_of(model)
        last = 0 if unembedding is None else unembedding.weight.numel()
        return cls(torch.tensor(layers, dtype=torch.float64), float(last), int(model.cfg.n_heads))

    @property
    def forward(self) -> float:
        """Of one forward pass."""
        return float(self.layers.sum()) + self.unembedding

    @property
    def one_head(self) -> Float[Tensor, " layer"]:
        """Of ablating one head of each layer: this layer, those above it, and the unembedding."""
        return self.layers.flip(0).cumsum(0).flip(0) + self.unembedding

    @property
    def exact(self) -> float:
        return float(self.one_head.sum()) * self.n_heads

    def screening(self, draws: int) -> float:
        """Gradients and curvature: two forward passes, 1 + ``draws`` backward passes to the activations."""
        layers = float(self.layers.sum()) * (3 + draws)
        return (layers + 4 * self.unembedding) / self.exact

    def affordable(
        self, possible: Float[Tensor, "layer head"], budget: float
    ) -> tuple[HeadSet, float]:
        """Heads by what they may be worth for their cost, as many as the budget pays for; and the cost."""
        shares = self.one_head / self.exact
        spent, chosen = 0.0, []
        ranking = top_heads(possible / shares[:, None], possible.numel())
        for head in ranking:
            if spent + float(shares[head.layer]) > budget:
                break
            spent += float(shares[head.layer])
            chosen.append(head)
        return HeadSet(ranking.grid, chosen), spent
