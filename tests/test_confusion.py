"""Is text on target? By a fake identifier whose verdicts are known, and by the bundled one on clear texts."""

import pytest

from lahis_tl.confusion import judge_text, judge_texts, pass_rates, script_of
from lahis_tl.identify import language_identifier
from lahis_tl.quality import bert_scores, chrf


class Fake:
    """Says the language that a text names."""

    name = "fake"

    def __init__(self, confidence: float = 0.9):
        self.confidence = confidence

    def __call__(self, text: str) -> tuple[str, float]:
        for code in ("fr", "en", "zh", "hi"):
            if f"<{code}>" in text:
                return code, self.confidence
        return "und", 0.0


FR = "<fr> un deux trois quatre cinq six"
EN = "<en> one two three four five six"


@pytest.mark.parametrize(
    ("text", "language", "expected"),
    [
        (FR, "fr", True),
        (EN, "fr", False),
        (f"{FR}\n{FR}", "fr", True),
        (f"{FR}\n{EN}", "fr", False),
        (f"{FR}\n<en> ok", "fr", True),  # a line too short to tell is no evidence
        ("<fr> oui", "fr", False),  # but a whole text that short fails
        ("", "fr", False),
        ("123 456 789 10 11 12", "fr", False),
        ("one two three four five", "fr", False),  # unknown
        ("<zh> 今天天气很好我们去公园", "zh", True),
        ("<zh> 今天", "zh", False),
        (f"{FR}\n<zh> 今天天气很好我们去公园玩", "fr", False),  # off target though it is "one word"
    ],
)
def test_line_pass(text: str, language: str, expected: bool) -> None:
    assert judge_text(text, language, Fake())["line_pass"] is expected


def test_an_unsure_identifier_is_no_evidence_for_the_language() -> None:
    found = judge_text(FR, "fr", Fake(confidence=0.2))
    assert (found["identified"], found["line_pass"]) == ("und", False)


@pytest.mark.parametrize(
    ("text", "language", "expected"),
    [
        ("今天天气很好我们去公园玩", "zh", True),
        ("今天天气很好我们去 park 公园玩", "zh", False),
        (
            "今天 Alice 和 BBC 去了 the 公园玩吧",
            "zh",
            True,
        ),  # names, capitals and words of three letters pass
        ("आज मौसम बहुत अच्छा है और हम", "hi", True),
        ("आज weather बहुत अच्छा है और", "hi", False),
        ("bonjour tout le monde aujourd'hui", "fr", None),
        ("", "zh", False),
    ],
)
def test_word_pass(text: str, language: str, expected: bool | None) -> None:
    assert judge_text(text, language, Fake())["word_pass"] is expected


def test_repetition_and_copies() -> None:
    repeated = judge_text("<fr> " + "la la la " * 10, "fr", Fake())
    assert repeated["repetitive"]
    assert not repeated["passes"]
    assert repeated["line_pass"]
    varied = judge_text(FR, "fr", Fake())
    assert varied["distinct_3"] == 1.0
    # Units are words that have a letter: "<fr> un deux trois quatre cinq six" has five 3-grams, three in the prompt.
    copied = judge_text(FR, "fr", Fake(), prompt="un deux trois quatre cinq")
    assert copied["copy_rate"] == pytest.approx(3 / 5)
    chinese = judge_text("今天天气今天天气今天天气", "zh", Fake())
    assert chinese["distinct_3"] == pytest.approx(4 / 10)


def test_two_identifiers_agree_or_not() -> None:
    assert judge_text(FR, "fr", Fake(), second=Fake())["agree"] is True
    assert judge_text(FR, "fr", Fake(), second=Fake(0.1))["agree"] is False
    assert judge_text(FR, "fr", Fake())["agree"] is None


def test_rates_with_intervals() -> None:
    rows = [
        {"language": "zh", "text": text}
        for text in ("<zh> 今天天气很好我们去公园", "<zh> 今天天气很好我们去 weather 公园", EN, "")
    ]
    table = pass_rates(judge_texts(rows, Fake()))
    (row,) = table.to_dict("records")
    assert row["line_rate"] == 0.5
    assert row["line_rate_lower"] == pytest.approx(0.150, abs=1e-3)  # Wilson, 2 of 4
    assert row["line_rate_upper"] == pytest.approx(0.850, abs=1e-3)
    assert row["word_rate"] == 0.5, "of the two texts that pass line by line"
    assert row["confusion_rate"] == 0.5
    assert row["passes"] == 0.25
    assert (row["short"], row["empty"], row["unknown"], row["texts"]) == (0.25, 0.25, 0.25, 4)


def test_rates_of_a_latin_script_have_no_word_level() -> None:
    (row,) = pass_rates(judge_texts([{"language": "fr", "text": FR}], Fake())).to_dict("records")
    assert row["word_rate"] != row["word_rate"]
    assert row["confusion_rate"] == row["line_rate"] == 1.0


def test_the_bundled_identifier_on_real_text() -> None:
    identify = language_identifier()
    french = "Il fait beau aujourd'hui et nous allons nous promener au parc avec les enfants."
    assert judge_text(french, "fr", identify)["passes"]
    assert not judge_text(french, "es", identify)["passes"]
    mixed = f"{french}\nThe weather is nice today and we go for a walk."
    assert not judge_text(mixed, "fr", identify)["line_pass"]


def test_quality_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    import sacrebleu

    assert chrf("le chat dort", "le chat dort") == 100.0
    assert chrf("", "le chat dort") == 0.0
    expected = sacrebleu.sentence_chrf("le chat mange", ["le chat dort"]).score
    assert chrf("le chat mange", "le chat dort") == pytest.approx(expected, abs=1e-5)
    assert judge_text(FR, "fr", Fake(), reference=FR)["chrf"] == 100.0
    with pytest.raises(ValueError, match="pip install bert-score"):
        bert_scores(["a"], ["a"])


def test_bert_scores_take_a_multilingual_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    import types

    seen = {}

    def score(texts, references, **options):
        seen.update(options)
        return [0.0] * len(texts), [0.0] * len(texts), [0.75] * len(texts)

    monkeypatch.setitem(sys.modules, "bert_score", types.SimpleNamespace(score=score))
    assert bert_scores(["le chat", " "], ["le chat", "x"]) == [75.0, 0.0]
    assert seen["model_type"] == "bert-base-multilingual-cased"


def test_scripts() -> None:
    assert [script_of(c) for c in ("fr", "zh", "zh-Hant", "hi", "ja", "ru")] == [
        "Latn",
        "Hans",
        "Hant",
        "Deva",
        "Jpan",
        "Cyrl",
    ]
