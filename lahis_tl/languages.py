"""Language codes: BCP 47 as users write them, and the names that data sets have for them."""

import langcodes

from lahis_tl.errors import CorpusError

# FLORES+ names the individual language where BCP 47 has only the macrolanguage.
_FLORES_CODES = {
    "ar": "arb_Arab",
    "az": "azj_Latn",
    "et": "ekk_Latn",
    "fa": "pes_Arab",
    "lv": "lvs_Latn",
    "mn": "khk_Cyrl",
    "ms": "zsm_Latn",
    "ne": "npi_Deva",
    "no": "nob_Latn",
    "sq": "als_Latn",
    "sw": "swh_Latn",
    "uz": "uzn_Latn",
    "zh": "cmn_Hans",
    "zh-Hant": "cmn_Hant",
}


def check_language(code: str) -> str:
    """The code in its standard spelling (BCP 47): ``en``, ``pt-BR``, ``zh-Hant``.

    >>> check_language("pt_br")
    'pt-BR'

    Raises:
        CorpusError: there is no such language.
    """
    try:
        known = langcodes.tag_is_valid(code)
    except (ValueError, AttributeError):
        known = False
    if not known:
        raise CorpusError(
            f"unknown language code {code!r}; use BCP 47 codes such as en, fr, zh, hi, pt-BR"
        )
    # Not standardize_tag: that turns tl (Tagalog) into fil, which data sets do not know.
    return langcodes.Language.get(code, normalize=False).to_tag()


def flores_code(language: str) -> str:
    """
    >>> flores_code("fr"), flores_code("zh"), flores_code("ru")
    ('fra_Latn', 'cmn_Hans', 'rus_Cyrl')
    """
    if language in _FLORES_CODES:
        return _FLORES_CODES[language]
    full = langcodes.Language.get(language).maximize()
    return f"{full.to_alpha3()}_{full.script}"
