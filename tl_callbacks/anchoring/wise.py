"""The adapter: a training ends between the pretrained weights and the tuned ones (WiSE-FT)."""

import re
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from tl_callbacks import events
from tl_callbacks.anchoring.interpolation import Place, choose, interpolate_
from tl_callbacks.anchoring.reference import Reference
from tl_callbacks.callbacks import TransferCallback, announce
from tl_callbacks.discovery import group_layers
from tl_callbacks.dtensors import local, reshard
from tl_callbacks.groups import LayerGroups
from tl_callbacks.parameters import parameters_by_name
from tl_callbacks.reading.quiet import evaluating, random_states_kept
from tl_callbacks.sharding import sharding

ALPHAS = tuple(number / 10 for number in range(11))


class _Between(NamedTuple):
    tensor: Tensor  # of the model
    reference: Tensor
    tuned: Tensor


class WeightInterpolation(TransferCallback):
    """Leaves the model, when training ends, at the best place between its pretrained and its tuned weights (WiSE-FT).

    theta = (1 - alpha) * theta_pre + alpha * theta_tuned, for each alpha of a grid, is evaluated on a development set;
    the place with the best metric is kept, or, with `min_retention`, the best of those that retain at least so much of
    what the pretrained model could do. Of equals the one nearest to the pretrained weights is taken. The whole curve
    goes into `recipe.json`. It comes after `load_best_model_at_end`; what `trainer.save_model()` saves then is the
    model at the chosen place, while checkpoints hold the tuned weights.

    The head is not interpolated unless `exclude` says so: its pretrained weights are random. In a PEFT model it is the
    adapter that is interpolated, between its initial state and the tuned one.

    Args:
        alphas: the grid, each from 0 (pretrained) to 1 (tuned); 1 is always evaluated.
        metric: name of a metric of the evaluation, with `eval_` or without; None: `args.metric_for_best_model`, or the
            loss.
        greater_is_better: None: `args.greater_is_better`, or by the name: a loss is better if it is smaller.
        retention: called at each place, without arguments and on all ranks; returns the retention of the model as it
            is, such as `monitor.retention` of a `ForgettingMonitor`.
        min_retention: the least retention, above 0 and up to 1; None: any.
        dataset: the development set: a data set, or the name of one in the Trainer's `eval_dataset`; None: that one.
        reference: as in `WeightAnchoring`.
        exclude: names or patterns of groups that stay tuned; None: the head group; (): none.
        groups: the layer groups; None: `group_layers(model)`.

    Raises:
        ValueError: an alpha or `min_retention` is out of range, or `min_retention` is given without `retention`.

    Example:
        >>> WeightInterpolation(alphas=(0.5, 1.0), metric="accuracy")
        WeightInterpolation(alphas=(0.5, 1.0), metric='accuracy', min_retention=None)

    References:
        Wortsman et al., "Robust fine-tuning of zero-shot models", CVPR 2022. https://arxiv.org/abs/2109.01903
    """

    def __init__(
        self,
        alphas: Sequence[float] = ALPHAS,
        *,
        metric: str | None = None,
        greater_is_better: bool | None = None,
        retention: Callable[[], float] | None = None,
        min_retention: float | None = None,
        dataset: Any = None,
        reference: Literal["checkpoint"] | Mapping[str, Tensor] | None = None,
        exclude: Sequence[str] | None = None,
        groups: LayerGroups | None = None,
    ) -> None:
        if not alphas or not all(0 <= alpha <= 1 for alpha in alphas):
            raise ValueError(f"`alphas` is {tuple(alphas)}; expected at least one number, each from 0 to 1.")
        if min_retention is not None and not 0 < min_retention <= 1:
            raise ValueError(f"`min_retention` is {min_retention}; expected a share above 0 and up to 1, such as 0.98.")
        if min_retention is not None and retention is None:
            raise ValueError(
                "`min_retention` is given without `retention`, which measures it; give retention=monitor.retention of "
                "a ForgettingMonitor."
            )
        self.alphas = tuple(alphas)
        self.metric = metric
        self.greater_is_better = greater_is_better
        self.retention = retention
        self.min_retention = min_retention
        self.dataset = dataset
        self.reference = reference
        self.exclude = exclude
        self.groups = groups
        self.places: list[Place] = []
        """What was measured, by ascending alpha; empty before training has ended."""
        self.chosen: Place | None = None
        """The place where the model was left; None before training has ended."""
        self._taken: Reference | None = None
        self._buffers: dict[str, Tensor] = {}
        self._model: Callable[[], nn.Module | None] = lambda: None

    def __repr__(self) -> str:
        return (
            f"WeightInterpolation(alphas={self.alphas!r}, metric={self.metric!r}, min_retention={self.min_retention!r})"
        )

    def findings(self, trainer: Trainer) -> list[str]:
        """Return what would go wrong: no development set, a checkpoint taken for pretrained weights, a wrong order."""
        found = []
        if self.dataset is None and (trainer.eval_dataset is None or isinstance(trainer.eval_dataset, dict)):
            held = "several, by name" if trainer.eval_dataset else "none"
            found.append(
                f"WeightInterpolation needs one development set, and the Trainer's eval_dataset holds {held}. Give "
                "`dataset`."
            )
        path = str(getattr(getattr(trainer.model, "config", None), "_name_or_path", ""))
        if not isinstance(self.reference, Mapping) and re.search(r"checkpoint-\d+/?$", path):
            found.append(
                f"WeightInterpolation would take the weights of `{path}` for the pretrained ones. Load the pretrained "
                "model and pass resume_from_checkpoint to train(), or give reference=pretrained.state_dict()."
            )
        ours = [one for one in trainer.callback_handler.callbacks if isinstance(one, TransferCallback)]
        first = next((type(one).__name__ for one in ours if type(one).__name__ in _AFTER), None)
        if first is not None and ours.index(self) > [type(one).__name__ for one in ours].index(first):
            found.append(
                f"{first} stands before WeightInterpolation, so at the end of training it would measure weights that "
                "are not the ones you keep. Put WeightInterpolation first in `callbacks`."
            )
        if kind := {"deepspeed": "DeepSpeed", "fsdp1": "FSDP 1"}.get(sharding(trainer) or ""):
            found.append(
                f"WeightInterpolation does not support {kind}, which keeps weights of its own. Train with DDP."
            )
        return found

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
        """Check that there is a trainer and a reference."""
        if self.trainer is None or self._taken is None:
            raise RuntimeError("WeightInterpolation needs the trainer. Call attach(trainer) before trainer.train().")
        self.places, self.chosen = [], None

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Evaluate each place, and leave the model at the chosen one."""
        assert self.trainer is not None
        with random_states_kept(args.device, args.seed), evaluating(kwargs["model"]):
            self.chosen = self._settle(self.trainer, kwargs["model"])
        curve = [place._asdict() for place in self.places]
        facts = {"alpha": self.chosen.alpha, "curve": curve}
        events.emit(state.log_history, "interpolation", step=state.global_step, **facts)
        self.log({"tl/interpolation/alpha": self.chosen.alpha}, state)
        announce(f"WeightInterpolation leaves the model at alpha = {self.chosen.alpha:g} of {len(curve)} places", state)
        self._warn(self.chosen)

    def facts(self) -> Mapping[str, Any]:
        """Return the rule, the whole curve, and the place where the model was left."""
        return {
            "metric": self.metric,
            "min_retention": self.min_retention,
            "exclude": self.exclude and list(self.exclude),
            "curve": [place._asdict() for place in self.places],
            "alpha": self.chosen and self.chosen.alpha,
            "reference": self._taken and self._taken.facts(),
        }

    def _take(self, model: nn.Module) -> None:
        if self._model() is model:
            return
        groups = self.groups or group_layers(model)
        excluded = groups.select(self.exclude) if self.exclude is not None else (groups.head,)
        trained = parameters_by_name(model)
        names = [
            name
            for group in groups
            if group.name not in excluded
            for name in group.parameters
            if trained[name].is_floating_point()
        ]
        self._taken = Reference.take(model, names, source=self.reference)
        # Statistics of norms and the like, which training moves too.
        self._buffers = {
            name: buffer.detach().clone() for name, buffer in model.named_buffers() if buffer.is_floating_point()
        }
        self._model = weakref.ref(model)

    def _settle(self, trainer: Trainer, model: nn.Module) -> Place:
        """Measure every place and leave the model at the best one."""
        reshard(model)
        with self._tuned_kept(self._pairs(model)) as pairs:
            for alpha in sorted({*self.alphas, 1.0}, reverse=True):  # 1 first: an unknown metric changes nothing
                reshard(model)
                self._move(pairs, alpha)
                self.places.insert(0, self._measured(trainer, alpha))
            better = self._greater(trainer.args)
            chosen = choose(self.places, greater_is_better=better, min_retention=self.min_retention)
            reshard(model)
            self._move(pairs, chosen.alpha)
        return chosen

    def _warn(self, chosen: Place) -> None:
        if self.min_retention is not None and not (chosen.retention or 0) >= self.min_retention:
            warnings.warn(
                f"no place between the pretrained and the tuned weights retains {self.min_retention:g}; the model is "
                f"left at alpha = {chosen.alpha:g}, where retention is {chosen.retention:.4g}, the most there is. "
                "Train less or with an anchor, or give more alphas near 0.",
                UserWarning,
                stacklevel=3,
            )

    def _pairs(self, model: nn.Module) -> list[_Between]:
        assert self._taken is not None
        parameters, buffers = parameters_by_name(model), dict(model.named_buffers())
        held: list[tuple[Tensor, Tensor]]
        held = [(parameters[name], reference) for name, reference in self._taken.placed(model).items()]
        held += [(buffers[name], before) for name, before in self._buffers.items() if name in buffers]
        return [_Between(one.detach(), reference, local(one.detach()).clone()) for one, reference in held]

    @contextmanager
    def _tuned_kept(self, pairs: list[_Between]) -> Iterator[list[_Between]]:
        """Put the tuned weights back if anything goes wrong."""
        try:
            yield pairs
        except BaseException:
            self._move(pairs, 1.0)
            raise

    @staticmethod
    def _move(pairs: Sequence[_Between], alpha: float) -> None:
        for tensor, reference, tuned in pairs:
            interpolate_(tensor, reference, tuned, alpha)

    def _measured(self, trainer: Trainer, alpha: float) -> Place:
        """Return the metric and the retention of the model as it is."""
        output = trainer.evaluation_loop(
            trainer.get_eval_dataloader(self.dataset),
            "Interpolation",
            prediction_loss_only=True if trainer.compute_metrics is None else None,
        )
        name = self._name(trainer.args)
        assert output.metrics is not None
        if name not in output.metrics:
            raise ValueError(
                f"the evaluation gives no `{name}`; it gives {', '.join(output.metrics)}. Give one of them as `metric` "
                "of WeightInterpolation. The model keeps its tuned weights."
            )
        retention = None if self.retention is None else float(self.retention())
        return Place(alpha, float(output.metrics[name]), retention)

    def _name(self, args: TrainingArguments) -> str:
        name = self.metric or args.metric_for_best_model or "loss"
        return name if name.startswith("eval_") else f"eval_{name}"

    def _greater(self, args: TrainingArguments) -> bool:
        if self.greater_is_better is not None:
            return self.greater_is_better
        if self.metric is None and args.metric_for_best_model is not None and args.greater_is_better is not None:
            return bool(args.greater_is_better)
        return not self._name(args).endswith("loss")


_AFTER = ("ForgettingMonitor", "RepresentationProbes", "WeightAnchoring")
