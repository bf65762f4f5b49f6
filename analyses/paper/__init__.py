"""Every experiment of the paper on one model, in the authors' protocol and in a sound one, in one report."""

from analyses.paper.steps import run

__all__ = ["run"]
