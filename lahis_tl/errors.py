"""The package's own errors, so that callers can tell them from a bug."""


class LahisError(Exception):
    """Base of all errors that this package raises by intent."""


class ModelError(LahisError, ValueError):
    """A model cannot be loaded, lacks per-head outputs, or does not pass its checks."""


class CorpusError(LahisError, ValueError):
    """Texts are missing, empty, of unknown language, or too short."""


class ArtifactError(LahisError, ValueError):
    """A saved result is damaged, foreign, or belongs to another model."""
