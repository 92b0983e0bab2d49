"""How far: ways to stay near the pretrained weights."""

from tl_callbacks.anchoring.callback import WeightAnchoring
from tl_callbacks.anchoring.fisher.diagonal import Fisher, diagonal_fisher, load_fisher, save_fisher
from tl_callbacks.anchoring.fisher.likelihood import draw_labels, log_likelihood
from tl_callbacks.anchoring.forms.decoupled import Decoupled
from tl_callbacks.anchoring.forms.features import Features
from tl_callbacks.anchoring.forms.mixout import Mixout
from tl_callbacks.anchoring.forms.outputs import Outputs
from tl_callbacks.anchoring.forms.penalty import Penalty
from tl_callbacks.anchoring.operations.annealing import SigmoidAnnealing, sigmoid_annealing
from tl_callbacks.anchoring.operations.features import distillation_loss, feature_distance
from tl_callbacks.anchoring.operations.interpolation import interpolate_
from tl_callbacks.anchoring.operations.lora import LoraUpdate, lora_updates, shrink_, update_gradients, update_norm
from tl_callbacks.anchoring.operations.mixout import mix_, mixed_gradient, mixout_mask
from tl_callbacks.anchoring.operations.pulls import distance, half_life, penalty_gradient, pull_
from tl_callbacks.anchoring.reference.copies import snapshot
from tl_callbacks.anchoring.reference.reference import Reference
from tl_callbacks.anchoring.weight_interpolation import WeightInterpolation

__all__ = [
    "Decoupled",
    "Features",
    "Fisher",
    "LoraUpdate",
    "Mixout",
    "Outputs",
    "Penalty",
    "Reference",
    "SigmoidAnnealing",
    "WeightAnchoring",
    "WeightInterpolation",
    "diagonal_fisher",
    "distance",
    "distillation_loss",
    "draw_labels",
    "feature_distance",
    "half_life",
    "interpolate_",
    "load_fisher",
    "log_likelihood",
    "lora_updates",
    "mix_",
    "mixed_gradient",
    "mixout_mask",
    "penalty_gradient",
    "pull_",
    "save_fisher",
    "shrink_",
    "sigmoid_annealing",
    "snapshot",
    "update_gradients",
    "update_norm",
]
