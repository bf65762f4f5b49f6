"""Questions: the bundled set is whole, splits share no paragraph, measures are those of SQuAD and MLQA."""

import json
from pathlib import Path

import pandas as pd
import pytest
from torch import nn

import lahis_tl as lt
from analyses import xquad_mask
from lahis_tl.questions import (
    Question,
    answer_scores,
    load_questions,
    normalised,
    question_pair,
    question_prompt,
    split_by_paragraph,
)
from lahis_tl.records import load_records

LANGUAGES = ["en", "fr", "de", "es", "it", "pt", "zh"]


@pytest.mark.parametrize("code", LANGUAGES)
def test_the_bundled_questions_are_whole(code: str) -> None:
    questions = load_questions(languages=[code])[code]
    assert len(questions) == 72
    assert len({q.paragraph for q in questions}) == 24
    assert [q.id for q in questions] == [q.id for q in load_questions(languages=["en"])["en"]]
    contexts = set(lt.load_corpus("bundled", [code])[code])
    for q in questions:
        assert q.context in contexts
        assert q.question.rstrip().endswith(("?", "？"))
        assert q.answers[0].casefold() not in q.question.casefold()
        assert answer_scores(q.answers[0], q) == {"exact": 1.0, "f1": 1.0, "contains": 1.0}


def test_answer_starts_are_right() -> None:
    for path in (Path(lt.__file__).parent / "data" / "squad").glob("*.json"):
        for article in json.loads(path.read_text("utf-8"))["data"]:
            for paragraph in article["paragraphs"]:
                for entry in paragraph["qas"]:
                    for answer in entry["answers"]:
                        start = answer["answer_start"]
                        assert (
                            paragraph["context"][start : start + len(answer["text"])]
                            == answer["text"]
                        )


def test_parts_share_no_paragraph_in_any_language() -> None:
    questions = load_questions()
    parts = split_by_paragraph(questions, [0.4, 0.1, 0.5], seed=3)
    names = [{q.paragraph for code in part for q in part[code]} for part in parts]
    assert [len(part) for part in names] == [10, 2, 12]
    assert sum(map(len, names)) == len(set.union(*names)) == 24
    for part, members in zip(parts, names, strict=True):
        assert all({q.paragraph for q in part[code]} == members for code in LANGUAGES)
    assert parts == split_by_paragraph(questions, [0.4, 0.1, 0.5], seed=3)
    assert parts != split_by_paragraph(questions, [0.4, 0.1, 0.5], seed=4)


@pytest.mark.parametrize(
    ("shares", "match"),
    [([0.7, 0.7], "at most 1"), ([0.5, 0.0], "positive"), ([0.01, 0.5], "empty")],
)
def test_bad_shares_are_named(shares: list[float], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        split_by_paragraph(load_questions(languages=["en"]), shares)


@pytest.mark.parametrize(
    ("text", "language", "expected"),
    [
        ("The cat, an old one.", "en", ["cat", "old", "one"]),
        ("L'école des enfants", "fr", ["école", "enfants"]),
        ("Der alte Hund!", "de", ["alte", "hund"]),
        ("los sábados", "es", ["sábados"]),
        ("静止的 空气。", "zh", ["静", "止", "的", "空", "气"]),
        ("الكتاب الكبير", "ar", ["كتاب", "كبير"]),
        ("「今日」は", "ja", ["今", "日", "は"]),
    ],
)
def test_normalisation(text: str, language: str, expected: list[str]) -> None:
    assert normalised(text, language) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the nine legs", (1.0, 1.0, 1.0)),
        ("Nine legs.\nQuestion: more", (1.0, 1.0, 1.0)),
        ("legs", (0.0, 2 / 3, 0.0)),
        ("it has nine legs", (0.0, 2 / 3, 1.0)),
        ("", (0.0, 0.0, 0.0)),
        ("eight", (0.0, 0.0, 0.0)),
        ("9", (1.0, 1.0, 1.0)),
    ],
)
def test_answers_are_scored(text: str, expected: tuple[float, float, float]) -> None:
    question = Question("1", "p", "en", "nine legs 9", "How many?", ("nine legs", "9"))
    found = answer_scores(text, question)
    assert (found["exact"], pytest.approx(found["f1"]), found["contains"]) == expected


