"""What the forms of an anchor have in common: what one is opened with, and when it is asked to act."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from transformers import Trainer, TrainerState

from tl_callbacks.anchoring.updates import LoraUpdate
from tl_callbacks.groups import LayerGroups


class Anchored(NamedTuple):
    """A parameter, its reference in the same shards, its group's strength, and its group in the optimizer."""

    parameter: nn.Parameter
    reference: Tensor
    strength: float
    group: dict[str, Any]
    name: str = ""
    importance: Tensor | None = None


class AnchoredUpdate(NamedTuple):
    """The update of an adapter, its group's strength, and the group in the optimizer of the factor that starts at 0."""

    update: LoraUpdate
    strength: float
    group: dict[str, Any]


class Lent(NamedTuple):
    """What a form may need beside its own parameters: the attached trainer, the groups, the strengths of those that are
    anchored, and the reference by parameter name, as it is placed for this training.
    """

    trainer: Trainer | None
    groups: LayerGroups
    strengths: Mapping[str, float]
    reference: Mapping[str, Tensor]


class Form:
    """One way of staying near the reference. Between `open` and `close` it acts on what it was opened with."""

    below_one: ClassVar[bool]
    """Whether a strength must be below 1."""
    unit: ClassVar[str]
    """What a strength means, in words."""
    of_updates: ClassVar[bool] = False
    """Whether it acts on what LoRA adds to the weights as a whole, rather than on the adapter's parameters."""
    by_group: ClassVar[bool] = True
    """Whether groups may have strengths of their own."""

    def __init__(self) -> None:
        self.anchored: list[Anchored] = []
        self.updates: list[AnchoredUpdate] = []
        self.seed = 0
        self._handles: list[RemovableHandle] = []

    def check(self, strength: float) -> None:
        """Raise unless a strength is in the form's range.

        Raises:
            ValueError: it is not.
        """
        if not 0 <= strength < (1 if self.below_one else float("inf")):
            span = "[0, 1)" if self.below_one else "[0, infinity)"
            raise ValueError(f"`strength` is {strength}; expected a number in {span}, {self.unit}.")

    def names(self, model: nn.Module, groups: LayerGroups, strengths: Mapping[str, float]) -> list[str]:
        """Return the parameters of which a reference is needed, by normalised name.

        Args:
            model: the model.
            groups: its groups.
            strengths: of the groups that are anchored, by name.
        """
        return [name for group in groups if group.name in strengths for name in group.parameters]

    def take(self, model: nn.Module, given: Mapping[str, Tensor] | None) -> None:
        """Keep what else the reference is made of, when it is taken; `given`: as the user gave it."""

    def findings(self, trainer: Trainer) -> list[str]:
        """Return what keeps the form from working, one text each; empty if nothing."""
        return []

    def lend(self, lent: Lent) -> None:
        """Take what a form may need to open."""

    def open(
        self,
        model: nn.Module,
        optimizer: Any,
        anchored: list[Anchored],
        updates: Sequence[AnchoredUpdate] = (),
        *,
        seed: int = 0,
    ) -> None:
        """Register the hooks.

        Args:
            model: the model without wrappers.
            optimizer: the Trainer's, wrapped by accelerate or not.
            anchored: what is anchored.
            updates: what is anchored of LoRA, where the form acts on updates; their parameters are not in `anchored`.
            seed: of the training.
        """
        self.anchored, self.updates, self.seed = anchored, list(updates), seed
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
        self.updates = []

    def end_gradients(self) -> None:
        """Put back what was changed for the forward passes of a step: the gradients are complete, or it is over."""

    def what(self) -> str:
        """Return what the open form does, as the end of a sentence."""
        held = [one.parameter for one in self.anchored] + [p for one in self.updates for p in one.update.parameters]
        whole = f", among them what {len(self.updates)} LoRA adapters add as a whole" if self.updates else ""
        return f"anchors {sum(p.numel() for p in held):,} parameters{whole}{self.summary()}"

    def summary(self) -> str:
        """Return what a person should know of the strengths, as the end of a sentence; or nothing."""
        return ""

    def measured(self) -> dict[str, float]:
        """Return what to log beside the distances of the weights, as `tl/anchor/<name>`. Call it on all ranks."""
        return {}

    def metrics(self, state: TrainerState) -> dict[str, float]:
        """Return what else to log with them, by the whole key."""
        return {}

    def facts(self) -> dict[str, Any]:
        """Return what `recipe.json` should say beside the strengths."""
        return {}


def skipped(optimizer: Optimizer) -> bool:
    """Return whether this step changes nothing: fused optimizers call their hooks when the gradient scaler skips."""
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and float(found_inf) != 0
