"""The paper's three architectures from scoring to export: small random checkpoints on disk, with a real tokenizer.

Aya-23 (Cohere: parallel block, LayerNorm without bias, tied embeddings, scaled logits), Llama-3.2 (grouped-query heads,
rotary scaling "llama3") and Mistral-7B-v0.1 (sliding window), each on the class that ``load_model`` chooses.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import HOOKED_LINE, build_hf
from hf_reference import logits, scaled_columns, text_losses
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import lahis_tl as lt
from lahis_tl.access import full_logits, tokenizer_of
from lahis_tl.batches import tokenize
from lahis_tl.questions import load_questions, question_pair

LANGUAGES = ["en", "fr", "de"]
_SHAPE: dict[str, Any] = {
    "vocab_size": 700,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
_ROPE = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    # Short, so that the texts reach beyond it and the scaling matters.
    "original_max_position_embeddings": 32,
    "rope_theta": 500_000.0,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "aya-23-8b": ("Cohere", {"logit_scale": 0.0625, "use_qk_norm": False}),
    "llama-3.2-3b": ("Llama", {"rope_parameters": _ROPE, "tie_word_embeddings": True}),
    "mistral-7b-v0.1": ("Mistral", {"sliding_window": 16}),
}


class Case(NamedTuple):
    """A checkpoint, its loaded model, and Hugging Face's own."""

    folder: Path
    model: nn.Module
    hf: Any
    grads: lt.HeadGradients
    heads: lt.LanguageHeads
    testing: lt.Corpus


@pytest.fixture(scope="module")
def case_of(speaker: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """Saved, loaded, scored and its heads chosen, once a model; the tokenizer is the speaker's."""

    @cache
    def make(name: str) -> Case:
        family, options = MODELS[name]
        folder = tmp_path_factory.mktemp("models") / name
        build_hf(family, _SHAPE | options).save_pretrained(folder)
        tokenizer_of(speaker).save_pretrained(folder)
        model = lt.load_model(str(folder))
        hf = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
        scoring, testing = lt.load_corpus("bundled", LANGUAGES).split(5)
        grads = lt.head_gradients(model, scoring, max_tokens=40, progress=False)
        heads = lt.language_heads(lt.score(grads, "lahis"), "contrastive", fraction=0.1)
        return Case(folder, model, hf, grads, heads, testing.sample(3))

    return make


@pytest.fixture(params=MODELS)
def case(request: pytest.FixtureRequest, case_of: Callable[[str], Case]) -> Case:
    return case_of(request.param)


def off(case: Case, language: str) -> lt.HeadMask:
    return lt.HeadMask.scaling(case.heads.specific[language], 0.0)


def test_checkpoints_have_what_makes_their_architecture_special(case_of) -> None:
    aya, llama, mistral = (case_of(name).hf for name in MODELS)
    assert aya.config.logit_scale == 0.0625
    assert aya.lm_head.weight.data_ptr() == aya.model.embed_tokens.weight.data_ptr()
    assert not any(name.endswith("bias") for name, _ in aya.named_parameters())
    norms = [name for name, _ in aya.model.layers[0].named_parameters() if "norm" in name]
    assert norms == ["input_layernorm.weight"], "one norm for attention and MLP, side by side"
    assert llama.config.rope_parameters["rope_type"] == "llama3"
    assert llama.config.num_key_value_heads < llama.config.num_attention_heads
    assert mistral.config.sliding_window == 16
    assert sum(p.numel() for p in llama.parameters()) < 100_000


def test_the_class_is_the_one_for_the_version(case: Case) -> None:
    expected = "HookedTransformer" if HOOKED_LINE else "TransformerBridge"
    assert type(case.model).__name__ == expected
    assert lt.grid_of(case.model).shape == (3, 8)


def test_gradients_are_the_slopes_of_hugging_faces_loss(case: Case) -> None:
    """One head in float64, by scaling its columns of the output projection a little up and down."""
    model = lt.load_model(str(case.folder), dtype="float64")
    hf = AutoModelForCausalLM.from_pretrained(
        case.folder, dtype=torch.float64, attn_implementation="eager"
    ).eval()
    texts = tokenize(model, case.testing, 40)["fr"]
    grads = lt.head_gradients(model, {"fr": texts}, progress=False)["fr"]
    step, losses = 1e-3, []
    for sign in (1, -1):
        factors = torch.ones(3, 8, dtype=torch.float64)
        factors[1, 5] += sign * step
        with scaled_columns(hf, factors):
            losses.append(text_losses(hf, texts))
    slope = ((losses[0] - losses[1]) / (2 * step)).float()
    torch.testing.assert_close(grads[:, 1, 5], slope, rtol=2e-3, atol=1e-5)
    assert grads[:, 1, 5].abs().min() > 1e-5


def test_scores_and_heads_in_both_protocols(case: Case) -> None:
    assert {code: len(found) for code, found in case.heads.specific.items()} == dict.fromkeys(
        LANGUAGES, 2
    )
    ids = tokenize(case.model, case.testing, 40)
    moving = lt.lahis_code(case.model, ids, progress=False)
    fixed = lt.lahis_code(case.model, ids, moving_mask=False, progress=False)
    assert moving.values.shape == (3, 3, 8)
    assert (moving.values - fixed.values).abs().max() > 0
    chosen = lt.language_heads(moving, quantile=0.8)
    assert all(len(kept) == 5 for kept in chosen.kept.values())


def test_perplexity_without_heads_is_hugging_faces(case: Case) -> None:
    mask = off(case, "fr")
    plain = lt.perplexity(case.model, case.testing, max_tokens=40, progress=False)
    without = lt.perplexity(case.model, case.testing, mask, max_tokens=40, progress=False)
    texts = tokenize(case.model, case.testing, 40)
    assert max(map(len, texts["fr"])) == 40
    for code in LANGUAGES:
        torch.testing.assert_close(
            plain.nll[code], text_losses(case.hf, texts[code]), rtol=1e-4, atol=1e-4
        )
        with scaled_columns(case.hf, mask.factors):
            reference = text_losses(case.hf, texts[code])
        torch.testing.assert_close(without.nll[code], reference, rtol=1e-4, atol=1e-4)
        assert (without.nll[code] - plain.nll[code]).abs().max() > 1e-3


def test_ablation_beside_matched_random_heads(case: Case) -> None:
    options: dict[str, Any] = {"draws": 3, "max_tokens": 40, "progress": False}
    found = lt.selectivity(case.model, case.heads, case.testing, **options)
    assert found.matrix.shape == (3, 3)
    own = lt.ablation_effect(
        case.model,
        case.testing,
        case.heads.specific["fr"],
        scored=case.grads.card,
        **options,
    )
    torch.testing.assert_close(own.change["de"], found.change["fr", "de"], rtol=1e-4, atol=1e-5)
    assert 0 < own.to_dataframe()["p"].min() <= 1


def test_transfer_between_two_languages(case: Case) -> None:
    items = lt.conflicts("fr", "de", ["job"], 3)
    plain = lt.transfer_answers(case.model, items, progress=False)
    enhanced = lt.HeadMask.scaling(case.heads.specific["fr"], 3.0)
    found = lt.transfer_answers(case.model, items, enhanced, progress=False)
    tokenizer = tokenizer_of(case.model)
    ids = torch.tensor([tokenizer(items[0].prompt)["input_ids"]])
    assert ids.shape[1] > 40
    with scaled_columns(case.hf, enhanced.factors):
        last = logits(case.hf, ids)[0, -1]
    space = [tokenizer(items[0].prompt + " " + answer)["input_ids"] for answer in items[0].asked]
    expected = last[space[0][ids.shape[1]]] - last[space[1][ids.shape[1]]]
    torch.testing.assert_close(found.logit_difference[0], expected, rtol=1e-3, atol=1e-4)
    assert (found.logit_difference - plain.logit_difference).abs().min() > 1e-4


def test_off_target_text_is_generated_and_judged(case: Case) -> None:
    tasks = lt.continuation_tasks(case.testing.select(["fr", "de"]))
    prompts, mask = [task.prompt for task in tasks], off(case, "en")
    written = lt.generate(case.model, prompts, mask, max_new_tokens=8, progress=False)
    ids = torch.tensor([tokenizer_of(case.model)(prompts[0])["input_ids"]])
    with scaled_columns(case.hf, mask.factors):
        whole = case.hf.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=8,
            do_sample=False,
            pad_token_id=0,
        )
    new = whole[0, ids.shape[1] :].tolist()
    assert list(written[0].tokens) == new[: len(written[0].tokens)]
    rows = [
        {"language": task.language, "text": text}
        for task, text in zip(tasks, written.texts, strict=True)
    ]
    judged = lt.judge_texts(rows, lt.language_identifier())
    rates = lt.pass_rates(judged, ["language"])
    assert rates["language"].tolist() == ["fr", "de"]
    assert rates["line_rate"].between(0, 1).all()


