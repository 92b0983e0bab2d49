"""What a training did, read from the tensors and modules themselves after every step, none of it from our records."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer, optimizer
from transformers import TrainerCallback

HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks",
    "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks", "_post_accumulate_grad_hooks",
    "_optimizer_step_pre_hooks", "_optimizer_step_post_hooks", "_global_optimizer_pre_hooks",
    "_global_optimizer_post_hooks", "_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks",
    "_global_backward_pre_hooks",
)  # fmt: skip


def digest(tensors: Iterable[torch.Tensor]) -> str:
    """A hash of the tensors' bytes."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def hooks(model: nn.Module, inner: Optimizer | None = None) -> Counter[str]:
    """The hooks on all modules and parameters, on the optimizer's steps, and those for all modules and optimizers."""
    held: list[tuple[str, Any]] = [*model.named_modules(), *model.named_parameters()]
    held += [("all modules", nn.modules.module), ("all optimizers", optimizer)]
    held += [("optimizer", inner)] if inner is not None else []
    return Counter(
        f"{place}.{kind}: {getattr(hook, '__module__', '')}.{getattr(hook, '__qualname__', hook)}"
        for place, holder in held
        for kind in HOOKS
        for hook in (getattr(holder, kind, None) or {}).values()
    )


def buffers_of(model: nn.Module, groups: dict[str, list[nn.Parameter]]) -> dict[tuple[str, ...], list[torch.Tensor]]:
    """Each buffer, by the groups that the parameters of its module, or of the next one above, are in."""
    holder = {id(parameter): name for name, parameters in groups.items() for parameter in parameters}
    modules = dict(model.named_modules())
    found: dict[tuple[str, ...], list[torch.Tensor]] = {}
    for path, module in modules.items():
        for buffer in module.buffers(recurse=False):
            owner = path
            while owner and not any(True for _ in modules[owner].parameters()):
                owner = owner.rpartition(".")[0]
            held = [holder.get(id(parameter)) for parameter in modules[owner].parameters()]
            if held and None not in held:
                found.setdefault(tuple(sorted({str(name) for name in held})), []).append(buffer)
    return found


class Witness(TrainerCallback):
    """Notes all that is checked of one training; comes after ours.

    Args:
        model: before it is trained.
        groups: names of groups to their parameters.
    """

    def __init__(self, model: nn.Module, groups: dict[str, list[nn.Parameter]]) -> None:
        self.groups = groups
        self.trainable = {
            name: [parameter for parameter in parameters if parameter.requires_grad]
            for name, parameters in groups.items()
        }
        self.buffers = buffers_of(model, groups)
        self.began = 0
        self.weights: list[dict[str, str]] = []  # at the begin and after each step
        self.still: list[dict[tuple[str, ...], str]] = []  # hashes of buffers, likewise
        self.steps: list[dict[str, dict[str, Any]]] = []  # of each step: group to what the step had to work with

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = state.global_step
        self._note()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        rates = {id(p): float(group["lr"]) for group in kwargs["optimizer"].param_groups for p in group["params"]}
        self.steps.append({name: facts(parameters, rates) for name, parameters in self.trainable.items()})

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._note()

    def _note(self) -> None:
        self.weights.append({name: digest(parameters) for name, parameters in self.groups.items()})
        self.still.append({names: digest(tensors) for names, tensors in self.buffers.items()})


def facts(parameters: Sequence[nn.Parameter], rates: dict[int, float]) -> dict[str, Any]:
    """What a step has of one group: how many require a gradient and have one, the largest entry, the smallest rate."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    return {
        "parameters": len(parameters),
        "trainable": sum(p.requires_grad for p in parameters),
        "gradients": len(gradients),
        "largest": max((float(gradient.abs().max()) for gradient in gradients), default=0.0),
        "rate": min((rates[id(p)] for p in parameters), default=0.0),
    }
