import errno
import json
import os
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import lahis_tl as lt
from lahis_tl.artifacts import write_atomically
from lahis_tl.scores import HeadScores


@pytest.fixture(scope="module")
def grads(tiny):
    ids = {"en": [[5, 6, 7, 8], [9, 10, 11]], "zh": [[12, 13]]}
    return lt.head_gradients(tiny("llama"), ids, progress=False)


def leftovers(folder):
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_gradients_scores_and_heads_come_back_as_they_were(grads, tmp_path):
    scores = lt.score(grads)
    heads = lt.language_heads(scores, quantile=0.7)
    for name, result in (("g", grads), ("s", scores), ("h", heads)):
        path = result.save(tmp_path / name)
        assert path == tmp_path / f"{name}.safetensors"
        again = lt.load(path)
        assert type(again) is type(result)
        assert repr(again) == repr(result)
        pd_equal = again.to_dataframe().equals(result.to_dataframe())
        assert pd_equal
    assert torch.equal(lt.load(tmp_path / "g")["en"], grads["en"])
    assert lt.load(tmp_path / "g").n_tokens["en"].tolist() == [3, 2]
    assert lt.load(tmp_path / "h").options == dict(heads.options)
    assert leftovers(tmp_path) == []


def test_the_card_is_a_birth_certificate(grads, tmp_path):
    lt.score(grads).save(tmp_path / "s")
    card = json.loads((tmp_path / "s.json").read_text())
    assert card["kind"] == "head_scores"
    assert card["model"]["architecture"] == "LlamaForCausalLM"
    assert card["model"]["weight_processing"] == "none"
    assert len(card["model"]["tokenizer_sha256"]) == 64
    assert card["settings"] == {"max_tokens": 512, "batch_tokens": 1024}
    assert {"transformer-lens", "torch"} <= set(card["model"]["versions"])
    assert lt.load(tmp_path / "s").card["model"] == card["model"]


def test_checkpoints_that_differ_in_their_queries_alone_are_told_apart(
    checkpoint, token_ids, tmp_path
):
    """Adapters often train queries and values only; what is kept of one model must not serve another."""
    first = checkpoint("llama")
    hf = AutoModelForCausalLM.from_pretrained(first)
    with torch.no_grad():
        hf.model.layers[1].self_attn.q_proj.weight.mul_(1.5)
    second = tmp_path / "other"
    shutil.copytree(first, second)
    hf.save_pretrained(second)
    ours, theirs = (lt.load_model(str(folder)) for folder in (first, second))
    grads = lt.head_gradients(ours, token_ids, checkpoint=tmp_path / "run", progress=False)
    with pytest.raises(lt.ArtifactError, match="checkpoint_sha256"):
        lt.load(grads.save(tmp_path / "grads"), model=theirs)
    with pytest.raises(lt.ArtifactError, match=r"model\.checkpoint_sha256 was"):
        lt.head_gradients(theirs, token_ids, checkpoint=tmp_path / "run", progress=False)
    again = lt.load_model(str(first), dtype="bfloat16")
    assert lt.card_of(again)["checkpoint_sha256"] == grads.card["model"]["checkpoint_sha256"]


def test_a_result_of_another_model_is_refused(grads, tiny, tmp_path):
    path = grads.save(tmp_path / "g")
    assert lt.load(path, model=tiny("llama")).languages == ["en", "zh"]
    with pytest.raises(lt.ArtifactError, match="about another model: its checkpoint_sha256 is"):
        lt.load(path, model=tiny("qwen2"))


def test_a_result_of_another_kind_is_refused(grads, tmp_path):
    path = grads.save(tmp_path / "g")
    with pytest.raises(lt.ArtifactError, match="holds head_gradients, not head_scores"):
        HeadScores.load(path)


@pytest.mark.parametrize("cut", [0, 7, 100, -1])
def test_a_torn_file_is_refused(grads, tmp_path, cut):
    path = grads.save(tmp_path / "g")
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(lt.ArtifactError, match="damaged"):
        lt.load(path)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**9), st.integers(0, 7))
def test_any_flipped_bit_is_noticed(tmp_path_factory, position, bit):
    folder = tmp_path_factory.mktemp("bits")
    scores = HeadScores(torch.rand(2, 3, 4), ("en", "fr"), "lahis")
    scores.save(folder / "kept")
    path = scores.save(folder / "s")
    content = bytearray(path.read_bytes())
    content[position % len(content)] ^= 1 << bit
    path.write_bytes(content)
    try:
        found = lt.load(path)
    except lt.ArtifactError:
        return
    assert torch.equal(found.values, scores.values)  # a flip that JSON or the header does not see
    assert (repr(found), found.card["content"]) == (
        repr(scores),
        lt.load(folder / "kept").card["content"],
    )


def test_foreign_files_are_refused_and_never_run(tmp_path):
    from safetensors.torch import save_file

    save_file({"w": torch.ones(2)}, tmp_path / "foreign.safetensors")
    with pytest.raises(lt.ArtifactError, match="was not written by lahis-tl"):
        lt.load(tmp_path / "foreign")

    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "exploded"),))

    (tmp_path / "bomb.safetensors").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(lt.ArtifactError, match="damaged or no safetensors file"):
        lt.load(tmp_path / "bomb")
    assert not (tmp_path / "exploded").exists()
    with pytest.raises(FileNotFoundError, match="there is no file"):
        lt.load(tmp_path / "absent")


