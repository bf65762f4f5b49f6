"""How long the explorer page takes: to build, to paint first, to answer a click; and how large it is.

The page is of made-up results of 32 × 32 heads, 10 languages and 5 sample texts (and of 72 × 64 heads without texts),
opened from disk in a headless Chromium with the network cut.

python -m analyses.benchmark_explorer
"""

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import lahis_tl as lt
from lahis_tl.explorer import explore

_ANSWERED = """async (key) => {
    const start = performance.now();
    document.dispatchEvent(new KeyboardEvent('keydown', { key }));
    await new Promise((done) => requestAnimationFrame(() => setTimeout(done, 0)));
    return performance.now() - start;
}"""


def made_up(grid: lt.HeadGrid, languages: int, texts: int, tokens: int = 20) -> list[Any]:
    """Gradients, chosen heads, patterns and token effects such as a run would give."""
    generator = torch.Generator().manual_seed(0)
    codes = [f"l{i}" for i in range(languages)]
    gradients = {c: torch.randn(16, *grid.shape, generator=generator) / 100 for c in codes}
    losses = {c: torch.full((16,), 3.0) for c in codes}
    grads = lt.HeadGradients(gradients, losses, {c: torch.full((16,), 64) for c in codes})
    results: list[Any] = [grads, lt.language_heads(lt.score(grads), "contrastive")]
    if texts:
        samples = {c: [[f"{c}-{i} " for i in range(tokens)]] for c in codes[:texts]}
        future = torch.ones(tokens, tokens).triu(1).bool()
        patterns, effects = {}, {}
        for code in samples:
            logits = 4 * torch.randn(*grid.shape, tokens, tokens, generator=generator)
            logits[..., 0] += 5
            patterns[code] = [logits.masked_fill(future, -torch.inf).softmax(-1).half()]
            effects[code] = [torch.randn(*grid.shape, tokens, generator=generator) / 100]
        results += [lt.AttentionPatterns(samples, patterns), lt.TokenEffects(samples, effects)]
    return results


def run(rounds: int = 5, browser: str | None = None) -> pd.DataFrame:
    """One row a grid: seconds to build, megabytes, milliseconds to paint, to be ready and to answer (medians, worst).

    Raises:
        ValueError: no Chromium.
    """
    from playwright.sync_api import sync_playwright

    executable = browser or shutil.which("chromium") or shutil.which("google-chrome")
    if executable is None:
        raise ValueError("there is no Chromium: install it, or give its path as browser=")
    rows = []
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        for grid, texts in ((lt.HeadGrid(32, 32), 5), (lt.HeadGrid(72, 64), 0)):
            results = made_up(grid, 10, texts)
            built, page = [], Path(folder) / "heads.html"
            for _ in range(rounds):
                start = time.perf_counter()
                explore(results, page)
                built.append(time.perf_counter() - start)
            small = explore(results, Path(folder) / "small.html", plotlyjs="cdn")
            painted, ready, answered = [], [], []
            for _ in range(rounds):
                opened = chromium.new_page(viewport={"width": 1400, "height": 1000})
                opened.context.set_offline(True)
                start = time.perf_counter()
                opened.goto(page.as_uri())
                opened.wait_for_selector("html[data-ready=yes]")
                ready.append(1000 * (time.perf_counter() - start))
                paint = "performance.getEntriesByName('first-contentful-paint')[0].startTime"
                painted.append(opened.evaluate(paint))
                keys = ("ArrowDown", "ArrowRight", "ArrowDown", "ArrowLeft", "ArrowUp") * 4
                answered += [opened.evaluate(_ANSWERED, key) for key in keys]
                opened.close()
            rows.append(
                {
                    "grid": str(grid),
                    "build_s": statistics.median(built),
                    "page_mb": page.stat().st_size / 1e6,
                    "cdn_mb": small.stat().st_size / 1e6,
                    "first_paint_ms": statistics.median(painted),
                    "ready_ms": statistics.median(ready),
                    "answer_ms": statistics.median(answered),
                    "slowest_answer_ms": max(answered),
                    "rounds": rounds,
                }
            )
        chromium.close()
    return pd.DataFrame(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--browser", help="path of Chromium or Chrome")
    print(run(**vars(parser.parse_args())).round(3).T.to_string(header=False))
