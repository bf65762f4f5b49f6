"""Adapt a model by a handful of numbers: train the factors of chosen heads on a task."""

import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from lahis_tl.access import LensModel, device_of, frozen, grid_of
from lahis_tl.artifacts import Artifact, Card
from lahis_tl.cards import card_of
from lahis_tl.heads import HeadGrid, HeadSet
from lahis_tl.masks import HeadMask, masked
from lahis_tl.pairs import EncodedPair, Pair, encode_pairs, pair_nll, target_losses
from lahis_tl.processes import exchange, share_of, shows


@dataclass(frozen=True, eq=False)
class TunedMask(Artifact):
    """A head mask that was trained.

    Attributes:
        factors: float32 [layer, head]; exactly 1 outside ``heads``.
        heads: whose factors were trained.
        history: one row an epoch: epoch (0 before training), train_nll, valid_nll; nats per target token.
        stopped: why training ended: ``"epochs"``, ``"patience"`` or ``"nan"``.
    """

    kind: ClassVar[str] = "tuned_mask"
    factors: Float[Tensor, "layer head"]
    heads: HeadSet
    history: pd.DataFrame = field(default_factory=pd.DataFrame, repr=False)
    stopped: str = "epochs"
    card: Card = field(default_factory=dict, repr=False)

    def __repr__(self) -> str:
        values = self.factors[self.factors != 1]
        span = f"{float(values.min()):.2f} to {float(values.max()):.2f}" if len(values) else "1"
        return f"TunedMask({len(self.heads)} heads, factors {span}; stopped by {self.stopped})"

    @property
    def mask(self) -> HeadMask:
        """To use: ``with masked(model, tuned.mask)``, ``generate(model, prompts, tuned.mask)``."""
        return HeadMask(self.factors)

    def to_dataframe(self) -> pd.DataFrame:
        """One row a trained head: layer, head, label, factor."""
        return pd.DataFrame(
            [
                {
                    "layer": h.layer,
                    "head": h.head,
                    "label": h.label,
                    "factor": float(self.factors[h]),
                }
                for h in self.heads
            ]
        )

    def _tensors(self) -> dict[str, Tensor]:
        return {"factors": self.factors}

    def _content(self) -> Card:
        return {
            "heads": self.heads.flat_indices(),
            # JSON knows no NaN: without validation pairs there is no loss of theirs.
            "history": self.history.astype(object)
            .where(self.history.notna(), None)
            .to_dict("split", index=False),
            "stopped": self.stopped,
        }

    @classmethod
    def _from_tensors(cls, tensors: dict[str, Tensor], card: Card) -> "TunedMask":
        content, factors = card["content"], tensors["factors"]
        heads = HeadSet.from_flat(HeadGrid(*factors.shape), content["heads"])
        history = pd.DataFrame(**content["history"])
        history = history.astype({name: float for name in history if name != "epoch"})
        return cls(factors, heads, history, content["stopped"], card)


