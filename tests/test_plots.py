import json

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio
import pytest
import torch

import lahis_tl as lt
from lahis_tl import plots
from lahis_tl.attention import AttentionMass
from lahis_tl.scores import HeadScores

SCORES = HeadScores(
    torch.rand(3, 5, 4, generator=torch.Generator().manual_seed(0)),
    ("en", "fr", "zh"),
    "lahis",
    "nats per token",
    n_texts=(4, 4, 4),
)
HEADS = lt.language_heads(SCORES, quantile=0.7)
GENERATOR = torch.Generator().manual_seed(1)


def draw(*shape):
    return torch.randn(*shape, generator=GENERATOR)


def certainty():
    grads = lt.HeadGradients(
        {"fr": draw(8, 5, 4)}, {"fr": torch.ones(8)}, {"fr": torch.full((8,), 9)}
    )
    return lt.score_certainty(grads, top_k=6, draws=50)


CODES = ("en", "fr")
MATRIX = lt.Selectivity(
    CODES, CODES, {(r, c): draw(6) for r in CODES for c in CODES}, draw(2, 20, 2)
)
EFFECT = lt.AblationEffect(
    lt.HeadSet(SCORES.grid, ["L0H1"]),
    0.0,
    {c: draw(6) for c in CODES},
    {c: draw(20) for c in CODES},
    [],
)
SWEEP = lt.Sweep(
    "factor", (0.0, 1.0, 2.0), {c: draw(3, 6) for c in CODES}, {c: draw(3, 4) for c in CODES}
)
EVIDENCE = {
    "intervals": lambda: plots.intervals(certainty(), "fr"),
    "agreement": lambda: plots.agreement(SCORES, SCORES, "fr"),
    "selectivity": lambda: plots.selectivity_matrix(MATRIX),
    "set effect": lambda: plots.set_effect(EFFECT),
    "sweep": lambda: plots.sweep(SWEEP),
}
FIGURES = {
    "heatmap": lambda: plots.heatmap(SCORES),
    "one language": lambda: plots.heatmap(SCORES, "fr"),
    "difference": lambda: plots.difference(SCORES, "fr", "en"),
    "counts": lambda: plots.language_counts(HEADS),
    "layers": lambda: plots.heads_per_layer(HEADS),
    "overlap": lambda: plots.overlap(HEADS),
}


def cells(trace):
    return torch.tensor([list(row) for row in trace.z])


@pytest.mark.parametrize("name", EVIDENCE)
def test_evidence_has_a_title_units_and_an_opaque_ground(name):
    figure = EVIDENCE[name]()
    assert len(figure.layout.title.text) > 10
    assert figure.layout.paper_bgcolor == "white"
    assert "nats per token" in figure.to_json()
    assert len(figure.to_json()) < 60_000


def test_the_matrix_shows_its_cells_and_what_random_sets_do():
    figure = plots.selectivity_matrix(MATRIX)
    (trace,) = figure.data
    torch.testing.assert_close(cells(trace).float(), MATRIX.matrix)
    table = MATRIX.to_dataframe()
    for i in range(2):
        for j in range(2):
            row = table.iloc[2 * i + j]
            assert trace.text[i][j].endswith("*") == (row.p <= 0.05)
            assert trace.customdata[i][j][2] == pytest.approx(row.control_mean)
    assert trace.zmid == 0


def test_every_random_set_is_drawn_beside_the_heads():
    figure = plots.set_effect(EFFECT)
    *boxes, heads = figure.data
    assert [len(box.y) for box in boxes] == [20, 20]
    assert list(heads.y) == pytest.approx([float(EFFECT.change[c].mean()) for c in CODES])


def test_a_sweep_shades_the_range_of_all_random_sets():
    band, *lines = plots.sweep(SWEEP).data
    drawn = torch.cat([SWEEP.controls[c] for c in CODES], 1)
    assert list(band.y[:3]) == pytest.approx(drawn.amin(1).tolist())
    assert list(band.y[3:]) == pytest.approx(drawn.amax(1).flip(0).tolist())
    assert [line.name for line in lines] == list(CODES)


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_has_a_title_units_and_an_opaque_ground(name):
    before = pio.templates.default
    figure = FIGURES[name]()
    assert isinstance(figure, go.Figure)
    assert len(figure.layout.title.text) > 10
    assert figure.layout.paper_bgcolor == "white"
    assert pio.templates.default == before
    assert len(figure.to_json()) < 100_000
    axes = json.loads(figure.to_json())["layout"]
    if name != "overlap":
        assert {"layer"} <= {
            axes[key]["title"]["text"] for key in axes if "axis" in key and "title" in axes[key]
        }


def test_small_multiples_share_one_scale_from_zero_and_say_the_unit():
    figure = plots.heatmap(SCORES)
    assert len(figure.data) == 3
    for trace, code in zip(figure.data, SCORES.languages, strict=True):
        torch.testing.assert_close(cells(trace), SCORES[code])
        assert trace.coloraxis == "coloraxis"
    assert figure.layout.coloraxis.cmin == 0
    assert "nats per token" in figure.layout.coloraxis.colorbar.title.text
    assert [a.text for a in figure.layout.annotations] == ["en", "fr", "zh"]


def test_hover_tells_head_score_and_rank():
    trace = plots.heatmap(SCORES, "fr").data[0]
    assert trace.hovertemplate.startswith("L%{y}H%{x}: %{z")
    best = SCORES.top(1, "fr")[0]
    assert trace.customdata[best.layer][best.head] == 1
    assert "of 20" in trace.hovertemplate


