"""Several processes end with what one has alone."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lahis_tl as lt
from lahis_tl import processes

WORKER = """
import json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import lahis_tl as lt
from lahis_tl.processes import join, rank_and_size

join()
folder, model = Path(sys.argv[1]), lt.load_model(sys.argv[2])
corpus = lt.load_corpus("bundled", ["en", "fr"], n=5)
options = {"max_tokens": 20, "progress": False}
off = lt.HeadMask.scaling(["L1H2"], 0.0, lt.grid_of(model))
pairs = [("a b", " c"), ("d e f", " g"), ("le chat", " dort"), ("the", " cat"), ("un", " deux")]
lt.head_gradients(model, corpus, batch_tokens=64, checkpoint=folder / "parts", **options).save(folder / "gradients")
lt.exact_effects(model, corpus, ["L0H1", "L2H3"], batch_tokens=64, **options).save(folder / "effects")
lt.perplexity(model, corpus, off, batch_tokens=64, **options).save(folder / "losses")
lt.generate(model, [t[:30] for t in corpus["fr"]], off, max_new_tokens=5, batch_tokens=48, temperature=1.0,
            progress=False).save(folder / "texts")
heads = lt.HeadSet(lt.grid_of(model), ["L0H1", "L1H2", "L2H0"])
lt.tune_mask(model, pairs, heads, epochs=2, batch_size=4, progress=False).save(folder / "mask")
parts = len(list((folder / "parts").glob("part-*.safetensors")))

# An error in one process reaches all, and they go on together.
import lahis_tl.gradients as module
real, rank = module.batch_gradients, rank_and_size()[0]

def failing(model, batch):
    if rank == rank_and_size()[1] - 1:
        raise lt.ModelError("only here")
    return real(model, batch)

module.batch_gradients = failing
said = ""
try:
    lt.head_gradients(model, corpus, batch_tokens=64, **options)
except lt.ModelError as error:
    said = str(error)
(folder / f"rank{rank_and_size()[0]}.json").write_text(json.dumps(
    {"size": rank_and_size()[1], "parts": parts, "said": said}))
"""


def run(folder: Path, model: str, size: int) -> dict[str, Any]:
    """The worker's results from so many processes."""
    folder.mkdir()
    script = folder / "worker.py"
    script.write_text(WORKER)
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={size}"]
    command = [sys.executable, *(launch if size > 1 else []), str(script), str(folder), model]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = sorted(folder.glob("rank*.json"))
    told = [json.loads(path.read_text()) for path in ranks]
    assert [each["size"] for each in told] == [size] * size
    assert [each["said"] for each in told] == ["only here"] * size
    found = {name: lt.load(folder / name) for name in ("gradients", "effects", "losses", "mask")}
    found["parts"] = told[0]["parts"]
    return {**found, "texts": lt.Generations.load(folder / "texts")}


@pytest.mark.slow
def test_two_and_three_processes_have_what_one_has(speaker: nn.Module, tmp_path: Path) -> None:
    name = lt.card_of(speaker)["name"]
    alone = run(tmp_path / "one", name, 1)
    for size in (2, 3):
        together = run(tmp_path / str(size), name, size)
        for part in ("gradients", "effects"):
            for code, values in alone[part].parts[part].items():
                found = together[part].parts[part][code]
                assert torch.equal(found.nan_to_num(), values.nan_to_num()), part
        assert together["parts"] == alone["parts"] > size, "every process wrote its parts"
        for code, values in alone["losses"].nll.items():
            assert torch.equal(together["losses"].nll[code], values)
        assert together["texts"].texts == alone["texts"].texts
        torch.testing.assert_close(
            together["mask"].factors, alone["mask"].factors, rtol=1e-5, atol=1e-6
        )


