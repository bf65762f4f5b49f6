"""Adapters of ``peft`` trained on the same pairs, as a baseline for tuned masks."""

import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import lahis_tl as lt
from lahis_tl.access import LensModel
from lahis_tl.models.sources import open_source
from lahis_tl.pairs import encode_pairs, pad_pairs
from lahis_tl.questions import Question, answer_scores, question_pair

# Learning rates that suit each, as in their papers.
RATES = {"ia3": 3e-3, "lora": 2e-4}


def adapter_answers(
    model: LensModel,
    adapter: str,
    train: Sequence[Question],
    valid: Sequence[Question],
    test: Sequence[Question],
    epochs: int,
    max_new_tokens: int,
    seed: int,
    batch_size: int = 4,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Train an adapter with peft's own settings, keep its best epoch on validation, answer the test questions.

    Args:
        model: whose checkpoint is loaded afresh, in float32, for the adapter.

    Returns:
        the rows of ``analyses.xquad_mask.answers``, and parameters and seconds.

    Raises:
        ValueError: an unknown adapter, or peft is not installed.
    """
    if adapter not in RATES:
        raise ValueError(f"adapter {adapter!r} is not one of {', '.join(RATES)}")
    try:
        import peft
    except ImportError as error:
        raise ValueError(
            "adapters need a package that is not installed: pip install peft"
        ) from error
    card = lt.card_of(model)
    local = Path(card["name"]).expanduser().exists() or "/" not in card["name"]
    source = open_source(
        card["name"],
        dtype=torch.float32,
        device=torch.device("cpu"),
        revision=None if local else card.get("revision"),
        trust_remote_code=False,
    )
    kind: Any = peft.IA3Config if adapter == "ia3" else peft.LoraConfig
    torch.manual_seed(seed)
    adapted: Any = peft.get_peft_model(source.hf, kind(task_type="CAUSAL_LM"))
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=RATES[adapter], weight_decay=0.0)
    pairs, held_out = (
        encode_pairs(model, [question_pair(q) for q in part]) for part in (train, valid)
    )
    order, start = random.Random(seed), time.perf_counter()
    best, kept, least = _copies(trained), 0, _mean(adapted, held_out)
    for epoch in range(1, epochs + 1):
        shuffled = order.sample(pairs, len(pairs))
        for first in range(0, len(shuffled), batch_size):
            _losses(adapted, shuffled[first : first + batch_size]).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        loss = _mean(adapted, held_out)
        if loss < least:
            best, kept, least = _copies(trained), epoch, loss
    seconds = time.perf_counter() - start
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(best[name])
        rows = [_answer(adapted, source.tokenizer, model, q, max_new_tokens) for q in test]
    size = sum(p.numel() for p in trained.values())
    return rows, {"parameters": size, "seconds": seconds, "kept_epoch": kept}


def _copies(trained: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trained.items()}


def _answer(
    adapted: Any, tokenizer: Any, model: LensModel, question: Question, max_new_tokens: int
) -> dict[str, Any]:
    prompt, target = question_pair(question)
    (pair,) = encode_pairs(model, [(prompt, target.rstrip("\n"))])
    ids = torch.tensor([pair.ids[: pair.n_prompt]])
    whole = adapted.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
    )
    text = tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True).split("\n")[0]
    row = {"id": question.id, "paragraph": question.paragraph, "text": text}
    return row | {"nll": float(_losses(adapted, [pair])[0])} | answer_scores(text, question)


@torch.no_grad()
def _mean(adapted: Any, pairs: Sequence[Any]) -> float:
    return sum(float(_losses(adapted, [pair])[0]) for pair in pairs) / len(pairs)


def _losses(adapted: Any, pairs: Sequence[Any]) -> torch.Tensor:
    """Mean NLL of each target's tokens."""
    ids, mask, wanted = pad_pairs(pairs)
    logits = adapted(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
    nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    return (nll * wanted).sum(1) / wanted.sum(1)
