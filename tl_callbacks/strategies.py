"""Named ways of adapting a model: bundles of the methods, as Trainer keyword arguments."""

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

from tl_callbacks.anchoring.callback import WeightAnchoring
from tl_callbacks.callbacks import TransferCallback, as_json
from tl_callbacks.discovery import group_layers
from tl_callbacks.frozen.state import openable
from tl_callbacks.groups import LayerGroups
from tl_callbacks.layerwise.factory import layerwise_optimizer
from tl_callbacks.names import closest
from tl_callbacks.parameters import is_peft, parameters_by_name
from tl_callbacks.unfreezing.callback import GradualUnfreezing
from tl_callbacks.unfreezing.rates import SlantedTriangular, slanted_triangular
from tl_callbacks.unfreezing.schedule import UnfreezeSchedule, at_fractions, at_steps, every, per_epoch, staged


class Strategy(TransferCallback):
    """What `adapt` did: the strategy's name and resolved options. Prints, and goes into `recipe.json`.

    Args:
        name: the strategy.
        options: all options with their values.
        summary: one sentence for people.

    Example:
        >>> print(Strategy("probe", {}, "trains the head on frozen features"))
        strategy probe: trains the head on frozen features
    """

    def __init__(self, name: str, options: Mapping[str, Any], summary: str) -> None:
        self.name = name
        self.options = dict(options)
        self.summary = summary

    def __repr__(self) -> str:
        return f"Strategy({self.name!r}, {self.options!r})"

    def __str__(self) -> str:
        options = ", ".join(f"{key}={value!r}" for key, value in self.options.items())
        return f"strategy {self.name}: {self.summary}" + (f" ({options})" if options else "")

    def facts(self) -> Mapping[str, Any]:
        """Return the name and the options."""
        return {"name": self.name, "options": {key: as_json(value) for key, value in self.options.items()}}


