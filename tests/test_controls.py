from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lahis_tl import (
    Head,
    HeadGrid,
    HeadScores,
    HeadSet,
    matched_random_heads,
    score_matched_heads,
)

GRID = HeadGrid(4, 6)


def layers(heads):
    return Counter(head.layer for head in heads)


@given(st.sets(st.integers(0, GRID.size - 1), min_size=1, max_size=10), st.integers(0, 99))
def test_draws_match_layer_by_layer_where_they_can(indices, seed):
    heads = HeadSet(GRID, [GRID.head(i) for i in indices])
    for control in matched_random_heads(heads, draws=5, match="nearest", seed=seed):
        assert len(control) == len(heads)
        assert not set(control) & set(heads)
        if max(layers(heads).values()) <= 3:
            assert layers(control) == layers(heads)


def test_draws_are_seeded_and_differ():
    heads = HeadSet(GRID, ["L0H0", "L3H5", "L3H4"])
    first = matched_random_heads(heads, draws=20, seed=1)
    assert first == matched_random_heads(heads, draws=20, seed=1)
    assert first != matched_random_heads(heads, draws=20, seed=2)
    assert len(set(first)) > 10


def test_every_other_head_is_as_likely():
    heads = HeadSet(GRID, ["L1H0"])
    counts = Counter(matched_random_heads(heads, draws=1, seed=seed)[0][0] for seed in range(1000))
    assert set(counts) == {Head(1, h) for h in range(1, 6)}
    assert all(150 < n < 250 for n in counts.values())  # 200 expected, standard deviation 13


def test_sets_are_distinct_even_where_there_are_few():
    heads = HeadSet(GRID, ["L1H0"])
    drawn = matched_random_heads(heads, draws=100)
    assert {c[0] for c in drawn} == {Head(1, h) for h in range(1, 6)}
    assert len(drawn) == 5
    pairs = matched_random_heads(HeadSet(GRID, ["L1H0", "L1H1"]), draws=100)
    assert len({frozenset(c) for c in pairs}) == len(pairs) == 6


def test_heads_that_matter_as_much_to_another_language():
    values = torch.arange(48.0).reshape(2, 4, 6)
    values[1] = values[1].flip(0, 1)
    scores = HeadScores(values, ("en", "fr"), "lahis")
    heads = scores.top(2, "fr")
    assert heads.labels == ["L0H0", "L0H1"]
    matched = score_matched_heads(scores, heads, "fr")
    assert matched == {"en": HeadSet(GRID, ["L3H5", "L3H4"])}
    with pytest.raises(KeyError, match="no scores for 'de'"):
        score_matched_heads(scores, heads, "de")


def test_the_whole_network_and_excluded_heads():
    heads = HeadSet(GRID, ["L0H0", "L0H1"])
    excluded = [Head(2, h) for h in range(6)]
    drawn = matched_random_heads(heads, draws=200, match="network", exclude=excluded)
    layers_seen = {head.layer for control in drawn for head in control}
    assert layers_seen == {0, 1, 3}


def test_a_full_layer_is_refused_or_helped_by_its_neighbours():
    heads = HeadSet(GRID, [Head(2, h) for h in range(4)])
    with pytest.raises(
        ValueError, match=r"layer 2 has 4 heads of the set and only 2 others .*nearest"
    ):
        matched_random_heads(heads)
    for control in matched_random_heads(heads, draws=10, match="nearest"):
        assert layers(control)[2] == 2
        assert layers(control)[1] + layers(control)[3] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"match": "layers"}, "'layers' is not one of layer, nearest, network"),
        ({"draws": 0}, "draws=0"),
        ({"match": "network", "exclude": [GRID.head(i) for i in range(1, 24)]}, "only 0 others"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        matched_random_heads(HeadSet(GRID, ["L0H0"]), **options)


def test_an_empty_set_cannot_be_matched():
    with pytest.raises(ValueError, match="the set is empty"):
        matched_random_heads(HeadSet(GRID, []))
