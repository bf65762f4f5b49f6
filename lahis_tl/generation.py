"""Text generated under head masks: greedy or sampled, in batches, each prompt as if it were alone."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from lahis_tl.access import LensModel, end_tokens, grid_of, tokenizer_of
from lahis_tl.artifacts import Card
from lahis_tl.cards import card_of
from lahis_tl.decoding import Decoder
from lahis_tl.errors import ArtifactError
from lahis_tl.heads import HeadLike, HeadSet
from lahis_tl.masks import HeadMask, masked
from lahis_tl.processes import shared_out, shows
from lahis_tl.prompts import Masks, decoding_groups, mask_card, mask_hash, mask_rows, prompt_ids
from lahis_tl.records import load_records, save_records
from lahis_tl.shards import ShardStore


@dataclass(frozen=True)
class Generation:
    """What a model wrote after one prompt.

    Attributes:
        prompt, text: the latter without the prompt, cut by token index and free of special tokens.
        tokens: ids of the new tokens, the closing one not among them; all of a text that was cut at ``stop``.
        prompt_tokens: length of the prompt.
        ended: the model closed the text itself or reached ``stop``; else it was cut at the most allowed tokens.
    """

    prompt: str
    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    ended: bool


@dataclass(frozen=True, eq=False)
class Generations(Sequence[Generation]):
    """Generated texts in the order of their prompts.

    >>> found = generate(model, ["La ville de", "The city of"])       # doctest: +SKIP
    >>> found.texts, found[0].ended                                   # doctest: +SKIP
    """

    rows: tuple[Generation, ...]
    card: Card = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index):  # type: ignore[override]
        if isinstance(index, slice):
            return Generations(self.rows[index], self.card)
        return self.rows[index]

    def __repr__(self) -> str:
        first = f"; the first: {self.rows[0].text!r}" if self.rows else ""
        return f"Generations({len(self)}{first})"

    @property
    def texts(self) -> list[str]:
        return [row.text for row in self.rows]

    def to_dataframe(self) -> pd.DataFrame:
        """One row a prompt: prompt, text, new_tokens, prompt_tokens, ended."""
        return pd.DataFrame(
            [
                {
                    "prompt": row.prompt,
                    "text": row.text,
                    "new_tokens": len(row.tokens),
                    "prompt_tokens": row.prompt_tokens,
                    "ended": row.ended,
                }
                for row in self.rows
            ]
        )

    def save(self, path: str | Path) -> Path:
        """Write JSON lines, and the card with their checksum beside them; see ``save_records``."""
        return save_records(path, [asdict(row) for row in self.rows], self.card)

    @classmethod
    def load(cls, path: str | Path) -> "Generations":
        """Read what ``save`` wrote.

        Raises:
            ArtifactError: damaged or foreign.
        """
        records, card = load_records(path)
        try:
            rows = [Generation(**{**row, "tokens": tuple(row["tokens"])}) for row in records]
        except (KeyError, TypeError) as error:
            raise ArtifactError(f"{path} holds no generations: {error}") from error
        return cls(tuple(rows), card)


def generate(
    model: LensModel,
    prompts: Sequence[str] | str,
    mask: Masks = None,
    *,
    max_new_tokens: int = 40,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: str | None = None,
    use_cache: bool = True,
    batch_tokens: int = 4096,
    stream: Callable[[int, str], None] | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> Generations:
    """Let the model go on from prompts.

    >>> found = generate(model, ["La ville de Paris est"], max_new_tokens=20)           # doctest: +SKIP
    >>> off = HeadMask.scaling(heads.specific["fr"], 0.0)                                # doctest: +SKIP
    >>> generate(model, ["La ville de Paris est"], off).texts                            # doctest: +SKIP

    Prompts are padded on the left and run in batches; each gets what it gets alone, sampling included:
    its random numbers depend on the seed and the prompt (and on how often the prompt came before), not
    on its neighbours.

    Args:
        mask: one for all prompts; [text, layer, head], or a sequence, for a mask of each prompt's own.
        temperature: 0 takes the most probable token; above, tokens are sampled.
        top_p: sample among the fewest tokens that together have this probability.
        stop: cut a text before this string and go on no further.
        batch_tokens: most tokens, prompts and new ones together, in a batch.
        stream: called with a prompt's index and its new piece of text, whole characters, as it comes.
        checkpoint: a folder to which finished batches go, and from which an interrupted run goes on.

    Raises:
        ValueError: no prompt, an empty one, one too long for the context with the new tokens, a setting
            out of its range, or masks that do not fit the prompts or the model.
        ModelError: the model has no tokenizer.
        ArtifactError: ``checkpoint`` belongs to a run with other settings, or another run is writing to it.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    _check_settings(max_new_tokens, temperature, top_p, stop)
    tokenizer, ends = tokenizer_of(model), end_tokens(model)
    encoded = prompt_ids(model, prompts, max_new_tokens)
    mask_rows(model, mask, len(prompts), [])  # fails before anything is computed
    seen: Counter[str] = Counter()
    generators = []
    for prompt in prompts:
        key = f"{seed}/{seen[prompt]}/{prompt}".encode("utf-8", "replace")
        generators.append(
            torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key).digest()[:7], "big"))
        )
        seen[prompt] += 1
    writers = [
        _Writer(tokenizer, ends, index, stop, max_new_tokens, stream)
        for index in range(len(prompts))
    ]

    settings = {
        "mask": mask_card(mask),
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
        "stop": stop,
    }
    card = {"model": card_of(model), "settings": settings}
    known = {**card, "batch_tokens": batch_tokens, "mask_sha256": mask_hash(mask)}
    store = ShardStore(checkpoint, known, encoded)

    def steps_of(group: list[int]) -> Iterator[Int[Tensor, " batch"]]:
        """The token of every prompt, step by step, until all their writers are done."""
        chosen = mask_rows(model, mask, len(prompts), group)
        with nullcontext() if chosen is None else masked(model, chosen):
            decoder = Decoder(model, [encoded[i] for i in group], use_cache)
            logits = decoder.start()
            while True:
                uniforms = torch.stack([torch.rand((), generator=generators[i]) for i in group])
                tokens = choose_tokens(logits, temperature, top_p, uniforms)
                yield tokens.cpu()
                if all(writers[i].done for i in group):
                    return
                logits = decoder.step(tokens)

    def work(number: int, group: list[int]) -> list[tuple[int, Generation]]:
        part = store.read(number)
        taken = []
        for tokens in steps_of(group) if part is None else part["tokens"]:
            taken.append(tokens)
            for i, token in zip(group, tokens.tolist(), strict=True):
                writers[i].take(token)
        if part is None:
            store.write(number, {"tokens": torch.stack(taken)})
        return [(i, writers[i].generation(prompts[i], len(encoded[i]))) for i in group]

    rows: dict[int, Generation] = {}
    groups = decoding_groups(encoded, max_new_tokens, batch_tokens)
    with store, tqdm(total=len(prompts), unit="prompt", disable=not shows(progress)) as bar:
        for index, row in shared_out(groups, work):
            rows[index] = row
            bar.update()
    ordered = tuple(rows[i] for i in range(len(prompts)))
    return Generations(ordered, card)


