"""Work shared out over the processes that ``accelerate launch --multi_gpu`` or ``torchrun`` started.

Each item goes to one process and its result to all, in the order of the items: every process ends with what one
process alone would have, bit for bit, since an item is computed as it would be there. Nothing is shared before
``join``: scripts that divide their texts themselves are left alone.
"""

import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed

T = TypeVar("T")
R = TypeVar("R")
_joined = False
_PATIENCE = timedelta(days=7)  # a process without work waits for the others' longest batch


def join() -> None:
    """Join the processes that a launcher started, if one did, and share work from now on.

    All of them must then call the same functions on the same texts.

    >>> join()      # in a script that `torchrun --nproc_per_node 4 script.py` runs
    """
    global _joined
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available(), timeout=_PATIENCE)
        _joined = True


def rank_and_size() -> tuple[int, int]:
    """This process's number from 0, and how many share the work.

    >>> rank_and_size()
    (0, 1)
    """
    return (distributed.get_rank(), distributed.get_world_size()) if _joined else (0, 1)


def is_main() -> bool:
    """Whether this process writes results and talks; one of them does."""
    return rank_and_size()[0] == 0


def shows(progress: bool) -> bool:
    """Whether this process draws a progress bar."""
    return progress and is_main()


def local_device() -> str:
    """The device of this process: its own GPU where there are several."""
    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if _joined else "cuda"


def exchange(make: Callable[[], T]) -> list[T]:
    """What ``make`` gives in each process, in their order.

    Raises:
        what ``make`` raises in any process, in all of them, so that none waits for ever.
    """
    size = rank_and_size()[1]
    if size == 1:
        return [make()]
    failed: Exception | None = None
    told: Any
    try:
        told = make()
    except Exception as error:
        failed, told = error, _portable(error)
    gathered: list[Any] = [None] * size
    distributed.all_gather_object(gathered, told)
    if failed is not None:
        raise failed
    for part in gathered:
        if isinstance(part, Exception):
            raise part
    return gathered


def _portable(error: Exception) -> Exception:
    """The error, or its text where it does not survive the way to another process."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


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
    if len(set(exchange(lambda: len(items)))) > 1:
        raise RuntimeError(
            "the processes were given different texts; after join() all must make the same calls"
        )
    for start in range(0, len(items), size):
        mine = start + rank

        def own(mine: int = mine) -> list[R]:
            return list(work(mine, items[mine])) if mine < len(items) else []

        for part in exchange(own):
            yield from part


def share_of(items: Sequence[T]) -> Sequence[T]:
    """This process's part of some items."""
    rank, size = rank_and_size()
    return items[rank::size]
