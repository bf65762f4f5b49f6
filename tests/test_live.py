"""The widget: clicks reach Python, the text answers, what is missing is said."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import lahis_tl as lt
from lahis_tl import live
from lahis_tl.access import grid_of
from lahis_tl.live import OFF, SCALED, HeadWidget, StaticPage

TEXT = "The cat is in the house"


@pytest.fixture
def scores(speaker: nn.Module) -> list[lt.HeadScores]:
    grid = grid_of(speaker)
    values = torch.rand(2, *grid.shape, generator=torch.Generator().manual_seed(0))
    return [
        lt.HeadScores(values, ("en", "fr"), "lahis", "nats per token"),
        lt.HeadScores(values[:1] - 0.5, ("en",), "taylor", "nats per token"),
    ]


def click(view: HeadWidget, layer: int, head: int, shift: bool = False) -> None:
    """What plotly sends when a cell is clicked."""
    points = SimpleNamespace(ys=[layer], xs=[head])
    view._clicked(view.map.data[0], points, SimpleNamespace(shift=shift))


def test_clicks_choose_and_select(scores: list[lt.HeadScores]) -> None:
    view = HeadWidget(scores)
    assert view.head is None
    click(view, 1, 2)
    assert view.head == lt.Head(1, 2)
    assert (view.map.data[1].x, view.map.data[1].y) == ((2,), (1,))
    click(view, 0, 3, shift=True)
    click(view, 2, 1, shift=True)
    click(view, 0, 3, shift=True)
    click(view, 1, 1, shift=True)
    assert view.selected.labels == ["L2H1", "L1H1"]
    assert view.map.data[2].x == (1, 1)
    assert "Selected: L2H1, L1H1" in view._said.value
    view._clear.click()
    assert len(view.selected) == 0


def test_score_and_language_recolor_the_map(scores: list[lt.HeadScores]) -> None:
    view = HeadWidget(scores)
    view._language.value = "fr"
    assert torch.equal(torch.tensor(view.map.data[0].z), scores[0]["fr"])
    view._score.value = "taylor"
    assert view._language.options == ("en",)
    assert torch.equal(torch.tensor(view.map.data[0].z), scores[1]["en"])
    assert view.map.layout.coloraxis.cmid == 0


def test_a_text_answers_with_attention_and_the_next_token(
    speaker: nn.Module, scores: list[lt.HeadScores]
) -> None:
    view = HeadWidget(scores, speaker, TEXT)
    click(view, 1, 2)
    tokens, pattern = lt.head_pattern(speaker, TEXT, "L1H2")
    assert torch.equal(torch.tensor(view.attention.data[0].z), pattern)
    assert len(view.attention.layout.xaxis.ticktext) == len(tokens)
    assert view.mask is None
    assert view.next_tokens.empty
    view._mode.value = OFF
    assert torch.equal(view.mask.factors, lt.HeadMask.scaling(["L1H2"], 0.0, view.grid).factors)
    wanted = lt.next_tokens(speaker, TEXT, view.mask)
    assert view.next_tokens.equals(wanted)
    assert (wanted["change"] != 0).all()
    view.select(["L0H0", "L2H2"])
    view.scale(3.0, whole=True)
    assert view._mode.value == SCALED
    assert view.mask.factors[2, 2] == view.mask.factors[0, 0] == 3.0
    assert view.mask.factors[1, 2] == 1.0
    view.scale(10.0)
    assert view.mask.factors[1, 2] == 10.0, "beyond the slider's first range"
    view.scale(-1.0)
    assert view.mask.factors[1, 2] == -1.0
    view.scale(None)
    assert view.mask is None
    view._text.value = "word " * 2000
    assert "tokens" in view._listed.value, "a text that does not fit is said to be so"


def test_next_tokens_are_the_models_own(speaker: nn.Module) -> None:
    grid = grid_of(speaker)
    ones = lt.next_tokens(speaker, TEXT, lt.HeadMask.ones(grid), k=5)
    assert len(ones) == 5
    assert (ones["change"] == 0).all()
    tokenizer = lt.tokenizer_of(speaker)
    ids = torch.tensor([tokenizer(TEXT)["input_ids"]])
    p = speaker(ids, attention_mask=torch.ones_like(ids), return_type="logits")[0, -1].softmax(-1)
    assert ones["before"].iloc[0] == pytest.approx(float(p.max()), rel=1e-4)


def test_without_a_kernel_or_packages_the_page_says_why(
    scores: list[lt.HeadScores], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = lt.widget(scores[0], path=tmp_path / "heads.html")
    assert isinstance(found, StaticPage)
    assert "needs a Jupyter kernel" in repr(found)
    assert found.path.exists()
    assert str(found.path) in found._repr_html_()
    monkeypatch.setattr(live, "_NEEDED", ("no_such_package",))
    assert "pip install 'lahis-tl[widget]'" in repr(lt.widget(scores, path=found.path))


def test_in_a_kernel_it_is_live(
    scores: list[lt.HeadScores], monkeypatch: pytest.MonkeyPatch
) -> None:
    shell = SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    assert live._why_static() is None


def test_results_and_model_must_fit(speaker: nn.Module) -> None:
    scores = lt.HeadScores(torch.rand(1, 2, 2), ("en",), "lahis")
    with pytest.raises(ValueError, match="about 2 layers × 2 heads, but the model has"):
        HeadWidget([scores], speaker)
    heads = lt.language_heads(
        lt.HeadScores(torch.rand(2, 4, 4), ("en", "fr"), "x"), "contrastive", fraction=0.2
    )
    with pytest.raises(ValueError, match="the widget maps scores"):
        HeadWidget([heads])
