"""What an experiment's ``run`` takes, its command takes too."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from analyses.command_line import run_from_command_line
from analyses.result import Result

asked: dict[str, Any] = {}


def run(
    model: str = "smollm2",
    languages: Sequence[str] = ("en", "fr"),
    n: int = 48,
    shares: tuple[float, float] = (0.5, 0.5),
    relations: Sequence[str] | None = None,
    test_tokens: int | None = None,
    sweeps: bool = True,
    sizes: dict[str, int] | None = None,
    checkpoint: str | Path | None = "out/test_command_line/parts",
    **rule_options: Any,
) -> Result:
    asked.clear()
    asked.update(locals())
    return Result("made up", {"one": pd.DataFrame({"a": [1]})}, {}, "Nothing.", {})


def start(monkeypatch: pytest.MonkeyPatch, out: Path, *words: str) -> dict[str, Any]:
    monkeypatch.setattr("sys.argv", ["command", "--out", str(out), *words])
    run_from_command_line(run, "What it does.", {"n": 3, "checkpoint": None})
    assert (out / "one.csv").is_file()
    return dict(asked)


def test_settings_of_every_kind_are_options(monkeypatch, tmp_path: Path) -> None:
    words = "--languages fr,zh --texts 5 --shares 0.25,0.75 --relations job --test-tokens 32"
    words += " --no-sweeps --fraction 0.05 --min-languages 3"
    found = start(monkeypatch, tmp_path, *words.split())
    assert (found["languages"], found["n"], found["shares"]) == (("fr", "zh"), 5, (0.25, 0.75))
    assert (found["relations"], found["test_tokens"]) == (("job",), 32)
    assert found["sweeps"] is False
    assert found["rule_options"] == {"fraction": 0.05, "min_languages": 3}
    assert found["checkpoint"] == tmp_path / "parts", "parts lie beside the results"
    assert found["model"] == "smollm2"


def test_a_quick_run_is_small_and_can_be_changed(monkeypatch, tmp_path: Path) -> None:
    found = start(monkeypatch, tmp_path, "--quick")
    assert (found["n"], found["checkpoint"]) == (3, None)
    found = start(monkeypatch, tmp_path, "--quick", "--texts", "9", "--checkpoint", "kept")
    assert (found["n"], found["checkpoint"]) == (9, "kept")


def test_help_names_what_is_left_out_and_errors_the_value(monkeypatch, tmp_path, capsys) -> None:
    with pytest.raises(SystemExit):
        start(monkeypatch, tmp_path, "--help")
    said = capsys.readouterr().out
    assert "usage: python -m analyses.test_command_line" in said
    assert "default: 0.5,0.5" in said
    assert "None" not in said.replace("'checkpoint': None", "")
    assert "--sizes" not in said, "it cannot be written in one word"
    with pytest.raises(SystemExit):
        start(monkeypatch, tmp_path, "--shares", "half")
    assert "--shares: 'half' is not float and float, with commas" in capsys.readouterr().err
