"""The adapter: when a Trainer's model is asked what it could do before, and which checkpoints may be the best."""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers import EarlyStoppingCallback, Trainer, TrainerControl, TrainerState, TrainingArguments

from tl_callbacks import events
from tl_callbacks.callbacks import TransferCallback, announce
from tl_callbacks.checkpoints import loaded_checkpoint
from tl_callbacks.fingerprints import changes_base
from tl_callbacks.forgetting.gate import guard_best, step_at_the_end, too_little
from tl_callbacks.forgetting.measures import Measure
from tl_callbacks.forgetting.panel import Panel
from tl_callbacks.forgetting.readings import Change
from tl_callbacks.forgetting.records import Measured, logs, number, retention_key, row, smallest
from tl_callbacks.groups import LayerGroups
from tl_callbacks.sharding import sharding, zero_stage

_EVENT = "forgetting"


class ForgettingMonitor(TransferCallback):
    """Measures at each evaluation and at the end what the model has forgotten of what the pretrained one could do.

    Logged by measure: `tl/forgetting/<measure>`, how much worse it is than in the pretrained model, in its own unit
    (points of a share, nats a token; below 0 where it got better), and `tl/forgetting/<measure>_se`, the standard error
    of that, paired by row; `tl/retention/<measure>`, what share is left (1: all). The smallest is `tl/retention`, and
    `eval_retention` among the metrics that the evaluation returns, for `metric_for_best_model` and early stopping. A
    measure that has become NaN makes it NaN.

    The baseline is the model that `attach` finds, with adapters off, before a resumed run loads its checkpoint. Its
    numbers, the fingerprint of its weights and a digest of the rows are recorded in `log_history`; a resumed run
    compares with the recorded ones, refuses other rows, and warns where its own numbers differ. The measures read their
    rows in passes of their own, in eval mode, and change no random state.

    With `min_retention`, no checkpoint below it becomes `best_model_checkpoint`: `load_best_model_at_end` loads the
    best one that satisfies it, and `save_strategy="best"` saves no other. Where none does, the training ends with a
    warning, and `recipe.json` says so.

    Args:
        measures: `LanguageModelling`, `SourceTask`, `Retrieval`, one or several.
        min_retention: smallest share that every measure may have kept, above 0, of a score above 0; None: none is
            asked for.
        groups: the layer groups; None: `group_layers(model)`.

    Raises:
        TypeError: what is given is no measure.
        ValueError: there is no measure, two have one name, or `min_retention` is not above 0; when attached: a value is
            no number in the pretrained model, or with `min_retention` a score is 0 there; when resumed: the run began
            with other rows.

    Example:
        >>> from tl_callbacks import LanguageModelling
        >>> ForgettingMonitor(LanguageModelling(["The first text.", "The second."]), min_retention=0.95)
        ForgettingMonitor(measures=['language'], min_retention=0.95)

    References:
        Biderman et al., "LoRA Learns Less and Forgets Less", TMLR 2024. https://arxiv.org/abs/2405.09673
        Davari et al., "Probing Representation Forgetting in Supervised and Unsupervised Continual Learning", CVPR 2022.
        https://arxiv.org/abs/2203.13381
    """

    def __init__(
        self,
        measures: Measure | Sequence[Measure],
        *,
        min_retention: float | None = None,
        groups: LayerGroups | None = None,
    ) -> None:
        held = (measures,) if isinstance(measures, Measure) else tuple(measures)
        if others := [measure for measure in held if not isinstance(measure, Measure)]:
            raise TypeError(f"expected measures, such as LanguageModelling(texts), got {others[0]!r:.60}.")
        if not held:
            raise ValueError("there is nothing to measure. Give LanguageModelling, SourceTask or Retrieval.")
        names = [name for measure in held for name in measure.definitions]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two measures are called `{twice[0]}`; give one another `name=`.")
        if min_retention is not None and not min_retention > 0:
            raise ValueError(f"`min_retention` is {min_retention}; expected a share above 0, such as 0.95, or None.")
        self.min_retention = min_retention
        self._panel = Panel(held, groups)
        self._now: Measured | None = None
        self._recorded: dict[str, float] = {}

    def __repr__(self) -> str:
        names = [measure.name for measure in self._panel.measures]
        return f"ForgettingMonitor(measures={names}, min_retention={self.min_retention!r})"

    def findings(self, trainer: Trainer) -> list[str]:
        """Return what would go wrong: a checkpoint taken for the pretrained model, rows that cannot be read."""
        found = []
        others = trainer.callback_handler.callbacks
        if sum(isinstance(other, ForgettingMonitor) for other in others) > 1:
            found.append("the Trainer has several ForgettingMonitor; give one all measures.")
        if path := loaded_checkpoint(trainer.model):
            found.append(
                f"ForgettingMonitor would take the model of `{path}` for the pretrained one. Load the pretrained model "
                "and pass resume_from_checkpoint to train(). If it is the pretrained one, give its folder a name "
                "that no Trainer gives its checkpoints."
            )
        if sharding(trainer) == "fsdp1" or zero_stage(trainer) == 3:
            found.append("ForgettingMonitor reads no model that FSDP 1 or ZeRO-3 has cut. Train with DDP or FSDP 2.")
        before = [type(other).__name__ for other in others[: others.index(self)] if _stops_early(other)]
        if before and trainer.args.metric_for_best_model in ("retention", "eval_retention"):
            found.append(f"{before[0]} looks for `eval_retention` before ForgettingMonitor has it. Pass it behind.")
        return found + [text for measure in self._panel.measures for text in measure.findings(trainer)]

    def cautions(self, trainer: Trainer) -> list[str]:
        """Return what `min_retention` cannot do here, and which model the baseline is where it is not the base."""
        found = []
        if self.min_retention is not None and trainer.args.metric_for_best_model is None:
            found.append(
                f"min_retention={self.min_retention} chooses among checkpoints, and the Trainer looks for no best one: "
                "set load_best_model_at_end=True, or metric_for_best_model. It is judged at the end alone."
            )
        if self.min_retention is not None and any(map(_stops_early, trainer.callback_handler.callbacks)):
            found.append(
                "EarlyStoppingCallback compares with the best checkpoint, which none below min_retention can be, and "
                "counts no evaluation while there is none: it may stop late or never. Let max_steps or "
                "num_train_epochs bound the training."
            )
        if trainer.model is not None and changes_base(trainer.model):
            found.append(
                "the adapters have rewritten the weights below them, so ForgettingMonitor takes for the pretrained "
                "model the one with its adapters as they are now. Attach before anything has trained them."
            )
        return found

    def on_attach(self, trainer: Trainer) -> None:
        """Take the baseline, and a say in which checkpoint is the best."""
        attached = self.trainer is trainer
        super().on_attach(trainer)
        assert trainer.model is not None
        self._take(trainer, trainer.model)
        if self.min_retention is not None and not attached:
            guard_best(trainer, self.satisfied)

    def before_optimizer_load(self, model: nn.Module, state: TrainerState) -> None:
        """Take the baseline anew where `model_init` made another model for a fresh training."""
        if state.global_step == 0 and self.trainer is not None and self.trainer.model_init is not None:
            self._take(self.trainer, model)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Record the baseline, or go on with the one that a resumed run recorded."""
        self._attached()
        self._now = None
        if began := events.read(state.log_history, _EVENT):
            self._resume(began[0])
        else:
            events.emit(state.log_history, _EVENT, step=state.global_step, **self._baseline())
            announce(self._summary(), state)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure, once a step of a training, and put the smallest retention among the metrics."""
        if self.trainer is None:
            return
        if not self.trainer.is_in_train:  # asked for by hand: true of the weights as they are, and of no step
            kept = self._smallest(self.changes(kwargs["model"]))
        elif self._now is None or self._now.step != state.global_step:
            kept = self._measure(kwargs["model"], state, weights_of=state.global_step).retention
        else:
            kept = self._now.retention
        kwargs["metrics"][retention_key(kwargs["metrics"])] = kept

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure the weights that the training ends with, and say if they kept too little."""
        measured = self._measure(kwargs["model"], state, weights_of=step_at_the_end(args, state))
        facts = {"weights_of": measured.weights_of, "values": logs(measured)}
        events.emit(state.log_history, f"{_EVENT}_end", step=state.global_step, **facts)
        if self.min_retention is not None and not self.satisfied() and state.is_world_process_zero:
            warnings.warn(too_little(measured.retention, self.min_retention, args, state), UserWarning, stacklevel=2)

    def changes(self, model: nn.Module) -> dict[str, Change]:
        """Return what became of each value in a model as it is now, by name. Call it on all ranks, once attached.

        Nothing is logged; so a grid of weights can be judged, or a model after the training.

        Args:
            model: the model that was attached, with whatever weights it has.

        Raises:
            RuntimeError: nothing is attached yet.
        """
        self._attached()
        return self._panel.changes(model, self._recorded)

    def retention(self) -> float:
        """Return the smallest retention of the model as it is now. Call it on all ranks, once attached.

        Raises:
            RuntimeError: nothing is attached yet.
        """
        model = self._attached().model
        assert model is not None
        return self._smallest(self.changes(model))

    def satisfied(self) -> bool:
        """Return whether what was measured last has kept `min_retention`; true where none is asked for."""
        if self.min_retention is None:
            return True
        return self._now is not None and self._now.retention >= self.min_retention

    def facts(self) -> Mapping[str, Any]:
        """Return what was asked for, and what became of each value in the weights that the training ended with."""
        now = self._now
        return {
            "min_retention": self.min_retention,
            "retention": number(now.retention) if now is not None else None,
            "satisfied": self.satisfied() if now is not None else None,
            "weights_of_step": now.weights_of if now is not None else None,
            "measures": {
                name: row(text, self._recorded.get(name), now.changes.get(name) if now is not None else None)
                for measure in self._panel.measures
                for name, text in measure.definitions.items()
            },
            "start": self._panel.start,
            "rows": {measure.name: measure.rows for measure in self._panel.measures},
            "seconds": {what: round(value, 3) for what, value in self._panel.seconds.items()},
        }

    def _take(self, trainer: Trainer, model: nn.Module) -> None:
        self._panel.take(trainer, model)
        self._recorded = dict(self._panel.values)
        if self.min_retention is not None and (lacking := sorted(self._recorded.keys() - self._panel.retained)):
            raise ValueError(
                f"min_retention={self.min_retention} is a share of what the pretrained model scores in every measure, "
                f"and `{lacking[0]}` is {self._recorded[lacking[0]]:g} there. Give rows that it can do, or its old "
                "head as `head=`, or leave that measure out."
            )

    def _smallest(self, changes: Mapping[str, Change]) -> float:
        return smallest(changes, self._panel.retained)

    def _attached(self) -> Trainer:
        if self.trainer is None:
            raise RuntimeError("ForgettingMonitor needs the trainer. Call attach(trainer) before trainer.train().")
        return self.trainer

    def _baseline(self) -> dict[str, Any]:
        return {"start": self._panel.start, "rows": self._panel.rows, "baseline": self._recorded}

    def _resume(self, began: Mapping[str, Any]) -> None:
        """Go on with the recorded baseline; refuse other rows, and warn where the model's numbers are others."""
        if others := [name for name, rows in self._panel.rows.items() if began.get("rows", {}).get(name, rows) != rows]:
            raise ValueError(
                f"ForgettingMonitor: the rows of `{others[0]}` are not those that the run began with, which its "
                "recorded numbers are of. Resume with the same rows, tokenizer and settings, or give the measure "
                "another `name=`."
            )
        own = self._panel.values
        self._recorded = {name: began["baseline"].get(name, value) for name, value in own.items()}
        apart = [name for name, value in own.items() if not _close(value, self._recorded[name])]
        same = began["start"] == self._panel.start
        if apart or not same:
            what = f"`{apart[0]}` is {own[apart[0]]:.6g} here and {self._recorded[apart[0]]:.6g} there" if apart else ""
            if not same:
                why = "their fingerprints differ"
            else:
                why = "" if self._panel.start is None else "below the head their weights are the same"
            warnings.warn(
                "ForgettingMonitor: the model that this run was made with, or a setting of a measure, is not the one "
                f"that it began with: {', '.join(filter(None, (what, why)))}. What is forgotten is still measured "
                "against the recorded numbers, but KL and standard errors against this one. Make the model as it was "
                "made at first.",
                UserWarning,
                stacklevel=4,
            )

    def _measure(self, model: nn.Module, state: TrainerState, *, weights_of: int) -> Measured:
        """Return what became of each value, logged once a step and for the weights of that step alone."""
        logged = self._now is not None and self._now.step == state.global_step
        changes = self.changes(model)
        self._now = Measured(state.global_step, weights_of, changes, self._smallest(changes))
        if weights_of == state.global_step and not logged:
            self.log(logs(self._now), state)
        return self._now

    def _summary(self) -> str:
        errors = self._panel.errors
        values = [f"{name} {value:.4g} ± {errors[name]:.2g}" for name, value in self._recorded.items()]
        without = [item for measure in self._panel.measures for item in measure.unmeasured.items()]
        values += [f"no {name} ({why})" for name, why in without]
        return f"{self!r} compares with the pretrained model: {', '.join(values)}"


def _stops_early(callback: Any) -> bool:
    return isinstance(callback, EarlyStoppingCallback)


def _close(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=1e-4, abs_tol=1e-6)
