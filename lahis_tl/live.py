"""The map of heads inside Jupyter, whose clicks reach Python and whose heads answer on texts that are typed."""

import html
import importlib.util
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import torch

from lahis_tl.access import LensModel, grid_of
from lahis_tl.artifacts import Artifact
from lahis_tl.explorer import explore, loaded
from lahis_tl.explorer.payload import Payload
from lahis_tl.heads import Head, HeadLike, HeadSet
from lahis_tl.lens import next_tokens
from lahis_tl.masks import HeadMask
from lahis_tl.patterns import head_pattern
from lahis_tl.plots.attention import attention_pattern
from lahis_tl.plots.maps import selectable_map

_NEEDED = ("ipywidgets", "anywidget")
AS_IS, OFF, SCALED = "as it is", "off", "scaled"


@dataclass(frozen=True)
class StaticPage:
    """What ``widget`` gives where there is no live one: the explorer page, and why."""

    path: Path
    why: str

    def __repr__(self) -> str:
        return f"{self.why} The same map as a page: {self.path}"

    def _repr_html_(self) -> str:
        name = html.escape(str(self.path))
        return f'<p>{html.escape(self.why)} The same map as a page: <a href="{name}">{name}</a></p>'


def widget(
    results: Artifact | str | Path | Sequence[Artifact | str | Path],
    model: LensModel | None = None,
    *,
    text: str = "",
    path: str | Path = "heads.html",
) -> "HeadWidget | StaticPage":
    """The map of heads in a notebook: click a head, type a text, see its attention; ablate it, see the next token.

    >>> view = widget([scores, heads], model, text="La capitale de la France est")      # doctest: +SKIP
    >>> view                                                                            # doctest: +SKIP
    >>> view.selected            # the heads that were shift-clicked                    # doctest: +SKIP
    HeadSet([L12H3, L7H0], 30 layers × 9 heads)

    Args:
        results: as for ``explore``.
        model: for the text; without one only the map answers.
        text: to begin with.
        path: where the static page goes if there is no live one.

    Returns:
        the live widget in a Jupyter kernel with ipywidgets and anywidget; elsewhere the page of ``explore``, with
        the reason.

    Raises:
        ValueError: as ``explore``; or, live, the model has other heads than the results, or there is no score.
    """
    found = loaded(results)
    why = _why_static()
    if why is None:
        return HeadWidget(found, model, text)
    return StaticPage(explore(found, path), why)


def _why_static() -> str | None:
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        return f"A live widget needs {' and '.join(missing)}: pip install 'lahis-tl[widget]'."
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if shell is None or not hasattr(shell, "kernel"):
        return "A live widget needs a Jupyter kernel, and this is none."
    return None


