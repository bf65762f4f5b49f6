"""Every architecture, on both of TransformerLens's classes, against Hugging Face."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    ARCHITECTURES,
    HOOKED_LINE,
    N_HEADS,
    N_LAYERS,
    REQUIRED,
    VOCAB,
    build_hf,
    skip_unless_possible,
)
from hf_reference import logits, scaled_columns, text_losses
from tiny_gguf import write_gguf
from torch import nn
from transformers import AutoModelForCausalLM

import lahis_tl as lt
from lahis_tl.access import full_logits, head_points, is_bridge, unembedding_of
from lahis_tl.batches import make_batches
from lahis_tl.gradients import batch_gradients

BACKENDS = ["hooked", "bridge"]
CASES = [(name, backend) for name in ARCHITECTURES for backend in BACKENDS]
IDS = torch.randint(3, VOCAB, (2, 12), generator=torch.Generator().manual_seed(5))


def _variant(**changes: Any) -> dict[str, Any]:
    return ARCHITECTURES["llama"][1] | changes


def hf_of(folder: Path, dtype: torch.dtype = torch.float64) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")


def our_logits(model: nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return full_logits(model, ids, torch.ones_like(ids))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_auto_chooses_the_hooked_transformer_on_3_9_and_the_bridge_on_4(name, tiny):
    model = tiny(name)
    expected = "HookedTransformer" if HOOKED_LINE else "TransformerBridge"
    assert type(model).__name__ == expected
    assert lt.grid_of(model).shape == (N_LAYERS, N_HEADS)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())


def test_all_required_architectures_are_in_the_table():
    assert set(REQUIRED) <= set(ARCHITECTURES)


@pytest.mark.parametrize(("name", "backend"), CASES)
def test_logits_are_those_of_hugging_face(name, backend, tiny, checkpoint):
    model = tiny(name, backend)
    torch.testing.assert_close(
        our_logits(model), logits(hf_of(checkpoint(name)), IDS), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize(("name", "backend"), CASES)
def test_mask_equals_scaled_columns_of_the_output_projection(name, backend, tiny, checkpoint):
    model, hf = tiny(name, backend), hf_of(checkpoint(name))
    plain = our_logits(model)
    for factors in (
        torch.rand(N_LAYERS, N_HEADS, generator=torch.Generator().manual_seed(2)) * 2,
        lt.HeadMask.scaling(["L1H2"], 0.0, lt.grid_of(model)).factors,
    ):
        with lt.masked(model, factors):
            ours = our_logits(model)
        with scaled_columns(hf, factors):
            reference = logits(hf, IDS)
        torch.testing.assert_close(ours, reference, rtol=0, atol=1e-5)
        assert (ours - plain).abs().max() > 1e-3, "the mask should have changed something"
    torch.testing.assert_close(our_logits(model), plain, rtol=0, atol=0)


@pytest.mark.parametrize(("name", "backend"), CASES)
def test_mask_of_ones_changes_nothing(name, backend, tiny):
    model = tiny(name, backend)
    with lt.masked(model, torch.ones(N_LAYERS, N_HEADS, requires_grad=True)):
        ours = our_logits(model)
    torch.testing.assert_close(ours, our_logits(model), rtol=0, atol=0)


@pytest.mark.parametrize(("name", "backend"), CASES)
def test_losses_are_those_of_hugging_face(name, backend, tiny, checkpoint, token_ids):
    grads = lt.head_gradients(tiny(name, backend), token_ids, progress=False)
    for language, texts in token_ids.items():
        expected = text_losses(hf_of(checkpoint(name)), texts).float()
        torch.testing.assert_close(grads.losses[language], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "backend"), CASES)
def test_gradient_equals_finite_difference_of_every_head(name, backend, tiny, token_ids):
    model = tiny(name, backend)
    batch = make_batches({"en": token_ids["en"]}, 1000)[0]
    gradient, _ = batch_gradients(model, batch)
    # The bridge keeps norms and softmax in float32, which bounds what a small step can show.
    step, atol = (1e-2, 2e-4) if is_bridge(model) else (1e-4, 2e-6)
    for layer in range(N_LAYERS):
        for head in range(N_HEADS):
            losses = []
            for sign in (1, -1):
                mask = torch.ones(N_LAYERS, N_HEADS, dtype=torch.float64)
                mask[layer, head] += sign * step
                with lt.masked(model, mask), torch.no_grad():
                    losses.append(lt.text_nll(model, batch.ids, batch.attention_mask))
            slope = (losses[0] - losses[1]) / (2 * step)
            torch.testing.assert_close(
                gradient[:, layer, head].double(), slope, rtol=2e-3, atol=atol
            )


@pytest.mark.parametrize(("name", "backend"), CASES)
def test_batched_and_padded_equals_one_by_one(name, backend, tiny, token_ids):
    model = tiny(name, backend)
    together = lt.head_gradients(model, token_ids, batch_tokens=1000, progress=False)
    alone = lt.head_gradients(model, token_ids, batch_tokens=2, progress=False)
    for language in token_ids:
        torch.testing.assert_close(together[language], alone[language], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(together.losses[language], alone.losses[language])
        assert together[language].abs().max() > 1e-3


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize(("name", "backend"), CASES)
def test_generation_under_a_mask_is_hugging_faces(name, backend, use_cache, tiny, checkpoint):
    model, hf = tiny(name, backend), hf_of(checkpoint(name))
    prompt = IDS[:1, :6]
    factors = torch.rand(N_LAYERS, N_HEADS, generator=torch.Generator().manual_seed(3)) * 2
    options = {"max_new_tokens": 8, "do_sample": False}
    with lt.masked(model, factors):
        ours = model.generate(
            prompt, **options, stop_at_eos=False, use_past_kv_cache=use_cache, verbose=False
        )
    with scaled_columns(hf, factors):
        attended = torch.ones_like(prompt)
        reference = hf.generate(
            prompt, attention_mask=attended, **options, eos_token_id=None, pad_token_id=0
        )
    assert ours.tolist() == reference.tolist()


@pytest.mark.parametrize(("name", "backend"), CASES)
def test_chunked_loss_knows_the_unembedding(name, backend, tiny):
    assert unembedding_of(tiny(name, backend)) is not None


@pytest.mark.skipif(not HOOKED_LINE, reason="HookedTransformer only")
@pytest.mark.parametrize("name", ["llama", "cohere", "mistral"])
def test_hooked_weights_are_views_in_the_layout_that_needs_no_copies(name, tiny):
    model = tiny(name, "hooked")
    block = model.blocks[0]
    assert block.attn.W_O.permute(2, 0, 1).reshape(D := model.cfg.d_model, -1).is_contiguous()
    assert block.attn.W_Q.permute(0, 2, 1).is_contiguous()
    assert block.mlp.W_in.T.is_contiguous()
    assert D == 32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_other_dtypes_pass_the_checks_and_keep_the_mask_gradient_in_float32(dtype, tiny, token_ids):
    model = tiny("llama", "auto", dtype)
    assert str(next(model.parameters()).dtype) == f"torch.{dtype}"
    low = lt.head_gradients(model, token_ids, progress=False)
    high = lt.head_gradients(tiny("llama"), token_ids, progress=False)
    assert low["en"].dtype == torch.float32
    spread = high["en"].std()
    assert (low["en"] - high["en"]).abs().max() < {"float32": 1e-4, "bfloat16": 0.5}[dtype] * spread


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_half_precision_hook_returns_its_dtype(backend, tiny):
    model = tiny("llama", backend, "bfloat16")
    with lt.masked(model, torch.full((N_LAYERS, N_HEADS), 0.5)):
        assert our_logits(model).dtype == torch.bfloat16


# --- traps of the two classes -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
            "rotary scaling",
        ),
        ("llama", {"attention_bias": True}, "attention_bias"),
        ("llama", {"mlp_bias": True}, "mlp_bias"),
        ("llama", {"head_dim": 16}, "head_dim"),
        ("olmo2", {"num_key_value_heads": 2}, "grouped-query"),
    ],
)
def test_what_hooked_transformer_would_misload_becomes_a_bridge(name, changes, reason, checkpoint):
    folder = checkpoint(name, **changes)
    model = lt.load_model(str(folder))
    assert is_bridge(model)
    torch.testing.assert_close(
        our_logits(model), logits(hf_of(folder, torch.float32), IDS), rtol=0, atol=1e-5
    )
    if HOOKED_LINE:
        with pytest.raises(lt.ModelError, match=reason):
            lt.load_model(str(folder), backend="hooked")


VARIANTS = {
    "phi": ("Phi", _variant(num_key_value_heads=N_HEADS, partial_rotary_factor=0.5)),
    "gpt2-inner": ("GPT2", ARCHITECTURES["gpt2"][1] | {"n_inner": 48}),
    "bloom-post": (
        "Bloom",
        ARCHITECTURES["bloom"][1] | {"apply_residual_connection_post_layernorm": True},
    ),
    "gptneo-inner": (
        "GPTNeo",
        {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "intermediate_size": 40,
            "attention_types": [[["global", "local"], 1]],
            "max_position_embeddings": 96,
        },
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_that_the_converters_do_not_know_are_bridges(name, tmp_path, token_ids):
    family, options = VARIANTS[name]
    build_hf(family, options).save_pretrained(tmp_path)
    model = lt.load_model(str(tmp_path))
    reference = logits(hf_of(tmp_path, torch.float32), IDS)
    torch.testing.assert_close(our_logits(model), reference, rtol=0, atol=1e-4)
    assert lt.head_gradients(model, token_ids, progress=False)["en"].abs().max() > 0


@pytest.mark.skipif(not HOOKED_LINE, reason="fixed in 4.2")
def test_cohere_as_a_bridge_of_3_9_is_refused(checkpoint):
    with pytest.raises(lt.ModelError, match=r"computes CohereForCausalLM wrongly"):
        lt.load_model(str(checkpoint("cohere")), backend="bridge")
    with pytest.raises(lt.ModelError, match="per-head normalisation"):
        lt.load_model(str(checkpoint("cohere", use_qk_norm=True)))


@pytest.mark.skipif(HOOKED_LINE, reason="bridges before 4.2 refuse it")
def test_cohere_with_query_key_norm_is_a_bridge_on_4(checkpoint):
    assert is_bridge(lt.load_model(str(checkpoint("cohere", use_qk_norm=True))))


def test_a_wrong_conversion_is_refused_with_the_figures(checkpoint, monkeypatch):
    import lahis_tl.models as loading

    def damaged(hf: Any, *rest: Any) -> Any:
        hf.model.layers[1].self_attn.q_proj.weight.data *= 1.5
        return real(hf, *rest)

    which = "build_hooked" if HOOKED_LINE else "build_bridge"
    real = getattr(loading, which)
    monkeypatch.setattr(loading, which, damaged)
    with pytest.raises(
        lt.ModelError, match=r"not the model that Hugging Face computes: logits differ by [\d.]+"
    ):
        lt.load_model(str(checkpoint("llama")))


@pytest.mark.parametrize("word", ["llama", "gemma"])
def test_a_folder_named_like_another_family_loads(word, checkpoint, tmp_path):
    folder = tmp_path / f"my-{word}-finetune"
    folder.symlink_to(checkpoint("qwen2"))
    assert lt.card_of(lt.load_model(str(folder)))["architecture"] == "Qwen2ForCausalLM"


def test_the_tokenizer_is_the_checkpoints_own(checkpoint, tiny):
    model = tiny("llama")
    text = "le chat is here"
    own = lt.tokenizer_of(model)
    assert own(text)["input_ids"] == own(text, add_special_tokens=False)["input_ids"]
    # TransformerLens's own reading of strings gives the same ids: no BOS is made up
    assert model.to_tokens(text)[0].tolist() == own(text)["input_ids"]
    assert own.pad_token is None, "the caller's tokenizer is not written to"


def test_string_generation_under_a_mask(tiny):
    model = tiny("llama")
    mask = lt.HeadMask.scaling(["L0H0", "L1H3", "L2H1"], 0.0, lt.grid_of(model))
    options = {"max_new_tokens": 6, "do_sample": False, "verbose": False, "stop_at_eos": False}
    with lt.masked(model, mask):
        ablated = model.generate("le chat", **options)
    assert ablated.startswith("le chat")
    assert ablated != model.generate("le chat", **options)


def test_a_users_own_bridge_and_hooked_transformer_are_accepted(checkpoint, token_ids):
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    hf = hf_of(checkpoint("llama"), torch.float32)
    bridge = build_bridge_from_module(hf, "LlamaForCausalLM", hf_config=hf.config, tokenizer=None)
    expected = lt.head_gradients(lt.load_model(str(checkpoint("llama"))), token_ids, progress=False)
    found = lt.head_gradients(bridge, token_ids, progress=False)
    torch.testing.assert_close(found["en"], expected["en"], rtol=1e-4, atol=1e-6)
    assert found.card["model"]["loaded_by"] == "user"
    with pytest.raises(lt.ModelError, match="has no tokenizer"):
        lt.head_gradients(bridge, lt.load_corpus("bundled", ["en"], n=1), progress=False)


@pytest.mark.skipif(not HOOKED_LINE, reason="HookedTransformer only")
def test_a_users_processed_hooked_transformer_is_accepted_with_a_warning_and_a_note():
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cfg = HookedTransformerConfig(
            n_layers=2, d_model=8, n_ctx=16, d_head=4, n_heads=2, d_vocab=11, act_fn="relu", seed=0
        )
        model = HookedTransformer(cfg)
        model.process_weights_()
    assert not model.blocks[0].attn.b_V.any()
    with pytest.warns(UserWarning, match="value biases"):
        grads = lt.head_gradients(model, {"en": [[1, 2, 3]]}, progress=False)
    assert "layer norm folded" in grads.card["model"]["weight_processing"]


# --- bad input ----------------------------------------------------------------------------------


def test_a_model_without_per_head_output_is_refused(tmp_path):
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, state_size=4)
    MambaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(lt.ModelError, match=r"per-head output|cannot wrap"):
        lt.load_model(str(tmp_path))


def test_something_else_is_refused():
    with pytest.raises(lt.ModelError, match="Linear is neither a HookedTransformer nor"):
        head_points(nn.Linear(2, 2))


def test_nan_weights_are_refused(checkpoint, tmp_path):
    hf = hf_of(checkpoint("llama"), torch.float32)
    hf.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    hf.save_pretrained(tmp_path)
    with pytest.raises(lt.ModelError, match="NaN or infinity"):
        lt.load_model(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no/such-model", "Hugging Face hub was asked"),
        ("missing.gguf", "there is no GGUF file"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(lt.ModelError, match=message):
        lt.load_model(name)


def test_bad_options(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="dtype 'int8' is not one of"):
        lt.load_model("smollm2", dtype="int8")
    with pytest.raises(ValueError, match="backend 'x' is not one of"):
        lt.load_model(str(checkpoint("llama")), backend="x")
    with pytest.raises(lt.ModelError, match=r"holds no config\.json"):
        lt.load_model(str(tmp_path))


def test_damaged_gguf_files_are_refused(tmp_path):
    wrong, short = tmp_path / "wrong.gguf", tmp_path / "short.gguf"
    wrong.write_bytes(b"PK\x03\x04 something else")
    short.write_bytes(b"GGUF\x03\x00\x00\x00\x10\x00\x00\x00")
    with pytest.raises(lt.ModelError, match="is no GGUF file"):
        lt.load_model(str(wrong))
    with pytest.raises(lt.ModelError, match="damaged or cut short"):
        lt.load_model(str(short))


def test_the_card_tells_where_the_model_came_from(tiny):
    card = lt.card_of(tiny("llama"))
    assert card["architecture"] == "LlamaForCausalLM"
    assert card["weight_processing"] == "none"
    assert len(card["tokenizer_sha256"]) == 64
    assert card["checks"]["logits"]["max"] < 1e-6
    assert json.dumps(card)


def test_a_revision_of_a_local_folder_is_refused(checkpoint):
    with pytest.raises(lt.ModelError, match="revision='abc' is for hub repositories"):
        lt.load_model(str(checkpoint("llama")), revision="abc")


@pytest.mark.parametrize("backend", BACKENDS)
def test_edited_or_converted_weights_are_used_at_once(backend, checkpoint, token_ids):
    skip_unless_possible("llama", backend)
    model = lt.load_model(str(checkpoint("llama")), backend=backend)
    before = lt.head_gradients(model, token_ids, progress=False)
    unembedding_of(model).weight.data.mul_(0.5)
    ids = torch.tensor([token_ids["en"][0]])
    own = model(ids, attention_mask=torch.ones_like(ids), return_type="loss")
    torch.testing.assert_close(lt.text_nll(model, ids, torch.ones_like(ids))[0], own)
    after = lt.head_gradients(model, token_ids, progress=False)
    assert (after.losses["en"] - before.losses["en"]).abs().max() > 0.01


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_trainable_model_of_the_user_is_left_as_it_was(backend, checkpoint, token_ids):
    skip_unless_possible("llama", backend)
    model = lt.load_model(str(checkpoint("llama")), backend=backend).requires_grad_(True)
    lt.head_gradients(model, token_ids, progress=False)
    lt.lahis_code(model, {"en": token_ids["en"]}, progress=False)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    ids = torch.tensor([token_ids["en"][0]])
    attended = torch.ones_like(ids)
    lt.text_nll(model, ids, attended).sum().backward()
    ours = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    model(ids, attention_mask=attended, return_type="loss").backward()
    theirs = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(ours) == len(theirs) > 10
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_a_gguf_file_loads_and_a_cut_one_is_refused(checkpoint, tmp_path):
    hf = hf_of(checkpoint("llama"), torch.float32)
    path = tmp_path / "tiny.gguf"
    write_gguf(hf, path)
    model = lt.load_model(str(path))
    assert type(model).__name__ == ("HookedTransformer" if HOOKED_LINE else "TransformerBridge")
    torch.testing.assert_close(our_logits(model), logits(hf, IDS), rtol=0, atol=1e-4)
    assert lt.card_of(model)["revision"].startswith("gguf sha256:")
    cut = tmp_path / "cut.gguf"
    for share in (0.3, 0.9):
        content = path.read_bytes()
        cut.write_bytes(content[: int(share * len(content))])
        with pytest.raises(lt.ModelError, match=r"cannot load .*cut\.gguf.*damaged or cut short"):
            lt.load_model(str(cut))
