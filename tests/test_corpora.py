import json
import sys
from types import SimpleNamespace

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lahis_tl as lt
from lahis_tl.corpora import load_corpus, shared_texts, without_scored
from lahis_tl.languages import check_language, flores_code

LONG = "a sentence that is long enough to be kept, number {}"
ROWS = [
    {"language": code, "text": f"{code}: {LONG.format(i)}", "key": i}
    for code in ("en", "fr")
    for i in range(4)
]


def write(folder, name):
    path = folder / name
    frame = pd.DataFrame(ROWS)
    {
        ".csv": lambda: frame.to_csv(path, index=False),
        ".json": lambda: frame.to_json(path, orient="records"),
        ".jsonl": lambda: frame.to_json(path, orient="records", lines=True),
        ".parquet": lambda: frame.to_parquet(path),
    }[path.suffix]()
    return path


@pytest.mark.parametrize("name", ["t.csv", "t.json", "t.jsonl", "t.parquet"])
def test_tables_with_a_language_column(tmp_path, name):
    corpus = load_corpus(write(tmp_path, name))
    assert corpus.texts["fr"] == tuple(row["text"] for row in ROWS[4:])
    assert not corpus.parallel
    matched = load_corpus(tmp_path / name, id_column="key")
    assert matched.parallel
    assert matched.ids == ("0", "1", "2", "3")


def test_a_folder_with_a_file_a_language(tmp_path):
    (tmp_path / "de.txt").write_text(
        "\n".join(LONG.format(i) for i in range(3)) + "\n\n", encoding="utf-8"
    )
    (tmp_path / "pt_BR.jsonl").write_text(json.dumps({"text": LONG.format("x")}), encoding="utf-8")
    corpus = load_corpus(tmp_path)
    assert {code: len(texts) for code, texts in corpus.texts.items()} == {"de": 3, "pt-BR": 1}


def test_a_table_with_a_column_a_language_is_parallel(tmp_path):
    path = tmp_path / "wide.csv"
    pd.DataFrame(
        {"en": [LONG.format(i) for i in range(3)], "fr": [f"fr {LONG.format(i)}" for i in range(3)]}
    ).to_csv(path, index=False)
    corpus = load_corpus(path, ["fr", "en"])
    assert corpus.parallel
    assert corpus.languages == ["fr", "en"]


def test_near_empty_and_repeated_texts_are_dropped_and_counted():
    corpus = load_corpus({"en": [LONG, "  short ", LONG, "", LONG + "!"]})
    assert len(corpus["en"]) == 2
    assert corpus.dropped == {"en": 3}


def test_a_parallel_corpus_loses_the_row_everywhere(tmp_path):
    rows = [dict(row) for row in ROWS]
    rows[1]["text"] = "short"
    path = tmp_path / "t.jsonl"
    pd.DataFrame(rows).to_json(path, orient="records", lines=True)
    corpus = load_corpus(path, id_column="key")
    assert corpus.ids == ("0", "2", "3")
    assert corpus.dropped == {"en": 1, "fr": 0}
    assert corpus["fr"][1].endswith("number 2")


def test_splits_are_disjoint_seeded_and_keep_rows_together():
    corpus = load_corpus("bundled", ["en", "fr", "zh"])
    first, second = corpus.split(48, seed=3)
    assert len(first["fr"]) == 48
    assert len(second["fr"]) == 32
    assert not set(first.ids) & set(second.ids)
    assert not set(first["zh"]) & set(second["zh"])
    by_id = dict(zip(corpus.ids, corpus["zh"], strict=True))
    assert [by_id[key] for key in second.ids] == list(second["zh"])
    assert corpus.split(48, seed=3)[0].sha256 == first.sha256
    assert corpus.split(48, seed=4)[0].sha256 != first.sha256
    assert len(corpus.split(0.25)[0]["en"]) == 20


def test_sampling_does_not_depend_on_the_other_languages():
    texts = {code: [f"{code} {LONG.format(i)}" for i in range(9)] for code in ("en", "fr")}
    both, alone = load_corpus(texts, n=4, seed=1), load_corpus({"fr": texts["fr"]}, n=4, seed=1)
    assert both["fr"] == alone["fr"]
    assert len(load_corpus({"en": texts["en"], "fr": texts["fr"][:5]}, n=5)["en"]) == 5


