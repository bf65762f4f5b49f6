"""What is handed out: wheel and source archive are whole, light to import, and run on every supported Python."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from email.parser import Parser
from importlib import metadata
from itertools import product
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

import lahis_tl

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lahis_tl"
VERSIONS = ["3.10", "3.11", "3.12", "3.13"]
HEAVY = ("torch", "numpy", "pandas", "plotly", "transformers", "transformer_lens", "datasets")


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """Source archive, and the wheel built from it."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    (wheel,), (archive,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, archive


@pytest.fixture(scope="session")
def about(built):
    """The wheel's metadata."""
    with zipfile.ZipFile(built[0]) as wheel:
        (name,) = (n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
        return Parser().parsestr(wheel.read(name).decode())


def requirements(about):
    return [Requirement(line) for line in about.get_all("Requires-Dist")]


def test_the_wheel_is_the_package_and_nothing_else(built):
    with zipfile.ZipFile(built[0]) as wheel:
        names = {n for n in wheel.namelist() if not n.endswith("/")}
    package = {n for n in names if n.startswith("lahis_tl/")}
    there = {
        path.relative_to(ROOT).as_posix()
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert package == there
    assert {"lahis_tl/py.typed", "lahis_tl/data/planted/model.safetensors"} <= package
    others = {n.partition(".dist-info/")[2] for n in names - package}
    assert others == {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE"}


def test_the_source_archive_can_test_itself_and_holds_no_litter(built):
    with tarfile.open(built[1]) as archive:
        names = {n.name.partition("/")[2] for n in archive.getmembers() if n.isfile()}
    tops = {name.partition("/")[0] for name in names}
    folders = {"lahis_tl", "analyses", "tests", "notebooks", "docs", "constraints"}
    files = {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "CITATION.cff", "LICENSE", "Makefile"}
    assert tops == folders | files | {"mkdocs.yml", "pyproject.toml", "PKG-INFO", ".gitignore"}
    litter = re.compile(r"__pycache__|\.pyc$|\.ipynb_checkpoints|(^|/)(out|site|dist)/|~$")
    assert not [name for name in names if litter.search(name)]
    there = {
        path.relative_to(ROOT).as_posix()
        for folder in folders
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and not litter.search(path.relative_to(ROOT).as_posix())
    }
    assert there <= names


def test_the_metadata_say_what_it_is(about):
    assert (about["Name"], about["Version"]) == ("lahis-tl", lahis_tl.__version__)
    assert about["License-Expression"] == "MIT"
    assert about.get_payload().startswith("# lahis-tl")
    assert all(version in SpecifierSet(about["Requires-Python"]) for version in VERSIONS)
    assert not {"3.9", "3.14"} & set(SpecifierSet(about["Requires-Python"]).filter(["3.9", "3.14"]))


def pins(path, python):
    found = {}
    for line in path.read_text().splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            if pin.marker is None or pin.marker.evaluate({"python_version": python}):
                assert pin.name not in found, f"{path.name} pins {pin.name} twice for {python}"
                (exact,) = pin.specifier
                assert exact.operator == "=="
                found[canonicalize_name(pin.name)] = exact.version
    return found


@pytest.mark.parametrize("python", VERSIONS)
@pytest.mark.parametrize("path", sorted((ROOT / "constraints").glob("*.txt")), ids=lambda p: p.stem)
def test_the_pinned_versions_satisfy_every_requirement_and_extra(about, path, python):
    pinned = pins(path, python)
    extras = about.get_all("Provides-Extra")
    assert extras == sorted(["benchmark", "dev", "docs", "gguf", "peft", "png", "widget"])
    for extra, needed in product(["", *extras], requirements(about)):
        if needed.marker is None or needed.marker.evaluate({"extra": extra}):
            name = canonicalize_name(needed.name)
            if name != "pip":
                assert needed.specifier.contains(pinned[name]), f"{needed} but {pinned[name]}"


def test_dev_has_the_other_extras(about):
    sets = {
        extra: {
            r.name for r in requirements(about) if r.marker and f'== "{extra}"' in str(r.marker)
        }
        for extra in about.get_all("Provides-Extra")
    }
    assert set().union(*sets.values()) == sets["dev"]


def test_what_is_imported_is_required(about):
    """Of the package itself or of what it requires; so that no import hangs on what happens to be there."""
    needed = {canonicalize_name(r.name) for r in requirements(about)}
    light = {canonicalize_name(r.name) for r in requirements(about) if r.marker is None}
    for name in light:
        further = [Requirement(line) for line in metadata.requires(name) or []]
        needed |= {canonicalize_name(r.name) for r in further if "extra" not in str(r.marker)}
    home = metadata.packages_distributions()
    for path in PACKAGE.rglob("*.py"):
        for root in re.findall(r"^\s*(?:from|import) (\w+)", path.read_text(), re.MULTILINE):
            if root in home and root not in sys.stdlib_module_names and root != "lahis_tl":
                assert {canonicalize_name(d) for d in home[root]} & needed, f"{path.name}: {root}"


def quiet_run(python, *arguments, path=()):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "COV_"))}
    environment |= {"PYTHONPATH": os.pathsep.join(map(str, path)), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [str(python), *arguments], capture_output=True, text=True, env=environment, cwd="/"
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.strip()


@pytest.fixture(scope="session")
def empty_venv(built, tmp_path_factory):
    """The wheel alone, without anything that it requires."""
    folder = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-index"]
    subprocess.run([*pip, "--no-deps", str(built[0])], check=True, capture_output=True)
    return python


def light_site():
    """Where this Python finds what the command line stands on; nothing heavy is imported from there."""
    return Path(metadata.distribution("typer").locate_file(""))


def test_it_imports_without_what_it_requires(empty_venv):
    said = quiet_run(empty_venv, "-c", "import lahis_tl; print(lahis_tl.__version__)")
    assert said == lahis_tl.__version__


def test_the_command_line_answers_without_heavy_imports(empty_venv):
    said = quiet_run(empty_venv.with_name("lahis-tl"), "--version", path=[light_site()])
    assert said == f"lahis-tl {lahis_tl.__version__}"
    code = f"""
import sys
from lahis_tl.cli import main
sys.argv = ["lahis-tl", "--help"]
try:
    main()
except SystemExit as end:
    assert not end.code
print([m for m in {HEAVY} if m in sys.modules])
"""
    said = quiet_run(empty_venv, "-c", code, path=[light_site()])
    assert "Begin with" in said
    assert said.endswith("[]")


@pytest.mark.parametrize("code", ["import lahis_tl", "import lahis_tl.cli"])
def test_it_is_there_within_a_second(empty_venv, code):
    def seconds():
        start = time.perf_counter()
        quiet_run(empty_venv, "-c", code, path=[light_site()])
        return time.perf_counter() - start

    assert min(seconds() for _ in range(5)) < 1


def other_python(version):
    """A Python of that version on this machine, by its name or kept by pyenv."""
    kept = Path.home() / ".pyenv" / "versions"
    for found in [shutil.which(f"python{version}"), *kept.glob(f"{version}.*/bin/python")]:
        if (
            found is not None
            and subprocess.run([found, "-c", ""], capture_output=True).returncode == 0
        ):
            return Path(found)
    return None


@pytest.mark.parametrize("version", VERSIONS)
def test_every_supported_python_reads_it(version, built, tmp_path):
    python = other_python(version)
    if python is None:
        pytest.skip(f"there is no Python {version} here")
    with zipfile.ZipFile(built[0]) as wheel:
        wheel.extractall(tmp_path)
    assert quiet_run(python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])") == version
    said = quiet_run(python, "-c", "import lahis_tl; print(lahis_tl.__version__)", path=[tmp_path])
    assert said == lahis_tl.__version__
    quiet_run(python, "-W", "error", "-m", "compileall", "-q", str(tmp_path / "lahis_tl"))
    wanted = metadata.metadata("typer")["Requires-Python"]
    if Version(f"{version}.99") in SpecifierSet(wanted):
        path = [tmp_path, light_site()]
        assert quiet_run(python, "-m", "lahis_tl", "--version", path=path).endswith(
            lahis_tl.__version__
        )
        assert "steer" in quiet_run(python, "-m", "lahis_tl", "--help", path=path)


def test_the_citation_is_of_this_version(about):
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    told = [citation[key] for key in ("title", "version", "license", "abstract")]
    assert told == [about[key] for key in ("Name", "Version", "License-Expression", "Summary")]
    assert citation["message"]
    assert all({"name", "family-names"} & set(author) for author in citation["authors"])
    assert "arXiv:2511.07498" in str(citation["preferred-citation"]["identifiers"])
