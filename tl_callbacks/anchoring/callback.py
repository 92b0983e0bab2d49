"""The adapter: when an anchor's form acts in a Trainer's optimizer steps, and what is logged of it."""

import copy
import itertools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from tl_callbacks.anchoring.forms.decoupled import Decoupled
from tl_callbacks.anchoring.forms.features import Features
from tl_callbacks.anchoring.forms.form import Form, Opening
from tl_callbacks.anchoring.forms.mixout import Mixout
from tl_callbacks.anchoring.forms.outputs import Outputs
from tl_callbacks.anchoring.forms.pairing import group_distances, pair
from tl_callbacks.anchoring.forms.penalty import Penalty
from tl_callbacks.anchoring.operations.lora import LoraUpdate
from tl_callbacks.anchoring.reference.proof import WithReference
from tl_callbacks.callbacks import announce
from tl_callbacks.dtensors import reshard
from tl_callbacks.errors import NoEffectWarning
from tl_callbacks.groups import LayerGroups
from tl_callbacks.names import closest
from tl_callbacks.parameters import parameters_by_name
from tl_callbacks.sharding import anchoring_findings

FormName = Literal["decoupled", "penalty", "mixout", "features", "outputs"]

FORMS: dict[str, type[Form]] = {form.name: form for form in (Decoupled, Penalty, Mixout, Features, Outputs)}


