"""How much memory scoring takes, before it runs; and how to take less: recomputing in the backward pass."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from lahis_tl.access import (
    LensModel,
    context_length,
    device_of,
    dtype_of,
    final_hidden,
    frozen,
    grid_of,
    unembedding_of,
)
from lahis_tl.batches import TokenIds, make_batches, tokenize
from lahis_tl.corpora import Corpus
from lahis_tl.losses import chunked_nll, rows_at_once, text_nll
from lahis_tl.masks import masked

_PROBES = (32, 64, 96)  # tokens


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that one batch of ``head_gradients`` takes at its peak.

    Attributes:
        weights: of the model, on all its devices.
        activations: what the forward pass keeps for the backward pass.
        working: the most that a layer holds besides, on the way back.
        loss: blocks of logits, and the gradient of the last hidden states.
        available: bytes that were free when the estimate was made, weights being there already; on the first device of
            several.
        batch: texts and tokens each.
    """

    weights: int
    activations: int
    working: int
    loss: int
    available: int
    batch: tuple[int, int]

    @property
    def total(self) -> int:
        """The peak: the loss is computed before the way back begins."""
        return self.weights + self.needed

    @property
    def needed(self) -> int:
        """The peak without the weights."""
        return self.activations + max(self.working, self.loss)

    @property
    def fits(self) -> bool:
        return self.needed <= self.available

    def __str__(self) -> str:
        texts, tokens = self.batch
        free = f"{_gb(self.available)} are free besides the weights"
        return (
            f"about {_gb(self.total)} at the peak: weights {_gb(self.weights)}, activations of {texts} x {tokens} "
            f"tokens {_gb(self.activations)}, passing {_gb(self.working)}, loss {_gb(self.loss)}; {free}"
        )


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"


def memory_estimate(
    model: LensModel,
    corpus: Corpus | TokenIds | None = None,
    *,
    max_tokens: int | None = 512,
    batch_tokens: int = 1024,
) -> MemoryEstimate:
    """The peak memory of ``head_gradients`` with these settings, from four short passes.

    What a pass over one text holds is a polynomial of second degree in its length (attention patterns grow
    with the square); its coefficients come from texts of 32, 64 and 96 tokens of this very model, in its
    class and dtype. The loss goes by blocks of bounded size and is reckoned apart.

    Reckoned are the bytes of tensors, which on a GPU is what its allocator hands out. A process on Linux may hold 1.3
    to 2.7 times as much, in pieces that its allocator cannot use again; with ``MALLOC_MMAP_THRESHOLD_=1048576``
    set in its environment it stays within 20 %, at some cost in time.

    >>> print(memory_estimate(model, corpus))                                    # doctest: +SKIP
    about 2.01 GB at the peak: weights 0.57 GB, activations of 8 x 128 tokens 1.30 GB, ...

    Args:
        corpus: the texts; without them, as many as fit into a batch, all of ``max_tokens``.
        max_tokens, batch_tokens: as in ``head_gradients``.

    Raises:
        ModelError: the model gives no per-head output.
        ValueError: a length below 2, or neither texts nor ``max_tokens`` nor a model with a limit.
    """
    shapes = _shapes(model, corpus, max_tokens, batch_tokens)
    limit = context_length(model)
    probes = [n for n in _PROBES if limit is None or n <= limit] or [limit or 2]
    _held(model, probes[-1])  # what a model keeps of its first long text (ALiBi tables) is kept now
    found = torch.tensor([_held(model, n) for n in probes], dtype=torch.float64)
    powers = [float(p) for p in range(len(probes))]
    lengths = torch.tensor(probes, dtype=torch.float64)
    curve = torch.linalg.solve(lengths[:, None] ** torch.tensor(powers), found)

    def estimate(texts: int, length: int) -> MemoryEstimate:
        at = float(length) ** torch.tensor(powers, dtype=torch.float64)
        kept, peak = (int(texts * value) for value in at @ curve)
        loss = _loss(model, texts * (length - 1))
        return MemoryEstimate(weights, kept, max(0, peak - kept), loss, free, (texts, length))

    weights, free = _weights(model), _available(device_of(model))
    return max((estimate(*shape) for shape in shapes), key=lambda found: found.needed)