class HeadWidget:
    """See ``widget``.

    Attributes:
        head: the clicked one; None before the first click.
        selected: the set that was shift-clicked, in that order.
        map, attention: the figures, as plotly FigureWidgets.
        next_tokens: what the mask does to the text's next token; empty without a mask.
        view: the ipywidgets box that is shown.
    """

    def __init__(self, results: Sequence[Artifact], model: LensModel | None = None, text: str = ""):
        import ipywidgets

        if "google.colab" in sys.modules:
            sys.modules["google.colab"].output.enable_custom_widget_manager()  # type: ignore[attr-defined]
        shown = Payload(results, None)
        if not shown.maps:
            raise ValueError("the widget maps scores; give scores, gradients or effects")
        if model is not None and grid_of(model) != shown.grid:
            raise ValueError(
                f"the results are about {shown.grid}, but the model has {grid_of(model)}"
            )
        self._maps = {found.name: found for found in shown.maps}
        self._model, self.grid = model, shown.grid
        self.head: Head | None = None
        self._listening = True
        self.selected = HeadSet(self.grid, [])
        self.next_tokens = pd.DataFrame()
        first = shown.maps[0]
        # plotly's figures and ipywidgets' controls have no types that a checker could follow.
        self.map: Any
        self.attention: Any
        self._score: Any = ipywidgets.Dropdown(options=list(self._maps), description="Score")
        self._language: Any = ipywidgets.Dropdown(
            options=list(first.languages), description="Language"
        )
        self._text: Any = ipywidgets.Textarea(
            text, placeholder="A text", description="Text", continuous_update=False
        )
        self._mode: Any = ipywidgets.ToggleButtons(options=[AS_IS, OFF, SCALED], description="Head")
        self._factor: Any = ipywidgets.FloatSlider(
            2.0, min=0.0, max=5.0, step=0.25, description="Factor"
        )
        self._whole: Any = ipywidgets.Checkbox(False, description="the whole selection")
        self._clear: Any = ipywidgets.Button(description="Clear the selection")
        self._said: Any = ipywidgets.HTML()
        self._listed: Any = ipywidgets.HTML()
        self.map = go.FigureWidget(selectable_map(self._values(), first.unit))
        self.attention = go.FigureWidget()
        self._listen()
        self.view = self._arranged(ipywidgets)
        self._tell()

    def _listen(self) -> None:
        self.map.data[0].on_click(self._clicked)
        self._score.observe(lambda _: self._score_changed(), "value")
        self._language.observe(lambda _: self._recolor(), "value")
        for control in (self._text, self._mode, self._factor, self._whole):
            control.observe(lambda _: self._answer(), "value")
        self._clear.on_click(lambda _: self.select([]))

    def _arranged(self, ipywidgets: Any) -> Any:
        rows = [
            ipywidgets.HBox([self._score, self._language, self._clear]),
            self._said,
        ]
        if self._model is None:
            return ipywidgets.VBox([*rows, self.map])
        live = [self._text, ipywidgets.HBox([self._mode, self._factor, self._whole]), self._listed]
        right = ipywidgets.VBox([*live, self.attention])
        return ipywidgets.VBox([*rows, ipywidgets.HBox([self.map, right])])

    @property
    def mask(self) -> HeadMask | None:
        """What the toggles ask for: the clicked head, or the whole selection, off or scaled."""
        heads: Iterable[HeadLike] = (
            self.selected if self._whole.value else [self.head] if self.head else []
        )
        chosen = HeadSet(self.grid, heads)
        if self._mode.value == AS_IS or not len(chosen):
            return None
        return HeadMask.scaling(chosen, 0.0 if self._mode.value == OFF else self._factor.value)

    def click(self, head: HeadLike, shift: bool = False) -> None:
        """What a click does: choose the head, with ``shift`` also put it into the selection or take it out."""
        self.head = self.grid.check(head)
        if shift:
            kept = [other for other in self.selected if other != self.head]
            self.select(kept if len(kept) < len(self.selected) else [*kept, self.head])
        else:
            self._mark()
        self._answer()

    def scale(self, factor: float | None, whole: bool = False) -> None:
        """Multiply the clicked head, or the whole selection, by ``factor``; None leaves it as it is."""
        self._listening = False  # one answer for three changes
        self._whole.value = whole
        if factor:
            self._factor.min, self._factor.max = (
                min(self._factor.min, factor),
                max(self._factor.max, factor),
            )
            self._factor.value = factor
        self._mode.value = AS_IS if factor is None else OFF if factor == 0.0 else SCALED
        self._listening = True
        self._answer()

    def select(self, heads: Iterable[HeadLike]) -> None:
        """Make these the selection."""
        self.selected = HeadSet(self.grid, heads)
        self._mark()
        if self._whole.value:
            self._answer()

    def _clicked(self, trace: Any, points: Any, state: Any) -> None:
        for layer, head in zip(points.ys, points.xs, strict=True):
            self.click(Head(int(layer), int(head)), bool(state.shift))

    def _values(self) -> torch.Tensor:
        found = self._maps[self._score.value]
        return found.values[list(found.languages).index(self._language.value)]

    def _score_changed(self) -> None:
        languages, chosen = list(self._maps[self._score.value].languages), self._language.value
        if tuple(languages) != tuple(self._language.options):
            self._language.options = languages
            self._language.value = chosen if chosen in languages else languages[0]
        self._recolor()

    def _recolor(self) -> None:
        fresh: Any = selectable_map(self._values(), self._maps[self._score.value].unit)
        with self.map.batch_update():
            self.map.data[0].z = fresh.data[0].z
            self.map.data[0].customdata = fresh.data[0].customdata
            self.map.data[0].hovertemplate = fresh.data[0].hovertemplate
            self.map.layout.coloraxis = fresh.layout.coloraxis
        self._tell()

    def _mark(self) -> None:
        marks = self.map.data[1:]
        chosen = [] if self.head is None else [self.head]
        with self.map.batch_update():
            for trace, heads in zip(marks, (chosen, list(self.selected)), strict=True):
                trace.x, trace.y = [h.head for h in heads], [h.layer for h in heads]
        self._tell()

    def _tell(self) -> None:
        """One line: the clicked head's score, and the selection."""
        parts = ["Click a head; shift-click puts it into the selection."]
        if self.head is not None:
            value = float(self._values()[self.head])
            unit = self._maps[self._score.value].unit
            parts = [f"{self.head.label}: {value:.3g} {unit} in {self._language.value}."]
        if len(self.selected):
            parts.append(f"Selected: {', '.join(self.selected.labels)}.")
        self._said.value = html.escape(" ".join(parts))

    def _answer(self) -> None:
        """The attention and the next token on the text; an error is said, not lost."""
        if self._model is None or not self._listening:
            return
        if not self._text.value:
            self.attention.data, self._listed.value = [], ""
            self.next_tokens = pd.DataFrame()
            return
        try:
            self._look()
        except (ValueError, IndexError) as error:
            self._listed.value = f"<b>{html.escape(str(error))}</b>"

    def _look(self) -> None:
        assert self._model is not None
        mask, text = self.mask, self._text.value
        if self.head is not None:
            tokens, pattern = head_pattern(self._model, text, self.head, mask)
            fresh: Any = attention_pattern(
                tokens, pattern, f"Attention pattern of {self.head.label}"
            )
            with self.attention.batch_update():
                self.attention.data = []
                self.attention.add_trace(fresh.data[0])
                self.attention.update_layout(fresh.layout)
        if mask is None:
            self.next_tokens, self._listed.value = pd.DataFrame(), ""
            return
        self.next_tokens = next_tokens(self._model, text, mask)
        shown = self.next_tokens.assign(token=[repr(t) for t in self.next_tokens["token"]])
        self._listed.value = shown.round(3).to_html(index=False, escape=True)

    def _repr_mimebundle_(self, **options: Any) -> Any:
        return self.view._repr_mimebundle_(**options)

    def __repr__(self) -> str:
        return f"HeadWidget({', '.join(self._maps)}; {self.grid})"
