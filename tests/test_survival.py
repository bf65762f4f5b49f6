"""Long runs survive kills, full memory and company; damaged files never do more than raise our error."""

import multiprocessing
import os
import pickle
import random
import signal
import struct
import time
import zipfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import lahis_tl as lt
from lahis_tl import generation as generation_module
from lahis_tl import gradients as gradients_module
from lahis_tl import tuning as tuning_module
from lahis_tl.errors import ArtifactError, ModelError
from lahis_tl.records import load_records, save_records
from lahis_tl.shards import ShardStore

CORPUS = lt.load_corpus("bundled", ["en", "fr"], n=8)
OPTIONS = {"max_tokens": 24, "batch_tokens": 48, "progress": False}


def run_in_parts(model: str, folder: Path, ready: Connection) -> None:
    """A run in a process of its own, which says how long a whole one takes before it begins."""
    torch.set_num_threads(1)
    speaker = lt.load_model(model)
    lt.head_gradients(speaker, CORPUS, **OPTIONS)  # a first run takes longer than those that follow
    start = time.perf_counter()
    lt.head_gradients(speaker, CORPUS, **OPTIONS)
    ready.send(time.perf_counter() - start)
    lt.head_gradients(speaker, CORPUS, checkpoint=folder, **OPTIONS)


def test_killed_at_any_moment_a_run_goes_on_to_the_same_result(
    speaker: nn.Module, tmp_path: Path
) -> None:
    whole = lt.head_gradients(speaker, CORPUS, **OPTIONS)
    # Not forked from this process, whose threads (of torch, of browsers) would leave locked locks behind.
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(
        ["transformer_lens", "transformers.models.llama", "lahis_tl.gradients"]
    )
    moments = random.Random(0)
    begun, killed, ended = 0, 0, 0

    def same(folder: Path) -> bool:
        again = lt.head_gradients(speaker, CORPUS, checkpoint=folder, **OPTIONS)
        return all(torch.equal(again[code], whole[code]) for code in CORPUS.languages)

    for _ in range(20):
        folder = tmp_path / f"parts-{ended}"  # a run that came to its end is followed by a new one
        ready, tell = processes.Pipe(duplex=False)
        arguments = (lt.card_of(speaker)["name"], folder, tell)
        child = processes.Process(target=run_in_parts, args=arguments)
        child.start()
        assert ready.poll(60), "the run begins"
        time.sleep(moments.uniform(0, ready.recv()))
        child.kill()
        child.join(60)
        assert child.exitcode in (0, -signal.SIGKILL)
        begun = max(begun, len(list(folder.glob("part-*.safetensors"))))
        if child.exitcode == 0:
            assert same(folder)
            ended += 1
        else:
            killed += 1
    assert begun > 0, "some parts were finished between the kills"
    assert killed > 0, "some runs were killed before they had ended"
    assert same(tmp_path / f"parts-{ended}")


def test_a_part_torn_by_a_power_cut_is_made_again(speaker: nn.Module, tmp_path: Path) -> None:
    whole = lt.head_gradients(speaker, CORPUS, checkpoint=tmp_path / "parts", **OPTIONS)
    parts = sorted((tmp_path / "parts").glob("part-*.safetensors"))
    parts[0].write_bytes(parts[0].read_bytes()[:-7])
    content = bytearray(parts[1].read_bytes())
    content[-3] ^= 1
    parts[1].write_bytes(bytes(content))
    again = lt.head_gradients(speaker, CORPUS, checkpoint=tmp_path / "parts", **OPTIONS)
    for code in CORPUS.languages:
        assert torch.equal(again[code], whole[code])


def test_two_runs_in_one_folder_are_kept_apart(tmp_path: Path) -> None:
    def store() -> ShardStore:
        return ShardStore(tmp_path, {"a": 1}, [1, 2])

    with store(), pytest.raises(ArtifactError, match="another run is writing to"), store():
        pass
    with store():
        pass  # free again


