"""Adapters of peft as a baseline: they start as the model itself, learn, and are counted."""

import pytest
from torch import nn

import lahis_tl as lt
from analyses import adapters, xquad_mask
from lahis_tl.questions import split_by_paragraph


@pytest.fixture(scope="module")
def parts() -> list:
    questions = lt.load_questions("bundled", ["fr"])
    return [part["fr"][:6] for part in split_by_paragraph(questions, (0.4, 0.1, 0.5), 0)]


@pytest.mark.parametrize("adapter", ["ia3", "lora"])
def test_an_untrained_adapter_answers_as_the_model(
    speaker: nn.Module, parts: list, adapter: str
) -> None:
    train, valid, test = parts
    rows, cost = adapters.adapter_answers(speaker, adapter, train, valid, test, 0, 4, 0)
    plain = xquad_mask.answers(speaker, test, None, 4, progress=False)
    assert cost["kept_epoch"] == 0
    for found, wanted in zip(rows, plain, strict=True):
        assert found.keys() == wanted.keys()
        assert found["nll"] == pytest.approx(wanted["nll"], rel=1e-3)
        assert found["text"] == wanted["text"]


def test_training_lowers_the_loss_of_what_it_is_trained_on(speaker: nn.Module, parts: list) -> None:
    train = parts[0]
    rows, cost = adapters.adapter_answers(speaker, "ia3", train, train, train, 4, 4, 0)
    plain = xquad_mask.answers(speaker, train, None, 4, progress=False)
    assert cost["kept_epoch"] > 0
    assert sum(r["nll"] for r in rows) < sum(r["nll"] for r in plain)
    # IA3 of a Llama: one number for each output of k and v and each input of the down projection.
    config = speaker.cfg
    keys = config.n_key_value_heads or config.n_heads
    assert cost["parameters"] == config.n_layers * (2 * keys * config.d_head + config.d_mlp)


def test_an_unknown_adapter_is_named(speaker: nn.Module, parts: list) -> None:
    with pytest.raises(ValueError, match="'prefix' is not one of ia3, lora"):
        adapters.adapter_answers(speaker, "prefix", *parts, 1, 4, 0)
