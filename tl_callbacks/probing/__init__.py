"""What moved? Similarity to what was pretrained, and use of what was learned, layer by layer."""

from tl_callbacks.probing.alignment import procrustes, svcca
from tl_callbacks.probing.callback import RepresentationProbes
from tl_callbacks.probing.candidates import GroupProbe, ProbeTable, probe_model, rank_models
from tl_callbacks.probing.discriminant import fit_lda, lda_probe
from tl_callbacks.probing.domain import DomainDistances, domain_distance, mmd2, proxy_a_distance
from tl_callbacks.probing.gaussian_distances import coral, frechet
from tl_callbacks.probing.geometry import geometry, nearest_centre_disagreement, neural_collapse
from tl_callbacks.probing.linear_probe import fit_ridge, held_out_ridge, ridge_probe, ridge_probes
from tl_callbacks.probing.minibatch import MinibatchCKA
from tl_callbacks.probing.moments import Moments, all_reduce_
from tl_callbacks.probing.neighbours import intrinsic_dimension, knn_probe
from tl_callbacks.probing.online_code import online_code
from tl_callbacks.probing.projection import RandomProjection
from tl_callbacks.probing.scores import shuffled_labels, stratified_folds
from tl_callbacks.probing.similarity import cka_matrix, linear_cka
from tl_callbacks.probing.streamed import PairSums, reduce_pairs_
from tl_callbacks.probing.transferability import (
    h_score,
    h_score_of,
    ledoit_wolf,
    leep,
    log_me,
    log_me_of,
    nce,
)

__all__ = [
    "DomainDistances",
    "GroupProbe",
    "MinibatchCKA",
    "Moments",
    "PairSums",
    "ProbeTable",
    "RandomProjection",
    "RepresentationProbes",
    "all_reduce_",
    "cka_matrix",
    "coral",
    "domain_distance",
    "fit_lda",
    "fit_ridge",
    "frechet",
    "geometry",
    "h_score",
    "h_score_of",
    "held_out_ridge",
    "intrinsic_dimension",
    "knn_probe",
    "lda_probe",
    "ledoit_wolf",
    "leep",
    "linear_cka",
    "log_me",
    "log_me_of",
    "mmd2",
    "nce",
    "nearest_centre_disagreement",
    "neural_collapse",
    "online_code",
    "probe_model",
    "procrustes",
    "proxy_a_distance",
    "rank_models",
    "reduce_pairs_",
    "ridge_probe",
    "ridge_probes",
    "shuffled_labels",
    "stratified_folds",
    "svcca",
]
