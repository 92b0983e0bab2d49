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
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from tl_callbacks.callbacks import TransferCallback, as_json
from tl_callbacks.costs import Meter
from tl_callbacks.discovery.order import watch_order
from tl_callbacks.groups import LayerGroups
from tl_callbacks.identity import data_facts, model_facts, origin
from tl_callbacks.invocation import command, commit
from tl_callbacks.layerwise.factory import record_groups

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

    `attach` adds it, and then it takes the fingerprint of the weights that training starts from, which a resumed run
    has before its checkpoint is loaded. Rates are read from the optimizer right after the step that used them. In the
    first forward it checks the order of the groups.

    Args:
        groups: the layer groups of the optimizer.
        methods: the callbacks and the factory whose facts go into the file, by class name.

    Example:
        >>> Recorder(None, {})
        Recorder(methods=[])
    """

    KEYS = (
        "schema_version", "status", "model", "groups", "methods", "training_arguments", "versions", "training",
        "datasets", "command", "commit",
    )  # fmt: skip

    base_revision: str | None = None
    """The commit of the pretrained model on the Hub, where the script knows it."""

    def __init__(self, groups: LayerGroups | None, methods: Mapping[str, Any]) -> None:
        self.groups = groups
        self.methods = dict(methods)
        self._origin: dict[str, Any] | None = None
        self._invocation: dict[str, Any] = {}
        self._meter = Meter(0)
        self._rates: dict[str, float] = {}
        self._stop_watching: Callable[[], None] = lambda: None

    def __repr__(self) -> str:
        return f"Recorder(methods={list(self.methods)})"

    def on_attach(self, trainer: Trainer) -> None:
        """Take the fingerprint of the weights, once: a second `attach` may come after a training."""
        super().on_attach(trainer)
        if self._origin is None and trainer.model is not None:
            self._origin = self._start(trainer.model, hashed=trainer.is_world_process_zero())

    def before_optimizer_load(self, model: nn.Module, state: TrainerState) -> None:
        """Take it of the model that `model_init` has just made for a fresh training."""
        if state.global_step == 0 and self.trainer is not None and self.trainer.model_init is not None:
            anew = self._start(model, hashed=state.is_world_process_zero)
            if anew["fingerprint"] is not None or self._origin is None:  # sharded by now: the one before, made alike
                self._origin = anew

    def _start(self, model: nn.Module, *, hashed: bool) -> dict[str, Any]:
        return origin(model, self.groups, self.base_revision, hashed=hashed)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write what is known before step 1, and watch in which order the first forward uses the groups."""
        self._meter = Meter(state.global_step)
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
                for key in ("results", "comparison"):  # of an earlier run in the same folder
                    added.pop(key, None)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._invocation = self._invocation or {"command": command(), "commit": commit()}
        _write(path, {**self._recipe(args, state, model, status), **added})

    def _recipe(self, args: TrainingArguments, state: TrainerState, model: nn.Module, status: str) -> dict[str, Any]:
        started = self._origin or self._start(model, hashed=False)
        cost = {"cost": self._meter.read(args)} if status == "finished" else {}
        return {
            "schema_version": SCHEMA_VERSION,
            "status": status,
            "model": {**started, **model_facts(model)},
            "groups": json.loads(self.groups.to_json()) if self.groups else None,
            "methods": {name: as_json(dict(method.facts())) for name, method in self.methods.items()},
            "training_arguments": {key: as_json(value) for key, value in cast(Any, args).to_dict().items()},
            "versions": {"python": platform.python_version(), **_versions()},
            "training": {"global_step": state.global_step, "max_steps": state.max_steps, **cost},
            "datasets": data_facts(self.trainer) if self.trainer is not None else {},
            **self._invocation,
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
