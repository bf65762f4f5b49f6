"""A card is enough to make its result again, to the bit."""

import copy
import json
import random
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import lahis_tl as lt
from lahis_tl import cli
from lahis_tl.artifacts import Artifact
from lahis_tl.corpora import restored
from lahis_tl.errors import ArtifactError, CorpusError


@pytest.fixture(scope="module")
def corpus() -> lt.Corpus:
    return lt.load_corpus("bundled", ["en", "fr"]).split(9, seed=5)[0].sample(4, seed=2)


def results(model: nn.Module, corpus: lt.Corpus) -> dict[str, Artifact]:
    grads = lt.head_gradients(
        model, corpus, max_tokens=24, curvature_draws=2, seed=3, progress=False
    )
    effects = lt.exact_effects(
        model, corpus, ["L0H1", "L2H0"], ablation="resample", max_tokens=16, seed=4, progress=False
    )
    return {
        "gradients": grads,
        "effects": effects,
        "scores": lt.score(grads, "taylor"),
        "curved": lt.score(grads, "second_order"),
    }


@pytest.mark.parametrize("name", ["gradients", "effects", "scores", "curved"])
def test_the_same_to_the_bit(
    speaker: nn.Module, corpus: lt.Corpus, tmp_path: Path, name: str
) -> None:
    old = results(speaker, corpus)[name]
    found = lt.rerun(old.save(tmp_path / name).with_suffix(".json"), progress=False)
    assert found.difference == 0.0
    assert found.changed == ()
    assert "to the bit; changed since: nothing" in str(found)
    for key, values in old._tensors().items():
        assert torch.equal(found.result._tensors()[key].nan_to_num(), values.nan_to_num())


def test_what_is_another_now_is_named(
    speaker: nn.Module, corpus: lt.Corpus, tmp_path: Path
) -> None:
    old = results(speaker, corpus)["gradients"]
    old.card["model"] = copy.deepcopy(old.card["model"])
    old.card["model"]["versions"]["torch"] = "1.0"
    old.card["model"]["machine"]["threads"] = 7
    old.gradients["en"][0, 0, 0] += 0.5
    found = lt.rerun(old.save(tmp_path / "old"), model=speaker, progress=False)
    assert found.difference == pytest.approx(0.5, rel=1e-4)
    assert {text.split()[0] for text in found.changed} == {"torch", "threads"}
    assert "differs by at most 0.5" in str(found)


def test_texts_of_a_file_are_found_again_by_their_fingerprints(
    speaker: nn.Module, tmp_path: Path
) -> None:
    bundled = lt.load_corpus("bundled", ["en"])
    file = tmp_path / "en.txt"
    file.write_text("\n".join(text.replace("\n", " ") for text in bundled["en"]))
    corpus = lt.load_corpus(file, ["en"], n=3, seed=1)
    path = lt.head_gradients(speaker, corpus, max_tokens=12, progress=False).save(tmp_path / "g")
    with pytest.raises((CorpusError, ArtifactError)):
        lt.rerun(path, progress=False)
    assert lt.rerun(path, corpus=file, progress=False).difference == 0.0
    done = CliRunner().invoke(cli.app, ["rerun", str(path), "--corpus", str(file), "--quiet"])
    assert done.exit_code == 0, done.output
    assert "the same to the bit" in done.output


def test_a_hub_data_set_is_read_again_as_it_was(
    speaker: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundled, asked = lt.load_corpus("bundled", ["en"])["en"], []

    def from_hub(name, languages, n, seed, *others):
        asked.append((name, n, seed, others))
        assert n is not None, "as Wikipedia, which is too large to be read whole"
        order = random.Random(seed).sample(bundled, n)
        return pd.DataFrame([{"language": "en", "text": text} for text in order]), None

    monkeypatch.setattr("lahis_tl.corpora.from_hub", from_hub)
    corpus = lt.load_corpus(
        "wikimedia/wikipedia", ["en"], n=9, seed=4, config="20231101.{language}", revision="abc"
    )
    scored, _ = corpus.split(3, seed=1)
    path = lt.head_gradients(speaker, scored, max_tokens=12, progress=False).save(tmp_path / "g")
    assert lt.rerun(path, progress=False).difference == 0.0
    assert asked[0] == asked[1]


def test_a_number_that_is_not_there_any_more_is_a_difference(
    speaker: nn.Module, corpus: lt.Corpus, tmp_path: Path
) -> None:
    old = results(speaker, corpus)["effects"]
    layer, head = old.heads[0]
    old.effects["en"][0, layer, head] = float("nan")
    assert lt.rerun(old.save(tmp_path / "old"), model=speaker, progress=False).difference == float(
        "inf"
    )


def test_what_cannot_be_run_again_says_why(
    speaker: nn.Module, corpus: lt.Corpus, tmp_path: Path, llama: nn.Module
) -> None:
    made = results(speaker, corpus)
    heads = lt.language_heads(made["scores"])
    with pytest.raises(ArtifactError, match="holds language_heads; gradients, exact effects"):
        lt.rerun(heads.save(tmp_path / "heads"))
    ids = lt.head_gradients(speaker, {"en": [[5, 6, 7]]}, progress=False).save(tmp_path / "ids")
    with pytest.raises(ArtifactError, match="came from token ids; give them as corpus="):
        lt.rerun(ids)
    saved = made["gradients"].save(tmp_path / "g")
    with pytest.raises(ArtifactError, match="about another model"):
        lt.rerun(saved, model=llama)
    with pytest.raises(CorpusError, match="4 of the 4 texts in 'en' are not in memory"):
        lt.rerun(saved, corpus=lt.load_corpus({"en": ["x" * 30], "fr": ["y" * 30]}), model=speaker)
    card = json.loads(saved.with_suffix(".json").read_text())
    assert restored(lt.load_corpus("bundled", ["en", "fr"]), card["corpus"]).texts == corpus.texts
    user = made["gradients"]
    user.card["model"] = {**user.card["model"], "loaded_by": "user"}
    with pytest.raises(ArtifactError, match="give it as model="):
        lt.rerun(user.save(tmp_path / "user"))


def test_every_seeded_function_gives_the_same_twice(
    speaker: nn.Module, corpus: lt.Corpus, tmp_path: Path
) -> None:
    def once(folder: Path) -> list[bytes]:
        torch.manual_seed(
            int.from_bytes(folder.name.encode(), "big")
        )  # the global one does not matter
        made: list = list(results(speaker, corpus).values())
        made.append(lt.score_certainty(made[0], "lahis", draws=50, seed=1))
        heads = lt.HeadSet(lt.grid_of(speaker), ["L0H1", "L2H3"])
        made.append(
            lt.tune_mask(speaker, [("A cat is", " an animal")], heads, epochs=2, progress=False)
        )
        tensors = [t for each in made for t in each._tensors().values()]
        text = lt.generate(speaker, "A cat", temperature=1.0, max_new_tokens=8, progress=False)
        sets = lt.matched_random_heads(heads, 3, seed=1)
        return [t.numpy().tobytes() for t in tensors] + [
            repr((text.texts, [s.labels for s in sets])).encode()
        ]

    assert once(tmp_path / "a") == once(tmp_path / "b")
