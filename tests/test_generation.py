"""Decoding and generation: a prompt gets what it gets alone, cached or not, and masks act."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import REQUIRED
from torch import nn

import lahis_tl as lt
from lahis_tl.access import full_logits, grid_of
from lahis_tl.decoding import Decoder
from lahis_tl.errors import ArtifactError, ModelError
from lahis_tl.generation import choose_tokens
from lahis_tl.prompts import decoding_groups

PROMPTS = ["le chat the cat der hund is in", "the house", "maison la dort here the cat in la"]
IDS = [[5, 9, 31, 8, 40, 12, 7, 22, 33], [17, 4], [3, 60, 21, 13, 9, 50]]


@pytest.fixture
def llama(tiny: Callable[..., nn.Module]) -> nn.Module:
    """In float32: padded texts overflow in float64 on a bridge."""
    return tiny("llama", "auto", "float32")


def run(decoder: Decoder, tokens: torch.Tensor) -> torch.Tensor:
    """Logits after the prompts and after each forced token, [step, batch, vocab]."""
    return torch.stack([decoder.start(), *(decoder.step(row) for row in tokens)])


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
@pytest.mark.parametrize("name", [*REQUIRED, "gemma3", "olmo2", "phi3"])
def test_a_padded_row_decodes_as_alone_cached_or_not(
    tiny: Callable[..., nn.Module], name: str, backend: str
) -> None:
    model = tiny(name, backend, "float32")
    forced = torch.tensor([[11, 4, 35], [6, 44, 10], [52, 8, 19], [7, 7, 3], [29, 15, 41]])
    factors = torch.rand(3, *grid_of(model).shape, generator=torch.Generator().manual_seed(2)) * 2
    with lt.masked(model, factors):
        cached = run(Decoder(model, IDS), forced)
        uncached = run(Decoder(model, IDS, use_cache=False), forced)
    # The plain way: the model's own forward pass over each whole text, no padding.
    for row, ids in enumerate(IDS):
        whole = torch.tensor([[*ids, *forced[:, row].tolist()]])
        with lt.masked(model, factors[row]):
            alone = full_logits(model, whole, torch.ones_like(whole))[0, len(ids) - 1 :]
        torch.testing.assert_close(cached[:, row], alone.float(), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(uncached[:, row], alone.float(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.8}])
def test_batched_is_alone(
    tiny: Callable[..., nn.Module], backend: str, options: dict[str, float]
) -> None:
    model = tiny("llama", backend, "float32")
    options = {"max_new_tokens": 12, "progress": False, **options}
    together = lt.generate(model, PROMPTS, **options)
    alone = [lt.generate(model, prompt, **options)[0] for prompt in PROMPTS]
    assert list(together) == alone
    assert list(lt.generate(model, PROMPTS, batch_tokens=1, **options)) == alone
    assert list(lt.generate(model, PROMPTS, use_cache=False, **options)) == alone


def test_greedy_text_is_the_one_of_hugging_face(
    checkpoint: Callable[..., Path], llama: nn.Module
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = checkpoint("llama")
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for prompt, found in zip(
        PROMPTS, lt.generate(llama, PROMPTS, max_new_tokens=15, progress=False), strict=True
    ):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        whole = hf.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=15,
            do_sample=False,
            pad_token_id=0,
        )[0, ids.shape[1] :].tolist()
        if 2 in whole:
            whole = whole[: whole.index(2)]
        assert list(found.tokens) == whole
        assert found.ended == (len(whole) < 15)


def test_overflow_is_an_error_not_token_zero(tiny: Callable[..., nn.Module]) -> None:
    model = tiny("llama", "bridge", "float64")  # its masks of padded texts overflow in float32
    with pytest.raises(ModelError, match="load it in float32"):
        lt.generate(model, PROMPTS, progress=False)


def test_a_mask_of_ones_changes_no_token_and_zeros_do(llama: nn.Module) -> None:
    grid = grid_of(llama)
    options = {"max_new_tokens": 12, "progress": False}
    plain = lt.generate(llama, PROMPTS, **options)
    assert list(lt.generate(llama, PROMPTS, lt.HeadMask.ones(grid), **options)) == list(plain)
    off = lt.HeadMask(torch.zeros(grid.shape))
    assert lt.generate(llama, PROMPTS, off, **options).texts != plain.texts


def test_each_prompt_has_its_own_mask_whatever_the_order_of_batches(llama: nn.Module) -> None:
    grid = grid_of(llama)
    masks = [None, lt.HeadMask.scaling(["L1H2", "L0H1"], 0.0, grid), lt.HeadMask.ones(grid)]
    options = {"max_new_tokens": 12, "progress": False}
    found = lt.generate(llama, PROMPTS, masks, **options)
    for prompt, mask, row in zip(PROMPTS, masks, found, strict=True):
        assert lt.generate(llama, prompt, mask, **options)[0] == row
    stacked = torch.stack([torch.ones(grid.shape) if m is None else m.factors for m in masks])
    assert list(lt.generate(llama, PROMPTS, lt.HeadMask(stacked), **options)) == list(found)
    assert list(lt.generate(llama, PROMPTS, stacked, **options)) == list(found)
    with pytest.raises(ValueError, match="the mask is for 2 layers"):
        lt.generate(llama, PROMPTS, torch.ones(2, 4), **options)


def test_mean_ablation_acts_in_generation(llama: nn.Module) -> None:
    grid = grid_of(llama)
    means = torch.full((*grid.shape, 8), 3.0)
    heads = lt.HeadSet(grid, ["L0H0", "L1H1", "L2H3"])
    options = {"max_new_tokens": 8, "progress": False}
    filled = lt.generate(llama, PROMPTS, lt.HeadMask.mean_ablation(heads, means), **options)
    zeroed = lt.generate(llama, PROMPTS, lt.HeadMask.scaling(heads, 0.0), **options)
    assert filled.texts != zeroed.texts


def test_steer_shows_both_sides(llama: nn.Module) -> None:
    grid = grid_of(llama)
    heads = lt.HeadSet(grid, ["L0H1", "L1H2", "L2H0"])
    found = lt.steer(llama, PROMPTS, heads, [1.0, 0.0, 4.0], max_new_tokens=12, progress=False)
    assert found.plain.texts[0] == found.steered.texts[0]
    assert (
        found.changed
        == sum(a != b for a, b in zip(found.plain.texts, found.steered.texts, strict=True))
        > 0
    )
    assert list(found.to_dataframe()) == ["prompt", "plain", "steered"]
    by_label = lt.steer(
        llama, PROMPTS[1], ["L0H1", "L1H2", "L2H0"], 0.0, max_new_tokens=12, progress=False
    )
    assert by_label.steered[0] == found.steered[1]
    with pytest.raises(ValueError, match="3 prompts, but 3 sets of heads and 2 factors"):
        lt.steer(llama, PROMPTS, heads, [0.0, 1.0])


def test_streaming_gives_the_text_piece_by_piece(llama: nn.Module) -> None:
    pieces: dict[int, list[str]] = {0: [], 1: [], 2: []}
    found = lt.generate(
        llama, PROMPTS, max_new_tokens=10, progress=False, stream=lambda i, s: pieces[i].append(s)
    )
    assert ["".join(pieces[i]) for i in range(3)] == found.texts
    assert max(map(len, pieces.values())) > 1


def test_stop_cuts_the_text(llama: nn.Module) -> None:
    options = {"max_new_tokens": 20, "temperature": 1.0, "progress": False}
    whole = lt.generate(llama, PROMPTS[0], **options)[0]
    word = whole.text[4:6]
    cut = lt.generate(llama, PROMPTS[0], stop=word, **options)[0]
    assert cut.text == whole.text.split(word)[0]
    assert cut.ended
    assert len(cut.tokens) < len(whole.tokens)


def test_sampling_follows_the_distribution() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(4000, 4)
    uniforms = torch.linspace(0, 1, 4001)[:-1]
    counts = torch.bincount(choose_tokens(logits, 1.0, 1.0, uniforms), minlength=4) / 4000
    torch.testing.assert_close(counts, torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=2e-3, rtol=0)
    nucleus = torch.bincount(choose_tokens(logits, 1.0, 0.75, uniforms), minlength=4) / 4000
    torch.testing.assert_close(nucleus, torch.tensor([0.625, 0.375, 0, 0]), atol=2e-3, rtol=0)
    assert set(choose_tokens(logits, 0.0, 1.0, uniforms).tolist()) == {0}


def test_seeds_repeat_and_differ(llama: nn.Module) -> None:
    options = {"max_new_tokens": 12, "temperature": 1.5, "progress": False}
    first, again = (lt.generate(llama, [PROMPTS[0]] * 2, seed=3, **options) for _ in range(2))
    assert first.texts == again.texts
    assert first.texts[0] != first.texts[1], "the same prompt twice gives two samples"
    assert lt.generate(llama, PROMPTS[0], seed=4, **options).texts[0] not in first.texts


def test_batches_hold_like_lengths() -> None:
    assert decoding_groups([[1] * 5, [1] * 9, [1] * 6], 1, 14) == [[1], [2, 0]]
    assert decoding_groups([[1] * 5], 1, 1) == [[0]]


def test_generations_survive_the_disk(llama: nn.Module, tmp_path: Path) -> None:
    found = lt.generate(llama, PROMPTS, max_new_tokens=5, progress=False)
    path = found.save(tmp_path / "texts")
    assert list(lt.Generations.load(path)) == list(found)
    assert lt.Generations.load(path).card == found.card
    path.write_text(path.read_text().replace("chat", "chot"))
    with pytest.raises(ArtifactError, match="checksum"):
        lt.Generations.load(path)


@pytest.mark.parametrize(
    ("prompts", "options", "match"),
    [
        ([], {}, "no prompt"),
        (["le chat", ""], {}, r"prompt 1 \(''\) has no token"),
        (["le chat " * 60], {}, "exceeds the model's context of 96"),
        (["le"], {"max_new_tokens": 0}, "max_new_tokens=0"),
        (["le"], {"temperature": -1.0}, "temperature=-1.0"),
        (["le"], {"top_p": 0.0}, "top_p=0.0"),
        (["le"], {"stop": ""}, "empty string"),
        (["le", "la"], {"mask": [None]}, "1 masks for 2 prompts"),
    ],
)
def test_bad_input_is_named(
    llama: nn.Module, prompts: list[str], options: dict, match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        lt.generate(llama, prompts, **options)
