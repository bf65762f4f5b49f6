"""Sections of text, tables and pictures as Markdown and as one self-contained HTML page."""

import html
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.io as pio

_NUMBER = "{:.3g}"


@dataclass(frozen=True)
class Picture:
    """A figure of a step: ``NAME.png`` and ``NAME.figure.json`` in its folder."""

    folder: Path
    name: str
    about: str

    @property
    def alt(self) -> str:
        return f"{self.about}: {self.name.replace('_', ' ')}"


@dataclass(frozen=True)
class Fold:
    """Blocks that are shown when asked for."""

    title: str
    blocks: tuple[Any, ...]


Block = str | pd.DataFrame | Picture | Fold | list[str]
Section = tuple[int, str, list[Block]]  # level, title, blocks


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else _NUMBER.format(value)
    return "" if value is None else _one_line(str(value))


def _one_line(text: str) -> str:
    """Errors of other libraries have several, which would break a table or a list."""
    return " ".join(text.split())


def markdown(found: Sequence[Section], place: Callable[[Picture], Path], base: Path) -> str:
    """Markdown with pictures by paths relative to ``base``; ``place`` says where a picture is."""
    lines: list[str] = []

    def add(block: Block) -> None:
        if isinstance(block, pd.DataFrame):
            lines.append(_markdown_table(block))
        elif isinstance(block, Picture):
            path = place(block)
            if path.is_file():
                lines.append(f"![{block.alt}]({path.relative_to(base).as_posix()})\n")
        elif isinstance(block, Fold):
            lines.append(f'<details markdown="1"><summary>{block.title}</summary>\n')
            for inner in block.blocks:
                add(inner)
            lines.append("</details>\n")
        elif isinstance(block, list):
            lines.append("\n".join(f"- {_one_line(line)}" for line in block) + "\n")
        else:
            lines.append(f"{block}\n")

    for level, title, blocks in found:
        lines.append(f"{'#' * level} {title}\n")
        for block in blocks:
            add(block)
    return "\n".join(lines)


def _markdown_table(table: pd.DataFrame) -> str:
    def row(cells: Sequence[Any]) -> str:
        return "| " + " | ".join(_cell(cell).replace("|", "\\|") for cell in cells) + " |"

    header = [row(list(table.columns)), "|" + " --- |" * len(table.columns)]
    return "\n".join([*header, *(row(list(cells)) for cells in table.to_numpy())]) + "\n"


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title><style>
:root {{ color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }}
body {{ margin: 0 auto; max-width: 1100px; padding: 1rem; }}
h2 {{ margin-top: 2.5rem; border-bottom: 1px solid color-mix(in srgb, currentColor 25%, transparent); }}
figure {{ margin: 1rem 0; background: #fff; border-radius: 8px; overflow-x: auto; width: fit-content;
  max-width: 100%; }}
div.table {{ overflow-x: auto; margin: 1rem 0; }}
table {{ border-collapse: collapse; font-size: .875rem; line-height: 1.4; }}
td, th {{ padding: .3rem .8rem .3rem 0; text-align: left; vertical-align: top; }}
td.number {{ font-variant-numeric: tabular-nums; white-space: nowrap; }}
tr {{ border-bottom: 1px solid color-mix(in srgb, currentColor 12%, transparent); }}
th {{ font-weight: 600; }} td:last-child b {{ white-space: nowrap; }}
code {{ font-size: .9em; overflow-wrap: anywhere; }} summary {{ cursor: pointer; }}
</style></head><body>{body}</body></html>"""


def page(found: Sequence[Section]) -> str:
    """One self-contained page, plotly embedded once."""
    parts: list[str] = []
    drawn = 0

    def add(block: Block) -> None:
        nonlocal drawn
        if isinstance(block, pd.DataFrame):
            parts.append(_html_table(block))
        elif isinstance(block, Picture):
            text = (block.folder / f"{block.name}.figure.json").read_text(encoding="utf-8")
            figure = pio.from_json(text)
            inner = figure.to_html(full_html=False, include_plotlyjs=drawn == 0)
            parts.append(f'<figure aria-label="{html.escape(block.alt)}">{inner}</figure>')
            drawn += 1
        elif isinstance(block, Fold):
            parts.append(f"<details><summary>{html.escape(block.title)}</summary>")
            for inner in block.blocks:
                add(inner)
            parts.append("</details>")
        elif isinstance(block, list):
            parts.append(f"<ul>{''.join(f'<li>{_inline(line)}</li>' for line in block)}</ul>")
        else:
            parts.append(f"<p>{_inline(block)}</p>")

    for level, title, blocks in found:
        parts.append(f"<h{level}>{html.escape(title)}</h{level}>")
        for block in blocks:
            add(block)
    return _PAGE.format(title=html.escape(found[0][1]), body="\n".join(parts))


def _html_table(table: pd.DataFrame) -> str:
    head = "".join(f"<th>{html.escape(str(name))}</th>" for name in table.columns)
    rows = [
        "<tr>"
        + "".join(
            f"<td{' class=number' if isinstance(cell, float | int) else ''}>{_inline(_cell(cell))}</td>"
            for cell in cells
        )
        + "</tr>"
        for cells in table.to_numpy()
    ]
    return f'<div class="table"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


def _inline(text: str) -> str:
    """Escaped, with the few marks that the report's texts use: code, bold, emphasis."""
    found = html.escape(text, quote=False)
    found = re.sub(r"`([^`]+)`", r"<code>\1</code>", found)
    found = re.sub(r"\*\*([^*]+)\*\*", r"<b>\1</b>", found)
    return re.sub(r"(?<![\w*])\*([^*]+)\*(?![\w*])", r"<em>\1</em>", found)
