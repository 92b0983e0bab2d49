"""Which form the arguments of an anchor ask for, and what a resumed run must have kept."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import TrainerState

from tl_callbacks import events
from tl_callbacks.anchoring.annealing import SigmoidAnnealing
from tl_callbacks.anchoring.forms import Form
from tl_callbacks.anchoring.kept_features import Features
from tl_callbacks.anchoring.mixing import Mixout
from tl_callbacks.anchoring.old_outputs import Outputs
from tl_callbacks.anchoring.weight_forms import Decoupled, Penalty

FORMS: dict[str, type[Form]] = {
    "decoupled": Decoupled,
    "penalty": Penalty,
    "mixout": Mixout,
    "features": Features,
    "outputs": Outputs,
}


def make_form(
    form: str | Form,
    strength: float | Mapping[str, float],
    importance: Mapping[str, Tensor] | None,
    annealing: SigmoidAnnealing | None,
) -> Form:
    """Return the form of a name, or the one that is given.

    Args:
        form: its name, or a form with settings of its own.
        strength: of all groups, or by group.
        importance: of each parameter; None: all alike.
        annealing: of the pull; None: constant.

    Raises:
        ValueError: the name is unknown, the form does not take an option or strengths by group, or a strength is out of
            its range.

    Example:
        >>> type(make_form("mixout", 0.1, None, None)).__name__
        'Mixout'
    """
    if not isinstance(form, Form) and form not in FORMS:
        raise ValueError(f"`form` is {form!r}; expected one of {', '.join(FORMS)}.")
    if importance is not None and form != "penalty":
        raise ValueError(f'`importance` weighs the terms of a penalty; form={form!r} has none. Take form="penalty".')
    if annealing is not None and form != "decoupled":
        raise ValueError(
            f"`annealing` weighs the optimizer's update against a pull of its own, which form={form!r} does not have. "
            'Take form="decoupled".'
        )
    made = form if isinstance(form, Form) else Decoupled(annealing) if annealing is not None else FORMS[form]()
    if isinstance(strength, Mapping) and not made.by_group:
        raise ValueError(
            f"`strength` has numbers by group, which form={form!r} cannot use: the outputs are of the whole model. "
            "Give one number."
        )
    for value in strength.values() if isinstance(strength, Mapping) else (strength,):
        made.check(value)
    return made


def form_name(form: Form) -> str:
    """Return the name of a form, or how it was made if it has none.

    Example:
        >>> form_name(Mixout())
        'mixout'
    """
    return next((name for name, kind in FORMS.items() if type(form) is kind), repr(form))


def option_facts(importance: Any, annealing: SigmoidAnnealing | None) -> dict[str, Any]:
    """Return what `recipe.json` should say of the options that are given.

    Example:
        >>> option_facts(None, SigmoidAnnealing(0.1, 100))
        {'annealing': {'k': 0.1, 'midpoint': 100}}
    """
    found: dict[str, Any] = {}
    if importance is not None:
        known = getattr(importance, "facts", {})
        found["importance"] = {"parameters": len(importance), **{k: v for k, v in known.items() if k != "weights"}}
    if annealing is not None:
        found["annealing"] = {"k": annealing.k, "midpoint": annealing.midpoint}
    return found


def record_length(annealing: SigmoidAnnealing | None, state: TrainerState) -> None:
    """Record the length of training that a midpoint in fractions counts by.

    Raises:
        ValueError: the run that is resumed had another.
    """
    if annealing is None or isinstance(annealing.midpoint, int):
        return
    recorded = events.read(state.log_history, "annealing")
    if not recorded:
        events.emit(state.log_history, "annealing", step=state.global_step, max_steps=state.max_steps)
    elif recorded[-1]["max_steps"] != state.max_steps:
        raise ValueError(
            f"the run was started with max_steps={recorded[-1]['max_steps']} and is resumed with {state.max_steps}, "
            f"but {annealing!r} counts a fraction of it. Resume with the same length, or give the midpoint in steps."
        )
