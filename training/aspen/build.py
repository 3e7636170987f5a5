"""From a shape to the training model of its architecture."""

from training.aspen.hybrid import Willow
from training.aspen.model import Aspen
from training.aspen.shape import HybridShape, Shape

TrainingModel = Aspen | Willow


def build_model(shape: Shape | HybridShape) -> TrainingModel:
    """A model with initial weights, in fp32."""
    return Willow(shape) if isinstance(shape, HybridShape) else Aspen(shape)
