"""What the benchmarks share: texts of exact lengths, rounds in turn, medians and ranges, peak memory, the machine."""

import ctypes
import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lahis_tl as lt

Ways = Mapping[str, Callable[[], Any]]


def cut_texts(
    tokenizer: Any, length: int, count: int, languages: Sequence[str] = ("en", "fr", "es", "de")
) -> list[list[int]]:
    """``count`` texts of exactly ``length`` tokens, cut from the bundled corpus, languages in turn."""
    corpus = lt.load_corpus("bundled", languages)
    streams = [tokenizer("\n".join(corpus[code]))["input_ids"] for code in corpus.languages]
    starts = [(i % len(streams), i // len(streams) * length) for i in range(count)]
    return [streams[which][start : start + length] for which, start in starts]


def seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def in_turn(ways: Ways, rounds: int, warm: bool = True) -> dict[str, list[float]]:
    """Seconds of every way in every round; a round is once through all, so that a drifting machine hits all alike."""
    if warm:
        for way in ways.values():
            way()
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            found[name].append(seconds(way))
    return found


def compared(times: Mapping[str, list[float]], to: str, per: int = 1) -> list[dict[str, Any]]:
    """One row a way: median and range of its milliseconds, and of its ratio to the way ``to`` round by round."""
    rows = []
    for name, each in times.items():
        ratios = [a / b for a, b in zip(each, times[to], strict=True)]
        rows.append(
            {"way": name, "ms": 1000 * statistics.median(each) / per}
            | {"ms_low": 1000 * min(each) / per, "ms_high": 1000 * max(each) / per}
            | {f"over_{to}": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}
            | {"rounds": len(each)}
        )
    return rows


def status(field: str) -> int:
    """A field of the process's status in kB (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def peak_mb(run: Callable[[], Any]) -> float:
    """Growth of the process's resident memory at its peak during ``run`` (Linux with glibc)."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # hand back what earlier runs freed
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = status("VmRSS")
    run()
    return (status("VmHWM") - before) / 1024


@contextmanager
def needs_grad(embedding: nn.Module) -> Iterator[None]:
    """A gradient flows down to the embedding's output though no weight asks for one."""
    handle = embedding.register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    try:
        yield
    finally:
        handle.remove()


def machine() -> dict[str, Any]:
    """Processor, threads and versions behind the figures."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    packages = ("torch", "transformers", "transformer-lens")
    return {
        "processor": next(named, platform.processor()),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version()} | {p: version(p) for p in packages},
    }