def test_a_full_disk_leaves_the_old_file_and_nothing_else(grads, tmp_path, monkeypatch):
    path = grads.save(tmp_path / "g")
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        grads.save(tmp_path / "g")
    assert path.read_bytes() == before
    with pytest.raises(OSError, match="No space left"):
        grads.save(tmp_path / "new")
    assert not (tmp_path / "new.safetensors").exists()
    assert leftovers(tmp_path) == []


def test_an_interrupt_while_writing_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "x", b"content")
    assert list(tmp_path.iterdir()) == []


def test_load_needs_nothing_imported_before(grads, tmp_path):
    path = lt.score(grads).save(tmp_path / "s")
    code = f"import lahis_tl; print(lahis_tl.load({str(path)!r}).method)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "lahis"


def test_a_dot_in_a_name_is_part_of_it(grads, tmp_path):
    lahis, taylor = lt.score(grads, "lahis"), lt.score(grads, "taylor")
    assert lahis.save(tmp_path / "model-3.1").name == "model-3.1.safetensors"
    taylor.save(tmp_path / "model-3.2")
    assert lt.load(tmp_path / "model-3.1").method == "lahis"
    assert lt.load(tmp_path / "model-3.2.json").method == "taylor"


def test_file_and_card_are_replaced_together_or_not_at_all(grads, tmp_path, monkeypatch):
    path = lt.score(grads, "lahis").save(tmp_path / "s")
    real, calls = os.fsync, []

    def full_at_the_second(descriptor):
        calls.append(descriptor)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full_at_the_second)
    with pytest.raises(OSError, match="No space left"):
        lt.score(grads, "taylor").save(tmp_path / "s")
    assert lt.load(path).method == "lahis"
    assert json.loads((tmp_path / "s.json").read_text())["content"]["method"] == "lahis"
    assert leftovers(tmp_path) == []


def test_the_same_weights_are_the_same_model_by_any_name(tiny, checkpoint, tmp_path, token_ids):
    (tmp_path / "other-name").symlink_to(checkpoint("llama"))
    path = lt.head_gradients(tiny("llama"), token_ids, progress=False).save(tmp_path / "g")
    for dtype in ("float32", "bfloat16"):
        again = lt.load_model(str(tmp_path / "other-name"), dtype=dtype)
        assert lt.load(path, model=again).languages == ["en", "fr"]
    bridge = lt.load_model(str(checkpoint("llama")), backend="bridge")
    assert lt.card_of(bridge)["weights_sha256"] == lt.card_of(tiny("llama"))["weights_sha256"]


@pytest.fixture(scope="module")
def results(tiny):
    """One of every kind of result that experiments give."""
    model = tiny("llama")
    words = [
        "le",
        "chat",
        "the",
        "cat",
        "der",
        "hund",
        "dort",
        "here",
        "la",
        "maison",
        "house",
        "is",
        "in",
    ]
    texts = {
        code: [" ".join(words[i : i + 6]) for i in range(start, start + 5)]
        for code, start in (("fr", 2), ("en", 0))  # not in the order of the alphabet
    }
    corpus = lt.load_corpus(texts, min_chars=1)
    options = {"progress": False}
    gradients = lt.head_gradients(model, corpus, **options)
    heads = lt.HeadSet(lt.grid_of(model), ["L1H2", "L0H1"])
    sets = {"en": heads, "fr": lt.HeadSet(lt.grid_of(model), ["L2H0"])}
    return {
        "text_losses": lt.perplexity(model, corpus, **options),
        "ablation_effect": lt.ablation_effect(model, corpus, heads, draws=4, **options),
        "selectivity": lt.selectivity(model, sets, corpus, draws=3, **options),
        "sweep": lt.sweep_heads(model, corpus, heads, (1, 2), draws=3, **options),
        "head_overlap": lt.head_overlap(gradients, top_k=3, draws=20),
        "until_sure": lt.score_until(model, corpus, top_k=2, looks=[4, 5], **options),
    }


@pytest.mark.parametrize(
    "kind", ["text_losses", "ablation_effect", "selectivity", "sweep", "head_overlap", "until_sure"]
)
def test_results_of_experiments_come_back_as_they_were(results, tmp_path, kind):
    result = results[kind]
    again = lt.load(result.save(tmp_path / kind))
    assert type(again) is type(result)
    assert again.kind == kind
    assert repr(again) == repr(result)
    assert again.to_dataframe().equals(result.to_dataframe())
    assert again.card["model"] == json.loads(json.dumps(result.card["model"]))
    assert repr(lt.load(again.save(tmp_path / "again"))) == repr(result), "and once more"


def test_a_set_effect_keeps_its_random_sets(results, tmp_path):
    effect = results["ablation_effect"]
    again = lt.load(effect.save(tmp_path / "effect"))
    assert list(again.control_sets) == list(effect.control_sets)
    assert again.heads == effect.heads
    assert all(torch.equal(again.change[code], v) for code, v in effect.change.items())
