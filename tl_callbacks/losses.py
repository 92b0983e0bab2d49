"""The weights of a loss: what the trainers of sentence-transformers optimize beside the model's.

Their optimizer holds them, but DDP wraps the model alone and a checkpoint holds the model alone.
"""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from tl_callbacks.callbacks import TransferCallback

GROUP = "loss"  # the name of their group in the optimizer and of their file in a checkpoint


def loss_module(trainer: Trainer) -> nn.Module | None:
    """Return the trainer's loss as one module, those of several data sets side by side; None if it has none.

    Args:
        trainer: any trainer; only those of sentence-transformers have a loss of their own.
    """
    loss = getattr(trainer, "loss", None)
    if isinstance(loss, dict) and all(isinstance(one, nn.Module) for one in loss.values()):
        return nn.Sequential(OrderedDict(loss))
    return loss if isinstance(loss, nn.Module) else None


def loss_parameters(trainer: Trainer) -> dict[str, nn.Parameter]:
    """Return the trainable parameters of the trainer's loss that are not the model's, by name; most losses have none.

    Args:
        trainer: any trainer.
    """
    loss = loss_module(trainer)
    if loss is None or trainer.model is None:
        return {}
    known = {id(parameter) for parameter in trainer.model.parameters()}
    return {n: p for n, p in loss.named_parameters() if p.requires_grad and id(p) not in known}


def load_loss(trainer: Trainer, checkpoint: str | Path) -> None:
    """Give the loss the weights that it had at a checkpoint. Does nothing for a loss without weights of its own.

    Args:
        trainer: an attached trainer.
        checkpoint: path of a checkpoint that an attached trainer wrote.

    Raises:
        FileNotFoundError: the checkpoint does not hold them.
    """
    parameters = loss_parameters(trainer)
    if not parameters:
        return
    path = _file(checkpoint)
    if not path.is_file():
        raise FileNotFoundError(
            f"`{path.name}` is missing in `{path.parent}`, so `{next(iter(parameters))}` and {len(parameters) - 1} "
            "other weights of the loss would start anew. Resume from a checkpoint that was "
            "written after attach(trainer), or start a new training from its model."
        )
    with torch.no_grad():
        for name, tensor in load_file(path).items():
            parameters[name].copy_(tensor)


class LossWeights(TransferCallback):
    """Keeps the weights of a loss the same on all ranks, and writes them beside each checkpoint.

    `attach` adds it to a trainer that has a loss of its own.

    Example:
        >>> LossWeights()
        LossWeights()
    """

    def __init__(self) -> None:
        self._parameters: dict[str, nn.Parameter] = {}

    def __repr__(self) -> str:
        return "LossWeights()"

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give every rank the weights of rank 0, as DDP does for the model's."""
        self._parameters = loss_parameters(self.trainer) if self.trainer else {}
        if args.world_size > 1:
            for parameter in self._parameters.values():
                dist.broadcast(parameter.detach(), src=0)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Average the gradients over the ranks."""
        if args.world_size > 1 and self._parameters:
            _average(list(self._parameters.values()))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the weights into the checkpoint, without what never trained, such as a guide model."""
        if state.is_world_process_zero and self._parameters:
            held = kwargs["optimizer"].state
            trained = {n: p for n, p in self._parameters.items() if held.get(p)} or self._parameters
            folder = Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            save_file({name: p.detach().contiguous() for name, p in trained.items()}, _file(folder))


def _file(checkpoint: str | Path) -> Path:
    return Path(checkpoint) / f"{GROUP}.safetensors"


def _average(parameters: list[nn.Parameter]) -> None:
    """Average gradients over the ranks; a loss that only some ranks used counts as 0 on the others."""
    users = torch.tensor([float(p.grad is not None) for p in parameters], device=parameters[0].device)
    dist.all_reduce(users)
    for parameter, count in zip(parameters, users.tolist(), strict=True):
        if count:
            gradient: Tensor = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            dist.all_reduce(gradient)
            parameter.grad = gradient.div_(dist.get_world_size())
