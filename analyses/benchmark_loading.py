"""Time and peak memory of loading SmolLM2, checked and unchecked, beside plain TransformerLens and plain transformers.

All ways read the same folder from the disk's cache, in turn, in float32:

* ``lt.load_model``: weights shared with the Hugging Face model; file hash, logits and the mask's action checked.
* the same steps without hashes and checks.
* TransformerLens: ``TransformerBridge.boot_transformers``, and on 3.9 the steps of
  ``HookedTransformer.from_pretrained_no_processing``, whose list of names lacks SmolLM2.
* transformers: model and tokenizer alone, the floor.

    python -m analyses.benchmark_loading
"""

import argparse
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lahis_tl as lt
from analyses.benchmark_common import compared, in_turn, machine, peak_mb
from analyses.result import Result
from lahis_tl.models import transformer_lens_version
from lahis_tl.models.bridge import build_bridge
from lahis_tl.models.hooked import _convert_by_transformer_lens, _hooked_config, build_hooked
from lahis_tl.models.sources import open_source, smollm2_folder


def plain_transformers(folder: str) -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(folder)


def plain_hooked(folder: str) -> Any:
    """What ``from_pretrained_no_processing`` does with a model on its list: convert, draw random weights, copy."""
    from transformer_lens import HookedTransformer

    hf, tokenizer = plain_transformers(folder)
    hf.config.architectures = [type(hf).__name__]
    cfg = _hooked_config(hf)
    weights = _convert_by_transformer_lens(hf, cfg)
    model = HookedTransformer(cfg, tokenizer, move_to_device=False)
    unprocessed = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")
    model.load_and_process_state_dict(weights, **dict.fromkeys(unprocessed, False))
    return model


def plain_bridge(folder: str) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers(folder, dtype=torch.float32)


def unchecked(folder: str, backend: str) -> Any:
    """``load_model`` without the checkpoint's hash, the comparison of logits, and the mask's self-test."""
    options: dict[str, Any] = {"revision": None, "trust_remote_code": False}
    source = open_source(folder, dtype=torch.float32, device=torch.device("cpu"), **options)
    return build_hooked(source.hf) if backend == "hooked" else build_bridge(source.hf, source.name)


def run(folder: str | Path | None = None, rounds: int = 5) -> Result:
    """Seconds and peak memory of each way.

    Args:
        folder: a Hugging Face checkpoint; SmolLM2's if None.
    """
    path, name = str(folder or smollm2_folder()), str(folder or "smollm2")
    hooked = transformer_lens_version().major < 4
    ways = {
        "load_model, bridge": lambda: lt.load_model(name, backend="bridge"),
        "the same unchecked, bridge": lambda: unchecked(path, "bridge"),
        "TransformerBridge.boot_transformers": lambda: plain_bridge(path),
    }
    if hooked:
        ways |= {
            "load_model, HookedTransformer": lambda: lt.load_model(name, backend="hooked"),
            "the same unchecked, HookedTransformer": lambda: unchecked(path, "hooked"),
            "HookedTransformer, its own steps": lambda: plain_hooked(path),
        }
    ways["transformers"] = lambda: plain_transformers(path)
    times = in_turn({way: _dropped(load) for way, load in ways.items()}, rounds)
    rows = compared(times, "transformers")
    for row in rows:
        row["peak_mb"] = peak_mb(ways[row["way"]])
    table = pd.DataFrame(rows)
    ratios = table.set_index("way")["over_transformers"]
    verdict = ", ".join(f"{way} {ratio:.1f}" for way, ratio in ratios.items())
    verdict = f"Time of loading over that of transformers alone: {verdict}."
    return Result("benchmark_loading", {"loading": table}, {}, verdict, machine())


def _dropped(way: Any) -> Any:
    """The way without its result, so that one model at a time is in memory."""

    def load() -> None:
        way()

    return load


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="folder for the table")
    given = parser.parse_args()
    result = run(rounds=given.rounds)
    print(result)
    if given.out:
        print(f"\nWritten to {result.save(given.out)}")
