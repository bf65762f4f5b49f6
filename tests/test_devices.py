"""Models placed by a device map, and quantised ones, as far as a CPU allows."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers
from conftest import ARCHITECTURES

import lahis_tl as lt
from lahis_tl.errors import ModelError


def test_a_device_map_gives_the_same_gradients(
    checkpoint: Callable[..., Path], token_ids: dict[str, list[list[int]]]
) -> None:
    folder = str(checkpoint("llama"))
    whole = lt.load_model(folder, backend="bridge")
    names = ("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head")
    places = {f"model.layers.{i}": "cpu" for i in range(3)} | dict.fromkeys(names, "cpu")
    for device in (places, "auto"):
        mapped = lt.load_model(folder, device=device)
        assert hasattr(mapped, "original_model"), "a bridge on every version"
        found, expected = (
            lt.head_gradients(model, token_ids, progress=False) for model in (mapped, whole)
        )
        assert torch.equal(found["fr"], expected["fr"])


def test_what_only_a_bridge_can_do_is_said(checkpoint: Callable[..., Path]) -> None:
    folder = str(checkpoint("llama"))
    with pytest.raises(ValueError, match="cannot have a device map"):
        lt.load_model(folder, device="auto", backend="hooked")
    with pytest.raises(ValueError, match="cannot have quantised weights"):
        lt.load_model(folder, quantization="4bit", backend="hooked")
    with pytest.raises(ValueError, match="quantization '2bit' is not one of"):
        lt.load_model(folder, quantization="2bit")


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_quantised_models_are_scored(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        **{**ARCHITECTURES["llama"][1], "hidden_size": 128, "intermediate_size": 128}
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    ids = {"en": torch.randint(3, 64, (4, 40)).tolist()}
    whole = lt.head_gradients(lt.load_model(str(tmp_path), backend="bridge"), ids, progress=False)
    packed = lt.load_model(str(tmp_path), quantization="8bit")
    assert any(not p.is_floating_point() for p in packed.parameters())
    found = lt.head_gradients(packed, ids, progress=False)
    both = torch.stack([found["en"].flatten(), whole["en"].flatten()])
    assert torch.corrcoef(both)[0, 1] > 0.9
    # On a CPU the products of 4 bits pass no gradient on: the self-test sees it.
    with pytest.raises(ModelError, match=r"the gradient of the head mask is 0\.0"):
        lt.load_model(str(tmp_path), quantization="4bit")
