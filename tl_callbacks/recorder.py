"""Writes `recipe.json`, the facts of a run that its log history does not hold, and logs every group's rate."""

import json
import math
import os
import platform
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from tl_callbacks.callbacks import TransferCallback, as_json
from tl_callbacks.discovery.order import watch_order
from tl_callbacks.frozen.state import openable
from tl_callbacks.groups import LayerGroups
from tl_callbacks.layerwise.factory import record_groups
from tl_callbacks.parameters import parameters_by_name, true_size

SCHEMA_VERSION = 1
RECIPE_NAME = "recipe.json"
_PACKAGES = ("tl-callbacks", "torch", "transformers", "accelerate", "peft", "datasets")


def add_to_recipe(output_dir: str | Path, **facts: Any) -> None:
    """Add facts to a run's `recipe.json`, such as `data` and `results`. Written whole or not at all.

    Call it on the first process only, after training.

    Args:
        output_dir: the run's folder.
        facts: top-level keys to JSON values. Keys that the recorder wrote cannot be replaced.

    Raises:
        FileNotFoundError: there is no `recipe.json`; the trainer was not attached or did not train.
        ValueError: a key is the recorder's own.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "recipe.json").write_text('{"schema_version": 1}')
        >>> add_to_recipe(folder, results={"accuracy": 0.5})
        >>> json.loads((folder / "recipe.json").read_text())["results"]
        {'accuracy': 0.5}
    """
    path = Path(output_dir) / RECIPE_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"{path.name} is missing in `{path.parent}`; it is written when training begins. Call attach(trainer) "
            "before trainer.train(), and add facts afterwards."
        )
    recipe = json.loads(path.read_text())
    if taken := sorted(set(facts) & set(Recorder.KEYS)):
        raise ValueError(f"`{taken[0]}` is written by the recorder and cannot be replaced; choose another key.")
    _write(path, {**recipe, **facts})


class Recorder(TransferCallback):
    """Writes `recipe.json` when training begins and ends, logs all rates, and stops at a loss that is no number.

    `attach` adds it. Rates are read from the optimizer right after the step that used them. In the first forward it
    checks the order of the groups.

    Args:
        groups: the layer groups of the optimizer.
        methods: the callbacks and the factory whose facts go into the file, by class name.

    Example:
        >>> Recorder(None, {})
        Recorder(methods=[])
    """

    KEYS = ("schema_version", "status", "model", "groups", "methods", "training_arguments", "versions", "training")

    def __init__(self, groups: LayerGroups | None, methods: Mapping[str, Any]) -> None:
        self.groups = groups
        self.methods = dict(methods)
        self._rates: dict[str, float] = {}
        self._stop_watching: Callable[[], None] = lambda: None

    def __repr__(self) -> str:
        return f"Recorder(methods={list(self.methods)})"

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write what is known before step 1, and watch in which order the first forward uses the groups."""
        self._write(args, state, kwargs["model"], "running")
        if self.groups:
            record_groups(self.groups, state)
        if self.groups and state.is_world_process_zero and not args.torch_compile:
            self._stop_watching = watch_order(kwargs["model"], self.groups)

    def restore(self, model: nn.Module) -> None:
        """Remove what watches the first forward, if none came."""
        self._stop_watching()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write what happened."""
        self._write(args, state, kwargs["model"], "finished")

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the rates that the step has just used; the scheduler advances before the log."""
        groups = kwargs["optimizer"].param_groups
        self._rates = {group["layer_group"]: group["lr"] for group in groups if "layer_group" in group}

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Log the rate of every group beside each training log, as `tl/rate/<group>`."""
        logs = kwargs["logs"]
        if "learning_rate" not in logs:
            return
        if getattr(kwargs["optimizer"], "scaler", None) is None:  # a gradient scaler skips steps that are no numbers
            _check_finite(logs, args, state)
        if self._rates:
            order = dict.fromkeys((*(self.groups.names if self.groups else ()), *self._rates))
            self.log({f"tl/rate/{name}": float(self._rates[name]) for name in order if name in self._rates}, state)

    def _write(self, args: TrainingArguments, state: TrainerState, model: nn.Module, status: str) -> None:
        if not state.is_world_process_zero:
            return
        path = Path(str(args.output_dir)) / RECIPE_NAME
        added: dict[str, Any] = {}
        if path.is_file():
            added = {key: value for key, value in json.loads(path.read_text()).items() if key not in self.KEYS}
            if status == "running" and state.global_step == 0:
                added.pop("results", None)  # of an earlier run in the same folder
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, {**self._recipe(args, state, model, status), **added})

    def _recipe(self, args: TrainingArguments, state: TrainerState, model: nn.Module, status: str) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "status": status,
            "model": _model_facts(model),
            "groups": json.loads(self.groups.to_json()) if self.groups else None,
            "methods": {name: as_json(dict(method.facts())) for name, method in self.methods.items()},
            "training_arguments": {key: as_json(value) for key, value in cast(Any, args).to_dict().items()},
            "versions": {"python": platform.python_version(), **_versions()},
            "training": {"global_step": state.global_step, "max_steps": state.max_steps},
        }


def _check_finite(logs: Mapping[str, float], args: TrainingArguments, state: TrainerState) -> None:
    """Stop at a loss or gradient that is no number."""
    bad = [key for key in ("loss", "grad_norm") if key in logs and not math.isfinite(logs[key])]
    if bad:
        raise FloatingPointError(
            f"`{bad[0]}` is {logs[bad[0]]} at step {state.global_step}: the weights are no numbers from here on. Lower "
            f"learning_rate ({args.learning_rate}), add warm-up, or look for empty or broken inputs; the last "
            "checkpoint in output_dir is from before, if one was saved."
        )


def _model_facts(model: nn.Module) -> dict[str, Any]:
    config = getattr(model, "config", None)
    adapters = getattr(model, "peft_config", None)
    return {
        "class": type(model).__name__,
        "name_or_path": getattr(config, "_name_or_path", None) or None,
        "revision": getattr(config, "_commit_hash", None),
        "num_parameters": sum(true_size(parameter) for parameter in parameters_by_name(model).values()),
        "trainable_parameters": sum(parameter.numel() for parameter in openable(model).values()),
        "adapters": {n: as_json(c.to_dict()) for n, c in adapters.items()} if adapters else None,
    }


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _write(path: Path, recipe: Mapping[str, Any]) -> None:
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(recipe, indent=2) + "\n")
    os.replace(part, path)