class WeightAnchoring(WithReference):
    """Keeps the model near the pretrained one while a Trainer trains it, in one of five forms.

    | `form` | what it does at each optimizer step |
    |---|---|
    | `"decoupled"`, `Decoupled(annealing=)` | theta <- theta - strength * (lr / peak lr) * (theta - theta_pre) |
    | `"penalty"`, `Penalty(importance=)` | the loss + strength * the squared distance (L2-SP; weighted: EWC) |
    | `"mixout"`, `Mixout()` | some weights are the reference's for the step, with the right mean |
    | `"features"`, `Features()` | the loss + strength * the squared difference of the groups' outputs (DELTA) |
    | `"outputs"`, `Outputs(temperature=, classes=, old_head=)` | the loss + strength * the divergence of old outputs |

    The docstring of each form holds its formula and its settings. For features and outputs the reference runs once on
    each micro-batch, in eval mode and without gradient, and `attach(trainer)` is needed.

    The reference is taken when the Trainer is made, before a resumed run loads its checkpoint. Its fingerprint is
    recorded in `log_history`, and a resumed run that has another is refused. With LoRA adapters that add nothing then,
    it is the model below them: decoupled pull and penalty act on what LoRA adds to each weight, theta - theta_pre =
    s * B A, never formed. Of other adapters (DoRA, PiSSA, LoftQ, other methods), with an importance and in mixout it is
    the adapter's initial state: as it was made, or as it was loaded. Features and outputs are compared with those of
    the model without adapters.

    Args:
        strength: decoupled: share of the distance removed per step at the peak rate, in [0, 1); penalty: factor of the
            squared distance, 0 or more; mixout: a probability in [0, 1); features, outputs: factor of the term. A
            number, or anchored patterns of group names to numbers (others: 0).
        form: its name, for a form with its defaults, or a form with settings. One object may serve several anchors.
        reference: the pretrained weights by parameter name, such as a `state_dict()`; "checkpoint": those of the
            safetensors files that the model was loaded from, which take no memory; None: as they are when the Trainer
            is made.
        reference_dtype: of the copies, such as torch.bfloat16, which takes half the memory of float32 and pulls toward
            rounded weights; None: the parameters'. Not with "checkpoint".
        reference_device: of the copies, such as "cpu"; None: the parameters'. Not with "checkpoint".
        exclude: names or patterns of groups without anchor; None: the head group, whose weights are new, unless it
            is a language model's or `strength` names it; (): none.
        groups: the layer groups; None: `group_layers(model)`.

    Raises:
        ValueError: a strength is out of range, or `form` is unknown; when the Trainer is made: a setting of the form or
            the reference does not fit the model; when training begins: a setting does not fit the optimizer, or the
            length of the run that is resumed.
        RuntimeError: when training begins: the run that is resumed began with another reference.

    Example:
        >>> WeightAnchoring(strength=0.01)
        WeightAnchoring(strength=0.01, form='decoupled', exclude=None)
        >>> WeightAnchoring(strength={"layer.*": 0.3}, form=Mixout())
        WeightAnchoring(strength={'layer.*': 0.3}, form=Mixout(), exclude=None)
    """

    _event = "anchoring"

    def __init__(
        self,
        strength: float | Mapping[str, float],
        *,
        form: FormName | Form = "decoupled",
        reference: Literal["checkpoint"] | Mapping[str, Tensor] | None = None,
        reference_dtype: torch.dtype | None = None,
        reference_device: str | torch.device | None = None,
        exclude: Sequence[str] | None = None,
        groups: LayerGroups | None = None,
    ) -> None:
        if not isinstance(form, Form) and form not in FORMS:
            raise ValueError(f"`form` is {form!r}; expected one of {', '.join(FORMS)}, or a form such as Penalty().")
        super().__init__(reference, reference_dtype, reference_device, exclude, groups)
        self.strength = strength
        self.form = form
        self._form = copy.copy(form) if isinstance(form, Form) else FORMS[form]()
        self._form.check(strength)
        self._placed: dict[str, Tensor] = {}  # the reference on the parameters' devices, in their dtypes and shards

    def __repr__(self) -> str:
        return f"WeightAnchoring(strength={self.strength!r}, form={self.form!r}, exclude={self.exclude!r})"

    def findings(self, trainer: Trainer) -> list[str]:
        """Return what would go wrong: a checkpoint taken for pretrained weights, or no place for the form to enter."""
        found = []
        if sum(isinstance(other, WeightAnchoring) for other in trainer.callback_handler.callbacks) > 1:
            found.append("the Trainer has several WeightAnchoring callbacks; give one a strength per group instead.")
        if "lomo" in trainer.args.optim or "layerwise" in trainer.args.optim:
            found.append(
                f"optim={trainer.args.optim} steps inside the backward pass, where WeightAnchoring has no place to "
                "enter. Choose another, such as adamw_torch_fused."
            )
        return found + super().findings(trainer) + anchoring_findings(trainer) + self._form.findings(trainer)

    def cautions(self, trainer: Trainer) -> list[str]:
        """Return what the form finds of the reference."""
        return self._form.cautions(self._taken.tensors) if self._taken is not None else []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the form, or say that there is nothing to anchor."""
        self.restore(kwargs["model"])
        opening = self._opening(kwargs["model"], kwargs["optimizer"], args.seed)
        if opening.anchored or opening.updates:
            self._prove(state)
            self._form.begin(state)
            self._form.open(opening)
            announce(f"{self!r} {self._form.what()}{self._where()}", state)
        else:
            message = f"{self!r} anchors nothing. Leave it out, or raise `strength`."
            warnings.warn(message, NoEffectWarning, stacklevel=2)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let the form begin a step."""
        if self._taken is not None:
            self._taken.check()
        self._form.begin_step(kwargs["optimizer"], state)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let the form know that the gradients are complete."""
        self._form.end_gradients()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Let the form know that the step is over, also one that the gradient scaler skipped."""
        self._form.end_gradients()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Log the distance of each group from the reference, once a step."""
        self._log_distances(kwargs["model"], state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Log the distances of the weights that training leaves, unless they are logged, and remove the hooks."""
        self._log_distances(kwargs["model"], state, final=True)
        self.restore(kwargs["model"])

    def restore(self, model: nn.Module) -> None:
        """Remove all hooks. Safe to call twice."""
        self._form.close()

    def distances(self, model: nn.Module) -> dict[str, float]:
        """Return each anchored group's Euclidean distance from the reference, bottom to top. Call it on all ranks.

        Args:
            model: the model without wrappers.

        Raises:
            RuntimeError: no reference was taken yet.
        """
        if self._taken is None:
            raise RuntimeError(
                "WeightAnchoring has no reference yet, which it takes when the Trainer is made. Pass it as "
                "Trainer(callbacks=[...]), or call attach(trainer), before distances(model)."
            )
        reshard(model)
        strengths = self._strengths(model)
        groups = [group for group in self._layers(model) if group.name in strengths]
        references = {**self._taken.tensors, **self._placed}
        return group_distances(groups, parameters_by_name(model), references, self._updates(model))

    def facts(self) -> dict[str, Any]:
        """Return strength, form and its settings, what is excluded, the reference, and a distance's half-life."""
        strength = dict(self.strength) if isinstance(self.strength, Mapping) else self.strength
        return {"strength": strength, "form": self._form.name, **super().facts(), **self._form.facts(self.strength)}

    def _names(self, model: nn.Module) -> list[str]:
        """Return the parameters of which the form needs a reference.

        Raises:
            ValueError: the groups are of another model.
        """
        names = self._form.names(model, self._layers(model), self._strengths(model))
        known = parameters_by_name(model)
        if unknown := [name for name in names if name not in known]:
            raise ValueError(
                f"WeightAnchoring's groups name `{unknown[0]}` and {len(unknown) - 1} other parameters that this model "
                f"does not have (closest: {closest(unknown[0], known)}). Make them with group_layers(model)."
            )
        return names

    @property
    def _of_updates(self) -> bool:
        """Whether the form acts on what LoRA adds as a whole."""
        return self._form.of_updates

    def _aside(self, update: LoraUpdate) -> tuple[nn.Parameter, ...]:
        """Return all parameters of a LoRA update, which is anchored as a whole."""
        return update.parameters

    def _keep(self, model: nn.Module, names: list[str]) -> Mapping[str, Tensor]:
        """Let the form keep what else it needs."""
        self._placed = {}
        return self._form.take(model, names, self.reference if isinstance(self.reference, Mapping) else None)

    def _strengths(self, model: nn.Module) -> dict[str, float]:
        """Return the strength of each group that is anchored, by name.

        Raises:
            ValueError: a pattern has a strength, and names excluded groups alone.
        """
        groups = self._layers(model)
        strengths = groups.by_group(self.strength, default=0.0)
        by_pattern = self.strength if isinstance(self.strength, Mapping) else {}
        named = groups.head in by_pattern and self.exclude is None
        excluded = () if named else self._excluded(model, groups)
        for pattern, value in by_pattern.items():
            if value > 0 and set(groups.select([pattern])) <= set(excluded):
                raise ValueError(
                    f"`strength` has {value} for `{pattern}`, and `exclude` leaves out all groups that it names; "
                    "expected one or the other. Take it out of `exclude`, or out of `strength`. The head is left out "
                    "unless `strength` has its very name, or exclude=()."
                )
        return {name: value for name, value in strengths.items() if value > 0 and name not in excluded}

    def _opening(self, model: nn.Module, optimizer: Optimizer, seed: int) -> Opening:
        """Return what the form will act on in this training. Call it on all ranks."""
        reshard(model)
        reference, updates = self._settled(model), self._updates(model)
        parameters, groups, strengths = parameters_by_name(model), self._layers(model), self._strengths(model)
        whole = {id(parameter) for update in updates for parameter in update.parameters}
        reference.leave_out([name for name, parameter in parameters.items() if id(parameter) in whole])
        self._placed = reference.placed(model)
        by_name = {n: strengths[group.name] for group in groups if group.name in strengths for n in group.parameters}
        inner = getattr(optimizer, "optimizer", optimizer)
        anchored, held = pair(parameters, self._placed, by_name, inner, updates)
        return Opening(model, inner, anchored, held, groups, strengths, self._placed, seed, self.trainer)

    def _log_distances(self, model: nn.Module, state: TrainerState, *, final: bool = False) -> None:
        """Log the distances, once a step; at the end also where they are no longer those of its last step."""
        of_step = itertools.takewhile(lambda entry: entry.get("step") == state.global_step, reversed(state.log_history))
        logged = next((entry for entry in of_step if any(key.startswith("tl/anchor/") for key in entry)), None)
        if not self._form.opened or (logged is not None and not final):
            return
        found = {f"tl/anchor/{name}": v for name, v in {**self.distances(model), **self._form.measured()}.items()}
        if logged is None or any(logged.get(name) != value for name, value in found.items()):
            self.log(found | self._form.metrics(state), state)
