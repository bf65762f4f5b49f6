"""The documentation tells the truth: its Python runs, its commands parse, its links lead somewhere, its maps are whole.

A page's Python blocks run in their order, in one namespace and an empty folder, as a reader would run them. What is
large or far away has a stand-in: every model but the planted ones is the tiny ``speaker``, data sets of the hub are the
bundled texts. A block with a ``title`` is a file, written before.
"""

import argparse
import re
import runpy
import shlex
import shutil
import sys
from dataclasses import dataclass
from itertools import count, cycle
from pathlib import Path

import huggingface_hub
import pandas as pd
import pytest
import typer
from plotly.basedatatypes import BaseFigure

import lahis_tl as lt
import lahis_tl.export
import lahis_tl.models
from lahis_tl import plots
from lahis_tl.cli import app

ROOT = Path(__file__).parents[1]
FRONT = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
SITE = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [*FRONT, *SITE]
FENCE = re.compile(r"^( *)(`{3,})([^\n`]*)\n(.*?)^\1\2 *$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    language: str
    title: str | None
    line: int
    code: str


def blocks(page: Path, language: str = "") -> list[Block]:
    """The fenced blocks of a page, all or those in one language."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        words = match[3].split(maxsplit=1)
        title = re.search(r'title="([^"]+)"', match[3])
        line = text.count("\n", 0, match.start(4))
        found.append(Block((words or [""])[0], title and title[1], line, match[4]))
    return [block for block in found if language in ("", block.language)]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def with_blocks(language: str) -> list[Path]:
    return [page for page in PAGES if blocks(page, language)]


def run(page: Path) -> dict[str, object]:
    for block in blocks(page):
        if block.title:
            Path(block.title).parent.mkdir(parents=True, exist_ok=True)
            Path(block.title).write_text(block.code, encoding="utf-8")
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(page, "python"):
        code = "\n" * block.line + block.code  # so that a traceback names the page's own line
        exec(compile(code, str(page), "exec"), namespace)
    return namespace


@pytest.fixture
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(BaseFigure, "show", lambda self, *args, **kwargs: None)
    return tmp_path


@pytest.fixture
def stand_ins(empty_folder, monkeypatch, speaker):
    """In place of large models, of data sets on the hub and of repositories there."""
    folder, open_source = lt.card_of(speaker)["name"], lahis_tl.models.open_source

    def open_small(name, **options):
        return open_source(name if name.startswith("planted") else folder, **options)

    for module in (lahis_tl.models, lahis_tl.export):
        monkeypatch.setattr(module, "open_source", open_small)
    monkeypatch.setattr(lt.ModelPreset, "check_grid", lambda self, grid: None)
    # Scores that a page registers are forgotten after it.
    monkeypatch.setattr("lahis_tl.scores._methods", dict(lahis_tl.scores._methods))

    def from_hub(name, languages, n, *settings):
        rows = []
        for code, texts in lt.load_corpus("bundled", languages).texts.items():
            numbered = zip(count(), cycle(texts), strict=False)
            rows += [{"language": code, "text": f"{i}: {next(numbered)[1]}"} for i in range(n)]
        return pd.DataFrame(rows), None

    monkeypatch.setattr("lahis_tl.corpora.from_hub", from_hub)
    hub = empty_folder / ".hub"

    class Hub:
        def __init__(self, token=None): ...

        def create_repo(self, repository, private, exist_ok): ...

        def upload_folder(self, repo_id, folder_path):
            shutil.copytree(folder_path, hub / repo_id)

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda repository, **_: hub / repository
    )


@pytest.mark.parametrize("page", with_blocks("python"), ids=name_of)
def test_python_runs(page, stand_ins):
    run(page)


@pytest.mark.slow
def test_the_readme_runs_on_the_real_model(empty_folder):
    namespace = run(ROOT / "README.md")
    scores = namespace["scores"]
    assert scores.grid == lt.HeadGrid(30, 9)
    assert scores.card["model"]["name"] == "smollm2"


def test_a_block_that_fails_is_found(stand_ins, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "```python\nx = 1\n```\n\n1. In a list:\n\n```python\nassert x == 2, 'so'\n```\n"
    )
    with pytest.raises(AssertionError, match="so") as caught:
        run(page)
    assert caught.traceback[-1].lineno + 1 == 8


class Parsed(BaseException):
    """The arguments were understood; nothing is to be run."""


def commands(page: Path) -> list[list[str]]:
    """The words of every command in a page's shell blocks, comments left out."""
    lines = "\n".join(block.code for block in blocks(page, "sh")).replace("\\\n", " ")
    return [words for line in lines.splitlines() if (words := shlex.split(line, comments=True))]


def parse(words: list[str], monkeypatch) -> None:
    """Fail unless the command could be run as it stands.

    Raises:
        SystemExit, click.UsageError, AssertionError: why not.
    """
    if words[0] in ("python", "torchrun", "accelerate"):
        module, *rest = words[words.index("-m") + 1 :]
        if module == "lahis_tl":
            return parse(["lahis-tl", *rest], monkeypatch)
        return parse_experiment(module, rest, monkeypatch)
    if words[0] == "lahis-tl":
        group = typer.main.get_command(app)
        if not words[1].startswith("-"):
            context = group.make_context("lahis-tl", words[1:], resilient_parsing=True)
            name, command, rest = group.resolve_command(context, words[1:])
            assert command is not None, f"there is no command {words[1]}"
            command.make_context(name, list(rest), parent=context)
        return None
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(words[1:]) <= set(targets), f"there is no target {words[1:]}"
        return None
    assert words[0] in ("pip", "git", "cd"), f"what is {words[0]!r}?"
    return None


def parse_experiment(module: str, arguments: list[str], monkeypatch) -> None:
    understand = argparse.ArgumentParser.parse_args

    def parse_args(self, *args):
        understand(self, *args)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    with pytest.raises(Parsed):
        runpy.run_module(module, run_name="__main__")


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("page", with_blocks("sh"), ids=name_of)
def test_commands_parse(page, monkeypatch):
    for words in commands(page):
        parse(words, monkeypatch)


@pytest.mark.parametrize(
    "line",
    [
        "lahis-tl scores smollm2",
        "lahis-tl score smollm2 --corpse bundled",
        "lahis-tl score smollm2 --method lahs",
        "torchrun --nproc_per_node 4 -m lahis_tl steer",
        "python -m analyses.stability --tests 3",
        "python -m analyses.stabilty",
        "make tests",
        "lahistl demo",
    ],
)
def test_a_command_that_does_not_parse_is_found(line, monkeypatch):
    with pytest.raises((SystemExit, typer.BadParameter.__base__, AssertionError, ImportError)):
        parse(shlex.split(line), monkeypatch)


def links(page: Path) -> list[str]:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    found = re.findall(r"\]\(([^)\s]+)\)", text)
    return [link for link in found if not re.match(r"[a-z]+:", link)]


def anchors(page: Path) -> set[str]:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", FRONT, ids=name_of)  # mkdocs --strict does the others
def test_links_lead_somewhere(page):
    assert links(page)
    for link in links(page):
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def test_the_reference_has_every_public_name_once():
    text = "\n".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    named = re.findall(r"^::: (\S+)", text, re.MULTILINE)
    assert len(named) == len(set(named))
    public = {f"lahis_tl.{name}" for name in lt.__all__ if name != "plots"}
    public |= {f"lahis_tl.plots.{name}" for name in plots.__all__ if not name.isupper()}
    assert public <= set(named)


def test_contributing_names_every_module_and_no_other():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = re.findall(r"^\| `((?:lahis_tl|analyses)/[\w/]+\.py)` \|", text, re.MULTILINE)
    there = {
        str(path.relative_to(ROOT))
        for package in ("lahis_tl", "analyses")
        for path in (ROOT / package).rglob("*.py")
    }
    assert sorted(named) == sorted(there)


def test_the_site_names_no_other_host():
    """A page that a reader opens asks nobody else for letters or scripts."""
    text = (ROOT / "mkdocs.yml").read_text()
    assert "font: false" in text
    assert "https://" not in text