def test_differences_are_centred_on_zero():
    figure = plots.difference(SCORES, "fr", "en")
    assert figure.layout.coloraxis.cmid == 0
    torch.testing.assert_close(cells(figure.data[0]), SCORES["fr"] - SCORES["en"])
    with pytest.raises(KeyError, match="no scores for 'de'"):
        plots.difference(SCORES, "fr", "de")


def test_counts_layers_and_overlap_say_what_the_heads_say():
    counts = plots.language_counts(HEADS)
    assert cells(counts.data[0]).tolist() == HEADS.counts.tolist()
    assert counts.layout.coloraxis.cmax == 3.5
    layers = plots.heads_per_layer(HEADS)
    total = sum(sum(bar.y) for bar in layers.data)
    assert total == len(HEADS.general) + sum(map(len, HEADS.specific.values()))
    overlap = plots.overlap(HEADS)
    assert cells(overlap.data[0]).diagonal().tolist() == [1, 1, 1]
    assert "by chance" in overlap.layout.title.text


def test_negative_scores_get_a_scale_that_shows_them():
    negative = HeadScores(SCORES.values - 0.5, SCORES.languages, "taylor", "nats per token")
    assert plots.heatmap(negative).layout.coloraxis.cmin is None


def test_html_opens_without_a_network(tmp_path):
    path = plots.write(plots.heatmap(SCORES), tmp_path / "map.html")
    text = path.read_text()
    assert "<script src=" not in text
    assert len(text) < 6_000_000


def test_the_page_embeds_plotly_once_and_escapes(tmp_path):
    figures = [make() for make in FIGURES.values()]
    path = plots.write_page(
        tmp_path / "p.html", "<b>T</b>", figures, {"Heads": {"<script>": "L0H1"}}
    )
    text = path.read_text()
    assert "&lt;script&gt;" in text
    assert "&lt;b&gt;T&lt;/b&gt;" in text
    assert "<script src=" not in text
    assert 3_000_000 < len(text) < 6_000_000


def test_bad_formats_and_missing_browsers_are_explained(tmp_path, monkeypatch):
    with pytest.raises(
        ValueError, match=r"cannot write map\.gif: the formats are html, png, svg, pdf"
    ):
        plots.write(plots.heatmap(SCORES), tmp_path / "map.gif")

    def no_browser(*args, **kwargs):
        raise OSError("Chrome not found")

    monkeypatch.setattr(go.Figure, "to_image", no_browser)
    with pytest.raises(
        RuntimeError, match=r"PNG needs kaleido and a Chrome.*lahis-tl\[png\].*Chrome not found"
    ):
        plots.write(plots.heatmap(SCORES), tmp_path / "map.png")
    assert list(tmp_path.iterdir()) == []


def test_attention_before_and_after_and_its_difference():
    shape = (2, 3, 4, 3)
    before = AttentionMass(("start", "fr", "rest"), draw(*shape), {"model": {"name": "m"}})
    after = AttentionMass(before.parts, draw(*shape) * 0.5, before.card)
    figure = plots.attention_change(before, after, "fr", "fr × 3")
    maps = [trace for trace in figure.data if isinstance(trace, go.Heatmap)]
    plain, changed, change = (cells(trace) for trace in maps)
    assert change == pytest.approx(changed - plain, abs=1e-6)
    assert plain == pytest.approx(before["fr"].mean(0).numpy())
    assert figure.layout.coloraxis2.cmid == 0
    assert [a.text for a in figure.layout.annotations[:3]] == ["no mask", "fr × 3", "difference"]


def test_heads_that_rest_are_crossed_out():
    mass = torch.tensor([[[[0.99, 0.01], [0.2, 0.8]]]])
    both = AttentionMass(("start", "rest"), mass, {})
    figure = plots.attention_change(both, both, "rest", "nothing")
    crosses = [trace for trace in figure.data if isinstance(trace, go.Scatter)]
    assert [(list(t.x), list(t.y)) for t in crosses] == [([0], [0])] * 3


def test_a_pattern_shows_its_tokens_as_text():
    tokens = ["<b>", " chat", "·", "a" * 30]
    figure = plots.attention_pattern(tokens, torch.eye(4), "L0H0")
    assert list(figure.layout.xaxis.ticktext) == ["&lt;b&gt;", " chat", "·", "a" * 13 + "…"]
    assert figure.layout.yaxis.autorange == "reversed"


def test_a_square_keeps_one_order_and_leaves_gaps():
    table = pd.DataFrame({"a": ["fr", "de"], "b": ["de", "fr"], "v": [1.0, -1.0]})
    figure = plots.square(table, ("a", "b", "v"), "T", "about", "bar", ("rows", "columns"))
    (trace,) = figure.data
    assert list(trace.x) == list(trace.y) == ["fr", "de"]
    values = np.array(trace.z, dtype=float)
    assert np.isnan(values.diagonal()).all()
    assert (values[0, 1], values[1, 0]) == (1.0, -1.0)
    assert trace.zmid == 0


def test_tuning_marks_the_kept_epoch():
    history = pd.DataFrame(
        {"epoch": [0, 1, 2], "train_nll": [3.0, 2.0, 1.0], "valid_nll": [3.0, 2.5, 2.8]}
    )
    grid = lt.HeadGrid(1, 2)
    tuned = lt.TunedMask(
        torch.ones(1, 2),
        lt.HeadSet(grid, ["L0H1"]),
        history,
        card={"settings": {"kept_epoch": 1, "pairs": 7}},
    )
    figure = plots.tuning(tuned)
    assert figure.layout.shapes[0].x0 == 1
    assert "1 heads, 7 pairs" in figure.layout.title.text
    assert list(figure.data[1].y) == [3.0, 2.5, 2.8]
