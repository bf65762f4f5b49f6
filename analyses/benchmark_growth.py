"""How time and memory of scoring and of exact effects grow with texts, their length, layers, heads and vocabulary.

Random Llamas of width 256; one size changes while the others stay. All sizes of an axis are timed in turn. The slope of
log time against log size is 1 where the cost is proportional, 0 where it does not grow; its interval (95 %, from the
scatter about the line) tells how far the points are from a line at all, and the last step's slope how it goes on.

    python -m analyses.benchmark_growth
    python -m analyses.benchmark_growth --out out/benchmark_growth
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots
from scipy.stats import linregress
from scipy.stats import t as student
from transformers import LlamaConfig, LlamaForCausalLM

import lahis_tl as lt
from analyses.benchmark_common import in_turn, machine, peak_mb
from analyses.result import Result
from lahis_tl.access import LensModel

WIDTH = 256
BATCH_TOKENS = 1024
BASE = {"texts": 32, "tokens": 32, "layers": 4, "heads": 8, "vocabulary": 4096}
AXES: dict[str, tuple[int, ...]] = {
    "texts": (32, 64, 128, 256, 512),
    "tokens": (32, 64, 128, 256, 512),
    "layers": (1, 2, 4, 8, 16),
    "heads": (2, 4, 8, 16, 32),
    "vocabulary": (1024, 4096, 16384, 65536, 262144),
}
_TITLES = {"tokens": "tokens a text", "heads": "heads a layer"}
_WAYS = {"scoring": "circle", "exact effects": "square"}


def growth_slope(sizes: Sequence[float], values: Sequence[float]) -> tuple[float, float, float]:
    """Slope of log value against log size, and its 95 % interval.

    >>> slope, low, high = growth_slope([1, 2, 4, 8], [3, 12, 48, 192])
    >>> round(slope, 6)
    2.0

    Raises:
        ValueError: fewer than three sizes, or a value that has no logarithm.
    """
    if len(sizes) < 3:
        raise ValueError(f"{len(sizes)} sizes: a slope with an interval needs three or more")
    if min(*sizes, *values) <= 0:
        raise ValueError(
            f"sizes and values must be above 0, but the least is {min(*sizes, *values)}"
        )
    fit: Any = linregress(np.log(sizes), np.log(values))
    half = float(student.ppf(0.975, len(sizes) - 2) * fit.stderr)
    return float(fit.slope), float(fit.slope) - half, float(fit.slope) + half


def random_llama(layers: int, heads: int, vocabulary: int, width: int = WIDTH) -> LensModel:
    """A random Llama with a gated MLP of four widths, without a tokenizer."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=2048,
    )
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(config).save_pretrained(folder)
        return lt.load_model(folder)


