"""The adapter: a training ends between the pretrained weights and the tuned ones (WiSE-FT)."""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from tl_callbacks import events
from tl_callbacks.anchoring.measuring import UnknownMetricError, evaluated, names_of, number, prefix
from tl_callbacks.anchoring.operations.interpolation import Place, as_row, choose, interpolate_
from tl_callbacks.anchoring.reference.beside import as_given, buffers_of, floating_buffers, saved
from tl_callbacks.anchoring.reference.mapped import ReferenceWrittenError
from tl_callbacks.anchoring.reference.proof import WithReference
from tl_callbacks.callbacks import TransferCallback, announce
from tl_callbacks.dtensors import local, reshard
from tl_callbacks.errors import NoEffectWarning
from tl_callbacks.groups import LayerGroups
from tl_callbacks.parameters import parameters_by_name
from tl_callbacks.reading.quiet import evaluating, random_states_kept
from tl_callbacks.sharding import sharding

ALPHAS = tuple(number / 10 for number in range(11))


class _Between(NamedTuple):
    tensor: Tensor  # of the model
    reference: Tensor
    tuned: Tensor


class WeightInterpolation(WithReference):
    """Leaves the model, when training ends, at the best place between its pretrained and its tuned weights (WiSE-FT).

    theta = (1 - alpha) * theta_pre + alpha * theta_tuned, for each alpha of a grid, is evaluated on a development set;
    the place with the best metric is kept, or, with `min_retention`, the best of those that retain at least so much of
    what the pretrained model could do. Of equals the one nearest to the pretrained weights is taken. The whole curve
    goes into `recipe.json`. It comes after `load_best_model_at_end`; what `trainer.save_model()` saves then is the
    model at the chosen place, while checkpoints hold the tuned weights.

    The head is not interpolated unless `exclude` says so: its pretrained weights are random. The statistics of a norm
    go with its parameters. A run that is resumed with another reference is refused, as by `WeightAnchoring`.

    The tuned weights stay, with a warning, where the metric is a finite number at no place, and where the evaluation
    gives no such metric and the training had none that would have told.

    With LoRA adapters that add nothing at the start, alpha scales what they add: theta = theta_pre + alpha * s * B A.
    The factor that was zero is interpolated and the other stays tuned. Other adapters are interpolated between their
    initial state and the tuned one.

    Args:
        alphas: the grid, each from 0 (pretrained) to 1 (tuned); 1 is always evaluated.
        metric: name of a metric of the evaluation, with `eval_` (and the name of `dataset`) or without; None:
            `args.metric_for_best_model`, or the loss.
        greater_is_better: None: `args.greater_is_better` if the metric is `args.metric_for_best_model`, or by the name:
            a loss is better if it is smaller.
        retention: called at each place, without arguments and on all ranks; returns the retention of the model as it
            is, such as `monitor.retention` of a `ForgettingMonitor`.
        min_retention: the least retention, above 0 and up to 1; None: any.
        dataset: the development set: a data set, or the name of one in the Trainer's `eval_dataset`; None: that one.
        reference: as in `WeightAnchoring`, as are the next two.
        reference_dtype: of the copies; None: the parameters'.
        reference_device: of the copies; None: the parameters'.
        exclude: names or patterns of groups that stay tuned; None: the head group, whose weights are new, unless it is
            a language model's; (): none.
        groups: the layer groups; None: `group_layers(model)`.

    Raises:
        ValueError: an alpha or `min_retention` is out of range, or `min_retention` is given without `retention`.
        ValueError: at the first evaluation of the training: it does not give the metric.
        RuntimeError: when training begins: the run that is resumed began with another reference.

    Example:
        >>> WeightInterpolation(alphas=(0.5, 1.0), metric="accuracy")
        WeightInterpolation(alphas=(0.5, 1.0), metric='accuracy', min_retention=None)

    References:
        Wortsman et al., "Robust fine-tuning of zero-shot models", CVPR 2022. https://arxiv.org/abs/2109.01903
    """

    _event = "interpolation_start"

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
        reference_dtype: torch.dtype | None = None,
        reference_device: str | torch.device | None = None,
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
        super().__init__(reference, reference_dtype, reference_device, exclude, groups)
        self.alphas = tuple(alphas)
        self.metric = metric
        self.greater_is_better = greater_is_better
        self.retention = retention
        self.min_retention = min_retention
        self.dataset = dataset
        self.places: list[Place] = []
        """What was measured, by ascending alpha; empty before training has ended."""
        self.chosen: Place | None = None
        """The place where the model was left; None before training has ended, and where the metric is unknown."""
        self._buffers: dict[str, Tensor] = {}

    def __repr__(self) -> str:
        return (
            f"WeightInterpolation(alphas={self.alphas!r}, metric={self.metric!r}, min_retention={self.min_retention!r})"
        )

    def findings(self, trainer: Trainer) -> list[str]:
        """Return what would go wrong: no development set, a checkpoint taken for pretrained weights, a wrong order."""
        found = super().findings(trainer)
        if self.dataset is None and (trainer.eval_dataset is None or isinstance(trainer.eval_dataset, dict)):
            held = "several, by name" if trainer.eval_dataset else "none"
            found.append(
                f"WeightInterpolation needs one development set, and the Trainer's eval_dataset holds {held}. Give "
                "`dataset`."
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

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Settle what the reference is, and record it or check that a resumed run has the same."""
        if self.trainer is None:
            raise RuntimeError("WeightInterpolation needs the trainer. Call attach(trainer) before trainer.train().")
        self.places, self.chosen = [], None
        reference = self._settled(kwargs["model"])
        still = {id(update.staying) for update in self._updates(kwargs["model"])}
        reference.leave_out([n for n, p in parameters_by_name(kwargs["model"]).items() if id(p) in still])
        self._prove(state)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Refuse a metric that the training's own evaluation does not give, before more is trained.

        Raises:
            UnknownMetricError: it does not.
        """
        metrics, ours = kwargs.get("metrics") or {}, f"{prefix(self.dataset)}_runtime"
        if self.trainer is not None and self.trainer.is_in_train and ours in metrics:
            number(metrics, self._name(args), self.dataset)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Evaluate each place, and leave the model at the chosen one."""
        try:
            self.chosen = self._walk(kwargs["model"], args)
        except (UnknownMetricError, ReferenceWrittenError) as error:  # the training is over: nothing of it is lost
            warnings.warn(f"{error} The model keeps its tuned weights.", NoEffectWarning, stacklevel=2)
            return
        curve, where = [as_row(place) for place in self.places], f"alpha = {self.chosen.alpha:g}"
        events.emit(state.log_history, "interpolation", step=state.global_step, alpha=self.chosen.alpha, curve=curve)
        self.log({"tl/interpolation/alpha": self.chosen.alpha}, state)
        announce(f"WeightInterpolation leaves the model at {where} of {len(curve)} places{self._where()}", state)
        self._warn(self.chosen)

    def facts(self) -> dict[str, Any]:
        """Return the rule, the whole curve, the place where the model was left, and the reference."""
        return {
            "metric": self.metric,
            "min_retention": self.min_retention,
            "curve": [as_row(place) for place in self.places],
            "alpha": self.chosen and self.chosen.alpha,
            **super().facts(),
        }

    def _names(self, model: nn.Module) -> list[str]:
        """Return what is interpolated: what has a group that is not excluded, and is no integer."""
        groups, parameters = self._layers(model), parameters_by_name(model)
        excluded = self._excluded(model, groups)
        names = [name for group in groups if group.name not in excluded for name in group.parameters]
        return [name for name in names if parameters[name].is_floating_point()]

    def _keep(self, model: nn.Module, names: list[str]) -> Mapping[str, Tensor]:
        """Keep the statistics of norms and the like, which training moves too, of what is interpolated."""
        given = self.reference if isinstance(self.reference, Mapping) else None
        self._buffers = as_given(buffers_of(model, names), given)
        return saved(model, self._buffers)

    def _walk(self, model: nn.Module, args: TrainingArguments) -> Place:
        """Measure each place, leave the model at the one that the rule chooses, and return it."""
        assert self.trainer is not None
        reshard(model)
        with random_states_kept(args.device, args.seed), evaluating(model), self._pairs(model) as pairs:
            for alpha in sorted({*self.alphas, 1.0}, reverse=True):  # 1 first: an unknown metric changes nothing
                _move(model, pairs, alpha)
                self.places.insert(0, self._measured(self.trainer, alpha))
            chosen = choose(self.places, greater_is_better=self._greater(args), min_retention=self.min_retention)
            _move(model, pairs, chosen.alpha)
        return chosen

    @contextmanager
    def _pairs(self, model: nn.Module) -> Iterator[list[_Between]]:
        """Yield the tensors between which the model moves; if anything goes wrong the tuned ones are put back."""
        assert self._taken is not None
        parameters, buffers = parameters_by_name(model), floating_buffers(model)
        held = [(parameters[name].detach(), reference) for name, reference in self._taken.placed(model).items()]
        held += [(buffers[name], before) for name, before in self._buffers.items() if name in buffers]
        pairs = [_Between(one, reference, local(one).clone()) for one, reference in held]
        try:
            yield pairs
        except BaseException:
            _move(model, pairs, 1.0)
            raise

    def _warn(self, chosen: Place) -> None:
        if not math.isfinite(chosen.metric):
            warnings.warn(
                f"the metric of WeightInterpolation is {chosen.metric} at every place between the pretrained and the "
                "tuned weights; the model keeps its tuned weights. Look at the development set and at compute_metrics.",
                NoEffectWarning,
                stacklevel=4,
            )
        elif self.min_retention is not None and not (chosen.retention or 0) >= self.min_retention:
            warnings.warn(
                f"no place between the pretrained and the tuned weights retains {self.min_retention:g}; the model is "
                f"left at alpha = {chosen.alpha:g}, where retention is {chosen.retention:.4g}, the most there is. "
                "Train less or with an anchor, or give more alphas near 0.",
                UserWarning,
                stacklevel=4,
            )

    def _measured(self, trainer: Trainer, alpha: float) -> Place:
        """Return the metric and the retention of the model as it is."""
        metric = number(evaluated(trainer, self.dataset), self._name(trainer.args), self.dataset)
        retention = None if self.retention is None else float(self.retention())
        return Place(alpha, metric, retention)

    def _name(self, args: TrainingArguments) -> str:
        return self.metric or args.metric_for_best_model or "loss"

    def _greater(self, args: TrainingArguments) -> bool:
        if self.greater_is_better is not None:
            return self.greater_is_better
        ours, best = names_of(self._name(args), self.dataset), args.metric_for_best_model
        if best is not None and args.greater_is_better is not None and set(ours) & set(names_of(best, self.dataset)):
            return bool(args.greater_is_better)
        return not ours[0].endswith("loss")


def _move(model: nn.Module, pairs: Sequence[_Between], alpha: float) -> None:
    reshard(model)
    for tensor, reference, tuned in pairs:
        interpolate_(tensor, reference, tuned, alpha)


_AFTER = ("ForgettingMonitor", "RepresentationProbes", "WeightAnchoring")
