"""Full and read-only disks, other locales and time zones, secrets: nothing is lost, changed or given away."""

import errno
import logging
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

import lahis_tl as lt
from lahis_tl.errors import LahisError
from lahis_tl.records import load_records, save_records


def scores(seed: int = 0) -> lt.HeadScores:
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(2, 40, 40, generator=generator)
    return lt.HeadScores(values, ("en", "fr"), "lahis", "nats per token")


@contextmanager
def small_disk(size: int) -> Iterator[None]:
    """The operating system takes no file longer than ``size`` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_where_the_disk_is_full_the_old_result_stays(tmp_path: Path) -> None:
    path = scores(0).save(tmp_path / "scores")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with small_disk(4000), pytest.raises(OSError, match="large"):
        scores(1).save(path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    save_records(tmp_path / "rows", [{"text": "old"}], {})
    with small_disk(4000), pytest.raises(OSError, match="large"):
        save_records(tmp_path / "rows", [{"text": "new" * 4000}], {})
    assert load_records(tmp_path / "rows")[0] == [{"text": "old"}]


def test_a_run_whose_disk_fills_up_goes_on_when_there_is_room(
    speaker: nn.Module, tmp_path: Path
) -> None:
    corpus = lt.load_corpus("bundled", ["en"], n=6)
    options = {"max_tokens": 12, "batch_tokens": 24, "progress": False}
    whole = lt.head_gradients(speaker, corpus, **options)
    parts = tmp_path / "parts"
    with small_disk(100), pytest.raises(OSError, match="large"):
        lt.head_gradients(speaker, corpus, checkpoint=parts, **options)
    assert not list(parts.glob("part-*")), "nothing half-written"
    again = lt.head_gradients(speaker, corpus, checkpoint=parts, **options)
    assert torch.equal(again["en"], whole["en"])


def test_a_finished_run_can_be_read_where_nothing_can_be_written(
    speaker: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = lt.load_corpus("bundled", ["en"], n=2)
    options = {"max_tokens": 12, "progress": False, "checkpoint": tmp_path / "parts"}
    whole = lt.head_gradients(speaker, corpus, **options)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(
        tempfile, "mkstemp", refuse
    )  # root may write anywhere, so permissions do not serve
    again = lt.head_gradients(speaker, corpus, **options)
    assert torch.equal(again["en"], whole["en"])
    with pytest.raises(PermissionError, match="Read-only"):
        again.save(tmp_path / "gradients")


SCRIPT = """
import sys
import lahis_tl as lt
from lahis_tl.records import save_records
model = lt.load_model("planted")
corpus = lt.load_corpus("planted", n=4)
scores = lt.score(lt.head_gradients(model, corpus, max_tokens=16, progress=False))
scores.save(sys.argv[1] + "/scores")
heads = lt.language_heads(scores, "contrastive", fraction=0.1)
lt.plots.write(lt.plots.heatmap(scores), sys.argv[1] + "/map.html")
texts = lt.generate(model, corpus[corpus.languages[0]][:2], max_new_tokens=4, progress=False)
save_records(sys.argv[1] + "/rows", [{"text": "é 中 \\u202e", "t": t} for t in texts.texts], {"ж": 1})
from lahis_tl.cli import app
app(["steer", "planted", "L0H1,L1H2", corpus[corpus.languages[0]][0], "--max-new-tokens", "3"], standalone_mode=False)
app(["heads", sys.argv[1] + "/scores.safetensors"], standalone_mode=False)
"""


def test_locale_and_time_zone_do_not_matter(tmp_path: Path) -> None:
    found = []
    for name, settings in {
        "here": {"LC_ALL": "C.UTF-8", "TZ": "UTC"},
        "there": {"LC_ALL": "C", "TZ": "Pacific/Kiritimati"}
        | {"PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
    }.items():
        folder = tmp_path / name
        folder.mkdir()
        environment = os.environ | settings | {"OMP_NUM_THREADS": "1"}
        script = tmp_path / "script.py"
        script.write_text(SCRIPT, encoding="utf-8")
        command = [sys.executable, str(script), str(folder)]
        done = subprocess.run(command, env=environment, capture_output=True, timeout=300)
        assert done.returncode == 0, done.stderr.decode(errors="replace")[-2000:]
        table = lt.load(folder / "scores")
        found.append((table.values, table.card["saved"], (folder / "rows.jsonl").read_bytes()))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][2] == found[1][2]
    assert all(saved.endswith("+00:00") for _, saved, _ in found), "times are in UTC"


def test_tokens_are_never_given_away(
    speaker: nn.Module,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    secret = "hf_" + "S3cr3t" * 5
    monkeypatch.setenv("HF_TOKEN", secret)
    caplog.set_level(logging.DEBUG)
    said = []
    for name in ("nobody/no-such-model", f"nobody/no-such-model-{os.getpid()}"):
        with pytest.raises(LahisError) as error:
            lt.load_model(name)
        said.append(str(error.value))
        assert "HF_HUB_OFFLINE" in said[-1]
        assert name in said[-1], "what is missing is named"
    with pytest.raises(LahisError) as error:
        lt.load_corpus("nobody/no-such-texts", ["en"], n=2)
    said.append(str(error.value))
    assert "nobody/no-such-texts" in said[-1]
    corpus = lt.load_corpus("bundled", ["en"], n=2)
    lt.head_gradients(speaker, corpus, max_tokens=8, checkpoint=tmp_path / "parts").save(
        tmp_path / "gradients"
    )
    lt.generate(speaker, "A cat", max_new_tokens=2).save(tmp_path / "texts")
    said += [file.read_bytes().decode(errors="replace") for file in tmp_path.rglob("*.*")]
    said += [caplog.text, *capfd.readouterr()]
    assert len(said) > 6
    assert not any(secret in text for text in said)
