"""What would go wrong, found before step 1: all findings at once."""

import copy
import warnings

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer

from tl_callbacks.callbacks import TransferCallback
from tl_callbacks.frozen.state import frozen_by_us
from tl_callbacks.layerwise.factory import LayerwiseOptimizer, check_groups, refusal
from tl_callbacks.parameters import is_peft, parameters_by_name
from tl_callbacks.unfreezing.callback import GradualUnfreezing


class PreflightError(ValueError):
    r"""Lists everything that is wrong with a set-up, each with what to do.

    Args:
        findings: one text a finding.

    Example:
        >>> str(PreflightError(["the head is frozen; open it."]))
        'attach(trainer) found 1 problem:\n- the head is frozen; open it.'
    """

    def __init__(self, findings: list[str]) -> None:
        plural = "problem" if len(findings) == 1 else "problems"
        super().__init__("\n- ".join([f"attach(trainer) found {len(findings)} {plural}:", *findings]))
        self.findings = findings


def our_callbacks(trainer: Trainer) -> list[TransferCallback]:
    """Return this package's callbacks among the trainer's, in their order."""
    return [c for c in trainer.callback_handler.callbacks if isinstance(c, TransferCallback)]


def preflight(trainer: Trainer) -> list[str]:
    """Return all that would go wrong with a trainer, one text a finding; empty if nothing."""
    assert trainer.model is not None
    found = []
    if trainer.state.global_step > 0:
        found.append(
            f"the trainer has already trained {trainer.state.global_step} steps, so the pretrained weights and the "
            "first openings are gone. Call attach(trainer) before trainer.train()."
        )
    found += _frozen_by_hand(trainer.model)
    found += _optimizer(trainer)
    for callback in our_callbacks(trainer):
        found += callback.findings(trainer)
    if trainer.args.n_gpu > 1:
        found.append(
            f"{trainer.args.n_gpu} devices in one process make the Trainer use DataParallel, which copies the model at "
            "every step. Launch one process a device with accelerate launch or torchrun."
        )
    return list(dict.fromkeys(found))  # two callbacks may find the same


def frozen_by_hand(model: nn.Module) -> list[str]:
    """Return the parameters that a script froze: the model's own class, made anew, would train them.

    What a model freezes itself, the base under PEFT adapters, quantised weights and what this package froze are none
    of them. A model that cannot be made anew from a config leaves the question open: a warning names what is frozen.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
        >>> model = BertForSequenceClassification(config)
        >>> model.classifier.bias.requires_grad_(False).requires_grad
        False
        >>> frozen_by_hand(model)
        ['classifier.bias']
    """
    ours = frozen_by_us(model)
    suspects = [n for n, p in parameters_by_name(model).items() if not p.requires_grad and n not in ours]
    if not suspects or is_peft(model) or getattr(model, "is_quantized", False):
        return []
    anew = _made_anew(model)
    if anew is None:
        warnings.warn(
            f"`{suspects[0]}` and {len(suspects) - 1} other parameters of {type(model).__name__} require no gradient "
            "and will never be opened. If the script froze them, remove that and use keep_frozen=[...].",
            UserWarning,
            stacklevel=4,
        )
        return []
    return [name for name in suspects if name not in anew or anew[name].requires_grad]


def _made_anew(model: nn.Module) -> dict[str, nn.Parameter] | None:
    """Return the parameters of a new model of the same class and config, without memory; None if it cannot be made."""
    if not isinstance(model, PreTrainedModel):
        return None
    try:
        with torch.device("meta"):
            return parameters_by_name(type(model)(copy.deepcopy(model.config)))
    except (TypeError, ValueError, RuntimeError):  # a class of the user's that takes more than a config
        return None


def _frozen_by_hand(model: nn.Module) -> list[str]:
    names = frozen_by_hand(model)
    if not names:
        return []
    finding = (
        f"`{names[0]}` and {len(names) - 1} other parameters were frozen by hand (requires_grad=False) before "
        "training; they would never be opened, and under DDP drift apart. Remove that from the script and name their "
        "groups in GradualUnfreezing(..., keep_frozen=[...]), or use adapt(model, args, 'probe') or 'top_k'."
    )
    return [finding]


def _optimizer(trainer: Trainer) -> list[str]:
    assert trainer.model is not None
    factory = factory_of(trainer)
    unfreezing = any(isinstance(callback, GradualUnfreezing) for callback in our_callbacks(trainer))
    given = trainer.optimizer is not None or (trainer.optimizer_cls_and_kwargs is not None and factory is None)
    if (factory or unfreezing) and not given and (reason := refusal(trainer.args)):
        return [reason]
    if factory is None:
        return []
    found = []
    if has_loss_parameters(trainer):
        found.append(
            f"{type(trainer).__name__} trains parameters of its loss too, which layerwise_optimizer does not cover. "
            "Leave optimizer_cls_and_kwargs out; attach(trainer) then keeps the trainer's own optimizer."
        )
    if factory.args is not trainer.args:
        found.append(
            "layerwise_optimizer was given other arguments than the Trainer; rate and weight decay would have two "
            "sources. Pass the same TrainingArguments object to both."
        )
    for callback in our_callbacks(trainer):
        if isinstance(callback, GradualUnfreezing) and callback.groups.groups != factory.groups.groups:
            first = next(a for a in callback.groups if a not in factory.groups.groups)
            found.append(
                f"GradualUnfreezing and layerwise_optimizer were given different groups (`{first.name}` of the former "
                "is not among the latter's), so rates would not follow the openings. Pass the same LayerGroups to both."
            )
    try:
        check_groups(factory.groups, trainer.model)
    except ValueError as error:
        found.append(f"layerwise_optimizer: {error}")
    return found


def has_loss_parameters(trainer: Trainer) -> bool:
    """Return whether the trainer holds losses as modules, as sentence-transformers' does, and optimizes them itself."""
    loss = getattr(trainer, "loss", None)
    return isinstance(loss, nn.Module | dict)


def factory_of(trainer: Trainer) -> LayerwiseOptimizer | None:
    """Return the trainer's factory if it is one of ours."""
    first = trainer.optimizer_cls_and_kwargs[0] if trainer.optimizer_cls_and_kwargs else None
    return first if isinstance(first, LayerwiseOptimizer) else None
