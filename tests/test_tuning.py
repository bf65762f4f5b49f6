"""Mask tuning: only chosen factors move, by the gradient of the targets' loss; bad input and bad luck are handled."""

import math
from collections.abc import Callable

import pytest
import torch
from conftest import REQUIRED
from torch import nn

import lahis_tl as lt
from lahis_tl import tuning
from lahis_tl.access import frozen, full_logits, grid_of, tokenizer_of
from lahis_tl.masks import hooked_heads
from lahis_tl.pairs import EncodedPair, encode_pairs, pad_pairs, pair_nll, target_losses
from lahis_tl.tuning import TunedMask, scattered, tune_mask

PAIRS = [
    ("le chat the cat", " der hund"),
    ("the house", " is here la"),
    ("maison la dort", " here"),
]
OPTIONS = {"progress": False, "learning_rate": 0.05}


@pytest.fixture
def heads(llama: nn.Module) -> lt.HeadSet:
    return lt.HeadSet(grid_of(llama), ["L1H2", "L0H3", "L2H0"])


def by_hand(model: nn.Module, pairs: list[EncodedPair], factors: torch.Tensor) -> torch.Tensor:
    """The mean NLL of target tokens from the model's own full logits, one pair at a time."""
    found = []
    for pair in pairs:
        ids = torch.tensor([pair.ids])
        with lt.masked(model, factors):
            nats = -full_logits(model, ids, torch.ones_like(ids))[0, :-1].log_softmax(-1)
        found.append(nats[torch.arange(len(pair.ids) - 1), ids[0, 1:]][pair.n_prompt - 1 :].mean())
    return torch.stack(found)


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
@pytest.mark.parametrize("name", REQUIRED)
def test_the_loss_is_that_of_the_targets_alone(
    tiny: Callable[..., nn.Module], name: str, backend: str
) -> None:
    model = tiny(name, backend, "float32")
    factors = torch.rand(grid_of(model).shape, generator=torch.Generator().manual_seed(0)) * 2
    pairs = encode_pairs(model, PAIRS)
    expected = by_hand(model, pairs, factors)
    with lt.masked(model, factors):
        torch.testing.assert_close(pair_nll(model, pairs).float(), expected, atol=1e-4, rtol=1e-4)
    found = target_losses(model, PAIRS, lt.HeadMask(factors), progress=False, batch_tokens=8)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_the_gradient_is_that_of_the_mean_loss_and_a_step_is_adamws(
    llama: nn.Module, heads: lt.HeadSet
) -> None:
    """By finite differences of a plain writing of the loss; AdamW's first step is the gradient's sign."""
    pairs = encode_pairs(llama, PAIRS)
    tuned = tune_mask(llama, PAIRS, heads, epochs=1, batch_size=3, **OPTIONS)
    values = nn.Parameter(torch.ones(len(heads)))
    run = tuning._Run(llama, heads, [], 0.05, 0.0)
    for first in (0, 2):  # two passes of unequal size make one mean
        run.backward(values, pairs[first : first + 2], len(pairs))
    for i, head in enumerate(heads):
        losses = []
        for step in (1e-4, -1e-4):
            factors = torch.ones(grid_of(llama).shape, dtype=torch.float64)
            factors[head] += step
            losses.append(float(by_hand(llama, pairs, factors).double().mean()))
        slope = (losses[0] - losses[1]) / 2e-4
        assert float(values.grad[i]) == pytest.approx(slope, rel=2e-2, abs=1e-4)
        assert float(tuned.factors[head]) == pytest.approx(
            1 - 0.05 * math.copysign(1, slope), abs=1e-4
        )


def test_only_the_chosen_factors_move(llama: nn.Module, heads: lt.HeadSet) -> None:
    before = {name: p.clone() for name, p in llama.named_parameters()}
    tuned = tune_mask(llama, PAIRS, heads, epochs=6, **OPTIONS)
    assert set(tuned.mask.heads()) == set(heads)
    assert tuned.factors.dtype == torch.float32
    assert tuned.history["train_nll"].iloc[-1] < tuned.history["train_nll"].iloc[0]
    assert list(tuned.history["epoch"]) == list(range(7))
    for name, parameter in llama.named_parameters():
        assert torch.equal(parameter, before[name]), "the model itself is as before"
        assert parameter.grad is None
    after = float(target_losses(llama, PAIRS, tuned.mask, progress=False).mean())
    assert after < float(target_losses(llama, PAIRS, progress=False).mean())


