"""How far: a pull toward the pretrained weights."""

from tl_callbacks.anchoring.callback import WeightAnchoring
from tl_callbacks.anchoring.penalties import add_penalty_gradient_, distance, half_life, pull_
from tl_callbacks.anchoring.reference import snapshot

__all__ = ["WeightAnchoring", "add_penalty_gradient_", "distance", "half_life", "pull_", "snapshot"]
