import pytest
import torch
from scipy import stats

import lahis_tl as lt
from lahis_tl.statistics import (
    bootstrap_means,
    empirical_p,
    mean_interval,
    percentile_interval,
    rank_correlation,
)


def gradients_of(values, parallel=True):
    """HeadGradients of given values, language → [text, layer, head]."""
    n = {code: len(v) for code, v in values.items()}
    return lt.HeadGradients(
        {code: v.float() for code, v in values.items()},
        {code: torch.ones(k) for code, k in n.items()},
        {code: torch.full((k,), 10) for code, k in n.items()},
        card={"corpus": {"parallel": parallel}},
    )


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_interval_of_a_mean_is_scipys():
    values = noise(60) + 1
    ours = mean_interval(values, draws=5000)
    theirs = stats.bootstrap(
        (values.numpy(),),
        lambda x, axis: x.mean(axis),
        n_resamples=5000,
        method="percentile",
        rng=0,
    ).confidence_interval
    assert ours.value == pytest.approx(float(values.mean()), rel=1e-6)
    assert ours.lower == pytest.approx(theirs.low, abs=0.02)
    assert ours.upper == pytest.approx(theirs.high, abs=0.02)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    hits = 0
    for seed in range(200):
        interval = mean_interval(noise(40, seed=seed), level=0.9, draws=400, seed=seed)
        hits += interval.lower <= 0 <= interval.upper
    assert 165 <= hits <= 195  # 180 expected, ± 3.5 standard errors


def test_bootstrap_means_keep_pairs_together():
    a = noise(30)
    draws = bootstrap_means(torch.stack([a, a + 1], 1))
    torch.testing.assert_close(draws[:, 1] - draws[:, 0], torch.ones(len(draws)))


def test_empirical_p_counts_the_observed_one():
    draws = torch.arange(99).float()
    assert empirical_p(98.5, draws) == 0.01
    assert empirical_p(-1.0, draws) == 1.0
    assert empirical_p(98.0, draws) == 0.02


def test_rank_correlation_is_scipys():
    a, b = noise(50), noise(50, seed=1).round()
    assert rank_correlation(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)


def test_certainty_of_a_score():
    clear = torch.zeros(40, 2, 3)
    clear[:, 0, 0], clear[:, 1, 2] = -5, -4
    values = {"en": clear + 0.5 * noise(40, 2, 3), "fr": noise(40, 2, 3, seed=1)}
    certainty = lt.score_certainty(gradients_of(values), top_k=2)
    torch.testing.assert_close(certainty.values[0], lt.score(gradients_of(values))["en"])
    assert (certainty.lower <= certainty.values).all()
    assert (certainty.values <= certainty.upper).all()
    assert certainty.likely("en", 0.99).labels == ["L0H0", "L1H2"]
    assert certainty.selection[0].sum() == pytest.approx(2, abs=1e-4), (
        "k heads are chosen each time"
    )
    assert len(certainty.likely("fr", 0.99)) == 0, "noise should settle on no head"
    assert certainty.split_half["en"].value > certainty.split_half["fr"].value
    assert certainty.split_overlap["en"].value == 1
    frame = certainty.to_dataframe()
    assert list(frame.columns)[-4:] == ["score", "lower", "upper", "selection"]
    assert len(frame) == 12


def test_certainty_is_saved_whole(tmp_path):
    certainty = lt.score_certainty(
        gradients_of({"en": noise(8, 2, 3)}), "taylor", top_k=2, draws=50
    )
    again = lt.load(certainty.save(tmp_path / "certainty"))
    assert torch.equal(again.selection, certainty.selection)
    assert again.split_half == certainty.split_half
    assert again.languages == ("en",)


def test_certainty_refuses_what_it_cannot_do():
    few = gradients_of({"en": noise(3, 2, 3)})
    with pytest.raises(ValueError, match="en: at least 4 texts"):
        lt.score_certainty(few, top_k=2)
    with pytest.raises(ValueError, match="top_k=7 must lie between 1 and 6"):
        lt.score_certainty(gradients_of({"en": noise(8, 2, 3)}), top_k=7)
    with pytest.raises(ValueError, match=r"level=95.0 must lie between 0 and 1"):
        mean_interval(noise(8), level=95.0)
    with pytest.raises(
        ValueError, match=r"ask for it by head_gradients\(model, corpus, curvature_draws=2\)"
    ):
        lt.score_certainty(gradients_of({"en": noise(8, 2, 3)}), "second_order", top_k=2)


def test_percentiles():
    interval = percentile_interval(5.0, torch.arange(101).float(), 0.9)
    assert interval == lt.Interval(5.0, 5.0, 95.0)
    assert str(lt.Interval(0.5, 0.25, 1.0)) == "0.5 [0.25, 1]"
