"""Prompts: halves of texts, summaries and instructions in every language of the corpus."""

import json
from pathlib import Path

import pytest
from torch import nn

import lahis_tl as lt
from lahis_tl import tasks
from lahis_tl.access import tokenizer_of
from lahis_tl.gate import competence
from lahis_tl.tasks import continuation_tasks, instruction_tasks, summary_tasks

LANGUAGES = ["en", "fr", "de", "es", "it", "pt", "ru", "zh", "hi", "vi"]
DATA = Path(lt.__file__).parent / "data"


@pytest.mark.parametrize("code", LANGUAGES)
def test_every_text_is_cut_between_sentences_and_nothing_is_lost(code: str) -> None:
    corpus = lt.load_corpus("bundled", [code])
    for text, task in zip(corpus[code], continuation_tasks(corpus), strict=True):
        assert task.prompt[-1] in '.!?।。！？"»”'
        assert task.reference
        assert "".join((task.prompt + task.reference).split()) == "".join(text.split())
        assert 0.2 < len(task.prompt) / len(text) < 0.8


def test_a_text_of_one_sentence_is_cut_in_the_middle() -> None:
    (task,) = continuation_tasks(
        lt.load_corpus({"en": ["one long sentence without any end at all"]})
    )
    assert task.prompt + " " + (
        task.reference or ""
    ) == "one long sentence without any end at all" or (
        task.prompt + (task.reference or "") == "one long sentence without any end at all"
    )


@pytest.mark.parametrize("code", LANGUAGES)
def test_summaries_are_whole(code: str) -> None:
    found = summary_tasks([code])
    assert len(found) == 24
    assert len({task.reference for task in found}) == 24
    texts = dict(zip(*(lambda c: (c.ids, c[code]))(lt.load_corpus("bundled", [code])), strict=True))
    for task in found:
        assert task.prompt.startswith(texts[task.id])
        assert len(task.reference or "") < len(texts[task.id])


def test_prompts_are_parallel() -> None:
    data = json.loads((DATA / "prompts.json").read_text("utf-8"))
    assert set(data["summary"]) == set(LANGUAGES) <= set(data["answer"]) == set(data["question"])
    assert len(data["instruction"]) == 20
    for wording in data["instruction"].values():
        assert set(wording) == set(LANGUAGES)
        assert len(set(wording.values())) == len(LANGUAGES)
    ids = {code: [task.id for task in summary_tasks([code], 5)] for code in LANGUAGES}
    assert len({tuple(names) for names in ids.values()}) == 1


def test_instructions_use_the_chat_template_where_there_is_one(
    llama: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    (plain,) = instruction_tasks(llama, ["fr"], 1)
    assert plain.prompt.endswith("\nRéponse :")
    with pytest.raises(ValueError, match="no chat template"):
        instruction_tasks(llama, ["fr"], 1, chat=True)
    template = "{% for m in messages %}<s>[{{ m.role }}] {{ m.content }}{% endfor %}[assistant]"
    monkeypatch.setattr(tokenizer_of(llama), "chat_template", template)
    (chat,) = instruction_tasks(llama, ["fr"], 1)
    assert chat.prompt.endswith("[assistant]")
    assert "[user] " in chat.prompt
    assert instruction_tasks(llama, ["fr"], 1, chat=False)[0] == plain


def test_a_chat_prompt_has_one_bos(llama: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tokenizer_of(llama)
    monkeypatch.setattr(tokenizer, "chat_template", "<s>{{ messages[0].content }}")
    monkeypatch.setattr(tasks, "_adds_bos", lambda tokenizer: True)
    assert not instruction_tasks(llama, ["en"], 1)[0].prompt.startswith("<s>")


def test_xlsum_by_a_stand_in_for_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load(name: str, config: str, split: str, revision: str):
        asked.append((name, config, split))
        text = "字" * 9000 if "chinese" in config else "mot " * 500
        rows = [{"id": str(i), "text": text, "summary": f"résumé {i}"} for i in range(9)]
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load)
    found = summary_tasks(["fr", "zh"], 4, source=tasks.XLSUM)
    assert asked == [(tasks.XLSUM, "french", "test"), (tasks.XLSUM, "chinese_simplified", "test")]
    assert len(found) == 8
    assert found[0].prompt.count("mot") == 300
    assert found[4].prompt.count("字") == 1200
    assert len(summary_tasks(["fr"], without=["baking-bread"])) == 23

    def refuse(*arguments, **options):
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(lt.CorpusError, match=r'offline.*source="bundled"'):
        summary_tasks(["fr"], 4, source=tasks.XLSUM)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda m: summary_tasks(["sw"]), "not bundled in sw"),
        (lambda m: summary_tasks(["fr"], 99), "n=99"),
        (lambda m: summary_tasks(["fr"], source="cnn"), "'cnn'"),
        (lambda m: summary_tasks(["de"], source=tasks.XLSUM), "has no 'de'"),
        (lambda m: instruction_tasks(m, ["th"]), "not bundled in th"),
        (lambda m: instruction_tasks(m, ["fr"], 0), "n=0"),
    ],
)
def test_bad_requests_are_named(llama: nn.Module, call, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        call(llama)


def test_competence_marks_languages_that_the_model_cannot_write(
    speaker: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = {
        "en": "la la la la la la la la la la la la",  # repeats itself
        "fr": "Les enfants sont rentrés chez eux en passant par le grand parc de la ville.",
        "de": "The children walked home through the large park in the middle of the town.",
    }

    def write(model: nn.Module, prompts: list[str], **options: object) -> lt.Generations:
        texts = [written[task.language] for task in continuation_tasks(corpus)]
        rows = [lt.Generation(p, t, (), 1, False) for p, t in zip(prompts, texts, strict=True)]
        return lt.Generations(tuple(rows))

    corpus = lt.load_corpus("bundled", ["en", "fr", "de"], n=6)
    monkeypatch.setattr("lahis_tl.gate.generate", write)
    found = competence(speaker, corpus, progress=False)
    assert (found.writes, found.fails) == (["fr"], ["en", "de"])
    table = found.to_dataframe().set_index("language")
    assert table["passes"].to_dict() == {"en": 0.0, "fr": 1.0, "de": 0.0}
    losses = lt.perplexity(speaker, corpus, progress=False)
    assert table.loc["en", "bits_per_byte"] == pytest.approx(losses.bits_per_byte("en").value)
    with pytest.raises(ValueError, match="least=0"):
        competence(speaker, corpus, least=0.0)
