"""Facts of a run as `recipe.json` and `trainer_state.json` hold them, for tests that need no training."""

import copy
import json
from pathlib import Path
from typing import Any

RECIPE: dict[str, Any] = {
    "schema_version": 1,
    "status": "finished",
    "model": {
        "class": "BertForSequenceClassification",
        "base_class": "BertForSequenceClassification",
        "name_or_path": "jo/small-bert",
        "local": False,
        "revision": "a" * 40,
        "dtype": "float32",
        "fingerprint": {"digest": "b" * 64, "tensors": {"bert.embeddings.word_embeddings.weight": "c" * 16}},
        "num_labels": 2,
        "id2label": {"0": "ham", "1": "spam"},
        "problem_type": None,
        "num_parameters": 1000,
        "trainable_parameters": 1000,
        "adapters": None,
    },
    "groups": {
        "groups": [
            {"name": "embeddings", "parameters": ["bert.embeddings.w"], "sizes": [600], "dtype": "float32"},
            {"name": "encoder.layer.0", "parameters": ["bert.encoder.w"], "sizes": [300], "dtype": "float32"},
            {"name": "head", "parameters": ["classifier.w"], "sizes": [100], "dtype": "float32"},
        ],
        "head": "head",
        "notes": [],
    },
    "methods": {
        "Strategy": {"name": "gradual", "options": {"decay": 0.8}},
        "LayerwiseOptimizer": {
            "optim": "adamw_torch",
            "learning_rate": 0.01,
            "scales": {"embeddings": 0.64, "head": 1.0},
        },
        "WeightAnchoring": {"strength": 0.01, "form": "decoupled", "exclude": None, "half_life_steps": 69.0},
    },
    "training_arguments": {"seed": 3, "output_dir": "/scratch/jo/run", "lr_scheduler_type": "linear"},
    "versions": {"python": "3.11.7", "torch": "2.13.0"},
    "training": {
        "global_step": 10,
        "max_steps": 10,
        "cost": {
            "from_step": 0,
            "seconds": 12.5,
            "cpu_seconds": 11.0,
            "accelerator_seconds": None,
            "peak_memory_bytes": 400_000_000,
            "peak_accelerator_memory_bytes": None,
            "processes": 1,
            "device": "cpu",
        },
    },
    "command": ["python", "/scratch/jo/train.py", "--train_file", "/scratch/jo/train.csv"],
    "commit": {"sha": "d" * 40, "dirty": False},
    "task": "text-classification",
    "language": "en",
    "data": {
        "name": "jo/mails",
        "local": False,
        "config": None,
        "revision": "e" * 40,
        "labels": ["ham", "spam"],
        "columns": {"text": "text", "label": "label"},
        "splits": {
            "train": {"rows": 64, "fingerprint": "f" * 64, "split": "train"},
            "test": {"rows": 32, "fingerprint": "0" * 64, "split": "test"},
        },
    },
    "preprocessing": {"max_length": 128},
    "results": {"test": {"eval_accuracy": 0.75, "eval_loss": 0.5, "eval_runtime": 1.0, "epoch": 3.0}},
}

STATE: dict[str, Any] = {
    "global_step": 10,
    "max_steps": 10,
    "log_history": [
        {"tl/event": "opening", "step": 0, "groups": ["head"], "trainable_parameters": 100},
        {"tl/unfreezing/open_groups": 1, "step": 0},
        {"tl/event": "opening", "step": 4, "groups": ["encoder.layer.0"], "trainable_parameters": 400},
        {"loss": 1.0, "grad_norm": 2.0, "learning_rate": 0.01, "epoch": 1.0, "step": 5},
        {"tl/rate/head": 0.01, "tl/rate/encoder.layer.0": 0.008, "tl/rate/embeddings": 0.0, "step": 5},
        {"eval_loss": 0.6, "eval_accuracy": 0.7, "eval_runtime": 1.0, "step": 5},
        {"loss": 0.5, "learning_rate": 0.001, "step": 10},
        {"tl/rate/head": 0.001, "tl/rate/encoder.layer.0": 0.0008, "tl/rate/embeddings": 0.0, "step": 10},
        {"eval_loss": 0.5, "eval_accuracy": 0.75, "step": 10},
    ],
}

COMPARISON: dict[str, Any] = {
    "row": "gradual",
    "n": 50,
    "seeds": [0, 1],
    "metric": "accuracy",
    "split": "test",
    "test_items": 32,
    "level": 0.95,
    "note": "32 test items, 2 seeds.",
    "command": "python recipes/compare.py",
    "rows": [
        {"row": "scratch", "label": "training from scratch", "value": {"mean": 0.5, "low": 0.4, "high": 0.6},
         "gain": None, "values": [0.4, 0.6], "trainable_share": 1.0,
         "cpu_seconds": 9.0, "steps": 99, "converged": False},
        {"row": "gradual", "label": "gradual unfreezing", "value": {"mean": 0.75, "low": 0.7, "high": 0.8},
         "gain": {"mean": 0.25, "low": 0.2, "high": 0.3}, "values": [0.7, 0.8], "trainable_share": 1.0,
         "cpu_seconds": 4.0, "steps": 10, "converged": None},
    ],
    "transfer": {"outcome": "positive", "sentence": "Transfer: positive at n = 50."},
    "adaptation": {"outcome": "does not pay", "sentence": "More adaptation than the probe: does not pay."},
}  # fmt: skip

RETENTION: dict[str, Any] = {
    "min_retention": 0.95,
    "retention": 0.96,
    "measures": {
        "retrieval": {"measures": "recall@1; now / before", "before": 0.5, "after": 0.48, "retention": 0.96},
        "text": {"measures": "nats a token; exp(before - now)", "before": 3.0, "after": 3.01, "retention": 0.99},
        "probe": {"measures": "accuracy; now / before", "before": None, "after": None, "retention": None},
    },
}

ADAPTERS = {
    "default": {"peft_type": "LORA", "r": 4, "task_type": "SEQ_CLS", "base_model_name_or_path": "jo/small-bert"}
}


def recipe(**changes: Any) -> dict[str, Any]:
    """The recipe with values replaced by their path, such as `model__revision=None`."""
    found = copy.deepcopy(RECIPE)
    for path, value in changes.items():
        *parents, last = path.split("__")
        place = found
        for parent in parents:
            place = place[parent]
        place[last] = value
    return found


def state(**changes: Any) -> dict[str, Any]:
    return {**copy.deepcopy(STATE), **changes}


def write(folder: Path, found: dict[str, Any] | None = None, history: dict[str, Any] | None = None) -> Path:
    """Write both files as a run would."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.json").write_text(json.dumps(found or recipe()))
    (folder / "trainer_state.json").write_text(json.dumps(history or state()))
    return folder
