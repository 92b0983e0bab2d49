"""The base of our callbacks: what `attach` lends them beyond what the Trainer hands to every callback."""

import functools
import json
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerState


class TransferCallback(TrainerCallback):
    """A Trainer callback that `attach` can check, lend the trainer to, and ask for facts.

    All methods may be left as they are. None of our callbacks is an `ExportableState`: they keep nothing that
    cannot be derived again from the step and `log_history`.
    """

    trainer: Trainer | None = None
    transitions = 0
    """How often this callback has changed what trains; after each change the ranks are compared."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name, hook in list(vars(cls).items()):
            if name.startswith("on_") and hasattr(TrainerCallback, name):
                setattr(cls, name, _as_the_trainer_calls(hook))

    def findings(self, trainer: Trainer) -> list[str]:
        """Return what would go wrong with this trainer, one text a finding; empty if nothing."""
        return []

    def cautions(self, trainer: Trainer) -> list[str]:
        """Return what will work but should be known beforehand, one text each; empty if nothing."""
        return []

    def on_attach(self, trainer: Trainer) -> None:
        """Take the trainer, once `attach` found nothing wrong."""
        self.trainer = trainer

    def before_optimizer_load(self, model: nn.Module, state: TrainerState) -> None:
        """Act after the optimizer was created and before its state is loaded and the model is wrapped."""

    def restore(self, model: nn.Module) -> None:
        """Leave the model as the user had it, after training and after an exception. Safe to call twice."""

    def log(self, metrics: dict[str, float], state: TrainerState) -> None:
        """Log numbers to every reporter and to `log_history`; without a trainer to `log_history` alone."""
        if self.trainer is not None:
            Trainer.log(self.trainer, metrics)  # TRL's own would add its metrics a second time
        else:
            state.log_history.append({**metrics, "step": state.global_step})

    def facts(self) -> Mapping[str, Any]:
        """Return what `recipe.json` should say of this callback, as JSON values."""
        return {}


def _as_the_trainer_calls(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Return a hook that gets the arguments and the model of the Trainer from SetFit's trainer too.

    SetFit's passes its own, a classifier that is no module, and those of the Trainer inside beside them.
    """

    @functools.wraps(hook)
    def called(self: TransferCallback, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if "st_model" in kwargs:
            args, kwargs["model"] = kwargs["st_args"], kwargs["st_model"]
        return hook(self, args, state, control, **kwargs)

    return called


def announce(text: str, state: TrainerState) -> None:
    """Show a text to the person who trains: on standard output of the first process, as the Trainer shows its logs."""
    if state.is_world_process_zero:
        print(text, flush=True)  # noqa: T201


def as_json(value: Any) -> Any:
    """Return `value` as JSON can hold it: sets as sorted lists, what is no JSON value as text.

    Example:
        >>> as_json({"modules": {"b", "a"}, "rate": 0.1})
        {'modules': ['a', 'b'], 'rate': 0.1}
    """
    return json.loads(json.dumps(value, default=lambda v: sorted(v) if isinstance(v, set | frozenset) else str(v)))
