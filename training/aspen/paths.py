"""Where the training data, checkpoints and exports live."""

from pathlib import Path

MODELS = Path(__file__).resolve().parents[2] / "pando" / "models_builtin"
"""The shipped models, as package data."""
MODEL_FOLDER = MODELS / "aspen"


def default_work(name: str = "aspen") -> Path:
    """Working folder used when `--work` is not given."""
    return Path.home() / ".cache" / "pando" / "training" / name
