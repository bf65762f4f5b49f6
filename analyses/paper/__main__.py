"""Every experiment of the paper on one model, in the authors' protocol and in a sound one, in one report.

    python -m analyses.paper --model smollm2 --quick
    python -m analyses.paper --model llama-3.2-3b --out out/llama
    python -m analyses.paper --model smollm2 --docs docs/paper     # and a small report with its pictures there

Interrupt it and give the same command again: what is finished is kept. The report is written after every experiment.
"""

import argparse
import logging
from pathlib import Path

from analyses.paper import run
from analyses.paper.plan import EXPERIMENTS
from lahis_tl.presets import PRESETS


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m analyses.paper",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument(
        "--model", default="smollm2", help=f"{', '.join(PRESETS)}, or any name or path"
    )
    parser.add_argument("--quick", action="store_true", help="a small run that shows the whole way")
    parser.add_argument("--out", type=Path, help="folder (default: out/paper/NAME, or NAME-quick)")
    parser.add_argument("--only", nargs="+", choices=EXPERIMENTS, default=EXPERIMENTS)
    parser.add_argument("--languages", help="comma-separated codes, as in en,fr")
    parser.add_argument(
        "--dtype",
        help="default: bfloat16, or float32 where a small model is faster in it",
    )
    parser.add_argument("--data", default="auto", choices=("auto", "bundled", "hub"))
    parser.add_argument("--preset", choices=tuple(PRESETS), help="what a local folder holds")
    parser.add_argument("--docs", type=Path, help="folder for a small Markdown report as well")
    parser.add_argument("--seed", type=int, default=0)
    given = vars(parser.parse_args())
    logging.basicConfig(format="%(message)s")
    logging.getLogger("analyses.paper").setLevel(logging.INFO)
    if given["languages"]:
        given["languages"] = tuple(given["languages"].split(","))
    report = run(**given)
    print(f"Written to {report} and {report.with_suffix('.html')}")
    if (report.parent / "missing.json").is_file():
        parser.exit(
            1,
            "The model could not be loaded, so that nothing was run; the report says what is wanted.\n",
        )


if __name__ == "__main__":
    main()
