"""The testbed with a known answer: its languages, its model, and that the answer is true."""

import dataclasses

import pytest
import torch
from conftest import HOOKED_LINE, skip_unless_possible

import lahis_tl as lt
from analyses import train_planted
from lahis_tl.access import full_logits
from lahis_tl.planted import (
    LANGUAGES,
    N_INDICES,
    OWN_TYPE,
    TYPES,
    draw_indices,
    expected_index,
    planted_corpus,
    planted_folder,
    planted_truth,
    vocabulary,
    word_type,
)

BACKENDS = ["hooked", "bridge"]


@pytest.fixture(scope="module")
def load():
    def load(name, backend="auto"):
        skip_unless_possible(name, backend)
        return lt.load_model(name, backend=backend)

    return load


@pytest.fixture(scope="module")
def model(load):
    return load("planted")


@pytest.fixture(scope="module")
def fresh():
    """Texts on which the model was neither trained nor measured."""
    return planted_corpus(16, seed=1234)


def ids_of(model, texts):
    return torch.tensor(lt.tokenizer_of(model)(list(texts))["input_ids"])


@torch.no_grad()
def losses(model, ids):
    return lt.text_nll(model, ids, torch.ones_like(ids))


def zeroed(model, head):
    return lt.masked(model, lt.HeadMask.scaling([head], 0.0, lt.grid_of(model)))


def effects_on(model, corpus):
    """[language, layer, head], by the plain road: one ablation at a time."""
    grid = lt.grid_of(model)
    ids = ids_of(model, [text for code in corpus.languages for text in corpus[code]])
    plain = losses(model, ids)
    effects = torch.zeros(len(corpus.languages), *grid.shape)
    for head in (grid.head(index) for index in range(grid.size)):
        with zeroed(model, head):
            change = losses(model, ids) - plain
        effects[:, head.layer, head.head] = change.reshape(len(effects), -1).mean(1)
    return effects


def test_the_corpus_is_reproducible_and_the_door_gives_the_same():
    corpus = lt.load_corpus("planted", n=3, seed=5)
    assert corpus == planted_corpus(3, seed=5)
    assert corpus.texts["qad"] == planted_corpus(7, seed=5).texts["qad"][:3]
    assert corpus.texts != planted_corpus(3, seed=6).texts
    some = lt.load_corpus("planted", ["qac", "qaa"])
    assert repr(some) == "Corpus(qac: 64, qaa: 64, parallel)"
    assert some["qac"] == lt.load_corpus("planted")["qac"]


def test_parallel_texts_differ_in_the_words_of_the_own_rule_alone(fresh):
    assert fresh.parallel
    assert len(fresh.ids) == 16
    differs = dict.fromkeys(TYPES, 0)
    for ours, theirs in zip(fresh["qaa"], fresh["qae"], strict=True):
        for a, b in zip(ours.split(), theirs.split(), strict=True):
            assert (a[:4], b[:4], a[4]) == ("qaa.", "qae.", b[4])
            differs[a[4]] += a[5:] != b[5:]
    assert differs.pop(OWN_TYPE) > 50
    assert set(differs.values()) == {0}


def test_languages_have_no_word_in_common(fresh):
    words = [{word for text in fresh[code] for word in text.split()} for code in fresh.languages]
    assert sum(map(len, words)) == len(set.union(*words)) <= len(vocabulary())


@pytest.mark.parametrize("language", LANGUAGES)
def test_rules_hold_but_for_the_noise(language):
    kept = {kind: [] for kind in TYPES}
    for row in range(100):
        indices = draw_indices(language, f"rule/{row}", 48)
        for place, index in enumerate(indices):
            ruled = expected_index(language, indices[:place])
            if ruled is not None:
                kept[word_type(place)].append(index == ruled)
    assert not kept.pop("E")
    for kind, found in kept.items():  # 85 %, and by chance a ninth of the rest
        share = 0.85 + 0.15 / N_INDICES
        assert sum(found) / len(found) == pytest.approx(share, abs=0.04), kind


def test_wrong_requests_are_refused():
    with pytest.raises(lt.CorpusError, match="no texts in fr; it has qaa, qab, qac, qad, qae"):
        lt.load_corpus("planted", ["qaa", "fr"])
    with pytest.raises(lt.CorpusError, match=r"2 to 63 words .* n=4 of length=64"):
        planted_corpus(4, length=64)
    with pytest.raises(lt.CorpusError, match="n=0 of length=48"):
        lt.load_corpus("planted", n=0)


