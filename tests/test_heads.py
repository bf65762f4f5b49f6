import pytest
import torch

from lahis_tl.heads import Head, HeadGrid, HeadSet, top_heads

GRID = HeadGrid(3, 4)


def test_flat_indices_and_labels_go_together():
    for index, label in enumerate(GRID.labels):
        assert GRID.head(index).label == label
        assert GRID.flat_index(label) == index
        assert Head.parse(label) == GRID.head(index)


@pytest.mark.parametrize("bad", ["H3L1", "3,1", "L1H2 ", "l1h2"])
def test_bad_labels(bad):
    with pytest.raises(ValueError, match="is not a head label"):
        Head.parse(bad)


def test_heads_outside_the_grid():
    with pytest.raises(IndexError, match="head L0H4 is outside the model's 3 layers × 4 heads"):
        HeadSet(GRID, ["L0H4"])
    with pytest.raises(IndexError, match="flat index 12"):
        GRID.head(12)
    with pytest.raises(IndexError):
        GRID.check((-1, 0))


def test_sets_refuse_repetition_and_keep_their_order():
    heads = HeadSet(GRID, ["L2H1", (0, 3), Head(1, 1)])
    assert heads.labels == ["L2H1", "L0H3", "L1H1"]
    assert heads.flat_indices() == [9, 3, 5]
    assert heads[1:] == HeadSet(GRID, ["L0H3", "L1H1"])
    assert heads != HeadSet(HeadGrid(3, 5), ["L2H1", (0, 3), Head(1, 1)])
    with pytest.raises(ValueError, match="more than once: L0H1"):
        HeadSet(GRID, ["L0H1", (0, 1)])


def test_an_empty_grid_is_refused():
    with pytest.raises(ValueError, match="0 × 4"):
        HeadGrid(0, 4)


def test_top_heads_of_equal_values_come_in_grid_order():
    values = torch.zeros(3, 4)
    values[1, 2], values[2, 0] = 5, 7
    assert top_heads(values, 4).labels == ["L2H0", "L1H2", "L0H0", "L0H1"]
    with pytest.raises(ValueError, match="k=13"):
        top_heads(values, 13)
