"""The forms of an anchor: what each does at an optimizer step, by which hooks."""

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from transformers import TrainerState

from tl_callbacks.anchoring.penalties import half_life, penalty_gradient, pull_
from tl_callbacks.dtensors import local


class Anchored(NamedTuple):
    """A parameter, its reference in the same shards, its group's strength, and its group in the optimizer."""

    parameter: nn.Parameter
    reference: Tensor
    strength: float
    group: dict[str, Any]


class Form:
    """One way of staying near the reference. Between `open` and `close` it acts on what it was opened with."""

    below_one: ClassVar[bool]
    """Whether a strength must be below 1."""
    unit: ClassVar[str]
    """What a strength means, in words."""

    def __init__(self) -> None:
        self.anchored: list[Anchored] = []
        self._handles: list[RemovableHandle] = []

    def check(self, strength: float) -> None:
        """Raise unless a strength is in the form's range.

        Raises:
            ValueError: it is not.
        """
        if not 0 <= strength < (1 if self.below_one else float("inf")):
            span = "[0, 1)" if self.below_one else "[0, infinity)"
            raise ValueError(f"`strength` is {strength}; expected a number in {span}, {self.unit}.")

    def open(self, model: nn.Module, optimizer: Any, anchored: list[Anchored]) -> None:
        """Register the hooks.

        Args:
            model: the model without wrappers.
            optimizer: the Trainer's, wrapped by accelerate or not.
            anchored: what is anchored.
        """
        self.anchored = anchored
        self._handles = self.hooks(model, getattr(optimizer, "optimizer", optimizer))

    def hooks(self, model: nn.Module, optimizer: Optimizer) -> list[RemovableHandle]:
        """Register what acts between two of the Trainer's events, on the model and the optimizer without wrappers."""
        raise NotImplementedError

    def begin_step(self, optimizer: Any, state: TrainerState) -> None:
        """Note that an optimizer step begins; the optimizer is the Trainer's."""

    def close(self) -> None:
        """Remove the hooks. Safe to call twice."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.anchored = []

    def summary(self) -> str:
        """Return what a person should know of the strengths, as the end of a sentence; or nothing."""
        return ""

    def facts(self) -> dict[str, Any]:
        """Return what `recipe.json` should say beside the strengths."""
        return {}


class Decoupled(Form):
    """Before each optimizer step: theta <- theta - strength * (lr / peak lr) * (theta - theta_pre)."""

    below_one = True
    unit = "the share of the distance removed per step at the peak rate"

    def hooks(self, model: nn.Module, optimizer: Optimizer) -> list[RemovableHandle]:
        """Pull before each step of the optimizer."""
        return [optimizer.register_step_pre_hook(self._pull)]

    def summary(self) -> str:
        """Return the half-life of a distance."""
        steps = half_life(max(anchored.strength for anchored in self.anchored))
        return f"; at the peak rate it halves a distance in {steps:.0f} steps"

    @torch.no_grad()
    def _pull(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if skipped(optimizer):
            return
        for parameter, reference, strength, group in self.anchored:
            peak = group.get("initial_lr", optimizer.defaults["lr"])
            if parameter.grad is not None and peak > 0:
                pull_(local(parameter), local(reference), strength * float(group["lr"]) / peak)


class Penalty(Form):
    """The loss J + strength * ||theta - theta_pre||^2 (L2-SP), as gradients that start at the penalty's."""

    below_one = False
    unit = "the factor of the squared distance"

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
        for parameter, reference, strength, _ in self.anchored:
            if parameter.requires_grad:
                gradient = penalty_gradient(parameter, reference, strength * self._loss_scale)
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)


def skipped(optimizer: Optimizer) -> bool:
    """Return whether this step changes nothing: fused optimizers call their hooks when the gradient scaler skips."""
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and float(found_inf) != 0


FORMS: dict[str, type[Form]] = {"decoupled": Decoupled, "penalty": Penalty}
