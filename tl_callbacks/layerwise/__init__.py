"""How fast: one learning rate per layer group."""

from tl_callbacks.layerwise.drift import rates_from_drift
from tl_callbacks.layerwise.factory import LayerwiseOptimizer, layerwise_optimizer
from tl_callbacks.layerwise.scales import layer_scales

__all__ = ["LayerwiseOptimizer", "layer_scales", "layerwise_optimizer", "rates_from_drift"]
