"""The trainings of `deepspeed_worker.py`; importing it does not need DeepSpeed."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.distributed.worker import Callbacks, unfreezing
from tl_callbacks.unfreezing import rate_frozen

STEPS = 12
OPENINGS = (3, 6, 9)
Hold = Callable[..., None]
HOLD = rate_frozen.hold


@dataclass(frozen=True)
class Cell:
    """One training.

    Args:
        zero: the section "zero_optimization"; None: without DeepSpeed.
        callbacks: from the groups and the number of ranks.
        overrides: training arguments.
        decay: ratio of neighbouring groups' rates.
        openings: steps at which groups open, for the tests.
        lag: steps from an opening to the first one whose rate is not 0.
        like: the cell without DeepSpeed that it must equal.
        hold: what replaces `rate_frozen.hold`, the remedy switched off.
        broken: what must fail: "frozen": that closed groups do not move; "plain": to equal the training without
            DeepSpeed; "state": that a closed group's optimizer state stays empty.
    """

    zero: dict[str, Any] | None
    callbacks: Callbacks = lambda groups, ranks: []
    overrides: dict[str, Any] = field(default_factory=dict)
    decay: float = 1.0
    openings: tuple[int, ...] = ()
    lag: int = 0
    like: str = ""
    hold: Hold = HOLD
    broken: tuple[str, ...] = ()


def nothing(*args: Any, **kwargs: Any) -> None:
    """No rate 0 and no weight decay 0: `requires_grad` alone."""


def hold_with_decay(trainer: Any, phase: Any, optimizer: Any, scheduler: Any, *, step: int) -> None:
    """Rate 0, but the weight decay left on."""
    HOLD(trainer, phase, optimizer, scheduler, step=step)
    for group in optimizer.param_groups:
        group["weight_decay"] = group["initial_weight_decay"]


def hold_without_emptying(trainer: Any, phase: Any, optimizer: Any, scheduler: Any, *, step: int) -> None:
    """Rate 0 and weight decay 0, but a group opens with the state of an optimizer that has counted its frozen steps."""
    HOLD(trainer, phase, optimizer, scheduler, step=-1)


GRADUAL: Callbacks = lambda g, n: [unfreezing(g, n)]  # noqa: E731
OWN: Callbacks = lambda g, n: [unfreezing(g, n, rates="own")]  # noqa: E731
KEPT: Callbacks = lambda g, n: [unfreezing(g, n, openings=[3, 6], keep_frozen=["embeddings"])]  # noqa: E731
TWO = {"stage": 2}
ACCUMULATION = {"gradient_accumulation_steps": 2}
MOMENTUM = {"optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 0.05}
CHECKPOINTING = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}}

PLAIN: dict[str, Cell] = {
    "unfreezing": Cell(None, GRADUAL),
    "accumulation": Cell(None, GRADUAL, ACCUMULATION),
    "momentum": Cell(None, GRADUAL, MOMENTUM),
    "RMSprop": Cell(None, GRADUAL, {"optim": "rmsprop"}),
    "own rates": Cell(None, OWN, decay=0.7),
    "keep frozen": Cell(None, KEPT),
    "layer-wise rates": Cell(None, decay=0.5),
}


def gradual(zero: dict[str, Any], overrides: dict[str, Any] | None = None, like: str = "unfreezing", **kw: Any) -> Cell:
    return Cell(zero, GRADUAL, overrides or {}, openings=OPENINGS, like=like, **kw)


CELLS: dict[str, Cell] = {
    "ZeRO-0": gradual({"stage": 0}),
    "ZeRO-1": gradual({"stage": 1}),
    "ZeRO-2": gradual(TWO),
    "ZeRO-0, accumulation": gradual({"stage": 0}, ACCUMULATION, "accumulation"),
    "ZeRO-1, accumulation": gradual({"stage": 1}, ACCUMULATION, "accumulation"),
    "ZeRO-2, accumulation": gradual(TWO, ACCUMULATION, "accumulation"),
    "ZeRO-1, momentum": gradual({"stage": 1}, MOMENTUM, "momentum"),
    "ZeRO-2, momentum": gradual(TWO, MOMENTUM, "momentum"),
    "ZeRO-2, RMSprop": gradual(TWO, {"optim": "rmsprop"}, "RMSprop"),
    "ZeRO-2, small buckets, overlapping": gradual({"stage": 2, "overlap_comm": True, "reduce_bucket_size": 500}),
    "ZeRO-2, round robin": gradual({"stage": 2, "round_robin_gradients": True, "contiguous_gradients": False}),
    "ZeRO-2, offloaded": gradual({"stage": 2, "offload_optimizer": {"device": "cpu"}}),
    "ZeRO-2, activation checkpointing": gradual(TWO, CHECKPOINTING),
    "ZeRO-1, own rates": Cell({"stage": 1}, OWN, decay=0.7, openings=OPENINGS, lag=1, like="own rates"),
    "ZeRO-2, own rates": Cell(TWO, OWN, decay=0.7, openings=OPENINGS, lag=1, like="own rates"),
    "ZeRO-2, keep frozen": Cell(TWO, KEPT, openings=(3, 6), like="keep frozen"),
    **{
        f"ZeRO-{stage}, layer-wise rates": Cell({"stage": stage}, decay=0.5, like="layer-wise rates")
        for stage in range(4)
    },
    # Remedies switched off: each must fail the same assertions.
    "ZeRO-1, requires_grad alone": gradual({"stage": 1}, hold=nothing, broken=("frozen", "plain")),
    "ZeRO-2, requires_grad alone": gradual(TWO, hold=nothing, broken=("frozen", "plain")),
    "ZeRO-2, momentum, decay left on": gradual(TWO, MOMENTUM, "momentum", hold=hold_with_decay, broken=("state",)),
    "ZeRO-2, state not emptied": gradual(TWO, hold=hold_without_emptying, broken=("plain",)),
    "ZeRO-2, other rates": Cell(TWO, decay=0.7, like="layer-wise rates", broken=("plain",)),
}
