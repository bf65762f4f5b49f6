import itertools

import pytest
import torch
from test_statistics import gradients_of, noise

import lahis_tl as lt


def shared_noise(n_languages, n_texts, shape, seed=0):
    """Log-normal importance that texts share between languages, as parallel texts do."""
    text = noise(n_texts, 1, 1, seed=seed)
    return [-(text + noise(n_texts, *shape, seed=seed + 1 + i)).exp() for i in range(n_languages)]


def planted(seed=0, n_texts=40, lift=8.0):
    """Four languages; L0H1 is larger in "fr", L1H0 in "de", L2H3 large everywhere."""
    values = shared_noise(4, n_texts, (3, 4), seed)
    for v in values:
        v[:, 2, 3] *= 6
    values[1][:, 0, 1] *= lift
    values[2][:, 1, 0] *= lift
    return gradients_of(dict(zip(["en", "fr", "de", "es"], values, strict=True)))


def test_the_tested_rule_finds_what_was_planted():
    heads = lt.language_heads(planted(), "tested", permutations=4000)
    assert heads.specific["fr"].labels == ["L0H1"]
    assert heads.specific["de"].labels == ["L1H0"]
    assert len(heads.specific["en"]) == 0
    assert heads.general.labels == ["L2H3"]
    assert heads.kept["fr"].labels == ["L0H1", "L2H3"]
    assert heads.counts[2, 3] == 4


def test_permutation_p_values_are_those_of_all_relabelings():
    """Three languages and four texts: all 3^4 ways to take one language a text can be gone through."""
    grads = gradients_of(dict(zip(["en", "fr", "de"], shared_noise(3, 4, (1, 3)), strict=True)))
    test = lt.specificity_test(grads, "sensitivity", ratio=1.0, permutations=20_000)
    x = torch.stack([g.abs().flatten(1).double() for g in grads.gradients.values()])
    shares = x / x.sum(2, keepdim=True)

    def exact_p(values):
        def contrast(picks):
            own = torch.stack([values[p, i] for i, p in enumerate(picks)]).mean(0)
            return own - (values.sum(0).mean(0) - own) / 2

        observed = contrast([1] * 4)
        every = torch.stack([contrast(p) for p in itertools.product(range(3), repeat=4)])
        return observed, (every >= observed - 1e-12).double().mean(0)

    observed, p_share = exact_p(shares)
    torch.testing.assert_close(test.contrast[1].flatten().double(), observed, rtol=1e-5, atol=1e-7)
    expected = torch.maximum(p_share, exact_p(x)[1])
    torch.testing.assert_close(test.specific_p[1].flatten().double(), expected, rtol=0, atol=0.012)


@pytest.mark.parametrize("parallel", [True, False])
def test_p_values_are_fair_when_labels_mean_nothing(parallel):
    below = []
    for seed in range(20):
        values = shared_noise(3, 20, (4, 5), seed * 100)
        grads = gradients_of(dict(zip(["en", "fr", "de"], values, strict=True)), parallel)
        test = lt.specificity_test(grads, ratio=1.0, permutations=500, seed=seed)
        assert test.paired == parallel
        below.append((test.specific_p <= 0.1).float().mean())
    # Two tests have to be passed, of shares and of scores, so that fewer than 10 % do.
    assert 0.02 < float(torch.stack(below).mean()) < 0.12


def test_pairing_sees_more():
    """Texts that differ much hide a small difference unless they are compared with themselves."""

    def smallest(parallel):
        values = [-(2 * noise(30, 3, 4)).exp() for _ in range(2)]
        values[1] = values[1].clone()
        values[1][:, 0, 1] *= 1.2
        grads = gradients_of({"en": values[0], "fr": values[1]}, parallel)
        return float(lt.specificity_test(grads, ratio=1.0, permutations=2000).specific_p[1, 0, 1])

    assert smallest(True) < 0.01 < smallest(False)


def test_a_loud_language_is_not_specific_altogether():
    values = shared_noise(2, 30, (3, 4))
    grads = gradients_of({"en": values[0], "fr": 10 * values[1]})
    assert (lt.specificity_test(grads, permutations=2000).specific_q > 0.05).all()


def test_one_ruling_head_does_not_make_the_others_specific_elsewhere():
    """It takes most of French's sum, so that all other shares are smaller there; their scores are not."""
    values = shared_noise(5, 30, (2, 6))
    values[1][:, 0, 0] *= 60
    codes = ["en", "fr", "de", "es", "it"]
    heads = lt.language_heads(gradients_of(dict(zip(codes, values, strict=True))), "tested")
    assert heads.specific["fr"].labels == ["L0H0"]
    assert [len(heads.specific[code]) for code in codes] == [0, 1, 0, 0, 0]


