"""The corpus that comes with the package: parallel, of the promised size, in the right languages."""

import unicodedata

import py3langid
import pytest

import lahis_tl as lt

LANGUAGES = ["en", "fr", "de", "es", "it", "pt", "ru", "zh", "hi", "vi"]
SCRIPTS = {"ru": "CYRILLIC", "zh": "CJK", "hi": "DEVANAGARI"}
# SentencePiece-like counts do not fit Chinese: characters there, words elsewhere.
BOUNDS = {"zh": (70, 160)}


@pytest.fixture(scope="module")
def corpus():
    return lt.load_corpus("bundled")


def test_ten_parallel_languages(corpus):
    assert set(corpus.languages) == set(LANGUAGES)
    assert corpus.parallel
    assert len(corpus.ids) == len(set(corpus.ids)) == 80
    assert sum(corpus.dropped.values()) == 0


@pytest.mark.parametrize("language", LANGUAGES)
def test_lengths(corpus, language):
    low, high = BOUNDS.get(language, (40, 90))
    for key, text in zip(corpus.ids, corpus[language], strict=True):
        length = len(text) if language == "zh" else len(text.split())
        assert low <= length <= high, (key, length)
        assert "\n" not in text


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_paragraph_is_in_its_script(corpus, language):
    script = SCRIPTS.get(language, "LATIN")
    for key, text in zip(corpus.ids, corpus[language], strict=True):
        letters = [c for c in text if c.isalpha()]
        share = sum(unicodedata.name(c, "").startswith(script) for c in letters) / len(letters)
        assert share > 0.98, (key, share)


@pytest.mark.parametrize("language", LANGUAGES)
def test_an_identifier_names_the_language(corpus, language):
    py3langid.set_languages(None)
    found = [py3langid.classify(text)[0] for text in corpus[language]]
    wrong = {key: code for key, code in zip(corpus.ids, found, strict=True) if code != language}
    assert not wrong


def test_no_paragraph_stands_in_two_languages(corpus):
    texts = [text for language in corpus.languages for text in corpus[language]]
    assert len(set(texts)) == len(texts)