def measure(
    axis: str, sizes: Sequence[int], rounds: int, base: Mapping[str, int], width: int
) -> list[dict[str, Any]]:
    """One row a size and way: median seconds and range, peak memory over the weights."""
    ways: dict[tuple[int, str], Callable[[], Any]] = {}
    models: dict[tuple[int, int, int], LensModel] = {}
    for size in sizes:
        at = {**base, axis: size}
        key = (at["layers"], at["heads"], at["vocabulary"])
        if key not in models:
            models[key] = random_llama(*key, width)
        generator = torch.Generator().manual_seed(size)
        shape = (at["texts"], at["tokens"])
        ids = torch.randint(at["vocabulary"], shape, generator=generator).tolist()
        few = ids[: max(1, len(ids) // 8)]
        options: dict[str, Any] = {"batch_tokens": BATCH_TOKENS, "progress": False}

        def scoring(m: LensModel = models[key], ids: Any = ids, o: Any = options) -> Any:
            return lt.head_gradients(m, {"all": ids}, **o)

        def exact(m: LensModel = models[key], ids: Any = few, o: Any = options) -> Any:
            return lt.exact_effects(m, {"all": ids}, **o)

        ways |= {(size, "scoring"): scoring, (size, "exact effects"): exact}
    names = {f"{size} {way}": each for (size, way), each in ways.items()}
    for each in list(names.values())[:2]:  # what the first use of all allocates for good
        each()
    peaks = {name: peak_mb(each) for name, each in names.items()}  # warms up too
    times = in_turn(names, rounds, warm=False)
    rows = []
    for size, way in ways:
        seconds = times[f"{size} {way}"]
        rows.append(
            {"axis": axis, "size": size, "way": way, "seconds": statistics.median(seconds)}
            | {"low": min(seconds), "high": max(seconds), "mb": peaks[f"{size} {way}"]}
        )
    return rows


def slopes(points: pd.DataFrame) -> pd.DataFrame:
    """One row an axis and way: slopes of time and memory with intervals, and the last step's."""
    rows = []
    for axis in dict.fromkeys(points["axis"]):
        for way in _WAYS:
            chosen = pd.DataFrame(points[(points["axis"] == axis) & (points["way"] == way)])
            sizes = chosen["size"].tolist()
            row: dict[str, Any] = {"axis": axis, "way": way, "from": sizes[0], "to": sizes[-1]}
            for name, column in {"time": "seconds", "memory": "mb"}.items():
                least = 0.1 if name == "memory" else 0.0  # MB; less cannot be measured
                values = chosen[column].clip(lower=least).tolist()
                slope, low, high = growth_slope(sizes, values)
                last = np.log(values[-1] / values[-2]) / np.log(sizes[-1] / sizes[-2])
                row |= {name: slope, f"{name}_low": low, f"{name}_high": high}
                row |= {f"{name}_last_step": float(last)}
            rows.append(row)
    return pd.DataFrame(rows)


def figure(points: pd.DataFrame, about: str) -> go.Figure:
    """Time above, memory below, one column an axis, both scales logarithmic."""
    axes = list(dict.fromkeys(points["axis"]))
    drawn = make_subplots(
        2, len(axes), shared_xaxes=True, shared_yaxes=True, horizontal_spacing=0.02,
        vertical_spacing=0.06,
    )  # fmt: skip
    for column, axis in enumerate(axes, 1):
        for which, (way, symbol) in enumerate(_WAYS.items()):
            chosen = points[(points["axis"] == axis) & (points["way"] == way)]
            for row, value in enumerate(("seconds", "mb"), 1):
                trace = go.Scatter(
                    x=chosen["size"],
                    y=chosen[value],
                    name=way,
                    mode="lines+markers",
                    marker={"symbol": symbol, "size": 7},
                    line={
                        "color": lt.plots.CATEGORICAL[(4, 1)[which]],
                        "dash": ("solid", "dot")[which],
                    },
                    showlegend=column == row == 1,
                )
                drawn.add_trace(trace, row=row, col=column)
        ticks = sorted(set(points[points["axis"] == axis]["size"]))
        drawn.update_xaxes(type="log", tickvals=ticks, tickformat="d", tickangle=-45, col=column)
        drawn.update_xaxes(title_text=_TITLES.get(axis, axis), row=2, col=column)
    drawn.update_yaxes(type="log", dtick=1, row=1)
    drawn.update_yaxes(type="log", tickvals=[10 * 2**i for i in range(-4, 16)], row=2)
    drawn.update_yaxes(title_text="time (s)", row=1, col=1)
    drawn.update_yaxes(title_text="peak memory over<br>the weights (MB)", row=2, col=1)
    lt.plots.dress(drawn, "How the cost of scoring and of exact effects grows", about)
    drawn.update_layout(width=1000, height=560, legend={"orientation": "h", "x": 0.7, "y": 1.12})
    drawn.update_layout(margin={"b": 80, "l": 80})
    return drawn


def run(
    axes: Mapping[str, Sequence[int]] | None = None,
    base: Mapping[str, int] | None = None,
    width: int = WIDTH,
    rounds: int = 3,
    progress: bool = True,
) -> Result:
    """Points, slopes and the figure.

    Args:
        axes: texts, tokens, layers, heads, vocabulary → at least three sizes. Exact effects (all heads) take an eighth
            of the texts.
        base: the size of what does not change.
    """
    rows: list[dict[str, Any]] = []
    for axis, sizes in (axes or AXES).items():
        found = measure(axis, sizes, rounds, {**BASE, **(base or {})}, width)
        rows += found
        if progress:
            print(pd.DataFrame(found).round(3).to_string(index=False), flush=True)
    points = pd.DataFrame(rows)
    table = slopes(points)
    at = ", ".join(f"{name} {value}" for name, value in {**BASE, **(base or {})}.items())
    about = f"random Llamas of width {width}, float32, {torch.get_num_threads()} threads; elsewhere {at}"
    verdict = "Slopes of log time against log size: " + "; ".join(
        f"{row['way']} with {row['axis']} {row['time']:.2f} [{row['time_low']:.2f}, {row['time_high']:.2f}]"
        for row in table.to_dict("records")
    )
    card = {**machine(), "rounds": rounds, "width": width, "batch_tokens": BATCH_TOKENS}
    drawn = {"benchmark_growth": figure(points, about)}
    return Result("benchmark_growth", {"slopes": table, "points": points}, drawn, verdict, card)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--axes", default=",".join(AXES), help=f"default {','.join(AXES)}")
    parser.add_argument("--out", type=Path, help="folder for tables and figure")
    given = parser.parse_args()
    axes = given.axes.split(",")
    if unknown := set(axes) - set(AXES):
        parser.error(f"no axis {', '.join(sorted(unknown))}: there are {', '.join(AXES)}")
    chosen = {axis: AXES[axis] for axis in axes}
    result = run(axes=chosen, width=given.width, rounds=given.rounds)
    print(f"\n{result}")
    if given.out:
        print(f"\nWritten to {result.save(given.out)}")


if __name__ == "__main__":
    main()