@pytest.mark.slow
def test_the_command_line_shares_its_texts_out(speaker: nn.Module, tmp_path: Path) -> None:
    name = lt.card_of(speaker)["name"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    given = f"-m lahis_tl score {name} -l en,fr -n 6 --max-tokens 20 --batch-tokens 64".split()
    command = [*launch, *given, "-o", str(tmp_path / "run")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Gradients:") == 1, "one process alone talks"
    corpus = lt.load_corpus("bundled", ["en", "fr"], n=6)
    alone = lt.head_gradients(speaker, corpus, max_tokens=20, batch_tokens=64, progress=False)
    found = lt.load(tmp_path / "run" / "gradients", speaker)
    for code in alone.languages:
        torch.testing.assert_close(found[code], alone[code], rtol=1e-5, atol=1e-8)
    assert not (tmp_path / "run" / "parts").exists()


OFF_TARGET = """
import sys
from analyses import generating, off_target
from lahis_tl.processes import join
join()
judged = generating.competence

def all_write(*arguments, **options):
    found = judged(*arguments, **options)
    found.table["writes"] = True
    return found

generating.competence = all_write
result = off_target.run(
    sys.argv[2], ("en", "fr"), n=4, prompts=1, draws=1, max_tokens=16, max_new_tokens=4, fraction=0.25,
    checkpoint=sys.argv[1] + "/parts", progress=False,
)
result.save(sys.argv[1])
"""


@pytest.mark.slow
def test_an_experiment_is_shared_out(speaker: nn.Module, tmp_path: Path) -> None:
    rows = {}
    for size in (1, 2):
        folder = tmp_path / str(size)
        folder.mkdir()
        script = folder / "script.py"
        script.write_text(OFF_TARGET)
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={size}"]
        command = [sys.executable, *(launch if size > 1 else []), str(script), str(folder)]
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(Path(__file__).parent.parent),
        }
        for _ in range(2):  # the second time all is there already
            done = subprocess.run(
                [*command, lt.card_of(speaker)["name"]],
                env=environment, capture_output=True, text=True, timeout=300,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr[-3000:]
            rows.setdefault(size, []).append((folder / "generations.jsonl").read_text())
    assert rows[1] == rows[2]
    assert rows[1][0] == rows[1][1]
    assert len(rows[1][0].splitlines()) > 20


class Group:
    """Stands in for a group of processes: this one is ``rank``; the others answer with ``theirs``.

    Asked how many items it has, each of the others says what this one says.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, rank: int, theirs: list[Any]):
        self.rank, self.theirs, self.told = rank, theirs, []
        monkeypatch.setattr(processes, "rank_and_size", lambda: (rank, len(theirs) + 1))
        monkeypatch.setattr(processes.distributed, "all_gather_object", self.gather)

    def gather(self, into: list[Any], own: Any) -> None:
        own = pickle.loads(pickle.dumps(own))
        self.told.append(own)
        theirs = self.theirs
        if isinstance(own, int) and all(isinstance(answer, list) for answer in theirs):
            theirs = [own] * len(theirs)
        into[:] = [*theirs[: self.rank], own, *theirs[self.rank :]]


def test_items_are_dealt_out_and_come_back_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    group = Group(monkeypatch, 1, [["x"], ["y"]])
    done = []

    def work(number: int, item: str) -> list[str]:
        done.append((number, item))
        return [item]

    found = list(processes.shared_out(list("abcde"), work))
    assert done == [(1, "b"), (4, "e")]
    assert group.told == [5, ["b"], ["e"]]
    assert found == ["x", "b", "y", "x", "e", "y"]
    assert list(processes.share_of(list("abcde"))) == ["b", "e"]


def test_an_error_in_one_process_stops_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(number: int, item: str) -> list[str]:
        raise ValueError("bad text")

    group = Group(monkeypatch, 0, ["y"])
    with pytest.raises(ValueError, match="bad text"):
        processes.exchange(lambda: fail(0, "a"))
    assert isinstance(group.told[0], ValueError), "the others were told"
    Group(monkeypatch, 0, [ValueError("theirs")])
    with pytest.raises(ValueError, match="theirs"):
        processes.exchange(lambda: 1)

    class Local(Exception):
        """Cannot be pickled: it is defined in a function."""

    def stop() -> None:
        raise Local("why")

    group = Group(monkeypatch, 0, ["y"])
    with pytest.raises(Local):
        processes.exchange(stop)
    assert str(group.told[0]) == "Local: why"


def test_nothing_is_shared_before_join(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(processes.distributed, "get_world_size", lambda: 2)
    assert processes.rank_and_size() == (0, 1)


def test_processes_with_other_texts_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    Group(monkeypatch, 0, [3])
    with pytest.raises(RuntimeError, match="were given different texts"):
        list(processes.shared_out(["a", "b"], lambda number, item: [item]))


def test_only_the_main_process_writes_results(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    scores = lt.HeadScores(torch.rand(1, 2, 2), ("en",), "lahis")
    Group(monkeypatch, 1, [[]])
    monkeypatch.setattr("lahis_tl.artifacts.is_main", lambda: False)
    scores.save(tmp_path / "scores")
    assert not list(tmp_path.iterdir())
