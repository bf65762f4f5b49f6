"""Our writing of the authors' procedures against what their own functions gave."""

from unittest.mock import patch

import pytest
import torch

import lahis_tl as lt
from analyses.benchmark import authors_pass
from lahis_tl import authors
from lahis_tl.authors import lahis_code, mean_exp_perplexity, soft_mask
from lahis_tl.heads import HeadSet, top_heads
from lahis_tl.pairs import EncodedPair

LANGUAGES = ["aa", "bb", "cc", "dd", "ee"]


@pytest.mark.parametrize("language", LANGUAGES)
def test_moving_mask_matrices_are_theirs(language, golden, golden_model):
    texts = golden["lahis"][language]["token_ids"]
    found = lahis_code(golden_model, {language: texts}, progress=False)
    expected = torch.tensor(golden["lahis"][language]["matrix"])
    torch.testing.assert_close(found[language], expected, rtol=1e-3, atol=0)


def test_an_interrupted_matrix_goes_on_with_the_next_language(golden, golden_model, tmp_path):
    texts = {code: golden["lahis"][code]["token_ids"][:6] for code in LANGUAGES[:3]}
    expected = lahis_code(golden_model, texts, progress=False)
    real, begun = authors._moving_mask_matrix, []

    def until_the_third(model, ids, language, progress):
        begun.append(language)
        if len(begun) == 3:
            raise KeyboardInterrupt
        return real(model, ids, language, progress)

    with patch.object(authors, "_moving_mask_matrix", until_the_third):
        with pytest.raises(KeyboardInterrupt):
            lahis_code(golden_model, texts, checkpoint=tmp_path, progress=False)
        found = lahis_code(golden_model, texts, checkpoint=tmp_path, progress=False)
    assert begun == [*LANGUAGES[:3], LANGUAGES[2]]
    assert torch.equal(found.values, expected.values)
    with pytest.raises(lt.ArtifactError, match="max_tokens was 2048, now 8"):
        lahis_code(golden_model, texts, max_tokens=8, checkpoint=tmp_path, progress=False)


@pytest.mark.parametrize("language", LANGUAGES)
def test_perplexities_are_theirs_to_the_last_place(language, golden, golden_model):
    texts = golden["lahis"][language]["token_ids"]
    grid = lt.grid_of(golden_model)
    count = int(grid.size * 0.25)
    top = top_heads(torch.tensor(golden["lahis"][language]["matrix"]), count)
    flat = {
        "ori": [],
        "full": top.flat_indices(),
        "specific": golden["heads"]["specific"][language][:count],
        "general": golden["heads"]["general"],
        "layer": range(grid.n_heads, 2 * grid.n_heads),
    }
    for condition, indices in flat.items():
        mask = lt.HeadMask.scaling(HeadSet(grid, map(grid.head, indices)), 0.0)
        if condition == "ori":
            mask = None
        found = mean_exp_perplexity(golden_model, texts, mask)
        assert round(found, 2) == golden["perplexity"][language][condition], condition


def test_the_fixed_mask_differs_from_the_moving_one(golden, golden_model):
    texts = {"aa": golden["lahis"]["aa"]["token_ids"]}
    fixed = lahis_code(golden_model, texts, moving_mask=False, progress=False)
    moving = lahis_code(golden_model, texts, progress=False)
    assert fixed.method == "lahis_code"
    assert (fixed["aa"] - moving["aa"]).abs().max() > 1


def test_the_tuned_mask_is_theirs(golden, golden_model):
    calls = golden["qa"]["token_ids"][
        :16
    ]  # prompt, prompt + answer; the second half is the second epoch
    pairs = [
        EncodedPair(tuple(whole), len(prompt))
        for prompt, whole in zip(calls[::2], calls[1::2], strict=True)
    ]
    grid = lt.grid_of(golden_model)
    heads = top_heads(torch.tensor(golden["lahis"]["aa"]["matrix"]), int(grid.size * 0.25))
    found = soft_mask(golden_model, pairs, heads)
    assert torch.equal(found, torch.tensor(golden["qa"]["mask"]))


def test_the_benchmarks_writing_of_the_procedure_agrees(golden):
    from conftest import GOLDEN
    from transformers import AutoModelForCausalLM

    hf = AutoModelForCausalLM.from_pretrained(GOLDEN / "tiny-llama", attn_implementation="eager")
    texts = golden["lahis"]["cc"]["token_ids"]
    found = authors_pass(hf.requires_grad_(False), texts)
    expected = torch.tensor(golden["lahis"]["cc"]["matrix"])
    torch.testing.assert_close(found, expected, rtol=5e-3, atol=0)
