"""How far: ways to stay near the pretrained weights."""

from tl_callbacks.anchoring.annealing import SigmoidAnnealing, sigmoid_annealing
from tl_callbacks.anchoring.callback import WeightAnchoring
from tl_callbacks.anchoring.copies import snapshot
from tl_callbacks.anchoring.decoupled import Decoupled
from tl_callbacks.anchoring.features import distillation_loss, feature_distance
from tl_callbacks.anchoring.fisher import Fisher, diagonal_fisher, load_fisher, save_fisher
from tl_callbacks.anchoring.interpolation import interpolate_
from tl_callbacks.anchoring.kept_features import Features
from tl_callbacks.anchoring.likelihood import draw_labels, log_likelihood
from tl_callbacks.anchoring.mixing import Mixout
from tl_callbacks.anchoring.mixout import mix_, mixed_gradient, mixout_mask
from tl_callbacks.anchoring.old_outputs import Outputs
from tl_callbacks.anchoring.penalties import distance, half_life, penalty_gradient, pull_
from tl_callbacks.anchoring.penalty import Penalty
from tl_callbacks.anchoring.reference import Reference
from tl_callbacks.anchoring.updates import LoraUpdate, lora_updates, shrink_, update_gradients, update_norm
from tl_callbacks.anchoring.wise import WeightInterpolation

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
