"""Whether all ranks hold the same weights: a checksum of every parameter, compared across the ranks."""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from tl_callbacks.callbacks import TransferCallback
from tl_callbacks.dtensors import local, reshard
from tl_callbacks.losses import loss_parameters
from tl_callbacks.parameters import parameters_by_name
from tl_callbacks.sharding import sharding, zero_stage

_CHUNK = 1 << 20  # words hashed at a time: no temporary of a parameter's size
_ODD = 0x9E3779B97F4A7C15 - (1 << 64)  # 2 ** 64 over the golden ratio, as a signed number
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}


@torch.no_grad()
def checksum(tensor: Tensor) -> Tensor:
    """Return a 64-bit checksum of a tensor's bits, which any change of a single element changes.

    The elements' bits, read as integers of at most 32 bits, are summed modulo 2 ** 64 with odd weights by position: an
    odd weight keeps a change of one integer from vanishing; that changes of several cancel has a chance of 2 ** -33 at
    the most (two signs) and 2 ** -64 as a rule.

    Args:
        tensor: any shape, elements of 1, 2, 4 or 8 bytes.

    Returns:
        An int64 tensor without dimensions, on the same device.

    Example:
        >>> one, other = torch.zeros(3), torch.zeros(3)
        >>> other[1] = 1e-45  # the lowest bit
        >>> bool(checksum(one) == checksum(one.clone())), bool(checksum(one) == checksum(other))
        (True, False)
    """
    words = tensor.detach().contiguous().view(-1).view(_WORDS[tensor.element_size()])
    places = torch.arange(1, min(_CHUNK, len(words)) + 1, device=words.device)
    weights = places.mul_(_ODD).bitwise_or_(1)
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for chunk in torch.split(words, _CHUNK):
        total = total * _ODD + (chunk * weights[: len(chunk)]).sum()
    return total


