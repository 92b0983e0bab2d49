"""The form of the penalty, L2-SP or EWC: the gradients of an optimizer step start at the penalty's."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle
from transformers import TrainerState

from tl_callbacks.anchoring.fisher.diagonal import check_importance, weights_elsewhere
from tl_callbacks.anchoring.forms.form import Form, Opening, passed_by
from tl_callbacks.anchoring.operations.lora import update_gradients
from tl_callbacks.anchoring.operations.pulls import penalty_gradient
from tl_callbacks.dtensors import placed_like
from tl_callbacks.parameters import parameters_by_name


class Penalty(Form):
    """The loss J + strength * ||theta - theta_pre||^2 (L2-SP), exactly.

    The gradients of each optimizer step start at the penalty's, whatever the accumulation, the number of ranks and the
    loss scale. A parameter that a step gives no gradient of its own moves by it too.

    With `importance` it is EWC's: J + strength * sum_i F_i * (theta_i - theta_pre,i)^2. The F_i are taken as they are,
    so `strength` is the lambda / 2 of the paper. With adapters it then acts on their parameters, from their initial
    state.

    Args:
        importance: of each element of the anchored parameters by parameter name, such as `diagonal_fisher` returns or
            `load_fisher` reads; None: all count alike. A parameter that lacks one, or has one of another shape, is
            refused when the Trainer is made.

    Example:
        >>> Penalty()
        Penalty(importance=None)

    References:
        Li, Grandvalet and Davoine, "Explicit Inductive Bias for Transfer Learning with Convolutional Networks",
        ICML 2018. https://arxiv.org/abs/1802.01483
        Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks", PNAS 2017 (EWC).
        https://arxiv.org/abs/1612.00796
    """

    name = "penalty"
    below_one = False
    unit = "the factor of the squared distance"

    def __init__(self, *, importance: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        self.importance = importance
        self._checked: dict[str, Tensor] = {}  # of the anchored parameters, by normalised name
        self._placed: dict[str, Tensor] = {}
        self._due = False
        self._loss_scale = 1.0

    def __repr__(self) -> str:
        held = None if self.importance is None else f"<of {len(self.importance)} parameters>"
        return f"Penalty(importance={held})"

    @property
    def of_updates(self) -> bool:
        """It penalises what LoRA adds, unless it weighs each parameter's elements."""
        return self.importance is None

    def take(self, model: nn.Module, names: list[str], given: Mapping[str, Tensor] | None) -> Mapping[str, Tensor]:
        """Check the importance against the parameters."""
        if self.importance is not None:
            self._checked = check_importance(self.importance, parameters_by_name(model), names)
        return {}

    def cautions(self, reference: Mapping[str, Tensor]) -> list[str]:
        """Return that the importance was estimated at other weights than the reference, if it was."""
        if self.importance is None or not (other := weights_elsewhere(self.importance, reference)):
            return []
        text = f"`{other[0]}` and {len(other) - 1} more differ"
        return [f"the importance was estimated at other weights than the reference, or in another dtype: {text}."]

    def facts(self, strength: float | Mapping[str, float]) -> dict[str, Any]:
        """Return how the importance was estimated, if there is one."""
        if self.importance is None:
            return {}
        known = {key: value for key, value in getattr(self.importance, "facts", {}).items() if key != "weights"}
        return {"importance": {"parameters": len(self.importance), **known}}

    def hooks(self, opening: Opening) -> list[RemovableHandle]:
        """Seed the gradients before the first forward of a step."""
        held = {one.name: one.parameter for one in opening.anchored if one.name in self._checked}
        self._placed = {name: _beside(self._checked[name], parameter) for name, parameter in held.items()}
        return [opening.model.register_forward_pre_hook(self._seed)]

    def begin_step(self, optimizer: Any, state: TrainerState) -> None:
        """Note that the penalty is due; it enters at the first forward, when all that is due is open."""
        self._due = self.opened
        scaler = getattr(optimizer, "scaler", None)
        self._loss_scale = float(scaler.get_scale()) if scaler is not None else 1.0

    def end_gradients(self) -> None:
        """Raise if the penalty is still due.

        Raises:
            RuntimeError: it is, as the loss passed the model's own forward by.
        """
        if self._due:
            raise passed_by(self)

    def close(self) -> None:
        """Remove the hooks. Safe to call twice."""
        super().close()
        self._due = False
        self._placed = {}

    def _seed(self, root: nn.Module, inputs: Any) -> None:
        """Start the gradients of this step at the penalty's.

        Backward passes add to them, on all ranks alike, so the penalty counts once a step under accumulation, is
        averaged to itself by DDP, is clipped with the rest, and reaches a parameter that no backward reaches.
        """
        if not self._due or not root.training:
            return
        self._due = False
        for parameter, reference, strength, _, name in self.opening.anchored:
            if parameter.requires_grad:
                gradient = penalty_gradient(parameter, reference, strength * self._loss_scale)
                _add(parameter, gradient.mul_(self._placed[name]) if name in self._placed else gradient)
        for update, strength, _ in self.opening.updates:
            for parameter, gradient in update_gradients(update, strength * self._loss_scale):
                _add(parameter, gradient)


def _add(parameter: nn.Parameter, gradient: Tensor) -> None:
    parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)


def _beside(importance: Tensor, parameter: nn.Parameter) -> Tensor:
    """Return an importance on the device and in the shards of its parameter, in its own dtype unless it is sharded."""
    return placed_like(importance, parameter) if isinstance(parameter, DTensor) else importance.to(parameter.device)
