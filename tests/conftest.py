"""Models that every test file may ask for: one to work out by hand, tiny random ones of nine architectures."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import json
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from playwright.sync_api import sync_playwright
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import PreTrainedTokenizerFast

import lahis_tl as lt
from lahis_tl.models import transformer_lens_version

# The models are too small to share out: one thread a test process.
torch.set_num_threads(1)

GOLDEN = Path(__file__).parent / "golden"
HOOKED_LINE = transformer_lens_version().major < 4
VOCAB, D_MODEL, N_LAYERS, N_HEADS = 64, 32, 3, 4

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": D_MODEL,
    "intermediate_size": 40,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": N_HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
}
_OLD_SHAPE = {"vocab_size": VOCAB, "n_embd": D_MODEL, "n_layer": N_LAYERS, "n_head": N_HEADS}
# name → (class, options); attention windows are shorter than the texts, so that they matter.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", _SHAPE),
    "mistral": ("Mistral", _SHAPE | {"sliding_window": 4}),
    "cohere": ("Cohere", _SHAPE | {"logit_scale": 0.25, "use_qk_norm": False}),
    "qwen2": ("Qwen2", _SHAPE),
    "qwen3": ("Qwen3", _SHAPE | {"head_dim": 16}),
    "gemma": ("Gemma", _SHAPE | {"head_dim": 8}),
    "gemma2": (
        "Gemma2",
        _SHAPE | {"head_dim": 16, "sliding_window": 4, "query_pre_attn_scalar": 16},
    ),
    "gemma3": (
        "Gemma3",
        _SHAPE | {"head_dim": 16, "sliding_window": 4, "query_pre_attn_scalar": 16},
    ),
    "olmo2": ("Olmo2", _SHAPE | {"num_key_value_heads": N_HEADS}),
    "phi3": ("Phi3", _SHAPE | {"pad_token_id": 0}),
    "gpt2": ("GPT2", _OLD_SHAPE | {"n_positions": 96}),
    "gptneox": ("GPTNeoX", {k: v for k, v in _SHAPE.items() if k != "num_key_value_heads"}),
    "bloom": (
        "Bloom",
        {"vocab_size": VOCAB, "hidden_size": D_MODEL, "n_layer": N_LAYERS, "n_head": N_HEADS},
    ),
}
# The nine that must work on every supported version and class.
REQUIRED = ["llama", "mistral", "cohere", "qwen2", "qwen3", "gemma2", "gpt2", "gptneox", "bloom"]


def build_hf(family: str, options: dict[str, Any], seed: int = 0) -> Any:
    """A random Hugging Face model whose heads, norms and biases all matter."""
    suffix = "TextConfig" if family == "Gemma3" else "Config"
    config = getattr(transformers, f"{family}{suffix}")(
        **options, bos_token_id=1, eos_token_id=2, attn_implementation="eager"
    )
    names = {"GPT2": "GPT2LMHeadModel"}
    torch.manual_seed(seed)
    model = getattr(transformers, names.get(family, f"{family}ForCausalLM"))(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.2)
            elif parameter.ndim == 1:  # norms; those of Gemma are offsets from 1
                parameter.add_(torch.randn_like(parameter) * 0.2)
            else:
                parameter.mul_(6)
    model.tie_weights()
    assert sum(p.numel() for p in model.parameters()) < 100_000, "a tiny model should be tiny"
    return model.eval()


@cache
def _train_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=["<unk>", "<s>", "</s>"])
    tokenizer.train_from_iterator(
        ["le chat the cat der hund dort here la maison house is in"], trainer
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A saved tiny checkpoint: ``checkpoint("llama")``, or with options that differ from the table's."""

    @cache
    def make(name: str, changes: str = "{}") -> Path:
        family, options = ARCHITECTURES[name]
        folder = tmp_path_factory.mktemp("models") / name
        build_hf(family, options | json.loads(changes)).save_pretrained(folder)
        _train_tokenizer().save_pretrained(folder)
        return folder

    return lambda name, **changes: make(name, json.dumps(changes))


@pytest.fixture(scope="session")
def tiny(checkpoint: Callable[..., Path]) -> Callable[..., nn.Module]:
    """A loaded tiny model: ``tiny("llama", "bridge")``; skipped where the version cannot have it."""

    @cache
    def load(name: str, backend: str = "auto", dtype: str = "float64") -> nn.Module:
        skip_unless_possible(name, backend)
        return lt.load_model(str(checkpoint(name)), dtype=dtype, backend=backend)

    return load


def skip_unless_possible(name: str, backend: str) -> None:
    if backend == "hooked" and not HOOKED_LINE:
        pytest.skip("transformer-lens 4 has no HookedTransformer")
    if backend == "bridge" and name == "cohere" and HOOKED_LINE:
        pytest.skip("the bridge of transformer-lens 3.9 computes Cohere wrongly and is refused")


@pytest.fixture(scope="session")
def llama(tiny: Callable[..., nn.Module]) -> nn.Module:
    return tiny("llama")


@pytest.fixture(scope="session")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    """A tiny random Llama that reads any text: its byte-level tokenizer is trained on the bundled texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    data = Path(lt.__file__).parent / "data"
    texts = [(data / "transfer.json").read_text(), (data / "parallel" / "en.jsonl").read_text()]
    english = json.loads(texts[0])["languages"]["en"]["relations"].values()
    # Often enough that the answers begin with tokens of more than the space before them.
    texts += [" " + word for relation in english for word in relation["answers"].values()] * 500
    tokenizer.train_from_iterator(texts, trainer)
    folder = tmp_path_factory.mktemp("models") / "speaker"
    options = _SHAPE | {"vocab_size": 700, "max_position_embeddings": 512, "num_attention_heads": 8}
    build_hf("Llama", options).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return lt.load_model(str(folder))


@pytest.fixture
def token_ids() -> dict[str, list[list[int]]]:
    """Texts of unequal lengths in two "languages"."""
    generator = torch.Generator().manual_seed(1)

    def text(length: int) -> list[int]:
        return torch.randint(3, VOCAB, (length,), generator=generator).tolist()

    return {"en": [text(n) for n in (9, 5, 12)], "fr": [text(n) for n in (7, 12)]}


@pytest.fixture(scope="session")
def golden() -> dict[str, Any]:
    return json.loads((GOLDEN / "golden.json").read_text())


@pytest.fixture(scope="session")
def golden_model() -> nn.Module:
    return lt.load_model(str(GOLDEN / "tiny-llama"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("-m"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="slow: run with -m slow"))


BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(
    BROWSER is None, reason="needs Chromium (Debian: apt install chromium)"
)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A headless Chromium, driven by playwright."""
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield found
        found.close()