def test_a_head_of_all_languages_can_still_be_specific_to_one():
    """More texts must not turn it from specific into general."""
    values = shared_noise(3, 100, (3, 6))
    for v, factor in zip(values, (1.5, 12.0, 1.5), strict=True):
        v[:, 0, 0] *= factor
    grads = gradients_of(dict(zip(["en", "fr", "de"], values, strict=True)))
    for rows in (range(10), range(100)):
        heads = lt.language_heads(grads.take(list(rows)), "tested", permutations=4000)
        assert heads.specific["fr"].labels == ["L0H0"]
        assert not len(heads.general)


def test_the_rate_holds_where_true_and_false_heads_are_mixed():
    """Ten heads are truly twelve times as large in one language; of what is found, a tenth may be others."""
    shares = []
    for seed in range(12):
        values = shared_noise(2, 80, (10, 10), seed * 50)
        for v in values:
            v[:, 5:] *= 1 + 0.4 * noise(5, 10, seed=seed).clamp(-1, 1)  # differ, but in both alike
        values[1][:, 0] *= 12
        grads = gradients_of({"en": values[0], "fr": values[1]})
        heads = lt.language_heads(grads, "tested", fdr=0.1, ratio=1.0, permutations=8000)
        found = [(code, head) for code, members in heads.specific.items() for head in members]
        false = [1 for code, head in found if code == "en" or head.layer != 0]
        assert len(found) - len(false) >= 5, "a rule that finds nothing is never wrong"
        shares.append(len(false) / max(1, len(found)))
    assert sum(shares) / len(shares) <= 0.1


def test_heads_that_differ_by_less_than_the_ratio_are_not_specific():
    values = shared_noise(2, 400, (3, 6))
    values[1][:, 1, 1] *= 1.5
    grads = gradients_of({"en": values[0], "fr": values[1]})
    assert len(lt.language_heads(grads, "tested", permutations=4000).specific["fr"]) == 0
    found = lt.language_heads(grads, "tested", ratio=1.0, permutations=4000)
    assert found.specific["fr"].labels == ["L1H1"]


def test_languages_count_alike_however_many_texts_they_have():
    values = {"en": -torch.ones(40, 1, 2), "fr": -torch.ones(8, 1, 2), "de": -torch.ones(8, 1, 2)}
    values["en"][:, 0, 0] *= 3
    test = lt.specificity_test(gradients_of(values, parallel=False), permutations=100)
    assert float(test.contrast[1, 0, 0]) == pytest.approx(0.5 - (0.75 + 0.5) / 2)


def test_effects_of_some_heads_only_are_refused():
    values = {code: noise(6, 1, 3) for code in ("en", "fr")}
    for v in values.values():
        v[:, 0, 1] = float("nan")
    n = {code: torch.full((6,), 9) for code in values}
    effects = lt.HeadEffects(values, {code: torch.ones(6) for code in values}, n)
    for use in (lt.specificity_test, lt.score_certainty, lt.head_overlap, lt.score):
        with pytest.raises(ValueError, match="effects of 'en' are not known for all heads"):
            use(effects, **({"top_k": 1} if use in (lt.score_certainty, lt.head_overlap) else {}))


def test_too_few_permutations_are_said():
    with pytest.warns(UserWarning, match="fewer than 5 specific heads altogether cannot be found"):
        lt.specificity_test(planted(), permutations=199)


def test_saving_and_tables(tmp_path):
    test = lt.specificity_test(planted(), permutations=1000)
    again = lt.load(test.save(tmp_path / "test"))
    assert torch.equal(again.specific_q, test.specific_q)
    assert again.languages == test.languages
    assert len(test.to_dataframe()) == 4 * 12
    assert "heads with q ≤ 0.05 in en: 0" in repr(test)
    heads = lt.language_heads(planted(), "tested", permutations=1000)
    assert lt.load(heads.save(tmp_path / "heads")).options["fdr"] == 0.05


def test_what_the_rule_refuses():
    grads = planted()
    with pytest.raises(ValueError, match="the tested rule compares texts"):
        lt.language_heads(lt.score(grads), "tested")
    with pytest.raises(ValueError, match=r"fdr=5.0 must lie between 0 and 1"):
        lt.language_heads(grads, "tested", fdr=5.0)
    with pytest.raises(ValueError, match="needs two with at least 4 texts"):
        lt.specificity_test(grads.select(["en"]))
    with pytest.raises(ValueError, match="needs two with at least 4 texts"):
        lt.specificity_test(grads.take([0, 1, 2]))
    with pytest.raises(ValueError, match=r"ratio=0.5 must be 1 or more"):
        lt.specificity_test(grads, ratio=0.5)
