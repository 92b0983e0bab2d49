"""Transfer learning for the Hugging Face Trainer: who trains, how fast, when, and how far from the pretrained weights.

Put `attach(trainer)` before `trainer.train()`. The names below are the public ones.
"""

from tl_callbacks.anchoring import WeightAnchoring, WeightInterpolation
from tl_callbacks.attach import attach
from tl_callbacks.checkpoints import last_complete_checkpoint
from tl_callbacks.discovery import group_layers
from tl_callbacks.errors import NoEffectWarning, PreflightWarning
from tl_callbacks.forgetting import ForgettingMonitor, LanguageModelling, Retrieval, SourceTask, TaskMatrix
from tl_callbacks.groups import LayerGroup, LayerGroups
from tl_callbacks.layerwise import LayerwiseOptimizer, layerwise_optimizer, rates_from_drift
from tl_callbacks.loss_scale import ignores_item_count
from tl_callbacks.names import closest
from tl_callbacks.preflight import PreflightError
from tl_callbacks.previewing import preview
from tl_callbacks.probing import RepresentationProbes, probe_model, rank_models
from tl_callbacks.recorder import Recorder, add_to_recipe
from tl_callbacks.strategies import STRATEGIES, Strategy, adapt
from tl_callbacks.unfreezing import (
    GradualUnfreezing,
    UnfreezePlan,
    UnfreezeSchedule,
    at_fractions,
    at_steps,
    every,
    per_epoch,
    schedule_from_probes,
    slanted_triangular,
    staged,
)

__all__ = [
    "STRATEGIES",
    "ForgettingMonitor",
    "GradualUnfreezing",
    "LanguageModelling",
    "LayerGroup",
    "LayerGroups",
    "LayerwiseOptimizer",
    "NoEffectWarning",
    "PreflightError",
    "PreflightWarning",
    "Recorder",
    "RepresentationProbes",
    "Retrieval",
    "SourceTask",
    "Strategy",
    "TaskMatrix",
    "UnfreezePlan",
    "UnfreezeSchedule",
    "WeightAnchoring",
    "WeightInterpolation",
    "adapt",
    "add_to_recipe",
    "at_fractions",
    "at_steps",
    "attach",
    "closest",
    "every",
    "group_layers",
    "ignores_item_count",
    "last_complete_checkpoint",
    "layerwise_optimizer",
    "per_epoch",
    "preview",
    "probe_model",
    "rank_models",
    "rates_from_drift",
    "schedule_from_probes",
    "slanted_triangular",
    "staged",
]