def test_parts_of_another_run_are_never_taken(tmp_path: Path) -> None:
    with ShardStore(tmp_path, {"a": 1}, [1]) as store:
        store.write(0, {"x": torch.ones(2)})
        assert store.read(0) is not None
    with pytest.raises(ArtifactError, match="a was 1, now 2"), ShardStore(tmp_path, {"a": 2}, [1]):
        pass
    (tmp_path / "run.json").unlink()  # as on another machine's disk
    with ShardStore(tmp_path, {"a": 2}, [1]) as store:
        assert store.read(0) is None


def test_where_memory_runs_out_the_batch_is_halved(
    speaker: nn.Module, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = lt.head_gradients(speaker, CORPUS, max_tokens=24, progress=False)
    real, sizes = gradients_module.batch_gradients, []

    def small(model, batch):
        sizes.append(len(batch.keys))
        if len(batch.keys) > 3:
            raise torch.OutOfMemoryError("out of memory")
        return real(model, batch)

    monkeypatch.setattr(gradients_module, "batch_gradients", small)
    found = lt.head_gradients(speaker, CORPUS, max_tokens=24, progress=False)
    assert max(sizes) > 3
    assert "going on with" in caplog.text
    for code in CORPUS.languages:
        torch.testing.assert_close(found[code], whole[code], rtol=1e-4, atol=1e-7)

    def none(model, batch):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(gradients_module, "batch_gradients", none)
    with pytest.raises(ModelError, match=r"out of memory on text \d of '(en|fr)' alone, 24 tokens"):
        lt.head_gradients(speaker, CORPUS, max_tokens=24, progress=False)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("saved")
    scores = lt.HeadScores(torch.rand(2, 3, 4), ("en", "fr"), "lahis", "nats", "high", (3, 3))
    return scores.save(folder / "scores").read_bytes()


def refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(ArtifactError):
        lt.load(path)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_flipped_and_missing_bytes_are_noticed(
    saved: bytes, tmp_path: Path, data: st.DataObject
) -> None:
    content = bytearray(saved)
    if data.draw(st.booleans(), "cut"):
        content = content[: data.draw(st.integers(0, len(content) - 1), "length")]
    else:
        place = data.draw(st.integers(0, len(content) - 1), "place")
        content[place] ^= data.draw(st.integers(1, 255), "flip")
    path = tmp_path / "scores.safetensors"
    path.write_bytes(bytes(content))
    try:
        found = lt.load(path)
    except ArtifactError:
        return
    # Spaces that pad the header may change; nothing that counts.
    path.write_bytes(saved)
    assert torch.equal(found.values, lt.load(path).values)


class Trap:
    """Runs when it is unpickled."""

    def __reduce__(self) -> tuple:
        return (os.mkdir, ("sprung",))


def test_other_files_in_disguise_are_refused_and_never_run(
    saved: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "scores.safetensors"
    refused(path, pickle.dumps(Trap()))
    torch.save({"values": torch.ones(2)}, tmp_path / "model.pt")
    refused(path, (tmp_path / "model.pt").read_bytes())
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("../../scores", b"x")
    refused(path, (tmp_path / "a.zip").read_bytes())
    refused(path, b"")
    refused(path, struct.pack("<Q", 2**62) + b"{}")
    refused(path, struct.pack("<Q", 2**31) + saved[8:])
    huge = b'{"x":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}}'
    refused(path, struct.pack("<Q", len(huge)) + huge)
    assert not (tmp_path / "sprung").exists()


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(texts=st.lists(st.text(st.characters(), max_size=40), max_size=4))
def test_records_keep_any_text(tmp_path: Path, texts: list[str]) -> None:
    rows = [{"text": text.encode("utf-8", "replace").decode("utf-8")} for text in texts]
    path = save_records(tmp_path / "rows", rows, {"model": {"name": "m"}})
    assert load_records(path)[0] == rows


STRANGE = [
    "nul \0 inside, and more words to go on with",
    "lone surrogate \ud800 and its neighbours in a text",
    "\u202eright to left\u202c override and marks \u200f here",
    "👩‍👩‍👧‍👦 🇫🇷 emoji of several parts in a text",
    "a\u0301e\u0308 combining marks, and \ufeff a byte order mark",
    "x " * 500_000,
]


@pytest.mark.parametrize("place", range(len(STRANGE)))
def test_strange_texts_are_scored(speaker: nn.Module, place: int) -> None:
    corpus = lt.load_corpus({"en": [STRANGE[place], "an ordinary text"]}, min_chars=1)
    found = lt.head_gradients(speaker, corpus, max_tokens=32, progress=False)
    assert torch.isfinite(found["en"]).all()
    assert len(lt.token_effects(speaker, corpus, max_tokens=16).tokens["en"][0]) <= 16


def stopped_after(n: int, real: Callable[..., Any]) -> Callable[..., Any]:
    """``real``, interrupted when it is called once more than ``n`` times."""
    calls = [0]

    def limited(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] > n:
            raise KeyboardInterrupt
        return real(*args, **options)

    return limited


PAIRS = [("The capital of France is", " Paris"), ("A cat is", " an animal"), ("Two and two", " is")]


@pytest.mark.parametrize("epochs_done", [0, 1, 3])
def test_interrupted_tuning_goes_on_to_the_same_mask(
    speaker: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epochs_done: int
) -> None:
    heads = lt.HeadSet(lt.grid_of(speaker), ["L0H1", "L2H3"])
    options = {"epochs": 4, "batch_size": 1, "weight_decay": 0.1, "progress": False}
    options |= {"validation": PAIRS[:1], "learning_rate": 0.05, "seed": 3}
    whole = lt.tune_mask(speaker, PAIRS, heads, **options)
    with monkeypatch.context() as patch:
        limited = stopped_after(3 * epochs_done + 1, tuning_module._Run.backward)
        patch.setattr(tuning_module._Run, "backward", limited)
        with pytest.raises(KeyboardInterrupt):
            lt.tune_mask(speaker, PAIRS, heads, checkpoint=tmp_path / "parts", **options)
    assert len(list((tmp_path / "parts").glob("part-*"))) == epochs_done + 1
    again = lt.tune_mask(speaker, PAIRS, heads, checkpoint=tmp_path / "parts", **options)
    assert torch.equal(again.factors, whole.factors)
    assert again.history.equals(whole.history)
    assert again.card["settings"] == whole.card["settings"]
    with pytest.raises(ArtifactError, match=r"learning_rate was 0\.05, now 0\.1"):
        lt.tune_mask(
            speaker,
            PAIRS,
            heads,
            checkpoint=tmp_path / "parts",
            **{**options, "learning_rate": 0.1},
        )


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_interrupted_generation_goes_on_to_the_same_texts(
    speaker: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    prompts = ["The cat", "La maison", "The dog and the cat", "The cat"]
    mask = lt.HeadMask.scaling(["L0H1"], 0.5, grid=lt.grid_of(speaker))
    options = {"max_new_tokens": 6, "temperature": temperature, "batch_tokens": 24}
    whole = lt.generate(speaker, prompts, mask, **options, progress=False)
    options |= {"checkpoint": tmp_path / "parts", "progress": False}
    with monkeypatch.context() as patch:
        patch.setattr(generation_module, "Decoder", stopped_after(1, generation_module.Decoder))
        with pytest.raises(KeyboardInterrupt):
            lt.generate(speaker, prompts, mask, **options)
    begun = list((tmp_path / "parts").glob("part-*"))
    assert len(begun) == 1
    pieces: list[tuple[int, str]] = []
    again = lt.generate(
        speaker, prompts, mask, stream=lambda i, piece: pieces.append((i, piece)), **options
    )
    assert again.rows == whole.rows
    for i, row in enumerate(whole):
        assert "".join(piece for j, piece in pieces if j == i) == row.text
    other = lt.HeadMask.scaling(["L0H1"], 0.25, grid=lt.grid_of(speaker))
    with pytest.raises(ArtifactError, match=r"mask\.L0H1 was 0\.5, now 0\.25"):
        lt.generate(speaker, prompts, other, **options)


def test_steering_keeps_both_its_runs(speaker: nn.Module, tmp_path: Path) -> None:
    found = lt.steer(
        speaker, "The cat", ["L0H1"], checkpoint=tmp_path, max_new_tokens=4, progress=False
    )
    assert {path.parent.name for path in tmp_path.rglob("part-*")} == {"plain", "steered"}
    assert (
        found.plain.texts == lt.generate(speaker, "The cat", max_new_tokens=4, progress=False).texts
    )
