import pytest
from test_statistics import gradients_of, noise

import lahis_tl as lt
from lahis_tl.selection import chance_jaccard, jaccard


def alike(seed=0):
    base = 0.2 * noise(30, 4, 6, seed=seed)
    base[:, 0, :3] -= 3
    return gradients_of(
        {"en": base, "fr": base + 0.2 * noise(30, 4, 6, seed=9), "de": noise(30, 4, 6, seed=5)}
    )


def test_the_overlap_is_that_of_the_top_sets():
    grads = alike()
    found = lt.head_overlap(grads, top_k=3, draws=200)
    scores = lt.score(grads)
    for a, b in [("en", "fr"), ("en", "de"), ("fr", "de")]:
        expected = jaccard(scores.top(3, a), scores.top(3, b))
        assert found.intervals[a, b].value == pytest.approx(expected)
    assert found.intervals["en", "fr"] == lt.Interval(1, 1, 1)
    table = found.to_dataframe().set_index(["a", "b"])
    assert table.loc[("en", "fr"), "p"] < 0.1
    assert table.loc[("en", "de"), "upper"] < 1


def test_chance_over_the_network_is_the_hypergeometric_one():
    found = lt.head_overlap(alike(), top_k=6, within="network", draws=4000)
    expected = chance_jaccard(6, 6, 24)
    assert float(found.chance["en", "de"].mean()) == pytest.approx(expected, abs=0.01)


def test_chance_within_layers_keeps_each_layers_number():
    """Three of layer 0's six heads in both: a shuffle within the layer has 3·3/6 = 1.5 of them in common."""
    found = lt.head_overlap(alike(), top_k=3, within="layer", draws=4000)
    common = 2 * 3 * found.chance["en", "fr"] / (1 + found.chance["en", "fr"])
    assert float(common.mean()) == pytest.approx(1.5, abs=0.05)


def test_bad_input():
    with pytest.raises(ValueError, match="within 'head' is not one of layer, network"):
        lt.head_overlap(alike(), within="head")
    with pytest.raises(ValueError, match="needs two"):
        lt.head_overlap(alike().select(["en"]), top_k=3)
    with pytest.raises(ValueError, match="top_k=25"):
        lt.head_overlap(alike(), top_k=25)
