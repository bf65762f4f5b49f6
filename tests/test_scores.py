import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lahis_tl as lt
from lahis_tl import scores as module
from lahis_tl.scores import HeadScores, register_score, score, score_method

GRADS = lt.HeadGradients(
    gradients={
        "en": torch.tensor([[[-0.2, 0.1]], [[-0.4, 0.3]], [[0.6, -0.1]]]),
        "fr": torch.tensor([[[1.0, -1.0]]]),
    },
    losses={"en": torch.ones(3), "fr": torch.ones(1)},
    n_tokens={"en": torch.tensor([3, 4, 5]), "fr": torch.tensor([6])},
    card={"model": {"name": "m"}},
)
# By hand from the three English gradients of head 0: -0.2, -0.4, 0.6; and of head 1: 0.1, 0.3, -0.1.
EXPECTED = {
    "lahis": [0.6 / 3, 0.1 / 3],
    "lahis_code": [1.2 / 3 * 1000 * 2 / 3, 0.5 / 3 * 1000 / 3],
    "sensitivity": [1.2 / 3, 0.5 / 3],
    "taylor": [0.0, -0.1],
}


@pytest.mark.parametrize("method", EXPECTED)
def test_scores_by_hand(method):
    found = score(GRADS, method)
    assert found["en"][0].tolist() == pytest.approx(EXPECTED[method], rel=1e-6, abs=1e-6)
    assert found.method == method
    assert found.unit
    assert found.n_texts == (3, 1)


def test_second_order_and_exact_by_hand():
    """Mean gradients of the heads 0 and 0.1; curvature 0.5 and 0.2, halved and saturated by 1 + h."""
    curvature = torch.tensor([0.5, 0.2]).expand(3, 1, 2)
    bent = dataclasses.replace(GRADS.select(["en"]), curvature={"en": curvature})
    found = score(bent, "second_order")["en"][0].tolist()
    assert found == pytest.approx([0.25 / 1.5, 0.1 / 1.2 - 0.1], rel=1e-6)
    effects = lt.HeadEffects(
        {"en": torch.tensor([[[0.1, 0.2]], [[0.3, -0.2]]])},
        {"en": torch.ones(2)},
        {"en": torch.ones(2).long()},
    )
    assert score(effects)["en"][0].tolist() == pytest.approx([0.2, 0.0])
    with pytest.raises(ValueError, match="compute them by head_gradients"):
        score(effects, "lahis")


def test_every_registered_score_is_tested_by_hand():
    assert {*EXPECTED, "second_order", "exact"} == set(lt.score_methods())


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(0, 1000))
def test_relations_between_scores(n, seed):
    gradients = torch.randn(n, 2, 3, generator=torch.Generator().manual_seed(seed))
    by = {name: score_method(name).reduce(gradients) for name in EXPECTED}
    assert (by["lahis"] >= 0).all()
    assert (by["lahis"] <= by["sensitivity"] + 1e-6).all()
    # sensitivity = 2·lahis − taylor, since |g| = 2·max(−g, 0) + g
    torch.testing.assert_close(
        by["sensitivity"], 2 * by["lahis"] - by["taylor"], rtol=1e-4, atol=1e-6
    )


def test_users_can_add_scores(monkeypatch):
    monkeypatch.setattr(module, "_methods", dict(module._methods))

    @register_score("largest", unit="nats per token", sign="high: matters")
    def largest(gradients):
        return gradients.abs().amax(0)

    assert score(GRADS, "largest")["en"][0].tolist() == pytest.approx([0.6, 0.3])
    with pytest.raises(ValueError, match="a score 'largest' already"):
        register_score("largest", unit="", sign="")(largest)
    register_score("bad", unit="", sign="")(lambda gradients: gradients.mean())
    with pytest.raises(Exception, match=r"'bad' returned shape \(\)|Type-check error"):
        score(GRADS, "bad")


def test_unknown_score():
    with pytest.raises(ValueError, match="no score 'x'; registered are lahis, lahis_code"):
        score(GRADS, "x")


def test_ranks_labels_and_table():
    scores = HeadScores(
        torch.tensor([[[0.1, 0.5], [0.3, 0.2]]]), ("en",), "lahis", "nats per token"
    )
    assert scores.top(2, "en").labels == ["L0H1", "L1H0"]
    frame = scores.to_dataframe().set_index("label")
    assert frame["rank"].to_dict() == {"L0H0": 4, "L0H1": 1, "L1H0": 2, "L1H1": 3}
    assert scores.select(["en"]).languages == ("en",)
    with pytest.raises(KeyError, match="no scores for 'fr'"):
        scores["fr"]


def test_results_check_themselves():
    with pytest.raises(ValueError, match=r"shape \(2, 1, 3\) need 2 languages, not 1: en"):
        HeadScores(torch.ones(2, 1, 3), ("en",), "lahis")
    with pytest.raises(ValueError, match="NaN"):
        HeadScores(torch.full((1, 1, 3), float("nan")), ("en",), "lahis")
    with pytest.raises(ValueError, match="one grid"):
        lt.HeadGradients(
            {"en": torch.ones(1, 1, 2), "fr": torch.ones(1, 1, 3)},
            {"en": torch.ones(1), "fr": torch.ones(1)},
            {"en": torch.ones(1, dtype=torch.int64), "fr": torch.ones(1, dtype=torch.int64)},
        )
    with pytest.raises(ValueError, match="1 gradients and 2 losses"):
        lt.HeadGradients(
            {"en": torch.ones(1, 1, 2)},
            {"en": torch.ones(2)},
            {"en": torch.ones(1, dtype=torch.int64)},
        )
