"""Which parameters a script froze before we could: they would never be opened."""

import copy
import warnings

import torch
from torch import nn
from transformers import PreTrainedModel

from tl_callbacks.frozen.state import frozen_by_us
from tl_callbacks.parameters import is_peft, parameters_by_name


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


def never_trained(model: nn.Module) -> frozenset[str]:
    """Return the parameters that the model's own class freezes when it is made anew, such as sinusoidal positions.

    Example:
        >>> from transformers import MarianConfig, MarianModel
        >>> config = MarianConfig(vocab_size=9, pad_token_id=0, d_model=16, encoder_layers=1, decoder_layers=1)
        >>> sorted(never_trained(MarianModel(config)))
        ['decoder.embed_positions.weight', 'encoder.embed_positions.weight']
    """
    frozen = [name for name, p in parameters_by_name(model).items() if not p.requires_grad]
    if not frozen or is_peft(model) or getattr(model, "is_quantized", False):
        return frozenset()
    anew = _made_anew(model) or {}
    return frozenset(name for name in frozen if name in anew and not anew[name].requires_grad)


def _made_anew(model: nn.Module) -> dict[str, nn.Parameter] | None:
    """Return the parameters of a new model of the same class and config, without memory; None if it cannot be made."""
    if not isinstance(model, PreTrainedModel):
        return None
    try:
        with torch.device("meta"):
            return parameters_by_name(type(model)(copy.deepcopy(model.config)))
    except (TypeError, ValueError, RuntimeError):  # a class of the user's that takes more than a config
        return None


def hand_frozen_findings(model: nn.Module) -> list[str]:
    """Return what to say of parameters that a script froze: one text, or none."""
    names = frozen_by_hand(model)
    if not names:
        return []
    finding = (
        f"`{names[0]}` and {len(names) - 1} other parameters were frozen by hand (requires_grad=False) before "
        "training; they would never be opened, and under DDP drift apart. Remove that from the script and name their "
        "groups in GradualUnfreezing(..., keep_frozen=[...]), or use adapt(model, args, 'probe') or 'top_k'."
    )
    return [finding]