def test_accumulation_equals_one_large_batch(llama: nn.Module, heads: lt.HeadSet) -> None:
    pairs = [*PAIRS, PAIRS[0], PAIRS[1]]  # the last group is a part of one
    whole = tune_mask(llama, pairs, heads, epochs=2, batch_size=4, **OPTIONS)
    parts = tune_mask(llama, pairs, heads, epochs=2, batch_size=2, accumulation=2, **OPTIONS)
    torch.testing.assert_close(whole.factors, parts.factors, atol=1e-5, rtol=1e-5)


def test_a_gradient_that_is_not_finite_stops_and_keeps_the_last_good_mask(
    llama: nn.Module, heads: lt.HeadSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = tuning._gradient, []

    def overflows(values: nn.Parameter) -> torch.Tensor:
        calls.append(1)
        return real(values) * (float("inf") if len(calls) > 3 else 1.0)

    good = tune_mask(llama, PAIRS, heads, epochs=1, batch_size=1, **OPTIONS)
    monkeypatch.setattr(tuning, "_gradient", overflows)
    tuned = tune_mask(llama, PAIRS, heads, epochs=5, batch_size=1, **OPTIONS)
    assert tuned.stopped == "nan"
    assert torch.equal(tuned.factors, good.factors)


def test_it_trains_where_gradients_are_off(llama: nn.Module, heads: lt.HeadSet) -> None:
    with torch.no_grad():
        tuned = tune_mask(llama, PAIRS, heads, epochs=1, **OPTIONS)
    assert len(tuned.mask.heads()) == len(heads)


def test_patience_ends_training(
    llama: nn.Module, heads: lt.HeadSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([2.0, 1.0, 1.5, 1.2, 1.1, 0.5])
    monkeypatch.setattr(
        tuning,
        "target_losses",
        lambda model, pairs, *rest, **options: torch.tensor(
            [next(losses) if len(pairs) == 1 else 3.0]
        ),
    )
    tuned = tune_mask(llama, PAIRS, heads, validation=PAIRS[:1], epochs=9, patience=2, **OPTIONS)
    assert tuned.stopped == "patience"
    assert tuned.history["valid_nll"].tolist() == pytest.approx([2.0, 1.0, 1.5, 1.2])
    assert tuned.card["settings"]["kept_epoch"] == 1


def test_nothing_below_the_first_chosen_layer_is_differentiated(llama: nn.Module) -> None:
    seen: dict[int, bool] = {}

    def note(layer: int):
        return lambda z: seen.__setitem__(layer, z.requires_grad)

    values = torch.ones(1, requires_grad=True)
    only = lt.HeadSet(grid_of(llama), ["L1H2"])
    pairs = encode_pairs(llama, PAIRS)
    with (
        hooked_heads(llama, {layer: note(layer) for layer in range(3)}),
        frozen(llama),
        lt.masked(llama, lt.HeadMask(scattered(only, values)), [1]),
    ):
        pair_nll(llama, pairs)
    assert seen == {0: False, 1: False, 2: True}


def test_seeds_repeat_and_differ(llama: nn.Module, heads: lt.HeadSet) -> None:
    first, again, other = (
        tune_mask(llama, PAIRS, heads, epochs=2, batch_size=1, seed=seed, **OPTIONS)
        for seed in (1, 1, 2)
    )
    assert torch.equal(first.factors, again.factors)
    assert not torch.equal(first.factors, other.factors)


def test_weight_decay_pulls_towards_one(llama: nn.Module, heads: lt.HeadSet) -> None:
    free = tune_mask(llama, PAIRS, heads, epochs=10, **OPTIONS)
    held = tune_mask(llama, PAIRS, heads, epochs=10, weight_decay=10.0, **OPTIONS)
    assert (held.factors - 1).abs().sum() < 0.9 * (free.factors - 1).abs().sum()


def test_the_best_epoch_on_validation_is_kept(llama: nn.Module, heads: lt.HeadSet) -> None:
    """Validation wants the opposite of training, so no epoch is better than no mask."""
    contrary = [("le chat the cat", " maison")]
    tuned = tune_mask(
        llama,
        PAIRS[:1],
        heads,
        validation=contrary,
        epochs=30,
        learning_rate=0.3,
        patience=2,
        progress=False,
    )
    best = tuned.history["valid_nll"].idxmin()
    assert tuned.card["settings"]["kept_epoch"] == tuned.history["epoch"][best]
    assert tuned.stopped in ("patience", "epochs")
    found = float(target_losses(llama, contrary, tuned.mask, progress=False).mean())
    assert found == pytest.approx(tuned.history["valid_nll"].min(), abs=1e-5)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_mask(
    llama: nn.Module, heads: lt.HeadSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = tuning.pair_nll, []

    def breaks(model: nn.Module, pairs: list) -> torch.Tensor:
        calls.append(len(pairs))
        return real(model, pairs) * (float("nan") if len(calls) > 3 else 1.0)

    good = tune_mask(llama, PAIRS, heads, epochs=1, batch_size=1, **OPTIONS)
    monkeypatch.setattr(tuning, "pair_nll", breaks)
    tuned = tune_mask(llama, PAIRS, heads, epochs=5, batch_size=1, **OPTIONS)
    assert tuned.stopped == "nan"
    assert torch.equal(tuned.factors, good.factors)
    assert len(tuned.history) == 2


def test_a_tuned_mask_survives_the_disk(llama: nn.Module, heads: lt.HeadSet, tmp_path) -> None:
    tuned = tune_mask(llama, PAIRS, heads, validation=PAIRS[:1], epochs=2, **OPTIONS)
    again = lt.load(tuned.save(tmp_path / "mask"), model=llama)
    assert isinstance(again, TunedMask)
    assert torch.equal(again.factors, tuned.factors)
    assert again.heads == tuned.heads
    assert again.history.equals(tuned.history)
    assert again.to_dataframe().equals(tuned.to_dataframe())
    assert again.card["settings"]["pairs"] == 3


def test_scattered_is_differentiable() -> None:
    heads = lt.HeadSet(lt.HeadGrid(2, 2), ["L1H0", "L0H1"])
    values = torch.tensor([3.0, 5.0], requires_grad=True)
    factors = scattered(heads, values)
    assert factors.tolist() == [[1.0, 5.0], [3.0, 1.0]]
    (grad,) = torch.autograd.grad((factors * torch.tensor([[1.0, 2.0], [4.0, 8.0]])).sum(), values)
    assert grad.tolist() == [4.0, 2.0]


def test_pairs_are_cut_by_token_index(speaker: nn.Module) -> None:
    tokenizer = tokenizer_of(speaker)
    (pair,) = encode_pairs(speaker, [("The answer is", " nine legs")])
    assert tokenizer.decode(list(pair.ids[: pair.n_prompt])) == "The answer is"
    assert tokenizer.decode(list(pair.ids[pair.n_prompt :])) == " nine legs"
    ids, mask, wanted = pad_pairs([EncodedPair((1, 2, 3, 4), 2), EncodedPair((5, 6), 1)])
    assert ids.tolist() == [[1, 2, 3, 4], [5, 6, 0, 0]]
    assert mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert wanted.tolist() == [[False, True, True], [True, False, False]]


@pytest.mark.parametrize(
    ("pairs", "match"),
    [
        ([], "no pair"),
        ([("le chat", "")], r"target '' of pair 0 has no token"),
        ([("le ch", "at")], r"joins the target 'at' of pair 0"),
        ([("le chat", " der"), ("the " * 120, " cat")], "pair 1 has .* context of 96"),
        ([EncodedPair((1, 2), 2)], "pair 0 has 2 prompt tokens of 2"),
    ],
)
def test_bad_pairs_are_named(llama: nn.Module, pairs: list, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        encode_pairs(llama, pairs)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"epochs": 0}, "epochs=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"accumulation": 0}, "accumulation=0"),
        ({"learning_rate": 0.0}, r"learning_rate=0\.0"),
        ({"weight_decay": -1.0}, r"weight_decay=-1\.0"),
        ({"patience": 2}, "patience=2 needs"),
    ],
)
def test_bad_settings_are_named(
    llama: nn.Module, heads: lt.HeadSet, options: dict, match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        tune_mask(llama, PAIRS, heads, **options)


def test_heads_of_another_model_and_none_are_named(llama: nn.Module) -> None:
    with pytest.raises(ValueError, match="the heads are of 2 layers"):
        tune_mask(llama, PAIRS, lt.HeadSet(lt.HeadGrid(2, 4), ["L0H0"]))
    with pytest.raises(ValueError, match="no head to tune"):
        tune_mask(llama, PAIRS, lt.HeadSet(grid_of(llama), []))
