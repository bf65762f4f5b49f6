"""The command line, called as a user calls it."""

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import lahis_tl as lt
from lahis_tl import cli

runner = CliRunner()


def run(*arguments):
    return runner.invoke(
        cli.app, [str(a) for a in arguments], env={"COLUMNS": "200", "TERM": "dumb"}
    )


@pytest.fixture(scope="module")
def scored(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    texts = folder / "texts"
    texts.mkdir()
    for code, text in {
        "en": "the cat is here in the house",
        "fr": "le chat dort la maison est la",
    }.items():
        (texts / f"{code}.txt").write_text("\n".join(f"{text} {'x' * i}" for i in range(5)))
    result = run("score", checkpoint("llama"), "--corpus", texts, "--out", folder, "--quiet")
    assert result.exit_code == 0, result.output
    return folder


def test_help_teaches_and_names_the_registries():
    for command, words in {
        "": ["demo", "score", "heads", "plot"],
        "score": ["lahis, lahis_code, sensitivity, taylor", "Example", "bundled"],
        "heads": ["authors, contrastive", "quantile"],
        "plot": ["heatmap, difference, counts, layers, overlap"],
        "demo": ["SmolLM2"],
    }.items():
        result = run(*command.split(), "--help")
        assert result.exit_code == 0
        for word in words:
            assert word in result.output, (command, word)


def test_score_writes_gradients_scores_and_cards(scored):
    assert lt.load(scored / "scores").method == "lahis"
    assert lt.load(scored / "gradients").languages == ["en", "fr"]
    assert (scored / "scores.json").is_file()


def test_heads_and_plots(scored):
    chosen = run("heads", scored / "scores.safetensors", "--quantile", "0.8")
    assert chosen.exit_code == 0, chosen.output
    assert "general" in chosen.output
    heads = lt.load(scored / "heads")
    assert heads.options["quantile"] == 0.8
    for arguments in (
        ("plot", scored / "scores.safetensors"),
        (
            "plot",
            scored / "gradients.safetensors",
            "--kind",
            "difference",
            "-l",
            "fr",
            "--minus",
            "en",
            "--method",
            "taylor",
        ),
        ("plot", scored / "heads.safetensors", "--kind", "counts"),
        ("plot", scored / "scores.safetensors", "--kind", "overlap", "-o", scored / "o.html"),
    ):
        result = run(*arguments)
        assert result.exit_code == 0, result.output
        assert Path(result.output.strip().replace("\n", "")).stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["score"], 2, "Missing argument"),
        (["score", "x", "--method", "nonsense"], 2, "is not one of lahis"),
        (["heads", "S", "--rule", "contrastive", "--quantile", "0.9"], 2, "has no option quantile"),
        (["heads", "H"], 2, "scores or gradients are needed"),
        (["plot", "S", "--kind", "difference"], 2, "needs --language and --minus"),
        (["plot", "H", "--kind", "heatmap"], 2, "needs scores"),
        (["plot", "S", "--kind", "pie"], 2, "is not one of heatmap"),
        (["heads", "S", "--method", "taylor"], 2, "holds lahis already; --method taylor needs"),
        (["plot", "S", "--kind", "counts", "-l", "fr"], 2, "counts is of all languages"),
    ],
)
def test_wrong_usage(scored, arguments, code, message):
    run("heads", scored / "scores.safetensors", "--quantile", "0.8")
    files = {"S": scored / "scores.safetensors", "H": scored / "heads.safetensors"}
    result = run(*(files.get(a, a) for a in arguments))
    assert result.exit_code == code
    assert message in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["score", "no/such-model"], "error: cannot load 'no/such-model'"),
        (["score", "smollm2", "-l", "en,xx"], "error: unknown language code 'xx'"),
        (["plot", "nowhere.safetensors"], "error: there is no file"),
    ],
)
def test_bad_input_is_one_line_and_status_1(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lahis-tl", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_ctrl_c_has_its_own_status(monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("lahis_tl.corpora.load_corpus", interrupted)
    monkeypatch.setattr(sys, "argv", ["lahis-tl", "score", "smollm2"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 130


def test_parts_are_gone_once_the_gradients_are_whole(scored):
    assert not (scored / "parts").exists()


def test_the_installed_command_knows_its_version():
    done = subprocess.run(
        [sys.executable, "-m", "lahis_tl.cli", "--version"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == f"lahis-tl {lt.__version__}"
