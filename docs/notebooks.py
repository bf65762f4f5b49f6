"""A hook of mkdocs: the notebooks as pages of the site, as they are committed, with their pictures."""

import base64
import json
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

_NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add ``notebooks/NAME.md`` for every notebook, and its pictures beside it."""
    for path in sorted(_NOTEBOOKS.glob("*.ipynb")):
        page, pictures = as_markdown(path)
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=page))
        for name, content in pictures.items():
            files.append(File.generated(config, f"notebooks/{name}", content=content))
    return files


def on_pre_build(config: MkDocsConfig) -> None:
    """``mkdocs serve`` looks here too."""
    config.watch.append(str(_NOTEBOOKS))


def as_markdown(path: Path) -> tuple[str, dict[str, bytes]]:
    """The notebook as Markdown, and its pictures by file name."""
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source.replace("](../docs/", "](../"))
            continue
        parts.append(_fenced(source, "python"))
        for output in cell["outputs"]:
            shown, picture = _output(output, f"{path.stem}-{len(pictures)}.png")
            parts.append(shown)
            pictures.update(picture)
    return "\n\n".join(filter(None, parts)), pictures


def _output(output: dict[str, Any], name: str) -> tuple[str, dict[str, bytes]]:
    """What the page shows of one output; live widgets and progress bars are for Jupyter alone."""
    if output["output_type"] == "stream":
        return (_plain(output["text"]) if output["name"] == "stdout" else ""), {}
    data = output.get("data", {})
    if "application/vnd.jupyter.widget-view+json" in data:
        return "", {}
    if "image/png" in data:
        return f"![Figure of the cell above]({name})", {name: base64.b64decode(data["image/png"])}
    if "text/html" in data:
        lines = "".join(data["text/html"]).splitlines()
        inside = "\n".join(line for line in lines if line.strip())
        return f'<div class="output">\n{inside}\n</div>', {}
    return _plain(data.get("text/plain", "")), {}


def _plain(text: str | list[str]) -> str:
    return _fenced("".join(text).rstrip(), "text")


def _fenced(text: str, language: str) -> str:
    return f"````{language}\n{text}\n````" if text else ""
