"""The adapter: when the pull or the penalty enters a Trainer's optimizer step."""

import re
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from tl_callbacks.anchoring.annealing import SigmoidAnnealing
from tl_callbacks.anchoring.fisher import check_importance, weights_elsewhere
from tl_callbacks.anchoring.forms import Anchored, AnchoredUpdate, Form, Lent
from tl_callbacks.anchoring.options import form_name, make_form, option_facts, record_length
from tl_callbacks.anchoring.pairing import group_distances, pair
from tl_callbacks.anchoring.penalties import half_life
from tl_callbacks.anchoring.reference import Reference
from tl_callbacks.anchoring.updates import agreed, lora_updates
from tl_callbacks.callbacks import TransferCallback, announce
from tl_callbacks.discovery import group_layers
from tl_callbacks.dtensors import reshard
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

    With `importance` the penalty is EWC's: J + strength * sum_i F_i * (theta_i - theta_pre,i)^2. The F_i are taken as
    they are, so `strength` is the lambda / 2 of the paper.

    With `annealing` the decoupled form is RecAdam's: with the weight w of the target task at a step, the pull's share
    is multiplied by 1 - w, and the optimizer's update of the anchored groups by w (AdamW's weight decay with it). The
    rates that are logged stay the schedule's; w is logged as `tl/anchor_target_weight`.

    `form="mixout"`: in each step every element is the reference's with the probability `strength`, else farther from it
    by 1 / (1 - strength), so that the mean over draws is the weight itself; the weights are put back before they are
    updated. The masks depend on `args.seed`, the step and the parameter's name alone.

    `form="features"` (DELTA without attention): the loss plus strength * the mean squared difference of each group's
    output to the reference's on the training batch; `form="outputs"` (Learning without Forgetting): plus strength *
    the divergence of the model's old outputs from the reference's. For both the reference runs once on each
    micro-batch, in eval mode and without gradient; `attach(trainer)` is needed.

    The reference is taken when the Trainer is made, before a resumed run loads its checkpoint. With LoRA adapters that
    add nothing then, it is the model below them: decoupled pull and penalty act on what LoRA adds to each weight,
    theta - theta_pre = s * B A, never formed. Of other adapters (DoRA, PiSSA, LoftQ, other methods), with `importance`
    and in mixout it is the adapter's initial state, where the function is the base model's too.

    Args:
        strength: decoupled: share of the distance removed per step at the peak rate, in [0, 1); penalty: factor of the
            squared distance, 0 or more; mixout: a probability in [0, 1); features, outputs: factor of the term. A
            number, or anchored patterns of group names to numbers (others: 0).
        form: "decoupled", "penalty", "mixout", "features" or "outputs"; or one with its settings, such as
            `Outputs(temperature=2.0, classes=range(5))`.
        reference: the pretrained weights by parameter name, such as a `state_dict()`; "checkpoint": those of the
            safetensors files that the model was loaded from, which take no memory; None: as they are when the Trainer
            is made.
        exclude: names or patterns of groups without anchor; None: the head group, whose weights are new, unless
            `strength` names it; (): none.
        groups: the layer groups; None: `group_layers(model)`.
        importance: of each element of the anchored parameters by parameter name, such as `diagonal_fisher` returns or
            `load_fisher` reads; with form="penalty" alone.
        annealing: `sigmoid_annealing(k, midpoint)`; with form="decoupled" alone.

    Raises:
        ValueError: a strength is out of range, `form` is unknown, or does not go with `importance` or `annealing`; when
            the Trainer is made: a parameter has no importance, or one of another shape; when training begins: a
            midpoint in fractions and another `max_steps` than the run began with, or anchored parameters that share a
            group of the optimizer with others under `annealing`.

    Example:
        >>> WeightAnchoring(strength=0.01)
        WeightAnchoring(strength=0.01, form='decoupled', exclude=None)

    References:
        Li, Grandvalet and Davoine, "Explicit Inductive Bias for Transfer Learning with Convolutional Networks",
        ICML 2018. https://arxiv.org/abs/1802.01483
        Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks", PNAS 2017 (EWC).
        https://arxiv.org/abs/1612.00796
        Chen et al., "Recall and Learn: Fine-tuning Deep Pretrained Language Models with Less Forgetting", EMNLP 2020
        (RecAdam). https://arxiv.org/abs/2004.12651
        Lee, Cho and Kang, "Mixout: Effective Regularization to Finetune Large-scale Pretrained Language Models",
        ICLR 2020. https://arxiv.org/abs/1909.11299
        Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019. https://arxiv.org/abs/1711.05101
    """

    def __init__(
        self,
        strength: float | Mapping[str, float],
        *,
        form: Literal["decoupled", "penalty", "mixout", "features", "outputs"] | Form = "decoupled",
        reference: Literal["checkpoint"] | Mapping[str, Tensor] | None = None,
        exclude: Sequence[str] | None = None,
        groups: LayerGroups | None = None,
        importance: Mapping[str, Tensor] | None = None,
        annealing: SigmoidAnnealing | None = None,
    ) -> None:
        self._form = make_form(form, strength, importance, annealing)
        self.strength = strength
        self.form = form_name(self._form)
        self.reference = reference
        self.exclude = exclude
        self.groups = groups
        self.importance = importance
        self.annealing = annealing
        self._zero: dict[str, Literal["up", "down"]] = {}  # the factor that was zero, by LoRA update
        self._importance: dict[str, Tensor] = {}
        self._taken: Reference | None = None
        self._weights: dict[str, Tensor] | None = None
        self._placed: dict[str, Tensor] = {}  # the same on the parameters' devices, in their dtypes and shards
        self._model: Callable[[], nn.Module | None] = lambda: None

    def __repr__(self) -> str:
        text = f"strength={self.strength!r}, form={self.form!r}, exclude={self.exclude!r}"
        if self.importance is not None:
            text += f", importance=<of {len(self.importance)} parameters>"
        return f"WeightAnchoring({text}{f', annealing={self.annealing!r}' if self.annealing else ''})"

    def findings(self, trainer: Trainer) -> list[str]:
        """Return what would go wrong: a checkpoint taken for pretrained weights, or no place for the pull to enter."""
        found = []
        if sum(isinstance(other, WeightAnchoring) for other in trainer.callback_handler.callbacks) > 1:
            found.append("the Trainer has several WeightAnchoring callbacks; give one a strength per group instead.")
        path = str(getattr(getattr(trainer.model, "config", None), "_name_or_path", ""))
        if (self.reference is None or self.reference == "checkpoint") and re.search(r"checkpoint-\d+/?$", path):
            found.append(
                f"WeightAnchoring would take the weights of `{path}` for the pretrained ones. Load the pretrained "
                "model and pass resume_from_checkpoint to train(), or give reference=pretrained.state_dict()."
            )
        if "lomo" in trainer.args.optim or "layerwise" in trainer.args.optim:
            found.append(
                f"optim={trainer.args.optim} steps inside the backward pass, where WeightAnchoring has no place to "
                "enter. Choose another, such as adamw_torch_fused."
            )
        return found + anchoring_findings(trainer) + self._form.findings(trainer)

    def cautions(self, trainer: Trainer) -> list[str]:
        """Return that the importance was estimated at other weights than the reference, if it was."""
        if self.importance is None or not (other := weights_elsewhere(self.importance, self._weights or {})):
            return []
        text = f"`{other[0]}` and {len(other) - 1} more differ"
        return [f"the importance was estimated at other weights than the reference, or in another dtype: {text}."]

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
        record_length(self.annealing, state)
        if text := self._open(kwargs["model"], kwargs["optimizer"], args.seed):
            announce(text, state)
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
        references = {**self._weights, **self._placed}
        strengths = self._strengths(model)
        groups = [group for group in self._groups(model) if group.name in strengths]
        return group_distances(groups, parameters_by_name(model), references, lora_updates(model, self._zero))

    def facts(self) -> Mapping[str, Any]:
        """Return strength, form, what is excluded, and the half-life of a distance in steps."""
        strength = dict(self.strength) if isinstance(self.strength, Mapping) else self.strength
        facts = {"strength": strength, "form": self.form, "exclude": self.exclude and list(self.exclude)}
        if self.form == "decoupled" and not isinstance(strength, dict) and strength > 0:
            facts["half_life_steps"] = half_life(strength)
        return facts | self._form.facts() | option_facts(self.importance, self.annealing)

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
        names = self._form.names(model, self._groups(model), strengths)
        known = parameters_by_name(model)
        if unknown := [name for name in names if name not in known]:
            raise ValueError(
                f"WeightAnchoring's groups name `{unknown[0]}` and {len(unknown) - 1} other parameters that this model "
                f"does not have (closest: {closest(unknown[0], known)}). Make them with group_layers(model)."
            )
        self._placed = {}
        self._taken = Reference.take(model, names, source=self.reference)
        self._weights = self._taken.tensors
        by_update = self._form.of_updates and self.importance is None and not isinstance(self.reference, Mapping)
        self._zero = {update.name: update.zero for update in lora_updates(model)} if by_update else {}
        self._form.take(model, self.reference if isinstance(self.reference, Mapping) else None)
        self._importance = {} if self.importance is None else check_importance(self.importance, known, names)
        self._model = weakref.ref(model)

    def _open(self, model: nn.Module, optimizer: Optimizer, seed: int) -> str:
        """Register the form's hooks; return what is anchored, in words, or nothing."""
        anchored, updates = self._pair(model, optimizer)
        if not anchored and not updates:
            return ""
        self._form.lend(Lent(self.trainer, self._groups(model), self._strengths(model), self._placed))
        self._form.open(model, optimizer, anchored, updates, seed=seed)
        return f"{self!r} {self._form.what()}"

    def _pair(self, model: nn.Module, optimizer: Optimizer) -> tuple[list[Anchored], list[AnchoredUpdate]]:
        if self._taken is None:
            raise RuntimeError(
                "WeightAnchoring was added after the Trainer was made and has no reference. Pass it as "
                "Trainer(callbacks=[...]), or call attach(trainer) before trainer.train()."
            )
        groups, strengths = self._groups(model), self._strengths(model)
        parameters = parameters_by_name(model)
        self._placed = self._taken.placed(model)
        self._zero = agreed(self._zero)
        by_name = {n: strengths[group.name] for group in groups if group.name in strengths for n in group.parameters}
        return pair(parameters, self._placed, by_name, optimizer, lora_updates(model, self._zero), self._importance)

    def _log_distances(self, model: nn.Module, state: TrainerState) -> None:
        if (self._form.anchored or self._form.updates) and not any(
            entry.get("step") == state.global_step and any(key.startswith("tl/anchor/") for key in entry)
            for entry in state.log_history[-8:]
        ):
            found = {**self.distances(model), **self._form.measured()}
            self.log({f"tl/anchor/{name}": value for name, value in found.items()} | self._form.metrics(state), state)
