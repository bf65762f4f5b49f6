"""Effects by position: they add up to the head's taylor score, whatever the batch; patterns and effects keep."""

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import REQUIRED
from torch import nn

import lahis_tl as lt
from lahis_tl.errors import CorpusError

TEXTS = {
    "en": ["the cat is in the house", "the dog", "here is the cat in the house the dog"],
    "fr": ["le chat dort la maison", "la maison dort le chat le chat", "le chat"],
}
CORPUS = lt.load_corpus(TEXTS, min_chars=1)


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
@pytest.mark.parametrize("name", REQUIRED)
def test_positions_add_up_to_taylor(
    tiny: Callable[..., nn.Module], name: str, backend: str
) -> None:
    model = tiny(name, backend)
    ids = {"a": [[5, 9, 3, 17, 4, 8], [7, 2, 11]], "b": [[3, 3, 12, 6]]}
    effects = lt.token_effects(model, ids)
    taylor = lt.score(lt.head_gradients(model, ids, progress=False), "taylor")
    for code, rows in ids.items():
        assert [e.shape[2] for e in effects[code]] == [len(row) for row in rows]
        total = torch.stack([e.sum(-1) for e in effects[code]]).mean(0)
        torch.testing.assert_close(total, taylor[code], rtol=1e-4, atol=1e-6)


def test_the_last_position_has_no_effect_and_batches_do_not_matter(speaker: nn.Module) -> None:
    together = lt.token_effects(speaker, CORPUS)
    alone = lt.token_effects(speaker, CORPUS, batch_tokens=2)
    for code in CORPUS.languages:
        for a, b in zip(together[code], alone[code], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
            assert (a[..., -1] == 0).all(), "nothing is predicted from the last token"
            assert (a[..., :-1] != 0).any()


def test_tokens_are_named_and_results_come_back_as_they_were(
    speaker: nn.Module, tmp_path: Path
) -> None:
    effects = lt.token_effects(speaker, CORPUS)
    table = effects.to_dataframe("L1H2")
    assert "".join(table.query("language == 'fr' and text == 2")["token"]).split()[-2:] == [
        "le",
        "chat",
    ]
    assert table["effect"].iloc[3] == effects["en"][0][1, 2, 3]
    again = lt.load(effects.save(tmp_path / "effects"), speaker)
    pd.testing.assert_frame_equal(again.to_dataframe("L1H2"), table)
    patterns = lt.attention_patterns(speaker, CORPUS)
    back = lt.load(patterns.save(tmp_path / "patterns"), speaker)
    for code, texts in patterns.patterns.items():
        for a, b in zip(texts, back[code], strict=True):
            assert torch.equal(a, b)
    assert back.tokens == {c: [list(t) for t in texts] for c, texts in patterns.tokens.items()}


def test_patterns_are_those_of_single_heads(speaker: nn.Module) -> None:
    patterns = lt.attention_patterns(speaker, CORPUS, max_tokens=None)
    tokens, pattern = lt.head_pattern(speaker, TEXTS["fr"][1], "L2H1")
    assert patterns.tokens["fr"][1] == tokens
    torch.testing.assert_close(patterns["fr"][1][2, 1].float(), pattern, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(
        patterns["en"][0].float().sum(-1),
        torch.ones(patterns["en"][0].shape[:3]),
        atol=4e-3,
        rtol=0,
    )


def test_a_long_text_is_cut_and_what_is_missing_is_named(speaker: nn.Module) -> None:
    assert lt.attention_patterns(speaker, CORPUS, max_tokens=3)["en"][0].shape[-1] == 3
    with pytest.raises(KeyError, match="no effects for 'de'; there are en, fr"):
        lt.token_effects(speaker, CORPUS)["de"]
    with pytest.raises(KeyError, match="no patterns for 'de'; there are en, fr"):
        lt.attention_patterns(speaker, CORPUS)["de"]
    with pytest.raises(IndexError):
        lt.token_effects(speaker, CORPUS).to_dataframe("L99H0")
    with pytest.raises(CorpusError, match="at least 2 are needed"):
        lt.token_effects(speaker, {"en": [[5]]})
