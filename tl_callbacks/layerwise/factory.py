"""The adapter: an optimizer factory for `Trainer(optimizer_cls_and_kwargs=...)` that holds every parameter, named."""

import hashlib
import itertools
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal, cast, get_args

from torch import nn
from torch.optim import Optimizer
from transformers import Trainer, TrainerState, TrainingArguments

from tl_callbacks import events
from tl_callbacks.callbacks import TransferCallback
from tl_callbacks.frozen.state import openable
from tl_callbacks.groups import LayerGroups
from tl_callbacks.layerwise.scales import layer_scales
from tl_callbacks.losses import GROUP, loss_module, loss_parameters
from tl_callbacks.names import closest, normalise
from tl_callbacks.parameters import dimensions, is_peft, parameters_by_name

EVENT = "groups"
NoDecay = Literal["trainer", "1d"]


class LayerwiseOptimizer:
    """An optimizer factory as the Trainer expects it: one named parameter group per layer group and decay class.

    Made by `layerwise_optimizer`. All parameters are in the optimizer from step 0, frozen ones too, so that the
    scheduler, a resumed run and DDP see the same groups throughout. The groups are stored head first, because the
    Trainer logs the rate of group 0 as `learning_rate`. The decay classes are the Trainer's own
    (`Trainer.get_decay_parameter_names`), narrowed by `no_decay="1d"`. Weights of a loss, which sentence-transformers'
    trainers optimize too, are a last group `loss` at `args.learning_rate` once `attach` has lent the trainer.

    Args:
        args: the Trainer's arguments; rates, betas, weight decay and `optim` are read from them when it is built.
        groups: the layer groups.
        scales: group name to ratio to `args.learning_rate`.
        no_decay: see `layerwise_optimizer`.

    Example:
        >>> import tempfile
        >>> from tl_callbacks import group_layers
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> args = TrainingArguments(tempfile.mkdtemp(), learning_rate=0.1, use_cpu=True)
        >>> optimizer = LayerwiseOptimizer(args, group_layers(model), {"0": 0.5, "head": 1.0}).build(model)
        >>> [(group["name"], group["lr"]) for group in optimizer.param_groups if group["weight_decay"] == 0]
        [('head', 0.1), ('head (no decay)', 0.1), ('0', 0.05), ('0 (no decay)', 0.05)]
    """

    def __init__(
        self, args: TrainingArguments, groups: LayerGroups, scales: Mapping[str, float], no_decay: NoDecay = "trainer"
    ) -> None:
        if no_decay not in get_args(NoDecay):
            raise ValueError(
                f"`no_decay` is {no_decay!r}; expected `trainer` (the Trainer's own classes) or `1d` (besides, no "
                "decay for parameters with fewer than two dimensions). Choose one of the two."
            )
        self.args = args
        self.groups = groups
        self.scales = dict(scales)
        self.no_decay = no_decay
        self.trainer: Trainer | None = None

    def __repr__(self) -> str:
        rates = ", ".join(f"{name}: {self.args.learning_rate * scale:.3g}" for name, scale in self.scales.items())
        return f"LayerwiseOptimizer({rates})"

    def __call__(self) -> Callable[..., Optimizer]:
        """Return `build`; the Trainer calls a factory twice."""
        return self.build

    def build(self, model: nn.Module) -> Optimizer:
        """Return the optimizer over all parameters of `model`, named, one group per layer group and decay class.

        Raises:
            ValueError: the groups are not those of this model, or `args.optim` steps or groups by rules of its own.
        """
        if reason := refusal(self.args):
            raise ValueError(f"layerwise_optimizer: {reason}")
        if self.trainer is not None:
            check_recorded(self.groups, self.trainer.state)
        source: Any = self.trainer or Trainer
        optimizer_class, kwargs = source.get_optimizer_cls_and_kwargs(self.args, model)
        trains_loss = kwargs.pop("optimizer_dict", None) is not None  # the groups of sentence-transformers' trainers
        decays = {normalise(name) for name in _decay_names(self.trainer, model)}
        parameters = check_groups(self.groups, model)
        param_groups = []
        for group in reversed(self.groups.groups):
            held = {name: parameters[name] for name in group.parameters}
            param_groups += self._by_decay(group.name, held, decays, self.scales[group.name])
        if trains_loss and self.trainer is not None and (loss := loss_module(self.trainer)) is not None:
            decays = set(_decay_names(self.trainer, loss))
            param_groups += self._by_decay(GROUP, loss_parameters(self.trainer), decays, 1.0)
        optimizer: Optimizer = optimizer_class(param_groups, **kwargs)
        optimizer.register_load_state_dict_pre_hook(_check_names)
        if self.trainer is not None:
            for callback in self.trainer.callback_handler.callbacks:
                if isinstance(callback, TransferCallback):
                    callback.before_optimizer_load(model, self.trainer.state)
        return optimizer

    def _by_decay(
        self, name: str, parameters: Mapping[str, nn.Parameter], decays: Collection[str], scale: float
    ) -> list[dict[str, Any]]:
        """Return the optimizer's groups of one layer group: those with weight decay, and those without."""
        rate = self.args.learning_rate * scale
        decays = {n for n in decays if n in parameters and (self.no_decay != "1d" or dimensions(parameters[n]) > 1)}
        return [
            {
                "params": named,
                "name": name if decay else f"{name} (no decay)",
                "layer_group": name,
                "lr": rate,
                "initial_lr": rate,  # the group's peak rate, also under a scheduler that does not note it
                "weight_decay": self.args.weight_decay if decay else 0.0,
            }
            for decay in (True, False)
            if (named := [(n, parameter) for n, parameter in parameters.items() if (n in decays) is decay])
        ]

    def facts(self) -> dict[str, Any]:
        """Return what `recipe.json` says of the rates: `optim`, each group's ratio, and what has no weight decay."""
        return {
            "optim": str(getattr(self.args.optim, "value", self.args.optim)),
            "learning_rate": self.args.learning_rate,
            "scales": self.scales,
            "no_decay": self.no_decay,
        }


