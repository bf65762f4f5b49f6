"""Adapt a model by a handful of numbers: train the factors of chosen heads on a task."""

import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
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
from lahis_tl.processes import exchange, is_main, share_of, shows
from lahis_tl.shards import ShardStore

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # what AdamW knows of a parameter


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
    checkpoint: str | Path | None = None,
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
        checkpoint: a folder to which every epoch's state goes, and from which an interrupted run goes on.

    Raises:
        ArtifactError: ``checkpoint`` belongs to a run with other settings, or another run is writing to it.
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
        "pairs_sha256": _hash(train),
        "validation_sha256": _hash(held_out),
    }
    card = {"model": card_of(model), "settings": settings}
    store = ShardStore(checkpoint, {**card, "heads": heads.labels}, None)
    run = _Run(model, heads, held_out, learning_rate, weight_decay)
    order = random.Random(seed)
    steps = math.ceil(len(train) / batch_size)
    with (
        store,
        tqdm(total=epochs * steps, unit="batch", disable=not shows(progress)) as bar,
        frozen(model),
        torch.enable_grad(),
    ):
        if not run.resume(store, 0):
            first, *_ = exchange(lambda: _mean(target_losses(model, train, progress=False)))
            if not math.isfinite(first):
                raise ValueError(
                    "the loss is not finite before training; load the model in float32 or bfloat16"
                )
            run.note(0, first)
            run.keep(store, 0)
        stopped = "epochs"
        for epoch in range(1, epochs + 1):
            shuffled = order.sample(train, len(train))
            if run.resume(store, epoch):
                bar.update(steps)
            else:
                loss = run.epoch(shuffled, batch_size, accumulation, bar)
                if loss is not None:
                    run.note(epoch, loss)
                if loss is None or run.failed:
                    stopped = "nan"
                    break
                run.keep(store, epoch)
            bar.set_postfix(train=f"{run.rows[-1]['train_nll']:.3f}")
            if patience is not None and epoch - run.best_epoch >= patience:
                stopped = "patience"
                break
    settings["kept_epoch"] = run.best_epoch
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
    """A training run: its factors and their optimizer, its data, its history, the best factors so far."""

    def __init__(
        self,
        model: LensModel,
        heads: HeadSet,
        held_out: Sequence[EncodedPair],
        learning_rate: float,
        weight_decay: float,
    ) -> None:
        self.model, self.heads, self.held_out = model, heads, held_out
        self.pull = learning_rate * weight_decay
        self.layers = sorted({head.layer for head in heads})
        self.values = nn.Parameter(torch.ones(len(heads), device=device_of(model)))
        self.optimizer = torch.optim.AdamW([self.values], lr=learning_rate, weight_decay=0.0)
        self.rows: list[dict[str, Any]] = []
        self.best, self.best_epoch, self.best_loss = torch.ones(len(heads)), 0, math.inf
        self.failed = False  # the validation loss is not finite

    def keep(self, store: ShardStore, epoch: int) -> None:
        """Put down all that the next epoch depends on."""
        moments = self.optimizer.state[self.values]
        history = [[row["train_nll"], row["valid_nll"]] for row in self.rows]
        state = {
            "values": self.values,
            "best": self.best,
            "best_at": torch.tensor([float(self.best_epoch), self.best_loss], dtype=torch.float64),
            "history": torch.tensor(history, dtype=torch.float64),
            **{name: moments[name] for name in _MOMENTS if name in moments},
        }
        if is_main():  # all have the same
            store.write(epoch, state)

    def resume(self, store: ShardStore, epoch: int) -> bool:
        """Take up the state after an epoch, if it was put down; the main process's in all."""
        state, *_ = exchange(lambda: store.read(epoch))
        if state is None:
            return False
        with torch.no_grad():
            self.values.copy_(state["values"])
        self.best = state["best"].to(self.values.device)
        self.best_epoch, self.best_loss = int(state["best_at"][0]), float(state["best_at"][1])
        self.rows = [
            {"epoch": number, "train_nll": train, "valid_nll": valid}
            for number, (train, valid) in enumerate(state["history"].tolist())
        ]
        moments = {name: state[name] for name in _MOMENTS if name in state}
        if moments:
            known = self.optimizer.state_dict()
            self.optimizer.load_state_dict({**known, "state": {0: moments}})
        return True

    def epoch(
        self, pairs: Sequence[EncodedPair], batch_size: int, accumulation: int, bar: tqdm
    ) -> float | None:
        """Once through the pairs; their mean loss, or None where a loss or gradient is not finite.

        The step of such a gradient is not taken.
        """
        total, values = 0.0, self.values
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
            self.optimizer.step()
            self.optimizer.zero_grad()
            with torch.no_grad():
                values.lerp_(torch.ones_like(values), self.pull)
        return total / len(pairs)

    def backward(self, values: Tensor, batch: Sequence[EncodedPair], pairs: int) -> float:
        """Add the gradient of a batch, as part of a mean over ``pairs``; returns the sum of its losses."""
        with masked(self.model, HeadMask(scattered(self.heads, values)), self.layers):
            nll = pair_nll(self.model, batch)
            (nll.sum() / pairs).backward()
        return float(nll.detach().sum())

    def note(self, epoch: int, train_nll: float) -> None:
        """Write an epoch down; keep its factors if they are the best on validation, or the last without one."""
        valid, values = float("nan"), self.values.detach()
        if self.held_out:
            mask = HeadMask(scattered(self.heads, values).cpu())
            # The main process decides for all which epoch is best and when to stop.
            valid, *_ = exchange(
                lambda: _mean(target_losses(self.model, self.held_out, mask, progress=False))
            )
            self.failed = not math.isfinite(valid)
        self.rows.append({"epoch": epoch, "train_nll": train_nll, "valid_nll": valid})
        if not self.held_out or valid < self.best_loss:
            self.best, self.best_epoch, self.best_loss = values.clone(), epoch, valid


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
