"""What all per-text results share: checks, cutting, joining, tables."""

import pytest
import torch
from test_statistics import gradients_of, noise

import lahis_tl as lt


def test_texts_and_languages_can_be_taken():
    grads = gradients_of({"en": noise(6, 2, 3), "fr": noise(4, 2, 3, seed=1)})
    assert grads.n_texts == {"en": 6, "fr": 4}
    part = grads.take([0, 2])
    assert torch.equal(part["fr"], grads["fr"][[0, 2]])
    assert part.losses["en"].shape == (2,)
    assert torch.equal(grads.take({"en": [5], "fr": [1]})["en"][0], grads["en"][5])
    assert grads.take([1, 3]).card["corpus"]["parallel"]
    assert not grads.take({"en": [5], "fr": [1]}).card["corpus"]["parallel"]
    assert grads.select(["fr"]).languages == ["fr"]
    with pytest.raises(IndexError):
        grads.take([4])
    with pytest.raises(KeyError, match="no gradients for de; there are en, fr"):
        grads.select(["de"])


def test_parts_join_to_the_whole():
    grads = gradients_of({"en": noise(6, 2, 3)})
    again = lt.HeadGradients.concatenate([grads.take([0, 1]), grads.take([2, 3, 4, 5])])
    assert torch.equal(again["en"], grads["en"])
    assert torch.equal(again.n_tokens["en"], grads.n_tokens["en"])


def test_languages_stand_side_by_side():
    whole = gradients_of({"en": noise(6, 2, 3), "fr": noise(4, 2, 3, seed=1)})
    again = lt.HeadGradients.side_by_side([whole.select(["en"]), whole.select(["fr"])])
    assert again.n_texts == whole.n_texts
    assert torch.equal(again["fr"], whole["fr"])
    assert torch.equal(again.losses["en"], whole.losses["en"])


def test_parts_that_do_not_fit_are_refused():
    values = {"en": noise(3, 2, 3)}
    with pytest.raises(ValueError, match="'en': 3 gradients and 2 losses do not match"):
        lt.HeadGradients(values, {"en": torch.ones(2)}, {"en": torch.ones(3, dtype=torch.int64)})
    with pytest.raises(ValueError, match="'en': 3 gradients and no losses do not match"):
        lt.HeadGradients(values, {"fr": torch.ones(3)}, {"en": torch.ones(3, dtype=torch.int64)})
    with pytest.raises(ValueError, match="one grid of heads"):
        gradients_of({"en": noise(3, 2, 3), "fr": noise(3, 3, 2)})