def test_the_hash_knows_texts_order_and_language():
    base = load_corpus({"en": [LONG, LONG + "2"], "fr": [LONG + "3"]})
    assert base.sha256 == load_corpus({"en": [LONG, LONG + "2"], "fr": [LONG + "3"]}).sha256
    for other in (
        {"en": [LONG + "2", LONG], "fr": [LONG + "3"]},
        {"en": [LONG, LONG + "2"], "de": [LONG + "3"]},
        {"en": [LONG], "fr": [LONG + "2", LONG + "3"]},
    ):
        assert load_corpus(other).sha256 != base.sha256


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(min_size=1, max_size=60), min_size=1, max_size=8), st.integers(0, 5))
def test_any_text_is_kept_as_it_is_or_dropped_and_counted(texts, min_chars):
    try:
        corpus = load_corpus({"en": texts}, min_chars=min_chars)
    except lt.CorpusError:
        assert all(len(text.strip()) < max(min_chars, 1) for text in texts)
        return
    assert len(corpus["en"]) + corpus.dropped["en"] == len(texts)
    assert set(corpus["en"]) <= {text.strip() for text in texts}


def test_rows_are_left_out_by_their_ids_in_all_languages():
    corpus = load_corpus("bundled", ["en", "zh"])
    gone = list(corpus.ids[3:5])
    found = corpus.without(gone)
    assert found.ids == (*corpus.ids[:3], *corpus.ids[5:])
    assert found["zh"] == (*corpus["zh"][:3], *corpus["zh"][5:])
    with pytest.raises(lt.CorpusError, match="no rows but those"):
        corpus.without(corpus.ids)
    with pytest.raises(lt.CorpusError, match="no rows but those"):
        load_corpus({"en": ["one text that has no id at all"]}).without(["p01"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"languages": []}, r"languages=\[\] names none"),
        ({"languages": ["en", "xx"]}, "unknown language code 'xx'"),
        ({"languages": ["english"]}, "unknown language code 'english'"),
        ({"languages": ["en", "ja"]}, "no texts in ja; it has"),
        ({"languages": ["en", "en"]}, "named twice"),
        ({"n": 1000}, "1000 texts a language were asked for"),
        ({"source": {}}, "no texts were given for any language"),
        ({"source": {"en": []}}, "no texts were given for 'en'"),
        ({"source": {"en": ["x", ""]}}, r"no usable text for 'en' \(2 near-empty"),
        ({"source": "nowhere.csv"}, r"there is no file nowhere\.csv"),
        ({"source": "some/dataset"}, "name the languages"),
        ({"source": "wikimedia/wikipedia", "languages": ["fr"]}, "say how many texts"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(lt.CorpusError, match=message):
        load_corpus(**options)


def test_bad_files(tmp_path):
    for name, content, message in (
        ("x.jsonl", "{not json", "cannot read"),
        ("x.xml", "<a/>", "the formats are txt, csv, json, jsonl, parquet"),
        ("x.csv", "a,b\n1,2\n", "no column 'text' and no column named after a language"),
        ("lines.csv", f"text\n{LONG.split(',')[0]}\n", "does not say which language"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(lt.CorpusError, match=message):
            load_corpus(tmp_path / name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(lt.CorpusError, match="holds no file named after a language"):
        load_corpus(tmp_path / "empty")


def test_a_split_that_would_be_empty_is_refused():
    corpus = load_corpus("bundled", ["en"])
    for n in (0, 80, 1.0):
        with pytest.raises(lt.CorpusError, match="cannot split off"):
            corpus.split(n)


@pytest.mark.parametrize(
    ("code", "standard"), [("EN", "en"), ("pt_br", "pt-BR"), ("zh-hant", "zh-Hant")]
)
def test_codes_are_standardised(code, standard):
    assert check_language(code) == standard


# --- hub data sets, by a stand-in for the library, since no network is assumed -------------------


class FakeRows(list):
    def shuffle(self, seed, buffer_size):
        return FakeRows(self[::-1])

    def take(self, n):
        return FakeRows(self[:n])

    def filter(self, keep):
        return FakeRows(row for row in self if keep(row))


@pytest.fixture
def hub(monkeypatch):
    calls = []

    def load_dataset(name, config, *, split, revision, streaming):
        calls.append((name, config, split, streaming))
        if name == "no/such":
            raise FileNotFoundError("Couldn't reach 'no/such' on the Hub")
        if name == "multi/lingual":
            return FakeRows(
                {"lang": c, "body": f"{c} {LONG.format(i)}"}
                for i in range(30)
                for c in ("en", "fr")
            )
        return FakeRows({"id": i, "text": f"{config} {LONG.format(i)}"} for i in range(300))

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return calls


def test_wikipedia_is_streamed_by_language(hub):
    corpus = load_corpus("wikimedia/wikipedia", ["en", "fr"], n=7)
    assert hub == [
        ("wikimedia/wikipedia", "20231101.en", "train", True),
        ("wikimedia/wikipedia", "20231101.fr", "train", True),
    ]
    assert not corpus.parallel
    assert all(text.startswith("20231101.fr") for text in corpus["fr"])
    assert len(corpus["en"]) == 7


def test_flores_is_parallel(hub):
    corpus = load_corpus("openlanguagedata/flores_plus", ["en", "zh"], n=10)
    assert [call[1:3] for call in hub] == [("eng_Latn", "dev"), ("cmn_Hans", "dev")]
    assert corpus.parallel
    numbers = [[text.rsplit(" ", 1)[1] for text in corpus[code]] for code in ("en", "zh")]
    assert numbers[0] == numbers[1]


def test_any_data_set_with_a_language_column(hub):
    corpus = load_corpus("multi/lingual", ["fr"], n=3, text_column="body", language_column="lang")
    assert all(text.startswith("fr ") for text in corpus["fr"])


def test_an_unreachable_data_set_says_what_to_check(hub):
    with pytest.raises(
        lt.CorpusError,
        match=r"cannot open the hub data set 'no/such'.*Couldn't reach.*'bundled' need no hub",
    ):
        load_corpus("no/such", ["en"], n=2, config="{language}")
    with pytest.raises(lt.CorpusError, match="has no column 'body'; it has id, text"):
        load_corpus("a/b", ["en"], n=2, config="{language}", text_column="body")


def test_flores_codes():
    expected = {
        "en": "eng_Latn",
        "hi": "hin_Deva",
        "ar": "arb_Arab",
        "zh-Hant": "cmn_Hant",
        "vi": "vie_Latn",
    }
    assert {code: flores_code(code) for code in expected} == expected


def test_the_language_column_that_is_named_wins(tmp_path):
    path = tmp_path / "t.csv"
    frame = pd.DataFrame(ROWS).assign(lang=["de"] * 4 + ["es"] * 4)
    frame.to_csv(path, index=False)
    assert load_corpus(path, language_column="lang").languages == ["de", "es"]


def test_wide_tables_take_languages_and_nothing_else(tmp_path):
    path = tmp_path / "wide.csv"
    columns = {code: [f"{code} {LONG.format(i)}" for i in range(3)] for code in ("en", "fr", "fil")}
    frame = pd.DataFrame(
        {"id": [7, 8, 9], "url": [f"see here {i} and there" for i in range(3)], **columns}
    )
    frame.to_csv(path, index=False)
    corpus = load_corpus(path)
    assert corpus.languages == ["en", "fr"]
    assert corpus.ids == ("7", "8", "9")
    assert load_corpus(path, ["fil", "en"]).languages == ["fil", "en"]
    with pytest.raises(lt.CorpusError, match="has no column 'nope'; it has id, url, en, fr, fil"):
        load_corpus(path, id_column="nope")
    indonesian = pd.DataFrame({"key": range(3), "id": columns["en"], "fr": columns["fr"]})
    indonesian.to_csv(path, index=False)
    assert load_corpus(path, id_column="key").languages == ["id", "fr"]


def test_a_single_file_is_in_the_language_of_its_name_or_the_one_asked_for(tmp_path):
    text = "\n".join(LONG.format(i) for i in range(3))
    (tmp_path / "fr.txt").write_text(text)
    (tmp_path / "notes.txt").write_text(text)
    assert load_corpus(tmp_path / "fr.txt").languages == ["fr"]
    assert load_corpus(tmp_path / "notes.txt", ["de"]).languages == ["de"]
    with pytest.raises(lt.CorpusError, match="name one language in languages"):
        load_corpus(tmp_path / "notes.txt")


def test_tagalog_stays_tagalog():
    assert check_language("tl") == "tl"


def test_the_card_says_how_the_texts_were_drawn():
    corpus = load_corpus("bundled", ["en"], n=40, seed=3).split(10, seed=4)[1]
    assert corpus.card["history"] == [
        "min_chars=20",
        "sample(n=40, seed=3)",
        "split(n=10, seed=4)[1]",
    ]


def test_texts_that_were_scored_can_be_left_out_or_found():
    whole = load_corpus("bundled", ["en", "fr"], n=20)
    scored, rest = whole.split(8)
    card = {"corpus": scored.card}
    assert shared_texts(card, whole) == {"en": 8, "fr": 8}
    assert shared_texts(card, rest) == {}
    assert without_scored(whole, card).texts == rest.texts
    # A paragraph that was scored in English is not tested on in French either.
    english = {"corpus": scored.select(["en"]).card}
    assert without_scored(whole, english).ids == rest.ids
    with pytest.raises(lt.CorpusError, match=r"all texts of .* were scored already"):
        without_scored(scored, card)