def test_every_word_is_one_token_after_the_first(model):
    tokenizer = lt.tokenizer_of(model)
    ids = tokenizer("qaa.A3 qaa.B1")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "qaa.A3", "qaa.B1"]
    all_ids = tokenizer(" ".join(vocabulary()))["input_ids"][1:]
    assert all_ids == list(range(2, 2 + len(vocabulary())))


def test_the_bundle_is_small():
    sizes = {path.name: path.stat().st_size for path in planted_folder().iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "truth.json"} <= set(sizes)
    assert sum(sizes.values()) < 3_000_000


@pytest.mark.parametrize("name", ["planted", "planted-random"])
def test_both_classes_compute_the_same(load, fresh, name):
    if not HOOKED_LINE:
        pytest.skip("transformer-lens 4 has one class")
    logits = []
    for backend in BACKENDS:
        model = load(name, backend)
        ids = ids_of(model, fresh["qab"])
        with torch.no_grad():
            logits.append(full_logits(model, ids, torch.ones_like(ids)))
    torch.testing.assert_close(*logits, atol=1e-3, rtol=1e-4)
    assert logits[0].std() > 0.5


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_truth_is_true_on_fresh_texts(load, fresh, backend):
    truth = planted_truth()
    assert truth.languages == LANGUAGES
    effects = effects_on(load("planted", backend), fresh)
    needed = truth.needed()
    assert effects[needed].min() >= 0.1  # nats a token
    assert effects[~needed].abs().max() <= 0.01
    torch.testing.assert_close(effects, truth.effects, atol=0.08, rtol=0)


def test_the_truth_names_each_head_once(model):
    truth = planted_truth()
    assert truth.grid == lt.grid_of(model)
    assert [len(truth.specific[code]) for code in truth.languages] == [1] * 5
    assert (len(truth.general), len(truth.silent)) == (3, 16)
    assert {head.layer for code in LANGUAGES for head in truth.specific[code]} == {0, 1, 2}
    assert {head.layer for head in truth.general} == {0, 1, 2}
    with pytest.raises(ValueError, match="do not make up the 3 layers × 8 heads"):
        dataclasses.replace(truth, silent=truth.general)
    with pytest.raises(ValueError, match=r"shape \(4, 3, 8\), not \(5, 3, 8\)"):
        dataclasses.replace(truth, effects=truth.effects[1:])


def test_the_random_model_is_always_the_same_and_leaves_the_generator_alone(load, model):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first = load("planted-random")
    assert torch.equal(torch.rand(3), expected)
    cards = [lt.card_of(m)["weights_sha256"] for m in (first, load("planted-random"), model)]
    assert cards[0] == cards[1] != cards[2]
    assert lt.grid_of(first) == lt.grid_of(model)


def test_the_random_model_cannot_tell_languages_apart_but_its_heads_matter(load, fresh):
    model = load("planted-random")
    texts = fresh["qaa"]
    ours, theirs = (
        ids_of(model, [text.replace("qaa", code) for text in texts]) for code in ("qaa", "qad")
    )
    plain = losses(model, ours).mean()
    torch.testing.assert_close(plain, losses(model, theirs).mean(), atol=1e-5, rtol=0)
    changes = []
    for label in ("L0H1", "L1H2", "L2H0"):
        with zeroed(model, label):
            changes.append(float(losses(model, ours).mean() - plain))
            assert float(losses(model, theirs).mean() - plain) == pytest.approx(
                changes[-1], abs=1e-5
            )
    assert min(map(abs, changes)) > 1e-3


def test_training_follows_the_rules_of_the_corpus():
    """What training tells a head to look at must be what the generator draws from."""
    sources, plan = train_planted.sources(), train_planted.planned()
    for row, language in enumerate(LANGUAGES):
        indices = draw_indices(language, "sources", 48)
        for place in range(1, 48):
            source = int(sources[row, place])
            changed = [*indices[:place]]
            if source < 0:
                assert expected_index(language, changed) is None
                continue
            changed[source - 1] = (changed[source - 1] + 1) % N_INDICES
            assert expected_index(language, changed) != expected_index(language, indices[:place])
            assert plan[row, place].sum() == 1
    assert torch.equal(plan.any(1), planted_truth().needed())


def test_a_few_steps_of_training_run_and_their_model_is_refused():
    trained = train_planted.train(0, train_planted.Schedule(steps=2, rows=1))
    again = train_planted.train(0, train_planted.Schedule(steps=2, rows=1))
    assert torch.equal(trained.lm_head.weight, again.lm_head.weight)
    with pytest.raises(ValueError, match=r"effects from 0.0000 nats .* others up to 0.0000"):
        train_planted.check(torch.zeros(5, 3, 8))
