"""Scores of other tools are read as they are, refused with the reason, and compared with chance beside."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr

import lahis_tl as lt
from lahis_tl.errors import ArtifactError

GRID = lt.HeadGrid(3, 4)


def test_retrieval_heads_as_their_detector_writes_them(tmp_path: Path) -> None:
    path = tmp_path / "retrieval.json"
    path.write_text(json.dumps({"0-1": [0.2, 0.4], "2-3": [1.0], "1-0": 0.5}))
    scores = lt.import_scores(path, GRID)
    assert (scores.method, scores.languages) == ("retrieval", ("all",))
    wanted = torch.zeros(3, 4)
    wanted[0, 1], wanted[2, 3], wanted[1, 0] = 0.3, 1.0, 0.5
    torch.testing.assert_close(scores["all"], wanted)
    assert scores.top(1, "all").labels == ["L2H3"]
    assert lt.load(scores.save(tmp_path / "saved")).method == "retrieval"


@pytest.mark.parametrize("suffix", [".csv", ".json", ".jsonl"])
def test_tables_by_language(tmp_path: Path, suffix: str) -> None:
    table = pd.DataFrame(
        {
            "layer": [0, 2, 1],
            "head": [3, 3, 0],
            "score": [0.1, 0.2, -0.3],
            "language": ["fr", "fr", "no"],
        }
    )
    path = tmp_path / f"scores{suffix}"
    if suffix == ".csv":
        table.to_csv(path, index=False)
    else:
        table.to_json(path, orient="records", lines=suffix == ".jsonl")
    scores = lt.import_scores(path)
    assert scores.grid == GRID
    assert scores.languages == ("fr", "no")
    assert float(scores["no"][1, 0]) == pytest.approx(-0.3)


def test_tensors_and_arrays() -> None:
    values = np.arange(12.0).reshape(3, 4)
    for source in (values, torch.tensor(values)):
        assert lt.import_scores(source, GRID, name="x")["all"].tolist() == values.tolist()
    with pytest.raises(ValueError, match=r"shape \(3, 4\) are not \[layer, head\] of 4 layers"):
        lt.import_scores(values, lt.HeadGrid(4, 3))


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="'L1H2' is no 'layer-head'"):
        lt.import_scores({"L1H2": 0.5})
    with pytest.raises(IndexError):
        lt.import_scores({"9-0": 0.5}, GRID)
    with pytest.raises(ValueError, match="score nan is no number"):
        lt.import_scores({"1-0": float("nan")}, GRID)
    bad = tmp_path / "bad.csv"
    bad.write_text("layer,head\n0,1\n")
    with pytest.raises(ArtifactError, match="needs the columns layer, head and score"):
        lt.import_scores(bad)
    bad.write_text("layer,head,score\n0,1,0.5\n0,1,0.6\n")
    with pytest.raises(ValueError, match="L0H1 has two scores"):
        lt.import_scores(bad)
    bad.write_text("layer,head,score\n0.5,1,0.5\n")
    with pytest.raises(ValueError, match=r"layer 0\.5 is no number"):
        lt.import_scores(bad)
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    with pytest.raises(ArtifactError, match="is damaged"):
        lt.import_scores(broken)
    with pytest.raises(ArtifactError, match=r"give \.json, \.jsonl or \.csv"):
        lt.import_scores(tmp_path / "scores.pkl")


def test_agreement_is_held_against_chance() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(2, 3, 4, generator=generator)
    ours = lt.HeadScores(values, ("en", "fr"), "lahis")
    theirs = lt.import_scores(values[0] * 2 + 1, GRID)
    table = lt.score_agreement(ours, theirs, top_k=3)
    same, other = table.to_dict("records")
    assert (same["rank_correlation"], same["common"], same["jaccard"]) == (1.0, 3, 1.0)
    assert same["p"] == pytest.approx(1 / 220), "one of 12 over 3 choices"
    wanted = spearmanr(values[0].flatten(), values[1].flatten()).statistic
    assert other["rank_correlation"] == pytest.approx(wanted)
    assert other["chance_common"] == 0.75
    with pytest.raises(ValueError, match="of 3 layers × 4 heads and 2 layers × 2 heads"):
        lt.score_agreement(ours, lt.import_scores(torch.rand(2, 2)))
    with pytest.raises(ValueError, match="top_k=99"):
        lt.score_agreement(ours, theirs, top_k=99)


def test_imported_scores_draw_chance_where_they_are_unrelated() -> None:
    generator = torch.Generator().manual_seed(1)
    found = [
        lt.score_agreement(
            *(lt.import_scores(torch.rand(10, 10, generator=generator)) for _ in range(2)), top_k=20
        )
        for _ in range(60)
    ]
    table = pd.concat(found)
    assert table["common"].mean() == pytest.approx(4, abs=0.6)
    assert table["rank_correlation"].mean() == pytest.approx(0, abs=0.05)
    assert (table["p"] <= 0.05).mean() < 0.15
