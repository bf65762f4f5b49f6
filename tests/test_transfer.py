"""Conflicting facts: the data are whole, the prompts say what they should, the answers are read rightly."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import lahis_tl as lt
from lahis_tl.access import full_logits, grid_of, tokenizer_of
from lahis_tl.errors import ArtifactError
from lahis_tl.transfer import (
    TransferAnswers,
    answer_tokens,
    conflicts,
    says_which,
    transfer_answers,
    transfer_languages,
    transfer_relations,
)

DATA = json.loads((Path(lt.__file__).parent / "data" / "transfer.json").read_text("utf-8"))
ITEMS = [
    *conflicts("fr", "de", n=2),
    *conflicts("zh", "en", n=2),
    *conflicts("hi", "th", ["job"], n=2),
]


def test_the_data_cover_what_is_promised() -> None:
    assert {"en", "zh", "fr", "hi", "vi", "th", "es", "it", "pt", "id", "ja", "ko"} <= set(
        transfer_languages()
    )
    assert transfer_relations() == ["job", "city", "colour"]
    assert len(DATA["answers"]["job"]) >= 10


@pytest.mark.parametrize("code", transfer_languages())
def test_every_language_is_whole(code: str) -> None:
    language = DATA["languages"][code]
    assert len(set(language["distraction"])) == 3
    for relation, answers in DATA["answers"].items():
        texts = language["relations"][relation]
        assert set(texts["answers"]) == set(answers)
        words = [w.casefold() for w in texts["answers"].values()]
        assert not any(a in b for i, a in enumerate(words) for j, b in enumerate(words) if i != j)
        assert texts["statement"].count("{name}") == texts["statement"].count("{answer}") == 1
        # The question is the statement up to its answer, so that the answer follows.
        assert texts["statement"].split("{answer}")[0].rstrip() == texts["question"]
        assert not any(w in s.casefold() for w in words for s in language["distraction"])


def test_english_answers_begin_differently() -> None:
    for relation in DATA["answers"]:
        words = DATA["languages"]["en"]["relations"][relation]["answers"].values()
        assert len({word[0].casefold() for word in words}) == len(words)


@pytest.mark.parametrize("item", ITEMS, ids=lambda c: f"{c.first}-{c.second}-{c.relation}")
def test_a_prompt_holds_both_statements_where_its_spans_say(item) -> None:
    for code, answer, (start, end) in zip(
        (item.first, item.second), item.answers, item.spans, strict=True
    ):
        assert (
            DATA["languages"][code]["relations"][item.relation]["answers"][answer]
            in item.prompt[start:end]
        )
    assert item.spans[0][1] < item.spans[1][0]
    assert item.prompt.endswith(
        DATA["languages"]["en"]["relations"][item.relation]["question"].split("}")[1]
    )
    assert item.answers[0] != item.answers[1]


def test_prompts_are_drawn_by_the_seed() -> None:
    assert conflicts("fr", "de", n=5) == conflicts("fr", "de", n=5)
    assert conflicts("fr", "de", n=5) != conflicts("fr", "de", n=5, seed=1)
    pairs = [(c.relation, c.answers) for c in conflicts("fr", "de", n=20)]
    assert len(set(pairs)) == len(pairs) == 60


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("teacher, not a cook", "first"),
        ("a cook and a teacher", "second"),
        ("enseignante", "first"),
        ("COOK", "second"),
        ("painter", "neither"),
        ("", "neither"),
    ],
)
def test_the_answer_that_comes_first_counts(text: str, expected: str) -> None:
    assert says_which(text, [["teacher", "enseignante"], ["cook", "Köchin"]]) == expected


def test_logits_and_ranks_are_those_of_a_plain_forward_pass(speaker: nn.Module) -> None:
    factors = (
        torch.rand(len(ITEMS), *grid_of(speaker).shape, generator=torch.Generator().manual_seed(0))
        * 2
    )
    found = transfer_answers(speaker, ITEMS, lt.HeadMask(factors), progress=False)
    tokenizer = tokenizer_of(speaker)
    for i, item in enumerate(ITEMS):
        ids = torch.tensor([tokenizer(item.prompt)["input_ids"]])
        with lt.masked(speaker, factors[i]):
            logits = full_logits(speaker, ids, torch.ones_like(ids))[0, -1]
        first, second = answer_tokens(speaker, item)
        piece = tokenizer.decode([first]).strip()
        assert piece
        assert item.asked[0].startswith(piece)
        assert float(found.logit_difference[i]) == pytest.approx(
            float(logits[first] - logits[second]), abs=1e-4
        )
        order = logits.argsort(descending=True).tolist()
        assert found.ranks[i].tolist() == [order.index(first) + 1, order.index(second) + 1]
        alone = lt.generate(
            speaker, item.prompt, lt.HeadMask(factors[i]), max_new_tokens=5, progress=False
        )
        if not alone[0].ended:
            assert found.texts[i] == alone[0].text


def test_ones_change_nothing_and_zeros_do(speaker: nn.Module) -> None:
    grid = grid_of(speaker)
    plain = transfer_answers(speaker, ITEMS, progress=False)
    ones = transfer_answers(speaker, ITEMS, lt.HeadMask.ones(grid), progress=False)
    assert plain.texts == ones.texts
    assert torch.equal(plain.logit_difference, ones.logit_difference)
    off = transfer_answers(speaker, ITEMS, lt.HeadMask(torch.zeros(grid.shape)), progress=False)
    assert not torch.allclose(plain.logit_difference, off.logit_difference)


def test_answers_survive_the_disk(speaker: nn.Module, tmp_path: Path) -> None:
    found = transfer_answers(speaker, ITEMS, progress=False)
    path = found.save(tmp_path / "answers")
    again = TransferAnswers.load(path)
    assert again.conflicts == found.conflicts
    assert again.to_dataframe().equals(found.to_dataframe())
    (tmp_path / "answers.jsonl").write_text("")
    with pytest.raises(ArtifactError, match="checksum"):
        TransferAnswers.load(path)


@pytest.mark.parametrize(
    ("arguments", "options", "match"),
    [
        (("fr", "xx"), {}, "no statements in 'xx'"),
        (("fr", "fr"), {}, "two languages"),
        (("fr", "de", ["age"]), {}, "no relation 'age'"),
        (("fr", "de"), {"n": 999}, "n=999"),
        (("fr", "de"), {"question": "sw"}, "no statements in 'sw'"),
    ],
)
def test_bad_conflicts_are_named(arguments: tuple, options: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        conflicts(*arguments, **options)


def test_answers_of_one_first_token_are_refused(speaker: nn.Module) -> None:
    # Asked in Thai, answers begin with bytes that all Thai letters share.
    items = conflicts("en", "fr", ["job"], n=30, question="th")
    with pytest.raises(ValueError, match=r"share their first token .* \(question="):
        for item in items:
            answer_tokens(speaker, item)


def test_nothing_to_ask_and_too_long_prompts_are_named(
    llama: nn.Module, speaker: nn.Module
) -> None:
    with pytest.raises(ValueError, match="no conflict"):
        transfer_answers(speaker, [])
    with pytest.raises(ValueError, match="exceeds the model's context"):
        transfer_answers(speaker, ITEMS, max_new_tokens=500, progress=False)
