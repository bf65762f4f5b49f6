"""What a run will take is known before it; recomputing takes less and changes nothing."""

from collections.abc import Callable

import pytest
import torch
from conftest import REQUIRED
from torch import nn

import lahis_tl as lt
from lahis_tl import losses
from lahis_tl.access import Unembedding
from lahis_tl.losses import chunked_nll
from lahis_tl.memory import LiveMemory

BACKENDS = ("hooked", "bridge")


def texts(n: int, length: int) -> dict[str, list[list[int]]]:
    generator = torch.Generator().manual_seed(0)
    return {"en": torch.randint(3, 64, (n, length), generator=generator).tolist()}


def test_live_memory_counts_storages_once_and_forgets_the_dead() -> None:
    with LiveMemory() as memory:
        whole = torch.zeros(1000)
        view = whole[:10]
        assert (memory.live, memory.peak) == (4000, 4000)
        other = whole + 1
        del whole, other
        assert (memory.live, memory.peak) == (4000, 8000), "the view keeps its storage"
        del view
        assert memory.live == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", REQUIRED)
def test_the_estimate_is_what_the_run_holds(
    tiny: Callable[..., nn.Module], name: str, backend: str
) -> None:
    model = tiny(name, backend, "float32")
    estimate = lt.memory_estimate(model, max_tokens=80, batch_tokens=400)
    assert estimate.batch == (5, 80)
    with LiveMemory() as memory:
        lt.head_gradients(model, texts(5, 80), batch_tokens=400, progress=False)
    assert estimate.needed == pytest.approx(memory.peak, rel=0.15)
    parameters = sum(p.nbytes for p in model.parameters())
    assert parameters * 0.8 < estimate.weights < parameters * 2
    assert estimate.total == estimate.weights + estimate.needed
    assert estimate.fits


def test_the_estimate_says_its_parts_and_refuses_nothing_to_predict(llama: nn.Module) -> None:
    said = str(lt.memory_estimate(llama, max_tokens=500, batch_tokens=64))
    assert "1 x 96 tokens" in said, "the context is the longest text"
    for word in ("weights", "activations", "loss", "free"):
        assert word in said
    of_texts = lt.memory_estimate(
        llama, {**texts(3, 20), "fr": texts(2, 30)["en"]}, batch_tokens=64
    )
    assert of_texts.batch == (2, 30)
    uneven = {"en": [[5] * 12] + [[5] * 10] * 30}
    dearest = lt.memory_estimate(llama, uneven, batch_tokens=23)
    assert dearest.batch == (2, 10)
    with pytest.raises(ValueError, match="max_tokens=1"):
        lt.memory_estimate(llama, max_tokens=1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", REQUIRED)
def test_recomputing_changes_nothing_but_the_memory(
    tiny: Callable[..., nn.Module], name: str, backend: str
) -> None:
    model = tiny(name, backend, "float32")
    ids = texts(4, 90)
    lt.head_gradients(
        model, ids, progress=False
    )  # the first pass makes tables of positions (ALiBi)
    with LiveMemory() as kept:
        plain = lt.head_gradients(model, ids, progress=False)
    with lt.recomputed(model), LiveMemory() as less:
        again = lt.head_gradients(model, ids, progress=False)
    assert torch.equal(again["en"], plain["en"])
    assert torch.equal(again.losses["en"], plain.losses["en"])
    assert less.peak < 0.8 * kept.peak, (
        "of three layers one, on its way back, and what lies between"
    )
    with LiveMemory() as after:
        lt.head_gradients(model, ids, progress=False)
    assert after.peak == kept.peak, "the model is as it was"


def test_recomputing_serves_tuning_and_leaves_generation_alone(speaker: nn.Module) -> None:
    pairs = [("The capital of France is", " Paris"), ("A cat is", " an animal")]
    heads = lt.HeadSet(lt.grid_of(speaker), ["L0H1", "L2H3"])
    plain = lt.tune_mask(speaker, pairs, heads, epochs=2, progress=False)
    with lt.recomputed(speaker):
        again = lt.tune_mask(speaker, pairs, heads, epochs=2, progress=False)
        text = lt.generate(speaker, "A cat", max_new_tokens=4, progress=False).texts
    assert torch.equal(again.factors, plain.factors)
    assert text == lt.generate(speaker, "A cat", max_new_tokens=4, progress=False).texts


def test_no_block_of_logits_outlives_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    vocab, width, block = 1000, 4, 16
    monkeypatch.setattr(losses, "_BLOCK", block * vocab)
    hidden = torch.randn(5 * block, width, requires_grad=True)
    weight = torch.randn(vocab, width)
    with LiveMemory() as memory:
        chunked_nll(hidden, torch.zeros(5 * block, dtype=torch.long), Unembedding(weight))
    assert memory.peak < 2.2 * block * vocab * 4
