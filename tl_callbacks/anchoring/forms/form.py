"""What the forms of an anchor have in common: what one is opened with, and when it is asked to act."""

from collections.abc import Mapping
from numbers import Real
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from transformers import Trainer, TrainerState

from tl_callbacks.anchoring.operations.lora import LoraUpdate
from tl_callbacks.groups import LayerGroups


class Anchored(NamedTuple):
    """A parameter, its reference in the same shards, its group's strength, its group in the optimizer, its name."""

    parameter: nn.Parameter
    reference: Tensor
    strength: float
    group: dict[str, Any]
    name: str


class AnchoredUpdate(NamedTuple):
    """The update of an adapter, its group's strength, and the group in the optimizer of the factor that starts at 0."""

    update: LoraUpdate
    strength: float
    group: dict[str, Any]


class Opening(NamedTuple):
    """What a form acts on from when a training begins until it ends.

    Args:
        model: the model without wrappers.
        optimizer: the optimizer without accelerate's wrapper.
        anchored: the parameters that are anchored one by one.
        updates: what LoRA adds, where the form acts on that as a whole; its parameters are not in `anchored`.
        groups: the layer groups.
        strengths: of the groups that are anchored, by name.
        reference: by parameter name, placed for this training.
        seed: of the training.
        trainer: the attached trainer; None: the callback was not attached.
    """

    model: nn.Module
    optimizer: Optimizer
    anchored: list[Anchored]
    updates: list[AnchoredUpdate]
    groups: LayerGroups
    strengths: Mapping[str, float]
    reference: Mapping[str, Tensor]
    seed: int
    trainer: Trainer | None


class Form:
    """One way of staying near the reference, with its settings.

    Each `WeightAnchoring` opens a copy of the form it is given: a form may be given to several.
    """

    name: ClassVar[str]
    """What it is called in `WeightAnchoring(form=...)` and in `recipe.json`."""
    below_one: ClassVar[bool]
    """Whether a strength must be below 1."""
    unit: ClassVar[str]
    """What a strength means, in words."""
    by_group: ClassVar[bool] = True
    """Whether groups may have strengths of their own."""

    def __init__(self) -> None:
        self._opening: Opening | None = None
        self._handles: list[RemovableHandle] = []

    # -- before a training ---------------------------------------------------------------------------------------------

    @property
    def of_updates(self) -> bool:
        """Whether it acts on what LoRA adds to the weights as a whole, rather than on the adapter's parameters."""
        return False

    def check(self, strength: float | Mapping[str, float]) -> None:
        """Raise unless a strength, or each of those by group, is in the form's range.

        Raises:
            ValueError: one is not, or is no number, or the form takes no strengths by group.
        """
        if isinstance(strength, Mapping) and not self.by_group:
            raise ValueError(
                f"`strength` has numbers by group, which form={self.name!r} cannot use: the outputs are of the whole "
                "model. Give one number."
            )
        for value in strength.values() if isinstance(strength, Mapping) else (strength,):
            if not isinstance(value, Real) or not 0 <= value < (1 if self.below_one else float("inf")):
                span = "[0, 1)" if self.below_one else "[0, infinity)"
                raise ValueError(f"`strength` is {value!r}; expected a number in {span}, {self.unit}.")

    def names(self, model: nn.Module, groups: LayerGroups, strengths: Mapping[str, float]) -> list[str]:
        """Return the parameters of which a reference is needed, by normalised name.

        Args:
            model: the model.
            groups: its groups.
            strengths: of the groups that are anchored, by name.
        """
        return [name for group in groups if group.name in strengths for name in group.parameters]

    def take(self, model: nn.Module, names: list[str], given: Mapping[str, Tensor] | None) -> Mapping[str, Tensor]:
        """Keep what else the reference is made of and return it, and check the settings, when it is taken.

        Args:
            model: the model, before training.
            names: what `names` returned.
            given: the reference as the user gave it; None: the model's own weights are the reference.

        Returns:
            What a resumed run must have the same, beside the parameters, by names that no parameter has.
        """
        return {}

    def findings(self, trainer: Trainer) -> list[str]:
        """Return what keeps the form from working, one text each; empty if nothing."""
        return []

    def cautions(self, reference: Mapping[str, Tensor]) -> list[str]:
        """Return what should be known before training, one text each; the reference is by parameter name."""
        return []

    def facts(self, strength: float | Mapping[str, float]) -> dict[str, Any]:
        """Return what `recipe.json` should say of the settings, and of what a strength comes to."""
        return {}

    # -- in a training -------------------------------------------------------------------------------------------------

    def begin(self, state: TrainerState) -> None:
        """Record what a resumed run must have kept, or check that it has; before the form is opened."""

    def open(self, opening: Opening) -> None:
        """Register the hooks."""
        self._opening = opening
        self._handles = self.hooks(opening)

    def hooks(self, opening: Opening) -> list[RemovableHandle]:
        """Register what acts between two of the Trainer's events."""
        raise NotImplementedError

    def begin_step(self, optimizer: Any, state: TrainerState) -> None:
        """Note that an optimizer step begins; the optimizer is the Trainer's, wrapped by accelerate."""

    def end_gradients(self) -> None:
        """Put back what was changed for the forward passes of a step: the gradients are complete, or it is over.

        Raises:
            RuntimeError: what was due at the first forward of the step had no place to enter.
        """

    def close(self) -> None:
        """Remove the hooks. Safe to call twice."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._opening = None

    @property
    def opened(self) -> bool:
        """Whether it acts."""
        return self._opening is not None

    @property
    def opening(self) -> Opening:
        """What it acts on."""
        assert self._opening is not None
        return self._opening

    def what(self) -> str:
        """Return what the open form does, as the end of a sentence."""
        anchored, updates = self.opening.anchored, self.opening.updates
        held = [one.parameter for one in anchored] + [p for one in updates for p in one.update.parameters]
        whole = f", among them what {len(updates)} LoRA adapters add as a whole" if updates else ""
        return f"anchors {sum(p.numel() for p in held):,} parameters{whole}"

    def measured(self) -> dict[str, float]:
        """Return what to log beside the distances of the weights, as `tl/anchor/<name>`. Call it on all ranks."""
        return {}

    def metrics(self, state: TrainerState) -> dict[str, float]:
        """Return what else to log with them, by the whole key."""
        return {}


def passed_by(form: Form) -> RuntimeError:
    """Return the error of a step whose loss was computed past the place where a form enters.

    Args:
        form: an open form that enters at the model's own forward.
    """
    return RuntimeError(
        f"the gradients of a step were computed without a call of {type(form.opening.model).__name__} in training "
        f"mode, where form={form.name!r} enters. Compute the loss from the model's own forward, or choose "
        'form="decoupled".'
    )


def skipped(optimizer: Optimizer) -> bool:
    """Return whether this step changes nothing: fused optimizers call their hooks when the gradient scaler skips."""
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and float(found_inf) != 0
