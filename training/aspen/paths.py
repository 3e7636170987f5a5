"""Where the training data, checkpoints and exports live."""

from pathlib import Path

MODEL_FOLDER = Path(__file__).resolve().parents[2] / "pando" / "models_builtin" / "aspen"
"""The shipped model, as package data."""


def default_work(name: str = "aspen") -> Path:
    """Working folder used when `--work` is not given."""
    return Path.home() / ".cache" / "pando" / "training" / name