def _shapes(
    model: LensModel, corpus: Corpus | TokenIds | None, max_tokens: int | None, batch_tokens: int
) -> set[tuple[int, int]]:
    """Texts and tokens of every batch."""
    if corpus is not None:
        batches = make_batches(tokenize(model, corpus, max_tokens), batch_tokens)
        return {(batch.ids.shape[0], batch.ids.shape[1]) for batch in batches}
    bounds = [n for n in (max_tokens, context_length(model)) if n is not None]
    if min(bounds, default=0) < 2 or batch_tokens < 2:
        raise ValueError(
            f"max_tokens={max_tokens}, batch_tokens={batch_tokens}: at least 2 tokens are needed"
        )
    return {(max(1, batch_tokens // min(bounds)), min(bounds))}


def _weights(model: nn.Module) -> int:
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(sizes.values())


def _held(model: LensModel, length: int) -> tuple[int, int]:
    """Bytes alive after the forward pass over one text, and at the most until the way back has ended."""
    device = device_of(model)
    ids = (torch.arange(length, device=device) % 50 + 5)[None]
    ones = torch.ones_like(ids)
    unembedding = unembedding_of(model)  # probes the model, so before anything is counted
    mask = torch.ones(1, *grid_of(model).shape, device=device, requires_grad=True)
    with frozen(model), torch.enable_grad(), masked(model, mask), LiveMemory() as memory:
        # Where logits exist whole, they grow with the length as all else does.
        run = text_nll if unembedding is None else final_hidden
        output = run(model, ids, ones)
        kept = memory.live
        torch.autograd.grad(output.sum(), mask)
    return kept, memory.peak


def _loss(model: LensModel, positions: int) -> int:
    unembedding = unembedding_of(model)
    if unembedding is None:
        return 0
    vocab, width = unembedding.weight.shape
    device = unembedding.weight.device
    hidden = torch.zeros(2, width, dtype=dtype_of(model), device=device, requires_grad=True)
    with torch.enable_grad(), LiveMemory() as memory:
        chunked_nll(hidden, torch.zeros(2, dtype=torch.long, device=device), unembedding)
    # A row's share of a block; besides, hidden states and their gradient for all positions.
    return min(positions, rows_at_once(vocab)) * memory.peak // 2 + 2 * positions * width * (
        hidden.element_size()
    )


def _available(device: torch.device) -> int:
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserved
    return int(psutil.virtual_memory().available)


class LiveMemory(TorchDispatchMode):
    """Bytes of the tensors made in a ``with`` block that are alive now, and the most that ever were.

    >>> with LiveMemory() as memory:
    ...     total = torch.ones(1000).add(1).sum()
    >>> memory.peak, memory.live
    (8000, 4)
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {id(s) for s in _storages((args, kwargs))}
        found = func(*args, **(kwargs or {}))
        for storage in _storages(found):
            key = storage.data_ptr()
            if id(storage) not in given and key and key not in self._seen:
                self._seen[key] = storage.nbytes()
                self.live += storage.nbytes()
                weakref.finalize(storage, self._forget, key)
        self.peak = max(self.peak, self.live)
        return found

    def _forget(self, key: int) -> None:
        self.live -= self._seen.pop(key)


def _storages(values: Any) -> list[torch.UntypedStorage]:
    return [v.untyped_storage() for v in tree_leaves(values) if isinstance(v, Tensor)]


@contextmanager
def recomputed(model: LensModel) -> Iterator[None]:
    """Keep only each block's input for the backward pass, and compute the rest of the block again there.

    Activation checkpointing: results stay the same, memory falls to about one block's, time rises by about
    one forward pass. For any work with gradients inside the block, scoring and tuning alike.

    >>> with recomputed(model):                                                  # doctest: +SKIP
    ...     grads = head_gradients(model, corpus, max_tokens=2048)

    Source:
        Chen et al. 2016, arXiv 1604.06174.
    """
    blocks: list[Any] = list(model.blocks)
    for block in blocks:  # past setattr, which a bridge hands on to the module that it wraps
        block.__dict__["forward"] = partial(_checkpointed, block.forward)
    try:
        yield
    finally:
        for block in blocks:
            del block.__dict__["forward"]


def _checkpointed(forward: Any, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
