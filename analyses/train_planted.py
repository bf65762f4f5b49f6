"""Trains the bundled model ``"planted"``, whose heads do what a plan says, and measures that they do.

One head follows each rule of the made-up languages of ``lahis_tl.planted``; at all other places, and
in all other languages, it should add nothing to the residual stream, and the heads without a rule
should add nothing anywhere. Four means see to that:

* *gates*: in training the output of a head is zeroed before it is added wherever the plan has no work
  for it, so that nothing can be learned to rely on it;
* *a penalty* on the squared length of what it would have added, relative to the residual stream (in
  absolute terms a model can escape it by shrinking the stream, and then works by whispers);
* *guidance*: a head at work is told which word to look at. Else it may settle on another word that
  has the same source, or on what an earlier head has fetched, and then that one is needed twice;
* *dropout* of whole heads, so that the model meets the loss of a head with a guess, as well in one
  language as in another, and not with a wrong answer.

Then each head is zeroed exactly, on texts that were not trained on, through the package's own mask.
Training fails if a planned head is not needed, or another one is.

    python -m analyses.train_planted                 # a few minutes on one core; writes the bundled folder
    python -m analyses.train_planted -o out/planted --seed 1
"""

import argparse
import json
import logging
import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import lahis_tl as lt
from lahis_tl.heads import Head, HeadGrid, HeadSet
from lahis_tl.planted import (
    FREE_TYPE,
    LANGUAGES,
    MAX_LENGTH,
    OWN_TYPE,
    draw_indices,
    offset_of,
    planted_corpus,
    planted_folder,
    vocabulary,
    word_type,
)

logger = logging.getLogger(__name__)

GRID = HeadGrid(n_layers=3, n_heads=8)
GENERAL = {"A": "L0H2", "B": "L1H5", "D": "L2H1"}  # type of the next word → head
SPECIFIC = {"qaa": "L0H6", "qab": "L1H0", "qac": "L1H3", "qad": "L2H4", "qae": "L2H7"}
SPECIAL = ("<unk>", "<s>")  # the second begins a text, would end one, and pads
BOS = 1
NEEDED, UNNEEDED = 0.1, 0.01  # nats a token, bounds on the effects
D_MODEL = 96
LENGTH = 48  # words a text in training


@dataclass(frozen=True)
class Schedule:
    """How long, how fast, and how hard the plan is enforced."""

    steps: int = 2000
    rows: int = 8  # texts of each language in a batch
    learning_rate: float = 3e-3
    penalty: float = 3.0  # nats for unplanned output as long as the residual stream
    guidance: float = 0.1  # weight of the attention's −log p of the right word
    dropout: float = 0.1  # share of heads that are zeroed in a text


