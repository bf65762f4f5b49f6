"""Work shared out over the processes that ``accelerate launch`` or ``torchrun`` started.

Each item goes to one process and its result to all, in the order of the items: every process ends with what one
process alone would have, bit for bit, since an item is computed as it would be there.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

T, R = TypeVar("T"), TypeVar("R")


def join() -> None:
    """Join the processes that a launcher started, if one did; does nothing otherwise, or the second time.

    >>> join()      # in a script that `torchrun --nproc_per_node 4 script.py` runs
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not _joined():
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available())


def _joined() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def rank_and_size() -> tuple[int, int]:
    """This process's number from 0, and how many there are.

    >>> rank_and_size()
    (0, 1)
    """
    return (distributed.get_rank(), distributed.get_world_size()) if _joined() else (0, 1)


def is_main() -> bool:
    """Whether this process writes results and talks; one of them does."""
    return rank_and_size()[0] == 0


def local_device() -> str:
    """The device of this process: its own GPU where there are several."""
    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if _joined() else "cuda"


def shared_out(items: Sequence[T], work: Callable[[int, T], Iterable[R]]) -> Iterator[R]:
    """What ``work(number, item)`` gives for every item, in their order.

    >>> list(shared_out(["a", "b"], lambda number, item: [item * 2]))
    ['aa', 'bb']

    Items are dealt out in turn, so neighbours should take like time. Results must be picklable.

    Raises:
        whatever ``work`` raises, in all processes.
    """
    rank, size = rank_and_size()
    if size == 1:
        for number, item in enumerate(items):
            yield from work(number, item)
        return
    for start in range(0, len(items), size):
        mine, own = start + rank, None
        try:
            own = list(work(mine, items[mine])) if mine < len(items) else []
        except Exception as error:  # the others wait, so they are told before it goes up
            own = error
        gathered: list[Any] = [None] * size
        distributed.all_gather_object(gathered, own)
        for part in gathered:
            if isinstance(part, Exception):
                raise part
        for part in gathered:
            yield from part


def share_of(items: Sequence[T]) -> Sequence[T]:
    """This process's part of some items."""
    rank, size = rank_and_size()
    return items[rank::size]


def add_up(*values: Tensor) -> None:
    """Replace each tensor by its sum over all processes."""
    if rank_and_size()[1] > 1:
        for value in values:
            distributed.all_reduce(value)
