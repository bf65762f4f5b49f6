"""The comparison of scores with exact effects, worked out by hand."""

import pytest
import torch

from analyses.faithfulness import _compare


def test_depths_and_common_heads_by_hand():
    """The true order is a b c d e f; the score's is a c f b e d, with the places 1 4 2 6 5 3."""
    truth = torch.tensor([[6.0, 5.0, 4.0], [3.0, 2.0, 1.0]])
    score = torch.tensor([[6.0, 3.0, 5.0], [1.0, 2.0, 4.0]])
    found = _compare(score, truth, 3)
    assert found["common_of_top_3"] == 2, "a and c are among the score's first three, b is not"
    assert found["depth_for_all"] == 4
    assert found["depth_for_90%"] == 4  # 90 % of three heads is three
    d = [0, 2, 1, 2, 0, 3]  # differences of the ranks
    assert found["rank_correlation"] == pytest.approx(1 - 6 * sum(x * x for x in d) / (6 * 35))
