"""Attention mass: spans of characters become spans of tokens, in any script; mass sums to 1."""

from collections.abc import Callable

import pytest
import torch
from conftest import REQUIRED
from tokenizers import Tokenizer, decoders, models
from torch import nn
from transformers import PreTrainedTokenizerFast

import lahis_tl as lt
from lahis_tl.access import grid_of, tokenizer_of
from lahis_tl.attention import AttentionMass, attention_mass, token_spans
from lahis_tl.errors import ModelError
from lahis_tl.patterns import head_pattern, readable_tokens

TEXTS = ["le chat the cat der hund is in", "the house", "maison la dort here the cat in la"]
SPANS = [{"a": (0, 7)}, {"a": (0, 3)}, {"a": (7, 14)}]


class HandMade:
    """A tokenizer whose tokens are written out: pieces and where they lie."""

    is_fast = True

    def __init__(self, offsets: list[tuple[int, int]]):
        self.offsets = offsets

    def __call__(self, text: str, **options: object) -> dict[str, list]:
        return {"input_ids": list(range(len(self.offsets))), "offset_mapping": self.offsets}


@pytest.mark.parametrize(
    ("text", "offsets", "span", "expected"),
    [
        # BOS, "Le", " chat", " dort", ".": the space before a word belongs to its token.
        ("Le chat dort.", [(0, 0), (0, 2), (2, 7), (7, 12), (12, 13)], (3, 7), (2, 3)),
        ("Le chat dort.", [(0, 0), (0, 2), (2, 7), (7, 12), (12, 13)], (0, 7), (1, 3)),
        # Chinese, no spaces; 学 is split over two byte tokens that both say where it lies.
        ("我在学校。", [(0, 1), (1, 2), (2, 3), (2, 3), (3, 4), (4, 5)], (2, 4), (2, 5)),
        # Hindi: a consonant and its vowel sign in tokens of one, two and three bytes.
        ("मैं घर", [(0, 1), (0, 1), (1, 2), (1, 3), (3, 4), (4, 5), (5, 6)], (0, 3), (0, 4)),
        # A token across the border belongs where its last character lies.
        ("ab cd", [(0, 1), (1, 4), (4, 5)], (0, 2), (0, 1)),
        ("ab cd", [(0, 1), (1, 4), (4, 5)], (3, 5), (1, 3)),
    ],
)
def test_token_spans_by_hand(text, offsets, span, expected) -> None:
    assert token_spans(HandMade(offsets), text, {"x": span}) == {"x": expected}


@pytest.mark.parametrize(
    "text", ["Alice は教師です。The door.", "मेरा नाम Anna है। Das Wetter.", "ฉันชื่อ Emma 🙂 oui"]
)
def test_spans_partition_the_tokens_of_a_real_tokenizer(speaker: nn.Module, text: str) -> None:
    tokenizer = tokenizer_of(speaker)
    n = len(tokenizer(text)["input_ids"])
    for cut in range(1, len(text)):
        spans = token_spans(tokenizer, text, {"left": (0, cut), "right": (cut, len(text))})
        assert spans["left"][1] == spans["right"][0]
        assert (spans["left"][0], spans["right"][1]) == (0, n)
        left = tokenizer.decode(tokenizer(text)["input_ids"][: spans["left"][1]])
        assert text[:cut].startswith(left), "whole characters, and none beyond the border"
        upto = tokenizer.decode(tokenizer(text)["input_ids"][: spans["left"][1] + 4])
        assert len(upto) > cut or upto == text, (
            "the next character's tokens (up to four) lie beyond it"
        )


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
@pytest.mark.parametrize("name", REQUIRED)
def test_mass_is_the_sum_of_the_pattern(
    tiny: Callable[..., nn.Module], name: str, backend: str
) -> None:
    model = tiny(name, backend)
    grid = grid_of(model)
    mask = lt.HeadMask(torch.rand(3, *grid.shape, generator=torch.Generator().manual_seed(0)) * 2)
    found = attention_mass(model, TEXTS, SPANS, mask, progress=False)
    assert found.parts == ("start", "a", "rest")
    torch.testing.assert_close(found.mass.sum(-1), torch.ones(3, *grid.shape), atol=1e-5, rtol=0)
    for i, text in enumerate(TEXTS):
        start, end = token_spans(tokenizer_of(model), text, SPANS[i])["a"]
        for head in ("L0H1", "L2H3"):
            _, pattern = head_pattern(model, text, head, lt.HeadMask(mask.factors[i]))
            torch.testing.assert_close(pattern.sum(-1), torch.ones(len(pattern)), atol=1e-5, rtol=0)
            last = pattern[-1]
            layer, index = int(head[1]), int(head[3])
            assert float(found["start"][i, layer, index]) == pytest.approx(float(last[0]), abs=1e-5)
            inside = float(
                last[max(start, 1) : end].sum()
            )  # the first position is "start" whatever the span
            assert float(found["a"][i, layer, index]) == pytest.approx(inside, abs=1e-5)


