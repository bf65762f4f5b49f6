"""The command line: ``lahis-tl demo | score | heads | explore | plot | ablate | rerun | steer | tune | export``."""

import os
import sys

import typer

import lahis_tl.cli.finding
import lahis_tl.cli.proving
import lahis_tl.cli.seeing
import lahis_tl.cli.using  # noqa: F401 - importing them registers the commands
from lahis_tl.cli.common import app

__all__ = ["app", "main"]


def _join_processes() -> None:
    """Under ``accelerate launch`` or ``torchrun``: share the work; one process alone talks."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    if os.environ.get("RANK", "0") != "0":
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - until the process ends
    from lahis_tl.processes import join

    join()


def main() -> None:
    """Exit status 0 if all went well, 1 for bad input or a failed run, 2 for wrong usage, 130 for Ctrl-C."""
    try:
        _join_processes()
        app()
    except Exception as error:
        from lahis_tl.errors import LahisError

        if not isinstance(
            error, (LahisError, ValueError, KeyError, IndexError, OSError, RuntimeError)
        ):
            raise
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        typer.echo(f"error: {text}", err=True)
        sys.exit(1)