def adapt(model: nn.Module, args: TrainingArguments, strategy: str, **options: Any) -> dict[str, Any]:
    """Return Trainer keyword arguments, the model among them, for a named way of adapting it.

    `trainer = Trainer(args=args, train_dataset=train, **adapt(model, args, "gradual")); attach(trainer)`

    - `scratch`: the same architecture from random weights, as a control.
    - `probe`: the head alone, on frozen features (linear probe, feature extraction).
    - `head`: as `probe`, after the head was initialised anew.
    - `top_k` (`k=2`): the head and the top k groups below it.
    - `gradual` (`schedule`, `decay=0.9`, `head_factor=1.0`, `rates="own"`, `keep_frozen=()`): gradual unfreezing with
      discriminative rates; without a schedule the groups open evenly over the first half of training.
    - `lp_ft` (`probe_fraction=0.3`, `factor=0.1`): linear probing, then everything at a smaller rate.
    - `full`: everything at one rate.
    - `discriminative` (`decay=0.9`, `head_factor=1.0`, `factors=None`): everything, each group at its own rate.
    - `anchored` (`strength=0.01`, `form="decoupled"`, `exclude=None`): everything, pulled toward the reference.
    - `lora` (`r=8`, `lora_alpha=16`, `lora_dropout=0.0`, `target_modules="all-linear"`): adapters on a frozen base.

    Args:
        model: the pretrained model with its task head, as it was loaded; `scratch` and `lora` return another.
        args: the Trainer's arguments; `args.seed` seeds what is initialised anew.
        strategy: one of the names above.
        options: the options named above. `schedule` may be a schedule or, as a configuration file has it, a mapping
            of its function to its arguments, such as `{"at_fractions": [0.2, 0.5]}`; `rates` likewise.

    Returns:
        `model`, `callbacks` and `optimizer_cls_and_kwargs`. The first callback is a `Strategy`, which prints what was
        done; add your own callbacks behind.

    Raises:
        ValueError: the strategy or an option is unknown, or does not fit the model.

    Example:
        >>> import tempfile
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8)
        >>> args = TrainingArguments(tempfile.mkdtemp(), use_cpu=True, report_to="none")
        >>> keywords = adapt(BertForSequenceClassification(config), args, "top_k", k=1)
        >>> print(keywords["callbacks"][0])
        strategy top_k: trains head, encoder.layer.1; the rest stays frozen (k=1)
    """
    if strategy not in STRATEGIES:
        raise ValueError(
            f"unknown strategy `{strategy}`. Closest names: {closest(strategy, STRATEGIES)}. "
            f"Known: {', '.join(STRATEGIES)}."
        )
    build = STRATEGIES[strategy]
    known = {
        name: parameter.default
        for name, parameter in inspect.signature(build).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    for option in options:
        if option not in known:
            raise ValueError(
                f"strategy `{strategy}` has no option `{option}`. Closest names: {closest(option, known) or 'none'}. "
                f"Options: {', '.join(known) or 'none'}."
            )
    keywords, summary = build(model, args, **options)
    applied = Strategy(strategy, {**known, **options}, summary)
    return {**keywords, "callbacks": [applied, *keywords["callbacks"]]}


_Built = tuple[dict[str, Any], str]


def _scratch(model: nn.Module, args: TrainingArguments) -> _Built:
    anew = _initialised_anew(model, args, "scratch")
    anew.config._name_or_path = ""
    return _keywords(anew, args), "trains the same architecture from random weights"


def _initialised_anew(model: nn.Module, args: TrainingArguments, strategy: str) -> PreTrainedModel:
    """Return a model of the same class and config with random weights, seeded by `args.seed`."""
    if not isinstance(model, PreTrainedModel) or is_peft(model):
        raise ValueError(
            f"`{strategy}` makes weights anew from the model's config, which {type(model).__name__} does not allow; "
            "expected a PreTrainedModel without adapters. Initialise it yourself and use another strategy."
        )
    with torch.random.fork_rng():
        torch.manual_seed(args.seed)
        anew: Any = type(model)(copy.deepcopy(model.config))
    result: PreTrainedModel = anew.to(device=model.device, dtype=model.dtype)
    return result


def _probe(model: nn.Module, args: TrainingArguments) -> _Built:
    return _top(model, args, 0)


def _head(model: nn.Module, args: TrainingArguments) -> _Built:
    groups = group_layers(model)
    if groups.head is None:
        raise ValueError(
            f"`head` initialises the head anew, but {type(model).__name__} has no head of its own. Load the model with "
            "a task head (AutoModelFor...), or use `probe`."
        )
    anew = parameters_by_name(_initialised_anew(model, args, "head"))
    parameters = parameters_by_name(model)
    with torch.no_grad():
        for name in groups[groups.head].parameters:
            parameters[name].copy_(anew[name])
    keywords, summary = _top(model, args, 0)
    return keywords, f"initialises the head anew and {summary}"


def _top_k(model: nn.Module, args: TrainingArguments, *, k: int = 2) -> _Built:
    groups = group_layers(model)
    below = len(groups) - (groups.head is not None)
    if not 1 <= k <= below:
        raise ValueError(f"`k` is {k}; expected the number of groups below the head to train, from 1 to {below}.")
    return _top(model, args, k)


def _top(model: nn.Module, args: TrainingArguments, k: int) -> _Built:
    groups = group_layers(model)
    count = k + 1 if groups.head is not None else max(1, k)
    trained, frozen = groups.names[-count:], groups.names[:-count]
    unfreezing = GradualUnfreezing(groups, at_steps([0] * (count - 1)), keep_frozen=frozen)
    return _keywords(model, args, groups, [unfreezing]), f"trains {', '.join(reversed(trained))}; the rest stays frozen"


def _gradual(
    model: nn.Module,
    args: TrainingArguments,
    *,
    schedule: UnfreezeSchedule | Mapping[str, Any] | None = None,
    decay: float = 0.9,
    head_factor: float = 1.0,
    rates: str | SlantedTriangular | Mapping[str, Any] = "own",
    keep_frozen: Sequence[str] = (),
) -> _Built:
    groups = group_layers(model)
    openings = len(groups) - 1 - len(groups.select(keep_frozen))
    if schedule is None:
        schedule = at_fractions([round(0.5 * (place + 1) / max(1, openings), 6) for place in range(openings)])
    unfreezing = GradualUnfreezing(groups, _made(schedule), keep_frozen=keep_frozen, rates=_made(rates))
    keywords = _keywords(model, args, groups, [unfreezing], decay=decay, head_factor=head_factor)
    return keywords, f"opens {openings} groups downwards from {groups.names[-1]}, each at its own rate"


def _made(value: Any) -> Any:
    """Return a schedule or rule from a mapping of its function's name to its arguments; other values as they are."""
    makers: dict[str, Callable[..., Any]] = {
        "every": every,
        "at_steps": at_steps,
        "at_fractions": at_fractions,
        "per_epoch": per_epoch,
        "staged": staged,
        "slanted_triangular": slanted_triangular,
    }
    if not isinstance(value, Mapping):
        return value
    if len(value) != 1 or (name := next(iter(value))) not in makers:
        near = closest(str(next(iter(value), "")), makers)
        raise ValueError(f"{dict(value)} names no schedule or rule; expected one key of {', '.join(makers)} ({near}?).")
    arguments = value[name]
    return makers[name](**arguments) if isinstance(arguments, Mapping) else makers[name](arguments)


def _lp_ft(model: nn.Module, args: TrainingArguments, *, probe_fraction: float = 0.3, factor: float = 0.1) -> _Built:
    groups = group_layers(model)
    schedule = staged([(float(probe_fraction), "all", factor)])
    unfreezing = GradualUnfreezing(groups, schedule, rates="own")
    return _keywords(model, args, groups, [unfreezing]), "trains the head, then everything at a smaller rate"


def _full(model: nn.Module, args: TrainingArguments) -> _Built:
    return _keywords(model, args), "trains everything at one rate"


def _discriminative(
    model: nn.Module,
    args: TrainingArguments,
    *,
    decay: float = 0.9,
    head_factor: float = 1.0,
    factors: Mapping[str, float] | None = None,
) -> _Built:
    keywords = _keywords(model, args, decay=decay, head_factor=head_factor, factors=factors)
    return keywords, "trains everything, each group at its own rate"


def _anchored(
    model: nn.Module,
    args: TrainingArguments,
    *,
    strength: float | Mapping[str, float] = 0.01,
    form: str = "decoupled",
    exclude: Sequence[str] | None = None,
) -> _Built:
    anchor = WeightAnchoring(strength, form=form, exclude=exclude)  # type: ignore[arg-type]
    return _keywords(model, args, None, [anchor]), "trains everything, pulled toward the pretrained weights"


def _lora(
    model: nn.Module,
    args: TrainingArguments,
    *,
    r: int = 8,
    lora_alpha: int = 16,
    lora_dropout: float = 0.0,
    target_modules: str | Sequence[str] = "all-linear",
) -> _Built:
    if not isinstance(model, PreTrainedModel) or is_peft(model):
        raise ValueError(
            f"`lora` puts adapters on a PreTrainedModel without adapters; got {type(model).__name__}. Wrap it with "
            "peft.get_peft_model yourself and use `full`, `discriminative` or `gradual`."
        )
    config = LoraConfig(
        r=r,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        target_modules=target_modules if isinstance(target_modules, str) else list(target_modules),
        task_type=_task_type(model),
        modules_to_save=_head_modules(model),
    )
    with torch.random.fork_rng():
        torch.manual_seed(args.seed)
        adapted = get_peft_model(model, config)
    count = sum(parameter.numel() for parameter in openable(adapted).values())
    return _keywords(adapted, args), f"trains {count:,} parameters of adapters and head on a frozen base"


def _task_type(model: PreTrainedModel) -> TaskType | None:
    kinds = {
        "ForSequenceClassification": TaskType.SEQ_CLS,
        "ForTokenClassification": TaskType.TOKEN_CLS,
        "ForQuestionAnswering": TaskType.QUESTION_ANS,
        "ForCausalLM": TaskType.CAUSAL_LM,
        "LMHeadModel": TaskType.CAUSAL_LM,
        "ForConditionalGeneration": TaskType.SEQ_2_SEQ_LM,
    }
    return next((kind for suffix, kind in kinds.items() if type(model).__name__.endswith(suffix)), None)


def _head_modules(model: PreTrainedModel) -> list[str] | None:
    """Return the head's modules for PEFT to train and save; None for a language-model head, which is pretrained too."""
    groups = group_layers(model)
    if groups.head is None or _task_type(model) in (TaskType.CAUSAL_LM, TaskType.SEQ_2_SEQ_LM):
        return None
    return sorted({name.split(".")[0] for name in groups[groups.head].parameters})


def _keywords(
    model: nn.Module,
    args: TrainingArguments,
    groups: LayerGroups | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    **rates: Any,
) -> dict[str, Any]:
    optimizer = layerwise_optimizer(args, groups or group_layers(model), **rates)
    return {"model": model, "callbacks": list(callbacks), "optimizer_cls_and_kwargs": optimizer}


STRATEGIES: dict[str, Callable[..., _Built]] = {
    "scratch": _scratch,
    "probe": _probe,
    "head": _head,
    "top_k": _top_k,
    "gradual": _gradual,
    "lp_ft": _lp_ft,
    "full": _full,
    "discriminative": _discriminative,
    "anchored": _anchored,
    "lora": _lora,
}
