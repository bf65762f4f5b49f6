"""The logit lens: its last layer is the model's own prediction, and TransformerLens's own lens agrees."""

from collections.abc import Callable

import pytest
import torch
from conftest import REQUIRED
from torch import nn

import lahis_tl as lt
from lahis_tl.access import full_logits, grid_of, is_bridge, tokenizer_of
from lahis_tl.lens import logit_lens

TEXTS = ["le chat the cat der hund is in", "the house", "maison la dort here the cat in la"]
TARGETS = [[3, 40], [17, 9], [22, 5]]


def ids_of(model: nn.Module, text: str) -> torch.Tensor:
    return torch.tensor([tokenizer_of(model)(text)["input_ids"]])


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
@pytest.mark.parametrize("name", REQUIRED)
def test_the_last_layer_is_the_prediction(
    tiny: Callable[..., nn.Module], name: str, backend: str
) -> None:
    model = tiny(name, backend)
    mask = torch.rand(3, *grid_of(model).shape, generator=torch.Generator().manual_seed(0)) * 2
    found = logit_lens(model, TEXTS, TARGETS, lt.HeadMask(mask))
    assert found.shape == (3, grid_of(model).n_layers, 2)
    for i, text in enumerate(TEXTS):
        ids = ids_of(model, text)
        with lt.masked(model, mask[i]):
            nats = full_logits(model, ids, torch.ones_like(ids))[0, -1].float().log_softmax(-1)
        torch.testing.assert_close(found[i, -1], nats[TARGETS[i]], atol=1e-4, rtol=1e-4)


def test_earlier_layers_read_the_residual_stream(llama: nn.Module) -> None:
    """The plain way: TransformerLens's cache, its final norm and unembedding."""
    found = logit_lens(llama, TEXTS, TARGETS)
    for i, text in enumerate(TEXTS):
        _, cache = llama.run_with_cache(ids_of(llama, text))
        for layer in range(3):
            residual = cache[f"blocks.{layer}.hook_resid_post"]
            nats = llama.unembed(llama.ln_final(residual))[0, -1].float().log_softmax(-1)
            torch.testing.assert_close(found[i, layer], nats[TARGETS[i]], atol=1e-4, rtol=1e-4)


def test_transformer_lens_has_the_same_lens(llama: nn.Module) -> None:
    analysis = pytest.importorskip("transformer_lens.tools.analysis")
    if not hasattr(analysis, "logit_readout") or not is_bridge(llama):
        pytest.skip("this transformer-lens has no logit lens")
    found = logit_lens(llama, TEXTS[:1], TARGETS[:1])
    _, cache = llama.run_with_cache(ids_of(llama, TEXTS[0]))
    for layer in range(3):
        residual = cache[f"blocks.{layer}.hook_resid_post"][0, -1]
        read = analysis.logit_readout(
            llama, residual[None], targets=TARGETS[0], return_type="log_probs"
        )
        torch.testing.assert_close(found[0, layer], read.values[0].float(), atol=1e-4, rtol=1e-4)


def test_targets_must_fit(llama: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"2 rows of lengths \[2\]"):
        logit_lens(llama, TEXTS, TARGETS[:2])
    with pytest.raises(ValueError, match=r"lengths \[1, 2\]"):
        logit_lens(llama, TEXTS, [[1], [2, 3], [4]])
