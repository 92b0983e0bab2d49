"""The forms that act on weights with a formula: the decoupled pull and the penalty, at an optimizer step, by hooks."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from transformers import TrainerState

from tl_callbacks.anchoring.annealing import SigmoidAnnealing
from tl_callbacks.anchoring.forms import Form, skipped
from tl_callbacks.anchoring.penalties import half_life, penalty_gradient, pull_
from tl_callbacks.anchoring.updates import shrink_, update_gradients
from tl_callbacks.dtensors import local


class Decoupled(Form):
    """Before each optimizer step: theta <- theta - strength * (lr / peak lr) * (theta - theta_pre).

    Args:
        annealing: RecAdam's: the pull is scaled by 1 - w and the optimizer's update of the same parameters by w, where
            w is the weight of the target task at the step.
    """

    below_one = True
    unit = "the share of the distance removed per step at the peak rate"
    of_updates = True

    def __init__(self, annealing: SigmoidAnnealing | None = None) -> None:
        super().__init__()
        self.annealing = annealing
        self._target_weight = 0.0
        self._rates: list[tuple[dict[str, Any], Any]] = []

    def hooks(self, model: nn.Module, optimizer: Optimizer) -> list[RemovableHandle]:
        """Pull before each step of the optimizer; with annealing scale its rates for this step."""
        handles = [optimizer.register_step_pre_hook(self._pull)]
        if self.annealing is not None:
            self._check_groups(optimizer)
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

    def summary(self) -> str:
        """Return the half-life of a distance."""
        strengths = [one.strength for one in self.anchored] + [one.strength for one in self.updates]
        steps = half_life(max(strengths))
        return f"; at the peak rate it halves a distance in {steps:.0f} steps"

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
        for parameter, reference, strength, group, *_ in self.anchored:
            if parameter.grad is not None and (share := self._share(optimizer, strength, group)) > 0:
                pull_(local(parameter), local(reference), share)
        for update, strength, group in self.updates:
            if update.moving.grad is not None and (share := self._share(optimizer, strength, group)) > 0:
                shrink_(update, share)

    def _share(self, optimizer: Optimizer, strength: float, group: dict[str, Any]) -> float:
        """Return the share of the distance that this step removes in a group of the optimizer."""
        peak = float(group.get("initial_lr", optimizer.defaults["lr"]))
        return (1 - self._target_weight) * strength * float(group["lr"]) / peak if peak > 0 else 0.0

    def _scale_rates(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Scale the rates of the anchored groups for this step alone; what is logged are the schedule's."""
        self.end_gradients()
        if skipped(optimizer):
            return
        groups = [one.group for one in self.anchored] + [one.group for one in self.updates]
        self._rates = [(group, group["lr"]) for group in {id(group): group for group in groups}.values()]
        for group, rate in self._rates:
            group["lr"] = rate * self._target_weight

    def _check_groups(self, optimizer: Optimizer) -> None:
        """Raise if an anchored parameter shares its group in the optimizer with one that is not anchored."""
        ours = {id(one.parameter) for one in self.anchored}
        ours |= {id(parameter) for one in self.updates for parameter in one.update.parameters}
        for group in optimizer.param_groups:
            count = sum(id(parameter) in ours for parameter in group["params"])
            if 0 < count < len(group["params"]):
                raise ValueError(
                    f"annealing scales the rate of the anchored parameters, but they share a group of the optimizer "
                    f"with {len(group['params']) - count} others. Let layerwise_optimizer(args, groups) make the "
                    "optimizer, as attach(trainer) does by itself."
                )


class Penalty(Form):
    """The loss J + strength * ||theta - theta_pre||^2 (L2-SP), as gradients that start at the penalty's.

    With an importance (EWC) each element of the squared distance counts times its own.
    """

    below_one = False
    unit = "the factor of the squared distance"
    of_updates = True

    def __init__(self) -> None:
        super().__init__()
        self._due = False
        self._loss_scale = 1.0

    def hooks(self, model: nn.Module, optimizer: Optimizer) -> list[RemovableHandle]:
        """Seed the gradients before the first forward of a step."""
        return [model.register_forward_pre_hook(self._seed)]

    def begin_step(self, optimizer: Any, state: TrainerState) -> None:
        """Note that the penalty is due; it enters at the first forward, when all that is due is open."""
        self._due = True
        scaler = getattr(optimizer, "scaler", None)
        self._loss_scale = float(scaler.get_scale()) if scaler is not None else 1.0

    def close(self) -> None:
        """Remove the hooks. Safe to call twice."""
        super().close()
        self._due = False

    def _seed(self, root: nn.Module, inputs: Any) -> None:
        """Start the gradients of this step at the penalty's.

        Backward passes add to them, on all ranks alike, so the penalty counts once a step under accumulation, is
        averaged to itself by DDP, is clipped with the rest, and reaches a parameter that no backward reaches.
        """
        if not self._due or not root.training:
            return
        self._due = False
        for parameter, reference, strength, _, _, importance in self.anchored:
            if parameter.requires_grad:
                gradient = penalty_gradient(parameter, reference, strength * self._loss_scale)
                _add(parameter, gradient if importance is None else gradient.mul_(importance))
        for update, strength, _ in self.updates:
            for parameter, gradient in update_gradients(update, strength * self._loss_scale):
                _add(parameter, gradient)


def _add(parameter: nn.Parameter, gradient: Tensor) -> None:
    parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