def layerwise_optimizer(
    args: TrainingArguments,
    groups: LayerGroups,
    *,
    decay: float | Mapping[str, float] = 1.0,
    head_factor: float = 1.0,
    factors: Mapping[str, float] | None = None,
    no_decay: NoDecay = "trainer",
) -> tuple[LayerwiseOptimizer, dict[str, Any]]:
    """Return the value for `Trainer(optimizer_cls_and_kwargs=...)` that gives each layer group its own rate.

    Discriminative learning rates (layer-wise learning-rate decay) move the general lower layers less than the specific
    upper ones. Any scheduler of the Trainer's that scales a rate scales each group's. With the neutral settings
    training is bit for bit that of the plain Trainer.

    Args:
        args: the Trainer's arguments: the only source of rate, betas, weight decay and `optim`.
        groups: the layer groups of the model, from `group_layers`.
        decay: ratio of neighbouring levels' rates, downwards, in (0, 1]; 0.9 is usual, ULMFiT's is 1 / 2.6. With
            several towers also a mapping, one ratio each: `{"vision_tower": 0.8, "language_model": 0.9}`.
        head_factor: ratio of the head's rate to what it would have, above 0.
        factors: anchored patterns of group names to ratios to `args.learning_rate`; they replace the result.
        no_decay: which parameters get no `args.weight_decay`: `trainer` for those that the plain Trainer spares (biases
            and norms, by name), `1d` for these and all with fewer than two dimensions, whatever their names.

    Returns:
        A factory and its empty keyword arguments.

    Raises:
        ValueError: see `layer_scales`; `no_decay` is neither; and, when the optimizer is made, groups of another model.

    Example:
        >>> import tempfile
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> from tl_callbacks import group_layers
        >>> config = BertConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8)
        >>> args = TrainingArguments(tempfile.mkdtemp(), learning_rate=1e-3, use_cpu=True)
        >>> groups = group_layers(BertForSequenceClassification(config))
        >>> layerwise_optimizer(args, groups, decay=0.5)[0]
        LayerwiseOptimizer(embeddings: 0.000125, encoder.layer.0: 0.00025, encoder.layer.1: 0.0005, head: 0.001)

    References:
        Howard and Ruder, "Universal Language Model Fine-tuning for Text Classification", ACL 2018, section 3.2.
        https://arxiv.org/abs/1801.06146
    """
    scales = layer_scales(groups, decay=decay, head_factor=head_factor, factors=factors)
    return LayerwiseOptimizer(args, groups, scales, no_decay), {}