def test_a_mask_is_tuned_and_shipped_both_ways(case: Case, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    pairs = [question_pair(question) for question in load_questions("bundled", ["fr"])["fr"][:3]]
    heads = case.heads.specific["fr"]
    tuned = lt.tune_mask(case.model, pairs, heads, epochs=2, learning_rate=0.05, progress=False)
    changed = tuned.factors != 1
    assert {lt.Head(*place) for place in changed.nonzero().tolist()} == set(heads)
    before = lt.target_losses(case.model, pairs, progress=False).mean()
    assert lt.target_losses(case.model, pairs, tuned.mask, progress=False).mean() < before

    ids = torch.tensor([tokenizer_of(case.model)(pairs[0][0])["input_ids"][:60]])
    attended = torch.ones_like(ids)
    with torch.no_grad(), lt.masked(case.model, tuned.mask):
        expected = full_logits(case.model, ids, attended)
    plain = logits(case.hf, ids)
    assert (expected - plain).abs().max() > 1e-3
    adapter = lt.export_ia3(tuned, str(case.folder), tmp_path / "adapter")
    fresh = AutoModelForCausalLM.from_pretrained(case.folder, attn_implementation="eager")
    adapted = peft.PeftModel.from_pretrained(fresh, adapter).eval()
    torch.testing.assert_close(logits(adapted, ids), expected, rtol=0, atol=1e-4)
    folded = lt.export_folded(tuned, str(case.folder), tmp_path / "folded")
    alone = AutoModelForCausalLM.from_pretrained(folded, attn_implementation="eager").eval()
    torch.testing.assert_close(logits(alone, ids), expected, rtol=0, atol=1e-4)
    assert AutoTokenizer.from_pretrained(folded)(pairs[0][0])["input_ids"][:60] == ids[0].tolist()
    # What was shipped can be loaded here again, and tested like any other model.
    again = lt.load_model(str(folded))
    with torch.no_grad():
        torch.testing.assert_close(full_logits(again, ids, attended), expected, rtol=0, atol=1e-4)
