"""The door, the direction of imports, and that importing is cheap."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lahis_tl

PACKAGE = Path(lahis_tl.__file__).parent
MODULES = sorted(path for path in PACKAGE.rglob("*.py"))


def imports_of(path):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def test_the_door_holds_what_it_says():
    for name in lahis_tl.__all__:
        assert getattr(lahis_tl, name) is not None
    assert set(lahis_tl._MODULE_OF) | {"plots"} == set(lahis_tl.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'lod_model'"):
        lahis_tl.lod_model  # noqa: B018
    assert set(lahis_tl.__all__) <= set(dir(lahis_tl))


def test_every_public_name_has_a_docstring():
    for name in lahis_tl.__all__:
        assert (getattr(lahis_tl, name).__doc__ or "").strip(), name


def test_only_models_imports_transformer_lens_and_only_what_draws_imports_plotly():
    for path in MODULES:
        roots = {name.split(".")[0] for name in imports_of(path)}
        inside = path.relative_to(PACKAGE).parts
        if inside[0] != "models":
            assert "transformer_lens" not in roots, path
        if inside[0] not in ("plots", "explorer", "live.py"):
            assert "plotly" not in roots, path


def test_no_module_imports_in_a_circle():
    names = {
        f"lahis_tl.{p.relative_to(PACKAGE).with_suffix('').as_posix().replace('/', '.')}".removesuffix(
            ".__init__"
        ): p
        for p in MODULES
    }
    top_level = {}
    for name, path in names.items():
        if name == "lahis_tl":
            continue
        body = ast.Module(
            [n for n in ast.parse(path.read_text()).body if not isinstance(n, ast.If)], []
        )
        found = {n.module for n in ast.walk(body) if isinstance(n, ast.ImportFrom) and n.module}
        top_level[name] = found & set(names)
    done: set[str] = set()
    while top_level.keys() - done:
        ready = {
            n for n, needs in top_level.items() if n not in done and needs <= done | {"lahis_tl"}
        }
        assert ready, f"a circle among {sorted(top_level.keys() - done)}"
        done |= ready


def test_import_is_cheap_and_quiet():
    code = "import sys, lahis_tl; print([m for m in ('torch', 'plotly', 'transformer_lens') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert done.stderr == ""


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.name)
def test_modules_stay_small_and_do_not_print(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    calls = [
        n
        for n in ast.walk(ast.parse(text))
        if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "print"
    ]
    assert not calls
