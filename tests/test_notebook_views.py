"""What a notebook shows of a result, and what goes into papers: small, escaped, with the numbers beside it."""

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
import torch
from conftest import needs_browser

import lahis_tl as lt
from lahis_tl import plots

GRID = lt.HeadGrid(3, 4)


def scores() -> lt.HeadScores:
    values = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(0))
    return lt.HeadScores(values, ("en", "fr"), "<b>lahis</b>", "nats per token")


def effects() -> lt.TokenEffects:
    values = torch.zeros(3, 4, 3)
    values[1, 2] = torch.tensor([0.5, -0.25, 0.0])
    return lt.TokenEffects({"fr": [["Le", " <script>", "\n"]]}, {"fr": [values]})


def test_every_result_shows_itself_small_and_escaped() -> None:
    gradients = {c: torch.randn(5, 3, 4) for c in ("en", "fr")}
    counts = {c: torch.full((5,), 7) for c in gradients}
    grads = lt.HeadGradients(gradients, {c: torch.full((5,), 2.5) for c in gradients}, counts)
    shown = {
        "scores": scores(),
        "heads": lt.language_heads(scores(), "contrastive", fraction=0.25),
        "gradients": grads,
        "certainty": lt.score_certainty(grads, top_k=3),
        "effects": effects(),
        "patterns": lt.AttentionPatterns({"fr": [["a"]]}, {"fr": [torch.ones(3, 4, 1, 1).half()]}),
    }
    for name, result in shown.items():
        text = result._repr_html_()
        assert len(text) < 5000, name
        assert "<script>" not in text
        assert "<b>lahis" not in text
        assert type(result).__name__ in text
    assert scores().top(1, "fr").labels[0] in shown["scores"]._repr_html_()
    assert "2.5" in grads._repr_html_()


def test_tokens_are_coloured_by_sign_and_size() -> None:
    text = plots.token_text(effects(), "L1H2")._repr_html_()
    assert "&lt;script&gt;" in text
    assert "<script" not in text
    assert "rgba(94,60,153,0.75)" in text, "the strongest, helping"
    assert "rgba(230,97,1,0.38)" in text, "half as strong, hurting"
    assert "⏎" in text
    with pytest.raises(KeyError, match="no effects for 'de'"):
        plots.token_text(effects(), "L1H2", "de")
    with pytest.raises(IndexError):
        plots.token_text(effects(), "L9H2")


def test_numbers_of_a_figure() -> None:
    table = plots.figure_data(plots.heatmap(scores(), "fr"))
    assert len(table) == 12
    cell = table.query("x == 3 and y == 2")["z"].item()
    assert cell == pytest.approx(float(scores()["fr"][2, 3]))
    bars = go.Figure(
        go.Bar(
            x=["a", "b"],
            y=[1.0, 2.0],
            name="n",
            error_y={"array": [0.5, 0.5], "arrayminus": [0.1, 0.2]},
        )
    )
    found = plots.figure_data(bars)
    assert found["lower"].tolist() == [0.9, 1.8]
    assert found["upper"].tolist() == [1.5, 2.5]
    assert plots.figure_data(go.Figure()).empty


@needs_browser  # which kaleido draws with
@pytest.mark.parametrize("width", ["column", "page"])
def test_a_picture_for_a_paper_has_its_width_letters_and_numbers(
    tmp_path: Path, width: str
) -> None:
    path = plots.write(plots.heatmap(scores(), "fr"), tmp_path / "map.svg", paper=width)
    root = ElementTree.parse(path).getroot()
    assert float(root.get("width")) == {"column": 317, "page": 662}[width]
    sizes = {
        float(part.split(":")[1].strip(" px"))
        for text in root.iter("{http://www.w3.org/2000/svg}text")
        for part in text.get("style", "").split(";")
        if part.strip().startswith("font-size")
    }
    assert sizes
    assert max(sizes) == pytest.approx(7 * 96 / 72, abs=0.1)
    saved = pd.read_csv(path.with_suffix(".csv"))
    np.testing.assert_allclose(saved["z"], scores()["fr"].flatten(), rtol=1e-5)


@needs_browser
def test_images_of_all_formats(tmp_path: Path) -> None:
    for suffix, start in ((".png", b"\x89PNG"), (".pdf", b"%PDF"), (".svg", b"<svg")):
        path = plots.write(plots.heatmap(scores()), tmp_path / f"map{suffix}", data=False)
        assert path.read_bytes().startswith(start)
    assert not (tmp_path / "map.csv").exists()
    with pytest.raises(ValueError, match="paper='poster' is neither column nor page"):
        plots.write(plots.heatmap(scores()), tmp_path / "map.png", paper="poster")


def test_a_text_from_right_to_left_is_shown_so() -> None:
    values = torch.zeros(3, 4, 3)
    effects = lt.TokenEffects({"ar": [["<s>", "مرحبا", " بالعالم"]]}, {"ar": [values]})
    assert 'dir="rtl"' in plots.token_text(effects, "L0H0").html
    bars = go.Figure(go.Scatter(x=[1.0], y=["a"], error_x={"array": [0.5]}))
    assert plots.figure_data(bars)[["lower", "upper"]].values.tolist() == [[0.5, 1.5]]


def test_patterns_show_tokens_as_they_are() -> None:
    figure = plots.attention_pattern(["<b>x</b>", "&lt;"], torch.eye(2), "L0H0")
    assert list(figure.layout.xaxis.ticktext) == ["&lt;b&gt;x&lt;/b&gt;", "&amp;lt;"]
    assert "<b>" not in figure.data[0].customdata[0][0]


def test_languages_of_any_name_come_back(tmp_path: Path) -> None:
    effects = lt.TokenEffects({"a>b": [["x"]]}, {"a>b": [torch.ones(3, 4, 1)]})
    assert list(lt.load(effects.save(tmp_path / "effects")).effects) == ["a>b"]