def test_prompts_end_where_the_answer_begins(speaker: nn.Module) -> None:
    for code in LANGUAGES:
        question = load_questions(languages=[code])[code][0]
        prompt = question_prompt(question)
        assert prompt.startswith(question.context)
        assert question.question in prompt
        assert prompt[-1] in ":："
        assert question_pair(question)[1].strip() == question.answers[0]
    assert question_pair(load_questions(languages=["zh"])["zh"][0])[1][0] != " "
    with pytest.raises(ValueError, match="no prompt in 'sw'"):
        question_prompt(Question("1", "p", "sw", "a", "b?", ("a",)))


def test_files_in_squads_format(tmp_path: Path) -> None:
    answers = [{"text": "nine"}, {"text": "nine"}]
    asked = {"id": 7, "question": "How many?", "answers": answers}
    paragraph = {"context": "It has nine legs.", "qas": [asked]}
    content = {"data": [{"paragraphs": [paragraph]}]}
    (tmp_path / "xx.json").write_text(json.dumps(content))
    (question,) = load_questions(tmp_path)["xx"]
    assert (question.id, question.answers) == ("7", ("nine",))
    assert load_questions({"xx": tmp_path / "xx.json"}) == load_questions(tmp_path)
    answers[0]["text"] = "ten"
    (tmp_path / "xx.json").write_text(json.dumps(content))
    with pytest.raises(lt.CorpusError, match="not in its paragraph"):
        load_questions(tmp_path)
    (tmp_path / "xx.json").write_text("[]")
    with pytest.raises(lt.CorpusError, match="SQuAD's format"):
        load_questions(tmp_path)
    with pytest.raises(lt.CorpusError, match="no folder"):
        load_questions(tmp_path / "none")
    with pytest.raises(lt.CorpusError, match="no questions in sw"):
        load_questions(languages=["sw"])
    with pytest.raises(lt.CorpusError, match=r"languages=\[\] names none"):
        load_questions(languages=[])


def test_xquad_by_a_stand_in_for_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load(name: str, config: str, split: str):
        assert (name, split) == ("google/xquad", "validation")
        rows = [
            {
                "id": str(i),
                "context": f"p{i // 2} yes",
                "question": "?",
                "answers": {"text": ["yes"]},
            }
            for i in range(6)
        ]
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load)
    found = load_questions("xquad", ["es", "de"])
    assert [q.paragraph for q in found["es"]] == ["0", "0", "1", "1", "2", "2"]
    with pytest.raises(lt.CorpusError, match="name the languages"):
        load_questions("xquad")

    def refuse(*arguments: object, **options: object) -> None:
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(lt.CorpusError, match="offline"):
        load_questions("xquad", ["es"])


