"""What each named strategy consists of: one function a strategy, whose keyword arguments are its options.

Each returns Trainer keyword arguments and a sentence of what it did; `strategies.adapt` looks them up by name.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

from tl_callbacks.anchoring.callback import FormName, WeightAnchoring
from tl_callbacks.anchoring.forms.form import Form
from tl_callbacks.discovery import group_layers
from tl_callbacks.frozen.state import openable
from tl_callbacks.groups import LayerGroups
from tl_callbacks.layerwise.factory import NoDecay, layerwise_optimizer
from tl_callbacks.names import closest
from tl_callbacks.parameters import is_peft, parameters_by_name
from tl_callbacks.unfreezing.adaptive import ProbeSchedule, schedule_from_probes
from tl_callbacks.unfreezing.callback import GradualUnfreezing
from tl_callbacks.unfreezing.rates import SlantedTriangular, slanted_triangular
from tl_callbacks.unfreezing.schedule import UnfreezeSchedule, at_fractions, at_steps, every, per_epoch, staged

Built = tuple[dict[str, Any], str]


def scratch(model: nn.Module, args: TrainingArguments) -> Built:
    """Train the same architecture from random weights, as a control."""
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
    if hasattr(model, "accepts_loss_kwargs"):  # how the Trainer scales the loss, which a script may have set
        anew.accepts_loss_kwargs = model.accepts_loss_kwargs
    result: PreTrainedModel = anew.to(device=model.device, dtype=model.dtype)
    return result


def probe(model: nn.Module, args: TrainingArguments) -> Built:
    """Train the head alone, on frozen features."""
    _need_head(model, "probe")
    return _top(model, args, 0)


def head(model: nn.Module, args: TrainingArguments) -> Built:
    """Initialise the head anew and train it alone, on frozen features."""
    head_parameters = _need_head(model, "head")
    anew = parameters_by_name(_initialised_anew(model, args, "head"))
    parameters = parameters_by_name(model)
    with torch.no_grad():
        for name in head_parameters:
            parameters[name].copy_(anew[name])
    keywords, summary = _top(model, args, 0)
    return keywords, f"initialises the head anew and {summary}"


def _need_head(model: nn.Module, strategy: str) -> tuple[str, ...]:
    """Return the names of the head's parameters; refuse a model without a head of its own."""
    groups = group_layers(model)
    if groups.head is None:
        why = "; ".join(groups.notes) or "nothing stands above its blocks"
        raise ValueError(
            f"`{strategy}` trains the head alone, but {type(model).__name__} has no head of its own: {why}. Use "
            "`top_k`, or load the model with a task head (AutoModelFor...)."
        )
    return groups[groups.head].parameters


def top_k(model: nn.Module, args: TrainingArguments, *, k: int = 2) -> Built:
    """Train the head and the top `k` groups below it."""
    groups = group_layers(model)
    below = len(groups.levels) - (groups.head is not None)
    if not 1 <= k <= below:
        raise ValueError(f"`k` is {k}; expected the number of groups below the head to train, from 1 to {below}.")
    return _top(model, args, k)


def _top(model: nn.Module, args: TrainingArguments, k: int) -> Built:
    groups = group_layers(model)
    count = k + (groups.head is not None)
    trained, frozen = (
        [group.name for level in levels for group in level]
        for levels in (groups.levels[-count:], groups.levels[:-count])
    )
    unfreezing = GradualUnfreezing(groups, at_steps([0] * (count - 1)), keep_frozen=frozen)
    return _keywords(model, args, groups, [unfreezing]), f"trains {', '.join(reversed(trained))}; the rest stays frozen"


def gradual(
    model: nn.Module,
    args: TrainingArguments,
    *,
    schedule: UnfreezeSchedule | ProbeSchedule | Mapping[str, Any] | None = None,
    decay: float | Mapping[str, float] = 0.9,
    head_factor: float = 1.0,
    rates: str | SlantedTriangular | Mapping[str, Any] = "own",
    keep_frozen: Sequence[str] = (),
) -> Built:
    """Open the groups downwards, each at its own rate."""
    groups = group_layers(model)
    kept = groups.select(keep_frozen)
    openings = sum(any(group.name not in kept for group in level) for level in groups.levels[:-1])
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
        "schedule_from_probes": schedule_from_probes,
        "slanted_triangular": slanted_triangular,
    }
    if not isinstance(value, Mapping):
        return value
    if not set(value) & set(makers) and all(isinstance(one, Mapping) for one in value.values()):
        return {tower: _made(one) for tower, one in value.items()}  # a schedule for each tower
    if len(value) != 1 or (name := next(iter(value))) not in makers:
        near = closest(str(next(iter(value), "")), makers)
        raise ValueError(f"{dict(value)} names no schedule or rule; expected one key of {', '.join(makers)} ({near}?).")
    arguments = value[name]
    return makers[name](**arguments) if isinstance(arguments, Mapping) else makers[name](arguments)


def lp_ft(model: nn.Module, args: TrainingArguments, *, probe_fraction: float = 0.3, factor: float = 0.1) -> Built:
    """Train the head, then everything at a smaller rate."""
    groups = group_layers(model)
    schedule = staged([(float(probe_fraction), "all", factor)])
    unfreezing = GradualUnfreezing(groups, schedule, rates="own")
    return _keywords(model, args, groups, [unfreezing]), "trains the head, then everything at a smaller rate"


def full(model: nn.Module, args: TrainingArguments) -> Built:
    """Train everything at one rate."""
    return _keywords(model, args), "trains everything at one rate"


def discriminative(
    model: nn.Module,
    args: TrainingArguments,
    *,
    decay: float | Mapping[str, float] = 0.9,
    head_factor: float = 1.0,
    factors: Mapping[str, float] | None = None,
    no_decay: NoDecay = "trainer",
) -> Built:
    """Train everything, each group at its own rate."""
    keywords = _keywords(model, args, decay=decay, head_factor=head_factor, factors=factors, no_decay=no_decay)
    return keywords, "trains everything, each group at its own rate"


def anchored(
    model: nn.Module,
    args: TrainingArguments,
    *,
    strength: float | Mapping[str, float] = 0.01,
    form: FormName | Form = "decoupled",
    exclude: Sequence[str] | None = None,
) -> Built:
    """Train everything, pulled toward the pretrained weights."""
    anchor = WeightAnchoring(strength, form=form, exclude=exclude)
    return _keywords(model, args, None, [anchor]), "trains everything, pulled toward the pretrained weights"


def lora(
    model: nn.Module,
    args: TrainingArguments,
    *,
    r: int = 8,
    lora_alpha: int = 16,
    lora_dropout: float = 0.0,
    target_modules: str | Sequence[str] = "all-linear",
) -> Built:
    """Train LoRA adapters and the head on a frozen base."""
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