def test_a_mask_of_ones_changes_no_attention_and_zeros_do(llama: nn.Module) -> None:
    plain = attention_mass(llama, TEXTS, SPANS, progress=False)
    ones = attention_mass(llama, TEXTS, SPANS, lt.HeadMask.ones(grid_of(llama)), progress=False)
    assert torch.equal(plain.mass, ones.mass)
    off = lt.HeadMask.scaling(["L0H0", "L0H1"], 0.0, grid_of(llama))
    moved = attention_mass(llama, TEXTS, SPANS, off, progress=False)
    assert torch.equal(moved.mass[:, 0], plain.mass[:, 0]), (
        "a layer's own attention is before its mask"
    )
    assert not torch.allclose(moved.mass[:, 1], plain.mass[:, 1])


def test_sinks_and_the_table_and_the_disk(tmp_path) -> None:
    mass = torch.tensor(
        [[[[0.95, 0.05, 0.0], [0.2, 0.5, 0.3]]], [[[0.97, 0.0, 0.03], [0.1, 0.6, 0.3]]]]
    )
    found = AttentionMass(("start", "fr", "rest"), mass, {"model": {"name": "x"}})
    assert found.sinks().labels == ["L0H0"]
    assert found.to_dataframe()["fr"].tolist() == pytest.approx([0.025, 0.55])
    again = lt.load(found.save(tmp_path / "mass"))
    assert torch.equal(again.mass, mass)
    assert again.parts == found.parts
    with pytest.raises(KeyError, match="no part 'de'"):
        found["de"]


def test_readable_tokens_keep_the_spaces_that_single_tokens_lose() -> None:
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "▁Le": 1, "▁chat": 2}, unk_token="<unk>"))
    steps = [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    assert fast.decode([2]) == "chat"
    assert readable_tokens(fast, [1, 2, 2]) == ["Le", " chat", " chat"]


def test_readable_tokens_show_split_characters_once(speaker: nn.Module) -> None:
    tokenizer = tokenizer_of(speaker)
    text = "Ein 🙂 für ฉัน"
    ids = tokenizer(text)["input_ids"]
    shown = readable_tokens(tokenizer, ids)
    assert len(shown) == len(ids)
    assert "".join(piece for piece in shown if piece != "·") == text


@pytest.mark.parametrize(
    ("spans", "match"),
    [
        ([{"a": (0, 2)}], "as many spans"),
        ([{"a": (0, 2)}, {"b": (0, 2)}, {"a": (0, 2)}], "same names"),
        ([{"start": (0, 2)}] * 3, "call a span otherwise"),
        ([{"a": (0, 500)}] * 3, "not within the text"),
        ([{"a": (2, 2)}] * 3, "not within the text"),
        ([{"a": (0, 5), "b": (0, 5)}] * 3, "overlaps"),
    ],
)
def test_bad_spans_are_named(llama: nn.Module, spans: list, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        attention_mass(llama, TEXTS, spans, progress=False)


def test_a_slow_tokenizer_is_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="a fast tokenizer is needed"):
        token_spans(Slow(), "text", {"a": (0, 2)})


def test_fused_attention_is_an_error(llama: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    silent = [nn.Identity() for _ in range(3)]
    for module in silent:
        module.add_hook = lambda hook, m=module: None  # type: ignore[attr-defined]
        module.fwd_hooks = [
            type("Entry", (), {"hook": type("H", (), {"remove": lambda self: None})()})()
        ]
    monkeypatch.setattr("lahis_tl.patterns.layer_points", lambda model, name: silent)
    with pytest.raises(ModelError, match="no attention pattern in layer 0"):
        attention_mass(llama, TEXTS, SPANS, progress=False)