def test_the_experiment_runs(
    speaker: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = xquad_mask.run(
        speaker, ("en", "fr"), n=6, top_k=4, shares=(0.125, 0.125, 0.25), epochs=1, learning_rate=0.05,
        training_seeds=2, random_sets=2, max_tokens=24, max_new_tokens=4, checkpoint=tmp_path / "parts", progress=False,
    )  # fmt: skip
    page = result.save(tmp_path / "out")
    rows, _ = load_records(page.parent / "answers")
    card = json.loads((page.parent / "card.json").read_text())
    tables, figures, verdict = xquad_mask.report(rows, card)
    assert verdict == result.verdict
    assert set(figures) == set(result.figures)
    found = tables["conditions"].set_index(["language", "condition"])
    assert found.loc[("en", "no mask"), "nll_change"] == 0.0
    assert found.loc[("en", "best heads"), "runs"] == 2
    assert found.loc[("en", "best heads"), "parameters"] == 4
    assert found.loc[("fr", "all heads"), "parameters"] == 24
    assert set(tables["transfer"]["mask_of"]) == {"en", "fr"}
    assert len(tables["transfer"]) == 4
    monkeypatch.setattr(lt, "tune_mask", None)  # nothing is trained again
    again = xquad_mask.run(
        speaker, ("en", "fr"), n=6, top_k=4, shares=(0.125, 0.125, 0.25), epochs=1, learning_rate=0.05,
        training_seeds=2, random_sets=2, max_tokens=24, max_new_tokens=4, checkpoint=tmp_path / "parts", progress=False,
    )  # fmt: skip
    assert again.records["answers"] == result.records["answers"], "read from the checkpoint"


def test_the_difference_from_random_sets_is_as_uncertain_as_they_differ() -> None:
    """All paragraphs agree, the sets do not: the interval is theirs; of one set nothing varies."""

    def rows(condition: str, value: float, number: int = 0) -> pd.DataFrame:
        ids = [str(i) for i in range(8)]
        made = pd.DataFrame({"id": ids, "paragraph": [i // 2 for i in range(8)]})
        return made.assign(condition=condition, number=number, f1=value)

    best = rows("best heads", 1.0)
    sets = pd.concat([rows("random heads", i % 2, i) for i in range(4)])
    found = xquad_mask._against(best, sets, "f1")
    assert (found.value, found.lower, found.upper) == (0.5, 0.0, 1.0)
    alone = xquad_mask._against(best, rows("random heads", 0.0), "f1")
    assert (alone.value, alone.lower, alone.upper) == (1.0, 1.0, 1.0)


def test_made_up_answers_are_reported_as_they_are() -> None:
    def row(i: int, condition: str, right: bool, number: int = 0, mask_of: str = "fr") -> dict:
        value = float(right)
        plain = {"condition": condition, "number": number, "language": "fr", "mask_of": mask_of}
        plain |= {"id": str(i), "paragraph": str(i // 3), "text": "", "nll": 2.0 - value}
        return plain | {"exact": value, "f1": value, "contains": value}

    rows = [row(i, "no mask", i < 6) for i in range(12)]
    rows += [row(i, "best heads", i < 11, number) for i in range(12) for number in range(2)]
    # Random sets that differ: one gains all of the six that were wrong, one loses the six that were right.
    right = {0: range(12), 1: range(0), 2: range(6), 3: range(6)}
    rows += [row(i, "random heads", i in right[n], n) for n in right for i in range(12)]
    rows += [row(i, "all heads", i >= 1 and i < 6) for i in range(12)]
    rows += [row(i, "other language", i < 6, 0, "de") for i in range(12)]
    costs = [
        {"condition": c, "parameters": p, "seconds": 1.0}
        for c, p in (("best heads", 20), ("random heads", 20), ("all heads", 270))
    ]
    tables, _, verdict = xquad_mask.report(rows, {"model": {"name": "made up"}, "costs": costs})
    found = tables["conditions"].set_index("condition")
    assert found.loc["best heads", "exact_change"] == pytest.approx(5 / 12)
    assert found.loc["best heads", "nll_change"] == pytest.approx(-5 / 12)
    assert found.loc["best heads", "mcnemar_p_least"] == pytest.approx(2 * 0.5**5)
    assert found.loc["best heads", "nll_against_random"] == pytest.approx(-5 / 12)
    assert found.loc["best heads", "random_runs"] == 4
    assert found.loc["best heads", "exact_against_all"] == pytest.approx(6 / 12)
    assert found.loc["random heads", "exact_change"] == 0.0
    assert found.loc["random heads", "mcnemar_p_least"] == pytest.approx(2 * 0.5**6)
    assert found.loc["random heads", "mcnemar_p_greatest"] == 1.0
    assert found.loc["all heads", "exact_change"] == pytest.approx(-1 / 12)
    assert found.loc["no mask", "parameters"] == 0
    assert found.loc["other language", "parameters"] == 20
    assert "exact 0.50 +0.42" in verdict
