"""The form of the decoupled pull, constant or annealed, at an optimizer step by hooks."""

from collections.abc import Mapping
from typing import Any

import torch
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from transformers import TrainerState

from tl_callbacks import events
from tl_callbacks.anchoring.forms.form import Anchored, AnchoredUpdate, Form, Opening, skipped
from tl_callbacks.anchoring.operations.annealing import SigmoidAnnealing
from tl_callbacks.anchoring.operations.lora import shrink_
from tl_callbacks.anchoring.operations.pulls import half_life, pull_
from tl_callbacks.dtensors import local

_EVENT = "annealing"


class Decoupled(Form):
    """Before each optimizer step: theta <- theta - strength * (lr / peak lr) * (theta - theta_pre).

    The pull stands apart from the gradient, as AdamW decays weights. The unit of `strength` is the share of the
    distance removed per step at the group's peak rate; it follows the schedule, but not the size of the rate. A rate
    above the peak that is known, as of a cyclic schedule that starts at its lowest, pulls as the peak does. A parameter
    that a step gives no gradient is not pulled by it, as the optimizer leaves it alone too.

    With `annealing` it is RecAdam's: with the weight w of the target task at a step, the pull's share is multiplied by
    1 - w, and the optimizer's update of the anchored groups by w (AdamW's weight decay with it). The rates that are
    logged stay the schedule's; w is logged as `tl/anchor_target_weight`.

    Args:
        annealing: `sigmoid_annealing(k, midpoint)`; None: the pull is constant.

    Example:
        >>> from tl_callbacks.anchoring import WeightAnchoring, sigmoid_annealing
        >>> WeightAnchoring(0.01, form=Decoupled(annealing=sigmoid_annealing(k=0.1, midpoint=0.25))).form
        Decoupled(annealing=SigmoidAnnealing(k=0.1, midpoint=0.25))

    References:
        Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019. https://arxiv.org/abs/1711.05101
        Chen et al., "Recall and Learn: Fine-tuning Deep Pretrained Language Models with Less Forgetting", EMNLP 2020
        (RecAdam). https://arxiv.org/abs/2004.12651
    """

    name = "decoupled"
    below_one = True
    unit = "the share of the distance removed per step at the peak rate"

    def __init__(self, *, annealing: SigmoidAnnealing | None = None) -> None:
        super().__init__()
        self.annealing = annealing
        self._target_weight = 0.0
        self._rates: list[tuple[dict[str, Any], Any]] = []

    def __repr__(self) -> str:
        return f"Decoupled(annealing={self.annealing!r})"

    @property
    def of_updates(self) -> bool:
        """It shrinks what LoRA adds."""
        return True

    def facts(self, strength: float | Mapping[str, float]) -> dict[str, Any]:
        """Return the annealing, if there is one, and the half-life of a distance in steps at the peak rate."""
        facts: dict[str, Any] = {}
        if self.annealing is not None:
            facts["annealing"] = {"k": self.annealing.k, "midpoint": self.annealing.midpoint}
        if not isinstance(strength, Mapping) and strength > 0:
            facts["half_life_steps"] = half_life(strength)
        return facts

    def begin(self, state: TrainerState) -> None:
        """Record the length of training that a midpoint in fractions counts by.

        Raises:
            ValueError: the run that is resumed had another.
        """
        if self.annealing is None or isinstance(self.annealing.midpoint, int):
            return
        recorded = events.read(state.log_history, _EVENT)
        if not recorded:
            events.emit(state.log_history, _EVENT, step=state.global_step, max_steps=state.max_steps)
        elif recorded[-1]["max_steps"] != state.max_steps:
            raise ValueError(
                f"the run was started with max_steps={recorded[-1]['max_steps']} and is resumed with "
                f"{state.max_steps}, but {self.annealing!r} counts a fraction of it. Resume with the same length, or "
                "give the midpoint in steps."
            )

    def hooks(self, opening: Opening) -> list[RemovableHandle]:
        """Pull before each step of the optimizer; with annealing scale its rates for this step.

        Raises:
            ValueError: the optimizer has no rate of its own; with annealing, anchored parameters share a group of the
                optimizer with others.
        """
        optimizer = opening.optimizer
        for one in self._held():
            _note_peak(one.group, optimizer)
        handles = [optimizer.register_step_pre_hook(self._pull)]
        if self.annealing is not None:
            _check_groups(opening)
            handles += [
                optimizer.register_step_pre_hook(self._scale_rates),
                optimizer.register_step_post_hook(lambda *_: self.end_gradients()),
            ]
        return handles

    def begin_step(self, optimizer: Any, state: TrainerState) -> None:
        """Take the weight of the target task at this step."""
        self.end_gradients()
        if self.annealing is not None:
            self._target_weight = self.annealing.target_weight(state.global_step + 1, state.max_steps)

    def end_gradients(self) -> None:
        """Give the groups their rates again."""
        for group, rate in self._rates:
            group["lr"] = rate
        self._rates = []

    def close(self) -> None:
        """Remove the hooks. Safe to call twice."""
        super().close()
        self.end_gradients()

    def what(self) -> str:
        """Return what is anchored, and the half-life of a distance."""
        strengths = [one.strength for one in self._held()]
        return f"{super().what()}; at the peak rate it halves a distance in {half_life(max(strengths)):.0f} steps"

    def metrics(self, state: TrainerState) -> dict[str, float]:
        """Return the weight of the target task at the last step."""
        if self.annealing is None:
            return {}
        weight = self.annealing.target_weight(max(state.global_step, 1), state.max_steps)
        return {"tl/anchor_target_weight": weight}

    @torch.no_grad()
    def _pull(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if skipped(optimizer):
            return
        for parameter, reference, strength, group, _ in self.opening.anchored:
            if parameter.grad is not None and (share := self._share(strength, group)) > 0:
                pull_(local(parameter), local(reference), share)
        for update, strength, group in self.opening.updates:
            if update.moving.grad is not None and (share := self._share(strength, group)) > 0:
                shrink_(update, share)

    def _held(self) -> list[Anchored | AnchoredUpdate]:
        return [*self.opening.anchored, *self.opening.updates]

    def _share(self, strength: float, group: dict[str, Any]) -> float:
        """Return the share of the distance that this step removes in a group of the optimizer, at most `strength`."""
        peak = float(group.get("max_lr", group["initial_lr"]))  # OneCycleLR's initial rate is far below its peak
        return (1 - self._target_weight) * strength * min(float(group["lr"]) / peak, 1.0) if peak > 0 else 0.0

    def _scale_rates(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Scale the rates of the anchored groups for this step alone; what is logged are the schedule's."""
        self.end_gradients()
        if skipped(optimizer):
            return
        groups = [one.group for one in self._held()]
        self._rates = [(group, group["lr"]) for group in {id(group): group for group in groups}.values()]
        for group, rate in self._rates:
            group["lr"] = rate * self._target_weight


def _note_peak(group: dict[str, Any], optimizer: Optimizer) -> None:
    """Note the peak rate of an optimizer's group, unless its scheduler has; checkpoints hold it with the group.

    ReduceLROnPlateau notes none, and a resumed run begins with a rate that is no longer the peak.
    """
    default = optimizer.defaults.get("lr")
    group.setdefault("initial_lr", float(group["lr"] or default or 0.0))
    if default is None and not group["initial_lr"]:
        raise ValueError(
            f"{type(optimizer).__name__} has no rate (lr=None, as Adafactor's relative steps), which the decoupled "
            'pull follows. Give the optimizer a rate, or choose form="penalty".'
        )


def _check_groups(opening: Opening) -> None:
    """Raise if an anchored parameter shares its group in the optimizer with one that is not anchored."""
    ours = {id(one.parameter) for one in opening.anchored}
    ours |= {id(parameter) for one in opening.updates for parameter in one.update.parameters}
    for group in opening.optimizer.param_groups:
        count = sum(id(parameter) in ours for parameter in group["params"])
        if 0 < count < len(group["params"]):
            raise ValueError(
                f"annealing scales the rate of the anchored parameters, but they share a group of the optimizer "
                f"with {len(group['params']) - count} others. Let layerwise_optimizer(args, groups) make the "
                "optimizer, as attach(trainer) does by itself."
            )