def tune_mask(
    model: LensModel,
    pairs: Sequence[Pair | EncodedPair],
    heads: HeadSet,
    *,
    validation: Sequence[Pair | EncodedPair] = (),
    epochs: int = 4,
    learning_rate: float = 1e-2,
    batch_size: int = 4,
    accumulation: int = 1,
    weight_decay: float = 0.0,
    patience: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> TunedMask:
    """Train one factor for each chosen head, by AdamW, so that targets become more probable after their prompts.

    >>> pairs = [("The capital of France is", " Paris"), ("The capital of Italy is", " Rome")]
    >>> tuned = tune_mask(model, pairs, scores.top(20, "en"))                          # doctest: +SKIP
    >>> with masked(model, tuned.mask):                                                  # doctest: +SKIP
    ...     model.generate("The capital of Spain is")

    The factors are float32 whatever the model's dtype and start at 1; all other heads keep exactly 1. The loss is the
    mean over pairs of the mean NLL of the target's tokens. Nothing below the first chosen head's layer is
    differentiated, and logits are computed for targets alone. (The soft mask of Liu et al., arXiv 2511.07498; their own
    procedure is ``lahis_tl.authors.soft_mask``.)

    Args:
        validation: pairs by which the best epoch is kept (epoch 0, no mask, included); by default the last one is.
        batch_size, accumulation: pairs of a pass (of all processes together), and passes of a step.
        weight_decay: decoupled, towards 1: a decay of 0.01 takes away 1 % × learning rate of the distance from 1.
        patience: stop after so many epochs without a better validation loss; None never does.
        seed: of the order of pairs.

    Raises:
        ValueError: no head, a setting out of its range, a pair that cannot be encoded, or a loss that is not finite
            before the first step.
    """
    _check(
        heads, epochs, learning_rate, batch_size, accumulation, weight_decay, patience, validation
    )
    if heads.grid != grid_of(model):
        raise ValueError(f"the heads are of {heads.grid}, but the model has {grid_of(model)}")
    train = encode_pairs(model, pairs)
    held_out = encode_pairs(model, validation) if validation else []
    values = nn.Parameter(torch.ones(len(heads), device=device_of(model)))
    optimizer = torch.optim.AdamW([values], lr=learning_rate, weight_decay=0.0)
    order = random.Random(seed)
    run = _Run(model, heads, held_out, pull=learning_rate * weight_decay)
    first, *_ = exchange(lambda: _mean(target_losses(model, train, progress=False)))
    run.note(0, values, first)
    if not math.isfinite(run.rows[0]["train_nll"]):
        raise ValueError(
            "the loss is not finite before training; load the model in float32 or bfloat16"
        )
    stopped = "epochs"
    steps = math.ceil(len(train) / batch_size)
    with (
        tqdm(total=epochs * steps, unit="batch", disable=not shows(progress)) as bar,
        frozen(model),
        torch.enable_grad(),
    ):
        for epoch in range(1, epochs + 1):
            shuffled = order.sample(train, len(train))
            loss = run.epoch(values, optimizer, shuffled, batch_size, accumulation, bar)
            if loss is not None:
                run.note(epoch, values, loss)
            if loss is None or run.failed:
                stopped = "nan"
                break
            bar.set_postfix(train=f"{run.rows[-1]['train_nll']:.3f}")
            if patience is not None and epoch - run.best_epoch >= patience:
                stopped = "patience"
                break
    settings = {
        "epochs": epochs,
        "learning_rate": learning_rate,
        "batch_size": batch_size,
        "accumulation": accumulation,
        "weight_decay": weight_decay,
        "patience": patience,
        "seed": seed,
        "pairs": len(train),
        "validation": len(held_out),
        "kept_epoch": run.best_epoch,
        "pairs_sha256": _hash(train),
        "validation_sha256": _hash(held_out),
    }
    card = {"model": card_of(model), "settings": settings}
    factors = scattered(heads, run.best).detach().cpu()
    return TunedMask(factors, heads, pd.DataFrame(run.rows), stopped, card)


def _hash(pairs: Sequence[EncodedPair]) -> str:
    return hashlib.sha256(repr([(pair.ids, pair.n_prompt) for pair in pairs]).encode()).hexdigest()


def scattered(heads: HeadSet, values: Float[Tensor, " head"]) -> Float[Tensor, "layer n_heads"]:
    """A mask of ones with ``values`` at the heads; differentiable with respect to them."""
    ones = torch.ones(heads.grid.size, device=values.device)
    places = torch.tensor(heads.flat_indices(), device=values.device)
    return ones.index_put((places,), values).reshape(heads.grid.shape)


class _Run:
    """What a training run knows: its data, its history, the best factors so far."""

    def __init__(
        self,
        model: LensModel,
        heads: HeadSet,
        held_out: Sequence[EncodedPair],
        pull: float = 0.0,
    ) -> None:
        self.model, self.heads, self.held_out, self.pull = model, heads, held_out, pull
        self.layers = sorted({head.layer for head in heads})
        self.rows: list[dict[str, Any]] = []
        self.best, self.best_epoch, self.best_loss = torch.ones(len(heads)), 0, math.inf
        self.failed = False  # the validation loss is not finite

    def epoch(
        self,
        values: nn.Parameter,
        optimizer: torch.optim.Optimizer,
        pairs: Sequence[EncodedPair],
        batch_size: int,
        accumulation: int,
        bar: tqdm,
    ) -> float | None:
        """Once through the pairs; their mean loss, or None where a loss or gradient is not finite.

        The step of such a gradient is not taken.
        """
        total = 0.0
        for start in range(0, len(pairs), batch_size * accumulation):
            group = pairs[start : start + batch_size * accumulation]

            def own_part(group: Sequence[EncodedPair] = group) -> tuple[float, Tensor]:
                loss = 0.0
                for first in range(0, len(group), batch_size):
                    own = share_of(group[first : first + batch_size])
                    loss += self.backward(values, own, len(group)) if own else 0.0
                    bar.update()
                return loss, _gradient(values).cpu()

            losses, gradients = zip(*exchange(own_part), strict=True)
            total += sum(losses)
            values.grad = torch.stack(gradients).sum(0).to(values.device)
            if not (math.isfinite(total) and torch.isfinite(values.grad).all()):
                return None
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                values.lerp_(torch.ones_like(values), self.pull)
        return total / len(pairs)

    def backward(self, values: Tensor, batch: Sequence[EncodedPair], pairs: int) -> float:
        """Add the gradient of a batch, as part of a mean over ``pairs``; returns the sum of its losses."""
        with masked(self.model, HeadMask(scattered(self.heads, values)), self.layers):
            nll = pair_nll(self.model, batch)
            (nll.sum() / pairs).backward()
        return float(nll.detach().sum())

    def note(self, epoch: int, values: Tensor, train_nll: float) -> None:
        """Write an epoch down; keep its factors if they are the best on validation, or the last without one."""
        valid = float("nan")
        if self.held_out:
            mask = HeadMask(scattered(self.heads, values.detach()).cpu())
            # The main process decides for all which epoch is best and when to stop.
            valid, *_ = exchange(
                lambda: _mean(target_losses(self.model, self.held_out, mask, progress=False))
            )
            self.failed = not math.isfinite(valid)
        self.rows.append({"epoch": epoch, "train_nll": train_nll, "valid_nll": valid})
        if not self.held_out or valid < self.best_loss:
            self.best, self.best_epoch, self.best_loss = values.detach().clone(), epoch, valid


def _gradient(values: nn.Parameter) -> Tensor:
    return torch.zeros_like(values) if values.grad is None else values.grad


def _mean(values: Tensor) -> float:
    return float(values.mean())


def _check(
    heads: HeadSet,
    epochs: int,
    learning_rate: float,
    batch_size: int,
    accumulation: int,
    weight_decay: float,
    patience: int | None,
    validation: Sequence[Any],
) -> None:
    if not len(heads):
        raise ValueError("there is no head to tune")
    for name, number in (
        ("epochs", epochs),
        ("batch_size", batch_size),
        ("accumulation", accumulation),
    ):
        if number < 1:
            raise ValueError(f"{name}={number} must be at least 1")
    if not learning_rate > 0:
        raise ValueError(f"learning_rate={learning_rate} must be above 0")
    if not 0 <= weight_decay * learning_rate < 1:
        raise ValueError(
            f"weight_decay={weight_decay} must be at least 0, and below 1 / learning_rate"
        )
    if patience is not None and (patience < 1 or not validation):
        raise ValueError(
            f"patience={patience} needs to be at least 1 and validation pairs to judge by"
        )
