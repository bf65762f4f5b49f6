import pytest
import torch

import lahis_tl as lt

# The tiny tokenizer splits at white space first, so that a token straddles only within a word.
TEXTS = [
    [("the cat ", "en"), ("dort ici ", "fr"), ("in the house", "en")],
    [("la maison ", "fr"), ("is here", "en")],
    [("le chat est ici", "fr"), (" house ", None), ("the cat is", "en")],
]


def plain_nll(model, pieces):
    """Loss of each token but the first, by one pass on the text alone."""
    ids = torch.tensor([lt.label_tokens(model, pieces).ids])
    with torch.no_grad():
        return lt.token_nll(model, ids, torch.ones_like(ids))[0]


def test_labels_follow_the_pieces(llama):
    labelled = lt.label_tokens(llama, TEXTS[2])
    tokenizer = lt.tokenizer_of(llama)
    words = tokenizer.convert_ids_to_tokens(labelled.ids)
    assert labelled.ids == tokenizer("le chat est ici house the cat is")["input_ids"]
    by_label = {
        code: "".join(w for w, c in zip(words, labelled.languages, strict=True) if c == code)
        for code in ("fr", None, "en")
    }
    assert by_label == {"fr": "lechatestici", None: "house", "en": "thecatis"}
    assert labelled.straddling == 0


def test_a_token_of_two_languages_is_dropped_and_counted(llama):
    tokenizer = lt.tokenizer_of(llama)
    whole = tokenizer("maison")["input_ids"]
    assert len(whole) == 1, "the test needs a word of one token"
    labelled = lt.label_tokens(llama, [("the mai", "en"), ("son est ici", "fr")])
    place = labelled.ids.index(whole[0])
    assert labelled.languages[place] is None
    assert labelled.straddling == 1
    found = lt.switched_perplexity(llama, [[("the mai", "en"), ("son est ici", "fr")]] * 2)
    assert found.card["corpus"]["straddling_tokens_dropped"] == 2


def test_losses_are_those_of_the_labelled_tokens(llama):
    found = lt.switched_perplexity(llama, TEXTS, batch_tokens=20)
    for code in ("en", "fr"):
        for i, pieces in enumerate(TEXTS):
            labels = lt.label_tokens(llama, pieces).languages[1:]
            counted = torch.tensor([label == code for label in labels])
            expected = plain_nll(llama, pieces)[counted].mean()
            assert float(found.nll[code][i]) == pytest.approx(float(expected), rel=1e-6)
            assert int(found.n_tokens[code][i]) == int(counted.sum())


def test_a_mask_acts_on_them(llama):
    head = lt.HeadSet(lt.grid_of(llama), ["L0H1"])
    plain = lt.switched_perplexity(llama, TEXTS)
    without = lt.switched_perplexity(llama, TEXTS, lt.HeadMask.scaling(head, 0.0))
    assert not torch.allclose(plain.nll["fr"], without.nll["fr"])


def test_gradients_are_the_finite_differences_of_those_losses(llama):
    grads = lt.switched_gradients(llama, TEXTS, batch_tokens=20, progress=False)
    assert grads.card["corpus"]["parallel"]
    step = 1e-2  # norms and softmax are float32 in some models, whatever the weights: shorter ones drown in that
    for head in ("L0H1", "L2H3"):
        ends = []
        for sign in (1, -1):
            heads = lt.HeadSet(lt.grid_of(llama), [head])
            mask = lt.HeadMask.scaling(heads, 1 + sign * step)
            with lt.masked(llama, mask):
                ends.append([plain_nll(llama, pieces).double() for pieces in TEXTS])
        for code in ("en", "fr"):
            for i, pieces in enumerate(TEXTS):
                labels = lt.label_tokens(llama, pieces).languages[1:]
                counted = torch.tensor([label == code for label in labels])
                slope = float((ends[0][i] - ends[1][i])[counted].mean()) / (2 * step)
                found = float(grads[code][i][lt.Head.parse(head)])
                assert found == pytest.approx(slope, rel=3e-3, abs=3e-5)


def test_texts_without_a_language_do_not_count_for_it(llama):
    texts = [*TEXTS, [("the cat is here", "en")]]
    grads = lt.switched_gradients(llama, texts, progress=False)
    assert grads.n_texts == {"en": 4, "fr": 3}
    assert not grads.card["corpus"]["parallel"]


def test_bad_input(llama):
    with pytest.raises(lt.CorpusError, match="unknown language code 'english'"):
        lt.label_tokens(llama, [("the cat", "english")])
    with pytest.raises(lt.CorpusError, match="no code-switched texts"):
        lt.switched_perplexity(llama, [])
    with pytest.raises(lt.CorpusError, match="no token of the texts belongs to a language"):
        lt.switched_perplexity(llama, [[("the cat is", None)]])
    with pytest.raises(lt.CorpusError, match="has 0 token"):
        lt.label_tokens(llama, [("", "en")])