@dataclass(frozen=True, eq=False)
class Steered:
    """What a model wrote with heads scaled, beside what it writes without."""

    plain: Generations
    steered: Generations

    def __repr__(self) -> str:
        return f"Steered({len(self.plain)} prompts, {self.changed} texts changed)"

    @property
    def changed(self) -> int:
        """How many texts differ."""
        pairs = zip(self.plain.texts, self.steered.texts, strict=True)
        return sum(a != b for a, b in pairs)

    def to_dataframe(self) -> pd.DataFrame:
        """One row a prompt: prompt, plain, steered."""
        return pd.DataFrame(
            {
                "prompt": [row.prompt for row in self.plain],
                "plain": self.plain.texts,
                "steered": self.steered.texts,
            }
        )

    def _repr_html_(self) -> str:
        return self.to_dataframe().to_html(index=False, escape=True)


def steer(
    model: LensModel,
    prompts: Sequence[str] | str,
    heads: HeadSet | Sequence[HeadLike] | Sequence[HeadSet],
    factor: float | Sequence[float] = 0.0,
    **options: Any,
) -> Steered:
    """Generate with heads suppressed (factor below 1) or enhanced (above), and without, side by side.

    >>> steer(model, "La ville de Paris est", heads.specific["fr"], 0.0).to_dataframe()   # doctest: +SKIP
    >>> each = [heads.specific["fr"], heads.specific["de"]]                               # doctest: +SKIP
    >>> steer(model, ["Le chat", "Die Katze"], each, [3.0, 0.0])                          # doctest: +SKIP

    Args:
        heads: one set (or labels such as ``["L12H3"]``) for all prompts, or a ``HeadSet`` for each.
        factor: one number, or one for each prompt.
        options: of ``generate``; ``stream`` is called for the steered texts.

    Raises:
        IndexError: a head is outside the model.
        ValueError: as many sets or factors as prompts are needed and others were given; or as ``generate``.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    members = list(heads)
    if not isinstance(heads, HeadSet) and members and isinstance(members[0], HeadSet):
        sets: list[Any] = members
    else:
        sets = [HeadSet(grid_of(model), heads)] * len(prompts)  # type: ignore[arg-type]
    if not members:
        raise ValueError("there is no head to scale")
    factors = [factor] * len(prompts) if isinstance(factor, (int, float)) else list(factor)
    if not len(sets) == len(factors) == len(prompts):
        raise ValueError(
            f"{len(prompts)} prompts, but {len(sets)} sets of heads and {len(factors)} factors: "
            "give one for all or one for each"
        )
    masks = [HeadMask.scaling(each, f) for each, f in zip(sets, factors, strict=True)]
    # The same prompt meets the same random numbers in both runs, so that only the mask differs.
    folder = options.pop("checkpoint", None)
    parts = [folder and Path(folder) / name for name in ("plain", "steered")]
    plain = generate(model, prompts, None, **{**options, "stream": None}, checkpoint=parts[0])
    return Steered(plain, generate(model, prompts, masks, **options, checkpoint=parts[1]))


def choose_tokens(
    logits: Float[Tensor, "batch vocab"],
    temperature: float,
    top_p: float,
    uniforms: Float[Tensor, " batch"],
) -> Int[Tensor, " batch"]:
    """The most probable token at temperature 0, else a sample: where ``uniforms`` falls in the distribution."""
    if temperature == 0:
        return logits.argmax(-1)
    ranked, order = (logits.double() / temperature).softmax(-1).sort(-1, descending=True)
    before = ranked.cumsum(-1) - ranked
    kept = torch.where(before < top_p, ranked, 0.0)  # the first is always among them
    reached = kept.cumsum(-1)
    point = uniforms.to(reached)[:, None] * reached[:, -1:]
    place = torch.searchsorted(reached, point, right=True).clamp_max(reached.shape[-1] - 1)
    return order.gather(-1, place)[:, 0]


def _check_settings(
    max_new_tokens: int, temperature: float, top_p: float, stop: str | None
) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
    if temperature < 0:
        raise ValueError(f"temperature={temperature} must be 0 (greedy) or above")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must lie above 0 and not above 1")
    if stop == "":
        raise ValueError("stop is an empty string, which every text holds; leave it out")


class _Writer:
    """Gathers the tokens of one prompt until they end."""

    def __init__(
        self,
        tokenizer: Any,
        ends: frozenset[int],
        index: int,
        stop: str | None,
        most: int,
        stream: Callable[[int, str], None] | None,
    ) -> None:
        self.tokenizer, self.index, self.stop, self.most = tokenizer, index, stop, most
        self.stream, self.ends = stream, ends
        self.tokens: list[int] = []
        self.ended = self.done = False
        self.text = ""

    def take(self, token: int) -> None:
        if self.done:
            return
        if token in self.ends:
            self.ended = self.done = True
        else:
            self.tokens.append(token)
            self.done = len(self.tokens) == self.most
        if self.done or self.stop is not None or self.stream is not None:
            self._decode()

    def generation(self, prompt: str, prompt_tokens: int) -> Generation:
        return Generation(prompt, self.text, tuple(self.tokens), prompt_tokens, self.ended)

    def _decode(self) -> None:
        text = self.tokenizer.decode(self.tokens, skip_special_tokens=True)
        if self.stop is not None and self.stop in text:
            text = text.split(self.stop)[0]
            self.ended = self.done = True
        # A character of several tokens is not shown before it is whole, nor what may become ``stop``.
        held = self.stop is not None and any(
            text.endswith(self.stop[:n]) for n in range(1, len(self.stop))
        )
        if self.stream is not None and (self.done or not (held or text.endswith("\ufffd"))):
            if text.startswith(self.text) and text != self.text:
                self.stream(self.index, text[len(self.text) :])
            self.text = text
        elif self.stream is None:
            self.text = text
