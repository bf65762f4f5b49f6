"""Experiments: one importable module each, also run by ``python -m analyses.NAME``."""