def checksums(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return what is compared across ranks: a row (checksum, shard, trainable) for each parameter.

    Args:
        parameters: parameters, sharded or not.

    Returns:
        An int64 tensor of shape (parameters, 3). Two ranks must hold the same bits of a parameter where its shard has
        the same number: everywhere under DDP, between the replicas under HSDP, nowhere under plain FSDP2.
    """
    rows = []
    for parameter in parameters:
        tensor = local(parameter)
        rest = torch.tensor([_shard(parameter), int(parameter.requires_grad)], device=tensor.device)
        rows.append(torch.cat([checksum(tensor)[None], rest]))
    return torch.stack(rows)


def _shard(parameter: Tensor) -> int:
    """Return the number of the shard that this rank holds of a parameter, 0 where it is whole."""
    if not isinstance(parameter, DTensor):
        return 0
    mesh, place = parameter.device_mesh, 0
    for dimension, placement in enumerate(parameter.placements):
        if isinstance(placement, Shard):
            place = place * mesh.size(dimension) + mesh.get_local_rank(dimension)
    return place


def _compared(parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Return the parameters whose bits can be read: packed integers and other quantised weights never train."""
    return {
        name: parameter
        for name, parameter in parameters.items()
        if parameter.is_floating_point()
        and isinstance(parameter, nn.Parameter)
        and type(local(parameter.detach())) is Tensor
        and not parameter.is_meta
    }


def differences(gathered: Tensor) -> list[tuple[int, int, int, int]]:
    """Return where ranks disagree: (parameter, column, rank, other rank), for each parameter that differs.

    Args:
        gathered: int64, shape (ranks, parameters, 3): the `checksums` of every rank.

    Returns:
        For each parameter the first rank that differs and the rank that it should equal; column 0: its bits, column 2:
        whether it trains.

    Example:
        >>> same = torch.tensor([[5, 0, 1], [6, 0, 1]])
        >>> other = torch.tensor([[5, 0, 1], [7, 0, 1]])
        >>> differences(torch.stack([same, same, other]))
        [(1, 0, 2, 0)]
    """
    if bool((gathered == gathered[:1]).all()):
        return []
    found = []
    for parameter, rows in enumerate(gathered.transpose(0, 1).tolist()):
        first: dict[int, tuple[int, list[int]]] = {}
        for rank, row in enumerate(rows):
            reference_rank, reference = first.setdefault(row[1], (rank, row))
            if row[2] != rows[0][2]:
                found.append((parameter, 2, rank, 0))
                break
            if row[0] != reference[0]:
                found.append((parameter, 0, rank, reference_rank))
                break
    return found


def holds_alike(trainer: Trainer) -> bool:
    """Return whether it can be told which ranks should hold the same bits: not of FSDP 1's and ZeRO-3's pieces."""
    return sharding(trainer) != "fsdp1" and zero_stage(trainer) < 3


class VerifyRanks(TransferCallback):
    """Stops a training on several ranks when they no longer hold the same weights, and names the first that differs.

    `attach(trainer, verify_ranks=...)` adds it. It compares after each transition of the freeze state, every so many
    steps, and before a checkpoint is written. Its cost is that of reading the weights once.

    Args:
        every: optimizer steps between two comparisons, 1 or more.

    Raises:
        ValueError: `every` is not a whole number of 1 or more.

    Example:
        >>> VerifyRanks(50)
        VerifyRanks(every=50)
    """

    def __init__(self, every: int = 100) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(
                f"`verify_ranks` is {every!r}; expected optimizer steps between two comparisons of the ranks, a whole "
                "number of 1 or more, or 0 for none."
            )
        self.every = every
        self._equal_at: int | None = None
        self._comparisons = 0
        self._transitions = 0

    def __repr__(self) -> str:
        return f"VerifyRanks(every={self.every})"

    def on_attach(self, trainer: Trainer) -> None:
        """Compare what FSDP2 will shard: it gives no rank the weights of another, as DDP does."""
        super().on_attach(trainer)
        if sharding(trainer) == "fsdp2" and not trainer.accelerator.state.fsdp_plugin.cpu_ram_efficient_loading:
            assert trainer.model is not None
            self._compare(trainer.model, trainer.args, trainer.state)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Compare the start: the names of the parameters, then their weights."""
        self._equal_at, self._comparisons, self._transitions = None, 0, self._made()
        names = "\n".join(parameters_by_name(kwargs["model"]))
        digests = gather_object([hashlib.sha256(names.encode()).hexdigest()])
        if len(set(digests)) > 1:
            raise RuntimeError("the ranks' models have different parameters. Make the same model on every rank.")
        self._compare(kwargs["model"], args, state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Compare if a transition was made, the interval is over, or a checkpoint is due."""
        due = self._made() != self._transitions or control.should_save or control.should_training_stop
        if due or state.global_step % self.every == 0:
            self._transitions = self._made()
            self._compare(kwargs["model"], args, state)

    def facts(self) -> Mapping[str, Any]:
        """Return the interval, how often the ranks were compared, and the last step at which they were equal."""
        return {"every": self.every, "comparisons": self._comparisons, "equal_at": self._equal_at}

    def _made(self) -> int:
        """Return how many transitions of the freeze state the trainer's callbacks have made."""
        assert self.trainer is not None
        callbacks = self.trainer.callback_handler.callbacks
        return sum(callback.transitions for callback in callbacks if isinstance(callback, TransferCallback))

    def _compare(self, model: nn.Module, args: TrainingArguments, state: TrainerState) -> None:
        assert self.trainer is not None
        reshard(model)
        of_loss = {f"loss: {name}": parameter for name, parameter in loss_parameters(self.trainer).items()}
        parameters = _compared({**parameters_by_name(model), **of_loss})
        mine = checksums(parameters.values()).to(args.device)
        gathered = mine.new_empty((dist.get_world_size(), *mine.shape))
        dist.all_gather_into_tensor(gathered.view(-1, mine.shape[-1]), mine)
        if found := differences(gathered):
            raise RuntimeError(self._message(list(parameters), found, gathered, state))
        self._equal_at = state.global_step
        self._comparisons += 1

    def _message(
        self, names: list[str], found: list[tuple[int, int, int, int]], gathered: Tensor, state: TrainerState
    ) -> str:
        place, column, rank, other = found[0]
        if column == 2:
            trains = ("is frozen", "trains")
            what = (
                f"`{names[place]}` {trains[int(gathered[rank, place, 2])]} on rank {rank} and "
                f"{trains[int(gathered[other, place, 2])]} on rank {other}"
            )
        else:
            what = f"the weights of `{names[place]}` on rank {rank} are not those of rank {other}"
        since = "from the start" if self._equal_at is None else f"since step {self._equal_at}, when all were equal"
        return (
            f"after step {state.global_step}, {what}; {len(found)} of {len(names)} parameters differ {since}. "
            "Something updates or freezes parameters on one rank alone, such as a callback that writes requires_grad, "
            "a parameter outside the wrapper, or new weights under a seed by rank. attach(trainer, verify_ranks=1) "
            "finds the step; resume from a checkpoint of before."
        )