def new_model(seed: int) -> LlamaForCausalLM:
    """The untrained model."""
    config = LlamaConfig(
        vocab_size=len(SPECIAL) + len(vocabulary()),
        hidden_size=D_MODEL,
        intermediate_size=2 * D_MODEL,
        num_hidden_layers=GRID.n_layers,
        num_attention_heads=GRID.n_heads,
        num_key_value_heads=GRID.n_heads,
        max_position_embeddings=MAX_LENGTH + 1,
        # Slow rotations are of no use at this length, and fast ones tell near places apart.
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        bos_token_id=BOS,
        eos_token_id=BOS,
        pad_token_id=BOS,  # its vector therefore stays 0: a head that looks there gives nothing
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    model.set_attn_implementation("eager")  # which gives the attention patterns
    return model


def new_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, and ``<s>`` before the first."""
    words = [*SPECIAL, *vocabulary()]
    tokenizer = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="<s> $A", special_tokens=[("<s>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="<s>",
        pad_token="<s>",
        model_max_length=MAX_LENGTH + 1,
    )


def planned(length: int = LENGTH) -> Bool[Tensor, "language pos layer head"]:
    """Where each head has work, by the token that is read; position 0 is ``<s>``, where none has.

    >>> at = planned()
    >>> at[0, 3].nonzero().tolist(), at[0, 2].nonzero().tolist()      # before a D, before qaa's C
    ([[2, 1]], [[0, 6]])
    """
    plan = torch.zeros(len(LANGUAGES), length + 1, *GRID.shape, dtype=torch.bool)
    for row, language in enumerate(LANGUAGES):
        for position in range(1, length + 1):
            kind = word_type(position)  # place 0 is position 1, so the next word's place is this
            label = SPECIFIC[language] if kind == OWN_TYPE else GENERAL.get(kind)
            if label is not None:
                layer, head = Head.parse(label)
                plan[row, position, layer, head] = True
    return plan


def sources(length: int = LENGTH) -> Int[Tensor, "language pos"]:
    """The position of the word that decides the next one; −1 where none does."""
    found = torch.full((len(LANGUAGES), length + 1), -1)
    for row, language in enumerate(LANGUAGES):
        for position in range(length + 1):
            kind = word_type(position)
            if kind != FREE_TYPE:
                found[row, position] = max(-1, position - offset_of(language, kind) + 1)
    return found.masked_fill(found < 1, -1)  # position 0 holds no word


def batch_of(key: str, rows: int) -> Int[Tensor, "text pos"]:
    """``rows`` texts of each language in turn; unlike the corpus each with draws of its own."""
    token = {word: index for index, word in enumerate([*SPECIAL, *vocabulary()])}
    texts = []
    for language in LANGUAGES:
        for row in range(rows):
            indices = draw_indices(language, f"train/{key}/{language}/{row}", LENGTH)
            words = [f"{language}.{word_type(place)}{i}" for place, i in enumerate(indices)]
            texts.append([BOS, *(token[word] for word in words)])
    return torch.tensor(texts)


class Gates:
    """Zeroes what heads give off the plan, and notes how much it would have been."""

    def __init__(self, plan: Bool[Tensor, "text pos layer head"]):
        self.plan = plan
        self.dropped = torch.zeros(len(plan), *GRID.shape, dtype=torch.bool)
        self.excess: list[Tensor] = []  # a number a layer

    @contextmanager
    def on(self, model: LlamaForCausalLM) -> Iterator["Gates"]:
        handles = []
        residual: dict[int, Tensor] = {}
        for index, block in enumerate(model.model.layers):
            layer: Any = block

            def note(module: nn.Module, args: tuple, index: int = index) -> None:
                residual[index] = args[0].detach().square().sum(-1)

            def gate(module: nn.Module, args: tuple, index: int = index) -> tuple[Tensor]:
                return (self._gate(args[0], module, residual[index], index),)

            handles.append(layer.input_layernorm.register_forward_pre_hook(note))
            handles.append(layer.self_attn.o_proj.register_forward_pre_hook(gate))
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def _gate(self, z: Tensor, projection: Any, residual: Tensor, layer: int) -> Tensor:
        plan = self.plan[:, :, layer]
        heads = z.unflatten(-1, (GRID.n_heads, -1))
        out = projection.weight.unflatten(1, (GRID.n_heads, -1))
        # |z W|² as z (W Wᵀ) zᵀ, which need not write to the stream.
        gram = torch.einsum("mhd,mhe->hde", out, out)
        added = (torch.einsum("bphd,hde->bphe", heads, gram) * heads).sum(-1)
        share = added / (residual[..., None] + 1e-4)
        self.excess.append(share.masked_fill(plan, 0.0).sum(-1).mean())
        closed = ~plan | self.dropped[:, None, layer]
        return heads.masked_fill(closed[..., None], 0.0).flatten(-2)


class Guide:
    """How far the heads at work look away from the words that decide: mean −log of the attention."""

    def __init__(self, plan: Bool[Tensor, "text pos layer head"], source: Int[Tensor, "text pos"]):
        at_work = (plan & (source >= 0)[..., None, None]).nonzero()
        self.layers = []
        for layer in range(GRID.n_layers):
            text, position, _, head = at_work[at_work[:, 2] == layer].unbind(1)
            self.layers.append((text, head, position, source[text, position]))

    def __call__(self, attentions: Sequence[Float[Tensor, "text head pos source"]]) -> Tensor:
        found = [pattern[at] for pattern, at in zip(attentions, self.layers, strict=True)]
        return -torch.cat(found).clamp_min(1e-6).log().mean()


def train(seed: int = 0, schedule: Schedule | None = None) -> LlamaForCausalLM:
    """Train the model to the plan; the same on the same machine for the same seed.

    One thread: the model is too small to share out, and sums then always run in the same order.
    """
    schedule = schedule or Schedule()
    torch.set_num_threads(1)
    model = new_model(seed)
    plan = planned().repeat_interleave(schedule.rows, 0)
    gates = Gates(plan)
    guide = Guide(plan, sources().repeat_interleave(schedule.rows, 0))
    optimiser = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.0)
    model.train()
    with gates.on(model):
        for step in range(schedule.steps):
            done = step / schedule.steps
            for group in optimiser.param_groups:
                group["lr"] = schedule.learning_rate * _pace(step, done)
            ids = batch_of(f"{seed}/{step}", schedule.rows)
            gates.excess.clear()
            gates.dropped = torch.rand(gates.dropped.shape) < schedule.dropout
            out = model(input_ids=ids, use_cache=False, output_attentions=True)
            nll = nn.functional.cross_entropy(
                out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
            )
            excess, astray = torch.stack(gates.excess).sum(), guide(out.attentions)
            penalty = schedule.penalty * min(1.0, 0.1 + 2 * done) * excess
            optimiser.zero_grad()
            (nll + penalty + schedule.guidance * astray).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            if step % 250 == 0 or step == schedule.steps - 1:
                figures = (nll.item(), excess.item(), astray.item())
                logger.info("step %d: %.3f nats, excess %.2g, astray %.2g", step, *figures)
    return model.eval()


def _pace(step: int, done: float) -> float:
    """The learning rate's share: up over 100 steps, then down along a cosine to 2 %."""
    return min(1.0, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


@torch.no_grad()
def measure(folder: Path, n: int = 200, seed: int = 1) -> Float[Tensor, "language layer head"]:
    """Rise of each language's mean loss in nats a token when a head is zeroed, on fresh texts."""
    model = lt.load_model(str(folder), device="cpu")
    tokenizer = lt.tokenizer_of(model)
    corpus = planted_corpus(n, seed=seed, length=LENGTH)
    effects = torch.zeros(len(LANGUAGES), *GRID.shape)
    for row, language in enumerate(LANGUAGES):
        ids = torch.tensor(tokenizer(list(corpus[language]))["input_ids"])
        attended = torch.ones_like(ids)
        plain = lt.text_nll(model, ids, attended).double().mean()
        for layer, head in (GRID.head(index) for index in range(GRID.size)):
            with lt.masked(model, lt.HeadMask.scaling([(layer, head)], 0.0, GRID)):
                without = lt.text_nll(model, ids, attended).double().mean()
            effects[row, layer, head] = without - plain
    return effects


def check(effects: Float[Tensor, "language layer head"]) -> tuple[float, float]:
    """The least effect of a planned head where it is needed, and the largest one elsewhere.

    Raises:
        ValueError: one of them is out of bounds, so the training did not succeed.
    """
    needed = planned().any(1)
    least, largest = float(effects[needed].min()), float(effects[~needed].abs().max())
    if least < NEEDED or largest > UNNEEDED:
        raise ValueError(
            f"the model does not follow the plan: needed heads have effects from {least:.4f} nats a token "
            f"(at least {NEEDED}), others up to {largest:.4f} (at most {UNNEEDED}); "
            "train longer or with another seed"
        )
    return least, largest


def truth_of(effects: Float[Tensor, "language layer head"], n: int, seed: int) -> dict[str, Any]:
    """What ``truth.json`` holds: plan and effects."""
    taken = {Head.parse(label) for label in (*GENERAL.values(), *SPECIFIC.values())}
    heads = (GRID.head(index) for index in range(GRID.size))
    silent = HeadSet(GRID, (head for head in heads if head not in taken))
    return {
        "n_layers": GRID.n_layers,
        "n_heads": GRID.n_heads,
        "languages": list(LANGUAGES),
        "specific": {language: [label] for language, label in SPECIFIC.items()},
        "general": list(GENERAL.values()),
        "silent": silent.labels,
        "effects_of": f"zero ablation, nats a token, planted_corpus({n}, seed={seed})",
        "effects": [[[round(x, 5) for x in row] for row in grid] for grid in effects.tolist()],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, save, measure, check, and write the truth beside the weights."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=planted_folder())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=Schedule.steps)
    parser.add_argument("-n", type=int, default=200, help="texts a language to measure on")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    with tempfile.TemporaryDirectory() as scratch:  # a model that fails replaces no other
        folder = Path(scratch)
        train(options.seed, Schedule(steps=options.steps)).save_pretrained(folder)
        new_tokenizer().save_pretrained(folder)
        effects = measure(folder, options.n, options.seed + 1)
        least, largest = check(effects)
        truth = truth_of(effects, options.n, options.seed + 1)
        (folder / "truth.json").write_text(json.dumps(truth) + "\n")
        options.output.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():
            (options.output / path.name).write_bytes(path.read_bytes())
    print(f"needed heads: {least:.3f} nats a token or more; all others: {largest:.5f} or less")


if __name__ == "__main__":
    main()
