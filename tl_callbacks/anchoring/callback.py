"""The adapter: when the pull or the penalty enters a Trainer's optimizer step."""

import re
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from tl_callbacks.anchoring.forms import FORMS, Anchored
from tl_callbacks.anchoring.penalties import distance, half_life
from tl_callbacks.anchoring.reference import broadcast_, given, snapshot
from tl_callbacks.callbacks import TransferCallback, announce
from tl_callbacks.discovery import group_layers
from tl_callbacks.dtensors import placed_like, reshard
from tl_callbacks.errors import NoEffectWarning
from tl_callbacks.groups import LayerGroups
from tl_callbacks.names import closest
from tl_callbacks.parameters import parameters_by_name
from tl_callbacks.sharding import anchoring_findings


class WeightAnchoring(TransferCallback):
    """Pulls the weights toward the pretrained ones while a Trainer trains.

    `form="decoupled"` (for adaptive optimizers): before each optimizer step
    theta <- theta - strength * (lr / peak lr) * (theta - theta_pre), apart from the gradient, as AdamW decays weights.
    The unit of `strength` is the share of the distance removed per step at the group's peak rate; it follows the
    schedule, but not the size of the rate.

    `form="penalty"` (L2-SP): the loss J + strength * ||theta - theta_pre||^2, exactly: the gradients of each optimizer
    step start at the penalty's, whatever the accumulation, the number of ranks and the loss scale.

    The reference is taken when the Trainer is made, before a resumed run loads its checkpoint. In a PEFT model it is
    the adapter's initial state, that is the base model's function.

    Args:
        strength: decoupled: share of the distance removed per step at the peak rate, in [0, 1); penalty: factor of the
            squared distance, 0 or more. A number, or anchored patterns of group names to numbers (others: 0).
        form: "decoupled" or "penalty".
        reference: the pretrained weights by parameter name, such as a `state_dict()`; None: as they are when the
            Trainer is made.
        exclude: names or patterns of groups without anchor; None: the head group, whose weights are new, unless
            `strength` names it; (): none.
        groups: the layer groups; None: `group_layers(model)`.

    Raises:
        ValueError: a strength is out of range, or `form` is unknown.

    Example:
        >>> WeightAnchoring(strength=0.01)
        WeightAnchoring(strength=0.01, form='decoupled', exclude=None)

    References:
        Li, Grandvalet and Davoine, "Explicit Inductive Bias for Transfer Learning with Convolutional Networks",
        ICML 2018. https://arxiv.org/abs/1802.01483
        Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019. https://arxiv.org/abs/1711.05101
    """

    def __init__(
        self,
        strength: float | Mapping[str, float],
        *,
        form: Literal["decoupled", "penalty"] = "decoupled",
        reference: Mapping[str, Tensor] | None = None,
        exclude: Sequence[str] | None = None,
        groups: LayerGroups | None = None,
    ) -> None:
        if form not in FORMS:
            raise ValueError(f"`form` is {form!r}; expected one of {', '.join(FORMS)}.")
        self._form = FORMS[form]()
        for value in strength.values() if isinstance(strength, Mapping) else (strength,):
            self._form.check(value)
        self.strength = strength
        self.form = form
        self.reference = reference
        self.exclude = exclude
        self.groups = groups
        self._weights: dict[str, Tensor] | None = None
        self._placed: dict[str, Tensor] = {}  # the same on the parameters' devices, in their dtypes and shards
        self._model: Callable[[], nn.Module | None] = lambda: None

    def __repr__(self) -> str:
        return f"WeightAnchoring(strength={self.strength!r}, form={self.form!r}, exclude={self.exclude!r})"

    def findings(self, trainer: Trainer) -> list[str]:
        """Return what would go wrong: a checkpoint taken for pretrained weights, or no place for the pull to enter."""
        found = []
        if sum(isinstance(other, WeightAnchoring) for other in trainer.callback_handler.callbacks) > 1:
            found.append("the Trainer has several WeightAnchoring callbacks; give one a strength per group instead.")
        path = str(getattr(getattr(trainer.model, "config", None), "_name_or_path", ""))
        if self.reference is None and re.search(r"checkpoint-\d+/?$", path):
            found.append(
                f"WeightAnchoring would take the weights of `{path}` for the pretrained ones. Load the pretrained "
                "model and pass resume_from_checkpoint to train(), or give reference=pretrained.state_dict()."
            )
        if "lomo" in trainer.args.optim or "layerwise" in trainer.args.optim:
            found.append(
                f"optim={trainer.args.optim} steps inside the backward pass, where WeightAnchoring has no place to "
                "enter. Choose another, such as adamw_torch_fused."
            )
        return found + anchoring_findings(trainer)

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Take the reference, before anything is loaded or trained."""
        self._take(kwargs["model"])

    def on_attach(self, trainer: Trainer) -> None:
        """Take the reference if the callback was added after the Trainer was made."""
        super().on_attach(trainer)
        assert trainer.model is not None
        self._take(trainer.model)

    def before_optimizer_load(self, model: nn.Module, state: TrainerState) -> None:
        """Take the reference anew where `model_init` made another model for a fresh training."""
        if state.global_step == 0:
            self._take(model)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Register the hooks that pull, or say that there is nothing to pull."""
        self.restore(kwargs["model"])
        reshard(kwargs["model"])
        anchored = self._pair(kwargs["model"], kwargs["optimizer"])
        broadcast_(self._placed)
        if anchored:
            self._form.open(kwargs["model"], kwargs["optimizer"], anchored)
            count = sum(one.parameter.numel() for one in anchored)
            announce(f"{self!r} anchors {count:,} parameters{self._form.summary()}", state)
        else:
            message = f"{self!r} anchors nothing. Leave it out, or raise `strength`."
            warnings.warn(message, NoEffectWarning, stacklevel=2)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let the form begin a step."""
        self._form.begin_step(kwargs["optimizer"], state)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Log the distance of each group from the reference, once a step."""
        self._log_distances(kwargs["model"], state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Log the final distances and remove the hooks."""
        self._log_distances(kwargs["model"], state)
        self.restore(kwargs["model"])

    def restore(self, model: nn.Module) -> None:
        """Remove all hooks. Safe to call twice."""
        self._form.close()

    def distances(self, model: nn.Module) -> dict[str, float]:
        """Return each anchored group's Euclidean distance from the reference, bottom to top. Call it on all ranks.

        Args:
            model: the model without wrappers.
        """
        assert self._weights is not None
        reshard(model)
        parameters = parameters_by_name(model)
        references = {**self._weights, **self._placed}
        result = {}
        for group in self._groups(model):
            held = [name for name in group.parameters if name in references]
            if held:
                result[group.name] = distance((parameters[name], references[name]) for name in held)
        return result

    def facts(self) -> Mapping[str, Any]:
        """Return strength, form, what is excluded, and the half-life of a distance in steps."""
        strength = dict(self.strength) if isinstance(self.strength, Mapping) else self.strength
        facts = {"strength": strength, "form": self.form, "exclude": self.exclude and list(self.exclude)}
        facts |= self._form.facts()
        if self.form == "decoupled" and not isinstance(strength, dict) and strength > 0:
            facts["half_life_steps"] = half_life(strength)
        return facts

    def _groups(self, model: nn.Module) -> LayerGroups:
        return self.groups or group_layers(model)

    def _strengths(self, model: nn.Module) -> dict[str, float]:
        """Return the strength of each group that is anchored, by name."""
        groups = self._groups(model)
        by_name = isinstance(self.strength, Mapping) and groups.head in self.strength
        excluded = groups.select(self.exclude) if self.exclude is not None else () if by_name else (groups.head,)
        strengths = groups.by_group(self.strength, default=0.0)
        return {name: value for name, value in strengths.items() if value > 0 and name not in excluded}

    def _take(self, model: nn.Module) -> None:
        if self._model() is model:
            return  # the same model in a second Trainer: its reference is from before it was trained
        strengths = self._strengths(model)
        names = [n for group in self._groups(model) if group.name in strengths for n in group.parameters]
        known = parameters_by_name(model)
        if unknown := [name for name in names if name not in known]:
            raise ValueError(
                f"WeightAnchoring's groups name `{unknown[0]}` and {len(unknown) - 1} other parameters that this model "
                f"does not have (closest: {closest(unknown[0], known)}). Make them with group_layers(model)."
            )
        self._placed = {}
        self._weights = snapshot(model, names) if self.reference is None else given(model, names, self.reference)
        self._model = weakref.ref(model)

    def _pair(self, model: nn.Module, optimizer: Optimizer) -> list[Anchored]:
        if self._weights is None:
            raise RuntimeError(
                "WeightAnchoring was added after the Trainer was made and has no reference. Pass it as "
                "Trainer(callbacks=[...]), or call attach(trainer) before trainer.train()."
            )
        strengths = self._strengths(model)
        parameters = parameters_by_name(model)
        holder = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        self._placed = {name: placed_like(weight, parameters[name]) for name, weight in self._weights.items()}
        return [
            Anchored(parameters[name], self._placed[name], strengths[group.name], holder[id(p)])
            for group in self._groups(model)
            if group.name in strengths
            for name in group.parameters
            if id(p := parameters[name]) in holder
        ]

    def _log_distances(self, model: nn.Module, state: TrainerState) -> None:
        if self._form.anchored and not any(
            entry.get("step") == state.global_step and any(key.startswith("tl/anchor/") for key in entry)
            for entry in state.log_history[-8:]
        ):
            self.log({f"tl/anchor/{name}": value for name, value in self.distances(model).items()}, state)
