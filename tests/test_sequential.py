from unittest.mock import patch

import pytest
import torch
from test_statistics import gradients_of, noise

import lahis_tl as lt
from lahis_tl import sequential
from lahis_tl.corpora import shared_texts
from lahis_tl.scores import score_method
from lahis_tl.sequential import StoppingRule, default_looks

CORPUS = lt.load_corpus({"en": [f"text number {i} of many" for i in range(60)]})


def run(values, **options):
    """score_until on given gradients instead of a model's."""

    def stand_in(model, token_ids, **_):
        rows = [int(ids[0]) for ids in token_ids["en"]]
        return gradients_of({"en": values[rows]})

    numbered = {"en": [[i, 0] for i in range(60)]}
    with (
        patch.object(sequential, "head_gradients", stand_in),
        patch.object(sequential, "tokenize", lambda *_: numbered),
        patch.object(sequential, "grid_of", lambda _: lt.HeadGrid(3, 4)),
    ):
        return lt.score_until(None, CORPUS, progress=False, **options)


def test_a_clear_set_stops_early_and_a_vague_one_does_not():
    clear = 0.3 * noise(60, 3, 4)
    clear[:, 0, :2] -= 5
    result = run(clear, top_k=2)
    assert result.n_texts["en"] == 10
    assert set(result.sets["en"].labels) == {"L0H0", "L0H1"}
    assert len(result.gradients["en"]) == 10
    vague = run(noise(60, 3, 4), top_k=2)
    assert vague.n_texts["en"] is None
    assert str(vague) == "en: not sure after all 60 texts"
    assert list(vague.looks.texts) == default_looks(60)


def test_half_widths_stop_it_too():
    values = noise(60, 3, 4) * 0.1 - 1
    wide = run(values, top_k=2, half_widths={"L1H1": 0.05})
    assert wide.n_texts["en"] not in (None, 10)
    last = wide.looks.iloc[-1]
    assert last.width <= 1 < wide.looks.iloc[-2].width
    with pytest.raises(IndexError, match="L9H9"):
        run(values, top_k=2, half_widths={"L9H9": 0.03})


def test_it_is_as_sure_as_it_says():
    """
    Populations in which the border of the top k is blurred, samples from them: where the rule says that half
    of the top 4 would stay, it must be so in at least 95 of 100 cases.
    """
    method, stops, wrong = score_method("taylor"), 0, 0
    looks = [10, 20, 40]
    rule = StoppingRule(4, 0.5, {}, 0.95, len(looks), draws=400)
    for seed in range(150):
        truth = noise(3, 4, seed=seed) * 0.4
        top = set(truth.flatten().topk(4).indices.tolist())
        texts = -truth + noise(40, 3, 4, seed=1000 + seed)
        for n in looks:
            part = gradients_of({"en": texts[:n]})
            if rule.look(part, "en", method)[2]:
                found = (-texts[:n].mean(0)).flatten().topk(4).indices.tolist()
                stops += 1
                wrong += len(top & set(found)) < 2
                break
    assert stops > 50, "a rule that never stops is right too easily"
    assert wrong / stops <= 0.05


def test_looks_are_paid_for():
    part = gradients_of({"en": 0.6 * noise(30, 3, 4) - torch.arange(12.0).reshape(3, 4) / 4})
    bounds = [
        StoppingRule(4, 0.8, {}, 0.95, n).look(part, "en", score_method("taylor"))[0]
        for n in (1, 50)
    ]
    assert bounds[0] > bounds[1]


def test_it_runs_on_a_model_and_resumes(llama, tmp_path):
    corpus = lt.load_corpus(
        {
            "en": [
                "the cat is in the house " + w
                for w in ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k", "l"]
            ]
        }
    )
    options = {"top_k": 3, "overlap": 1.0, "looks": [4, 8], "progress": False}
    first = lt.score_until(llama, corpus, checkpoint=tmp_path, **options)
    assert len(first.gradients["en"]) in (4, 8, 12)
    whole = lt.head_gradients(llama, corpus, progress=False)
    n = len(first.gradients["en"])
    torch.testing.assert_close(first.gradients["en"], whole["en"][:n], rtol=1e-4, atol=1e-7)
    assert lt.HeadGradients.load(first.gradients.save(tmp_path / "g")).n_texts == {"en": n}
    assert shared_texts(first.gradients.card, corpus) == {"en": n}, "the others were not scored"
    again = lt.score_until(llama, corpus, checkpoint=tmp_path, **options)
    assert torch.equal(again.gradients["en"], first.gradients["en"])


def test_bad_settings():
    with pytest.raises(ValueError, match="the first look at 'en' would be after 2 texts"):
        run(noise(60, 3, 4), looks=[2, 80])
    with pytest.raises(ValueError, match="top_k=13 must lie between 1 and 12"):
        run(noise(60, 3, 4), top_k=13)
    with pytest.raises(ValueError, match=r"the half-width of L0H1 must be above 0, not 0\.0"):
        run(noise(60, 3, 4), top_k=2, half_widths={"L0H1": 0.0})
    with pytest.raises(ValueError, match="'second_order' needs curvature_draws=2 or more"):
        run(noise(60, 3, 4), top_k=2, method="second_order")
    with pytest.raises(ValueError, match=r"overlap=0.0"):
        run(noise(60, 3, 4), overlap=0.0)
    with pytest.raises(ValueError, match=r"level=1.5"):
        run(noise(60, 3, 4), certainty=1.5)


def test_languages_with_fewer_texts_have_looks_of_their_own(llama):
    words = ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k", "l"]
    texts = ["the cat is in the house " + w for w in words]
    corpus = lt.load_corpus({"en": texts, "fr": texts[:5]})
    result = lt.score_until(llama, corpus, top_k=6, overlap=1.0, looks=[4], progress=False)
    by_language = result.looks.groupby("language")["texts"].apply(list).to_dict()
    assert by_language["en"] in ([4], [4, 12])
    assert by_language["fr"] in ([4], [4, 5])
    assert result.gradients.n_texts["en"] == by_language["en"][-1]
