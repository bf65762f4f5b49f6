import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lahis_tl as lt
from lahis_tl.heads import HeadGrid, HeadSet
from lahis_tl.scores import HeadScores
from lahis_tl.selection import chance_jaccard, head_count, jaccard, language_heads


def scores_of(golden, languages=None):
    languages = languages or list(golden["lahis"])
    values = torch.stack([torch.tensor(golden["lahis"][code]["matrix"]) for code in languages])
    return HeadScores(values, tuple(languages), "lahis_code")


def test_the_authors_rule_gives_the_authors_lists(golden):
    expected = golden["heads"]
    found = language_heads(
        scores_of(golden), quantile=expected["q"], min_languages=expected["min_repetition"]
    )
    assert {code: heads.flat_indices() for code, heads in found.specific.items()} == expected[
        "specific"
    ]
    assert found.general.flat_indices() == expected["general"]
    for code, heads in found.kept.items():
        assert set(heads) == set(found.specific[code]) | (set(heads) & set(found.general))
    assert found.counts[0, 0] == sum("L0H0" in heads.labels for heads in found.kept.values())


def test_fewer_languages_than_four_need_all_for_general(golden):
    found = language_heads(scores_of(golden, ["aa", "bb"]), quantile=0.4)
    assert found.options["min_languages"] == 2
    assert set(found.general) == set(found.kept["aa"]) & set(found.kept["bb"])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.floats(0.05, 0.95))
def test_the_quantile_is_strict(seed, quantile):
    values = torch.randint(0, 5, (2, 3, 4), generator=torch.Generator().manual_seed(seed)).float()
    found = language_heads(HeadScores(values, ("a", "b"), "x"), quantile=quantile)
    for i, code in enumerate(("a", "b")):
        flat = values[i].flatten().numpy()
        cut = np.quantile(flat, quantile)
        assert set(found.kept[code].flat_indices()) == set(np.flatnonzero(flat > cut + 1e-6))


def test_the_contrastive_rule_by_hand():
    """Shares: en (.5 .3 .2 0), fr (.1 .3 .2 .4). Contrast en - fr: (.4 0 0 -.4)."""
    values = torch.tensor([[[5.0, 3.0], [2.0, 0.0]], [[0.1, 0.3], [0.2, 0.4]]])
    found = language_heads(HeadScores(values, ("en", "fr"), "x"), "contrastive", fraction=0.25)
    assert found.specific["en"].labels == ["L0H0"]
    assert found.specific["fr"].labels == ["L1H1"]
    assert found.general.labels == ["L0H1"]


@pytest.mark.parametrize(
    ("size", "fraction", "rounding", "count"),
    [
        (672, 0.02, "down", 13),
        (672, 0.02, "up", 14),
        (672, 0.02, "nearest", 13),
        (270, 0.1, "up", 27),  # in floating point 270·0.1 lies above 27
        (1024, 0.02, "down", 20),
        (100, 0.29, "down", 29),  # and 100·0.29 below 29
    ],
)
def test_head_counts(size, fraction, rounding, count):
    assert head_count(size, fraction, rounding) == count


@pytest.mark.parametrize(
    ("rule", "options", "message"),
    [
        ("nonsense", {}, "no rule 'nonsense'; there are authors, contrastive"),
        ("authors", {"quantile": 1.0}, "quantile=1.0"),
        ("authors", {"min_languages": 6}, "min_languages=6"),
        ("contrastive", {"fraction": 0.0}, "fraction=0.0"),
        ("contrastive", {"fraction": 0.01, "rounding": "down"}, "is no head"),
        ("contrastive", {"rounding": "sideways"}, "rounding 'sideways'"),
    ],
)
def test_bad_options(golden, rule, options, message):
    with pytest.raises(ValueError, match=message):
        language_heads(scores_of(golden), rule, **options)


def test_the_contrastive_rule_needs_shares():
    with pytest.raises(ValueError, match="at least two"):
        language_heads(HeadScores(torch.ones(1, 2, 2), ("en",), "x"), "contrastive")
    negative = HeadScores(-torch.ones(2, 2, 2), ("en", "fr"), "taylor")
    with pytest.raises(ValueError, match="taylor has negative ones"):
        language_heads(negative, "contrastive")


def test_chance_overlap_is_what_random_sets_show():
    grid, generator = HeadGrid(6, 10), torch.Generator().manual_seed(0)

    def draw(k):
        order = torch.randperm(grid.size, generator=generator)[:k]
        return HeadSet(grid, (grid.head(i) for i in order.tolist()))

    found = sum(jaccard(draw(8), draw(12)) for _ in range(4000)) / 4000
    assert found == pytest.approx(chance_jaccard(8, 12, grid.size), abs=0.004)
    assert chance_jaccard(0, 0, 10) == 1
    assert chance_jaccard(10, 10, 10) == pytest.approx(1)


def test_heads_as_a_table(golden):
    frame = language_heads(scores_of(golden), quantile=0.4).to_dataframe()
    assert frame[frame["set"] == "general"]["label"].tolist()[0] == "L0H0"
    assert frame.groupby("set")["rank"].min().eq(1).all()


def test_sets_of_different_grids_are_refused():
    with pytest.raises(ValueError, match="one grid"):
        lt.LanguageHeads(
            specific={"en": HeadSet(HeadGrid(1, 2), [])},
            general=HeadSet(HeadGrid(1, 3), []),
            kept={},
            rule="x",
            options={},
            method="x",
        )


def test_one_language_alone_has_specific_heads_and_no_general_ones(golden):
    found = language_heads(scores_of(golden, ["aa"]), quantile=0.7)
    assert len(found.general) == 0
    assert len(found.specific["aa"]) == 4


def test_options_from_numpy_can_be_saved(golden, tmp_path):
    found = language_heads(scores_of(golden), quantile=np.float64(0.7), min_languages=2)
    found.save(tmp_path / "h")
    assert lt.load(tmp_path / "h").options["min_languages"] == 2
