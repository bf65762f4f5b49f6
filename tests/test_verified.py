import pytest
import torch

import lahis_tl as lt
from lahis_tl.verified import Costs

OPTIONS = {"progress": False, "seed": 3}


def test_exact_where_it_says_so_and_estimated_elsewhere(llama, token_ids):
    result = lt.verified_scores(llama, token_ids, budget=0.9, **OPTIONS)
    truth = lt.score(lt.exact_effects(llama, token_ids, progress=False))
    grads = lt.head_gradients(llama, token_ids, curvature_draws=2, seed=3, progress=False)
    estimate = lt.score(grads, "second_order")
    for i, code in enumerate(result.languages):
        exact = result.verified[i]
        assert 0 < int(exact.sum()) < exact.numel()
        torch.testing.assert_close(result[code][exact], truth[code][exact], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(
            result[code][~exact], estimate[code][~exact], rtol=1e-4, atol=1e-6
        )
        assert (result.error[i][exact] == 0).all()
        assert (result.error[i][~exact] > 0).all()
        assert len(result.exact(code)) == int(exact.sum())


def test_the_budget_is_kept_and_used(llama, token_ids):
    costs = Costs.of(llama)
    result = lt.verified_scores(llama, token_ids, budget=0.8, **OPTIONS)
    assert result.cost <= 0.8
    dearest = float(costs.one_head.max()) / costs.exact
    assert result.cost > 0.8 - dearest, "one more head would still have been affordable"


def test_costs_count_the_weights_that_are_used(llama):
    """Three layers of equal size b and an unembedding u; four heads: 4(3b + u) + 4(2b + u) + 4(b + u)."""
    costs = Costs.of(llama)
    b, u = float(costs.layers[0]), costs.unembedding
    assert costs.layers.tolist() == [b, b, b]
    assert u == llama.cfg.d_vocab * llama.cfg.d_model
    assert costs.exact == pytest.approx(24 * b + 12 * u)
    assert costs.screening(2) == pytest.approx((15 * b + 4 * u) / (24 * b + 12 * u))


def test_heads_that_may_matter_most_for_their_cost_are_ablated(llama, token_ids):
    result = lt.verified_scores(llama, token_ids, budget=0.8, **OPTIONS)
    grads = lt.head_gradients(llama, token_ids, curvature_draws=2, seed=3, progress=False)
    cost = Costs.of(llama).one_head[:, None]
    for i, code in enumerate(result.languages):
        possible = (0.5 * grads.curvature[code] - grads[code]).mean(0) / cost
        exact = result.verified[i]
        assert possible[exact].min() > possible[~exact].max()


def test_it_resumes_and_is_saved(llama, token_ids, tmp_path):
    first = lt.verified_scores(llama, token_ids, budget=0.8, checkpoint=tmp_path / "run", **OPTIONS)
    again = lt.verified_scores(llama, token_ids, budget=0.8, checkpoint=tmp_path / "run", **OPTIONS)
    assert torch.equal(first.values, again.values)
    loaded = lt.load(first.save(tmp_path / "scores"), model=llama)
    assert torch.equal(loaded.verified, first.verified)
    assert loaded.cost == first.cost
    assert isinstance(loaded, lt.HeadScores)
    frame = loaded.to_dataframe()
    assert frame["exact"].sum() == int(first.verified.sum())
    assert lt.language_heads(loaded, "authors").method == "verified"


def test_budgets_that_make_no_sense(llama, token_ids):
    with pytest.raises(ValueError, match=r"budget=0.0 must lie above 0"):
        lt.verified_scores(llama, token_ids, budget=0.0)
    with pytest.raises(
        ValueError, match=r"budget=0.01 does not pay for the screening, which takes 0\.\d+"
    ):
        lt.verified_scores(llama, token_ids, budget=0.01)
