"""A mask shipped: with peft alone, or transformers alone, the logits are those under the mask."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_gguf import write_gguf
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import lahis_tl as lt
from lahis_tl.access import full_logits, grid_of
from lahis_tl.export import MASK_FILE, export_folded, export_ia3, output_projections, pull, push
from lahis_tl.tuning import TunedMask

NAMES = [
    "llama",
    "mistral",
    "cohere",
    "qwen2",
    "qwen3",
    "gemma2",
    "gpt2",
    "gptneox",
    "bloom",
    "phi3",
]
IDS = torch.tensor([[5, 9, 31, 8, 40, 12, 7, 22, 33], [3, 60, 21, 13, 9, 50, 44, 18, 27]])


def a_mask(grid: lt.HeadGrid) -> lt.HeadMask:
    factors = torch.ones(grid.shape)
    factors[0, 1], factors[2, 3], factors[2, 0] = 0.0, 2.5, 0.7
    return lt.HeadMask(factors)


@pytest.fixture(scope="module")
def masked_logits(tiny: Callable[..., nn.Module]) -> Callable[[str], torch.Tensor]:
    def run(name: str) -> torch.Tensor:
        model = tiny(name, "auto", "float32")
        with torch.no_grad(), lt.masked(model, a_mask(grid_of(model))):
            return full_logits(model, IDS, torch.ones_like(IDS))

    return run


@pytest.mark.parametrize("name", NAMES)
def test_folded_with_transformers_alone(
    checkpoint: Callable[..., Path], masked_logits, tmp_path: Path, name: str
) -> None:
    source = checkpoint(name)
    before = {p.name: p.read_bytes() for p in source.iterdir()}
    folder = export_folded(a_mask(lt.HeadGrid(3, 4)), str(source), tmp_path / "folded")
    hf = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        found = hf(IDS).logits
    assert (found - masked_logits(name)).abs().max() <= 1e-4
    assert {p.name: p.read_bytes() for p in source.iterdir()} == before, "the original is untouched"
    plain = AutoModelForCausalLM.from_pretrained(source).state_dict()
    projections = dict(output_projections(hf, lt.HeadGrid(3, 4)))
    for key, value in hf.state_dict().items():
        weight_of_projection = key.removesuffix(".weight") in projections and key.endswith("weight")
        if not weight_of_projection:
            assert torch.equal(value, plain[key]), f"{key} is not to change, biases included"


@pytest.mark.parametrize("name", NAMES)
def test_adapter_with_peft_alone(
    checkpoint: Callable[..., Path], masked_logits, tmp_path: Path, name: str
) -> None:
    peft = pytest.importorskip("peft")
    source = checkpoint(name)
    folder = export_ia3(a_mask(lt.HeadGrid(3, 4)), str(source), tmp_path / "adapter")
    hf = AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager")
    adapted = peft.PeftModel.from_pretrained(hf, folder).eval()
    with torch.no_grad():
        found = adapted(IDS).logits
    assert (found - masked_logits(name)).abs().max() <= 1e-4
    config = json.loads((folder / "adapter_config.json").read_text())
    assert len(config["target_modules"]) == 2, "only layers that the mask changes"


def test_greedy_generations_are_equal_token_for_token(
    checkpoint: Callable[..., Path], tiny: Callable[..., nn.Module], tmp_path: Path
) -> None:
    source, model = checkpoint("llama"), tiny("llama", "auto", "float32")
    mask = a_mask(grid_of(model))
    folder = export_folded(mask, str(source), tmp_path / "folded")
    hf, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    prompt = "le chat the cat"
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    whole = hf.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0
    )[0, ids.shape[1] :].tolist()
    found = lt.generate(model, prompt, mask, max_new_tokens=12, progress=False)[0]
    assert list(found.tokens) == whole[: len(found.tokens)]
    assert len(found.tokens) >= len(whole) - 1


def test_folding_shards_and_keeps_the_tied_embedding(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source = checkpoint("qwen2", tie_word_embeddings=True)
    folder = export_folded(
        a_mask(lt.HeadGrid(3, 4)), str(source), tmp_path / "folded", max_shard_size="20KB"
    )
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    hf = AutoModelForCausalLM.from_pretrained(folder)
    assert hf.get_output_embeddings().weight is hf.get_input_embeddings().weight
    model = lt.load_model(str(source))
    with torch.no_grad(), lt.masked(model, a_mask(grid_of(model))):
        expected = full_logits(model, IDS, torch.ones_like(IDS))
    assert (hf.eval()(IDS).logits - expected).abs().max() <= 1e-4


def test_half_precision_is_rounded_once(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = checkpoint("llama")
    folder = export_folded(
        a_mask(lt.HeadGrid(3, 4)), str(source), tmp_path / "folded", dtype="bfloat16"
    )
    weight = (
        AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        .model.layers[2]
        .self_attn.o_proj.weight
    )
    plain = (
        AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
        .model.layers[2]
        .self_attn.o_proj.weight
    )
    assert weight.dtype == torch.bfloat16
    assert torch.equal(weight[:, 24:32], (plain[:, 24:32].float() * 2.5).to(torch.bfloat16))


def test_a_gguf_file_can_be_folded(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    gguf = tmp_path / "tiny.gguf"
    write_gguf(AutoModelForCausalLM.from_pretrained(checkpoint("llama")), gguf)
    model = lt.load_model(str(gguf))
    grid = grid_of(model)
    mask = lt.HeadMask.scaling([grid.head(1)], 2.0, grid)
    hf = AutoModelForCausalLM.from_pretrained(export_folded(mask, str(gguf), tmp_path / "folded"))
    ids = IDS % hf.config.vocab_size
    with torch.no_grad(), lt.masked(model, mask):
        expected = full_logits(model, ids, torch.ones_like(ids))
    assert (hf.eval()(ids).logits - expected).abs().max() <= 1e-4


def test_what_cannot_be_exported_is_named(
    checkpoint: Callable[..., Path], tiny: Callable[..., nn.Module], tmp_path: Path
) -> None:
    source, grid = str(checkpoint("llama")), lt.HeadGrid(3, 4)
    there = tmp_path / "there"
    there.mkdir()
    (there / "precious").write_text("mine")
    for export in (export_ia3, export_folded):
        with pytest.raises(FileExistsError, match="nothing was written"):
            export(a_mask(grid), source, there)
        with pytest.raises(
            lt.ModelError, match=r"mask is for 2 layers × 4 heads, but .* 3 layers × 4 heads"
        ):
            export(lt.HeadMask.ones(lt.HeadGrid(2, 4)), source, tmp_path / "new")
        with pytest.raises(ValueError, match="row for each text"):
            export(lt.HeadMask.ones(grid, texts=2), source, tmp_path / "new")
        broken = TunedMask(torch.full(grid.shape, torch.nan), lt.HeadSet(grid, ["L0H0"]))
        with pytest.raises(ValueError, match="finite"):
            export(broken, source, tmp_path / "new")
        with pytest.raises(lt.ModelError):
            export(a_mask(grid), str(tmp_path / "nowhere"), tmp_path / "new")
    with pytest.raises(ValueError, match="nothing to export"):
        export_ia3(lt.HeadMask.ones(grid), source, tmp_path / "new")
    assert [p.name for p in there.iterdir()] == ["precious"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["there"], "nothing half-written stays"


def test_a_mask_tuned_on_another_model_is_refused(
    checkpoint: Callable[..., Path], tiny: Callable[..., nn.Module], tmp_path: Path
) -> None:
    model = tiny("llama", "auto", "float32")
    card = {"model": lt.card_of(model)}
    tuned = TunedMask(
        a_mask(grid_of(model)).factors, lt.HeadSet(grid_of(model), ["L0H1"]), card=card
    )
    assert export_folded(tuned, str(checkpoint("llama")), tmp_path / "right").is_dir()
    half = TunedMask(
        tuned.factors, tuned.heads, card={"model": {**card["model"], "dtype": "bfloat16"}}
    )
    for mask in (tuned, half):
        with pytest.raises(lt.ModelError, match="tuned on another model"):
            export_ia3(mask, str(checkpoint("qwen2")), tmp_path / "wrong")
    with pytest.raises(lt.ModelError, match="tuned on another model"):
        export_folded(tuned, str(checkpoint("qwen2")), tmp_path / "wrong")


def test_an_interrupted_export_leaves_nothing(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("lahis_tl.export._describe", fail)
    with pytest.raises(OSError, match="no space"):
        export_folded(a_mask(lt.HeadGrid(3, 4)), str(checkpoint("llama")), tmp_path / "folded")
    assert list(tmp_path.iterdir()) == []


def test_the_readme_tells_what_it_is(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = export_ia3(a_mask(lt.HeadGrid(3, 4)), str(checkpoint("llama")), tmp_path / "adapter")
    text = (folder / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: peft")
    assert "3 attention heads rescaled" in text
    assert "L2H3 × 2.5" in text
    assert float(TunedMask.load(folder / MASK_FILE).factors[2, 3]) == 2.5


def test_push_and_pull_by_a_stand_in_for_the_hub(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    calls = []

    class Api:
        def __init__(self, token: str | None):
            calls.append(("token", token))

        def create_repo(self, repository: str, **options: object) -> None:
            calls.append(("create", repository, options))

        def upload_folder(self, **options: object) -> None:
            calls.append(("upload", options))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **options: str(tmp_path / name)
    )
    folder = export_ia3(a_mask(lt.HeadGrid(3, 4)), str(checkpoint("llama")), tmp_path / "adapter")
    assert push(folder, "me/mask") == "https://huggingface.co/me/mask"
    assert calls[1] == ("create", "me/mask", {"private": True, "exist_ok": True})
    assert calls[2] == ("upload", {"repo_id": "me/mask", "folder_path": str(folder)})
    assert pull("me/mask") == tmp_path / "me/mask"
    with pytest.raises(FileNotFoundError, match="export a mask first"):
        push(tmp_path / "none", "me/mask")