def refusal(args: TrainingArguments) -> str | None:
    """Return why the optimizer that `args` names cannot take groups from outside, None if it can.

    Example:
        >>> import tempfile
        >>> refusal(TrainingArguments(tempfile.mkdtemp(), optim="lomo", use_cpu=True)).split(",")[0]
        'optim=lomo steps inside the backward pass'
        >>> refusal(TrainingArguments(tempfile.mkdtemp(), optim="sgd", use_cpu=True)) is None
        True
    """
    name = str(getattr(args.optim, "value", args.optim))
    if "lomo" in name or name.endswith("layerwise"):
        why = "steps inside the backward pass"
    elif "galore" in name or "apollo" in name:
        why = "makes parameter groups of its own"
    elif mapping := getattr(args, "learning_rate_mapping", None):  # of sentence-transformers' arguments
        return (
            f"learning_rate_mapping={mapping} makes parameter groups of its own, so the rates would have two sources. "
            "Leave it out and name the rates in layerwise_optimizer(args, groups, factors={...})."
        )
    else:
        return None
    return (
        f"optim={name} {why}, so layer groups cannot have rates or freeze states of their own. Choose another, such as "
        "adamw_torch_fused, adafactor or sgd."
    )


def _decay_names(trainer: Trainer | None, model: nn.Module) -> list[str]:
    """Return the names that the Trainer gives weight decay; its method reads nothing of the trainer itself."""
    if trainer is not None:
        return trainer.get_decay_parameter_names(model)
    return Trainer.get_decay_parameter_names(cast(Trainer, None), model)


def check_groups(groups: LayerGroups, model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the model's parameters by name; raise if they are not those of the groups."""
    parameters = openable(model) if is_peft(model) else parameters_by_name(model)
    unknown = [name for name in groups.parameters if name not in parameters]
    grouped = set(groups.parameters)
    missing = [name for name in parameters if name not in grouped]
    if unknown or missing:
        strays = [
            f"`{name}` is in the groups but not in the model (closest: {closest(name, parameters)})" for name in unknown
        ] + [f"`{name}` is in the model but in no group" for name in missing]
        raise ValueError(
            f"the groups are not those of this {type(model).__name__}: {len(unknown)} unknown and {len(missing)} "
            f"missing parameters; {'; '.join(strays[:3])}. Make them with group_layers(model) from the model that is "
            "given to the Trainer, after PEFT adapters were added: from trainer.model, where the trainer adds them."
        )
    return parameters


def record_groups(groups: LayerGroups, state: TrainerState) -> None:
    """Record once in a run's history which parameters its groups hold, for `check_recorded`."""
    if not events.read(state.log_history, EVENT):
        events.emit(
            state.log_history, EVENT, step=state.global_step, digests=_digests(groups)
        )  # a list: JSON sorts keys


def check_recorded(groups: LayerGroups, state: TrainerState) -> None:
    """Refuse to resume a run that was started with other groups, before any state is loaded.

    FSDP's optimizer state goes by name and the scheduler's by position, so that other groups would load and train at
    the rates of one another.

    Raises:
        ValueError: the history that is resumed records other groups.
    """
    for event in events.read(state.log_history, EVENT):
        pairs = itertools.zip_longest(event["digests"], _digests(groups))
        if differing := [pair for pair in pairs if pair[0] != pair[1]]:
            there, here = (f"`{side[0]}`" if side else "none" for side in differing[0])
            raise ValueError(
                f"the checkpoint's optimizer state belongs to other layer groups (first difference: {there} there, "
                f"{here} here). Resume with the groups that the run was started with, or start afresh from the "
                "checkpoint's weights."
            )


def _digests(groups: LayerGroups) -> list[list[str]]:
    """Return name and a short hash of each group's parameter names, bottom to top; a list, as JSON sorts mappings."""
    return [[group.name, hashlib.sha256("\n".join(group.parameters).encode()).hexdigest()[:12]] for group in groups]


def _check_names(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Refuse optimizer state of other groups: torch would load it by position, moments of one tensor into another."""
    saved = [group.get("param_names") for group in state_dict["param_groups"]]
    ours = [group["param_names"] for group in optimizer.param_groups]
    if saved != ours:
        pairs = itertools.zip_longest(saved, ours)
        place = next(number for number, (theirs, mine) in enumerate(pairs) if theirs != mine)
        here = optimizer.param_groups[place]["name"] if place < len(ours) else "none"
        raise ValueError(
            f"the checkpoint's optimizer state belongs to other parameter groups: {len(saved)} there, {len(ours)} "
            f"here, first difference at number {place} (here: `{here}`). Resume with the groups that the run was "
            "started with, or start afresh from the checkpoint's weights."
        )
