"""How far: a pull toward the pretrained weights."""

from tl_callbacks.anchoring.callback import WeightAnchoring
from tl_callbacks.anchoring.penalties import distance, half_life, penalty_gradient, pull_
from tl_callbacks.anchoring.reference import snapshot

__all__ = ["WeightAnchoring", "distance", "half_life", "penalty_gradient", "pull_", "snapshot"]
