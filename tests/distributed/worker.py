"""Trains every cell of a layout on the ranks that launched it, and writes what each saw: one file per cell and rank.

Launched by `test_ranks.py`, with torch.distributed.run for several ranks and without for one:
`python worker.py <folder> <layout>`.
"""

import hashlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType, ParallelismConfig
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from transformers import Trainer, TrainerCallback, TrainingArguments

from tests import tiny
from tl_callbacks import (
    ForgettingMonitor,
    GradualUnfreezing,
    LanguageModelling,
    LayerGroups,
    PreflightWarning,
    RepresentationProbes,
    Retrieval,
    SourceTask,
    WeightAnchoring,
    WeightInterpolation,
    at_steps,
    attach,
    events,
    group_layers,
    layerwise_optimizer,
    schedule_from_probes,
    slanted_triangular,
)
from tl_callbacks.anchoring import Decoupled, Penalty, sigmoid_annealing
from tl_callbacks.dtensors import local, reshard, whole
from tl_callbacks.parameters import parameters_by_name
from tl_callbacks.unfreezing import callback
from tl_callbacks.unfreezing.adaptive import gradient_norms
from tl_callbacks.unfreezing.reducer import rebuild_reducer

LAYOUTS = {"1 rank": 1, "2 ranks": 2, "4 ranks": 4, "FSDP2": 2, "HSDP": 4}
STEPS = 12
OPENINGS = [3, 6, 9]
FSDP2 = {"version": 2, "transformer_layer_cls_to_wrap": ["BertLayer"]}
RESUMED = ("1 rank", "2 ranks", "FSDP2")
PLANTED = ("2 ranks", "4 ranks", "HSDP")
STRENGTH = {"decoupled": 0.05, "penalty": 0.5, "features": 2.0, "outputs": 20.0}

Callbacks = Callable[[LayerGroups, int], list[TrainerCallback]]


@dataclass(frozen=True)
class Cell:
    """One training.

    Args:
        callbacks: from the groups and the number of ranks.
        overrides: training arguments.
        decay: ratio of neighbouring groups' rates; None: the neutral factory that `attach` installs.
        openings: steps at which groups open, for the tests.
        lag: steps from an opening to the first one whose rate is not 0.
        model: "bert", "lora" or "experts".
        seeded_by_rank: whether each rank makes other weights, of which DDP keeps the first rank's.
        trains: number of calls of train().
        batch: rows of a micro-batch, of all ranks together.
        seed: of the data.
        rebuild: what replaces `rebuild_reducer`, the remedy switched off.
        like: the cell of one process that it must equal; None: itself.
        tolerance: of the distance from one process, as a ratio to the distance travelled.
        layouts: the layouts that train it; None: one rank, unless it is like another cell, and two.
        reshard: what replaces `reshard`, FSDP2's remedy switched off.
        broken: what must fail: "ranks": the ranks' equality, so that with one process too; "single": the latter alone;
            "hook": that the communication hook sees what is reduced; "frozen": that what should be frozen is.
    """

    callbacks: Callbacks = lambda groups, ranks: []
    overrides: dict[str, Any] = field(default_factory=dict)
    decay: float | None = None
    openings: tuple[int, ...] = ()
    lag: int = 0
    model: str = "bert"
    seeded_by_rank: bool = False
    trains: int = 1
    batch: int = 8
    seed: int = 1
    rebuild: Callable[[Any], None] = rebuild_reducer
    reshard: Callable[[Any], None] = reshard
    layouts: tuple[str, ...] | None = None
    like: str | None = None
    tolerance: float = 1e-10
    broken: str | None = None

    @property
    def trained_by(self) -> tuple[str, ...]:
        """The layouts that train it."""
        return self.layouts or (("1 rank", "2 ranks") if self.like is None else ("2 ranks",))


class Interrupt(TrainerCallback):
    """Raises once, as a user who stops a training does."""

    def __init__(self, step: int) -> None:
        self.step: int | None = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.step = None
            raise KeyboardInterrupt


class Routed(nn.Module):
    """A classifier that sends each row to one of two experts; the other one may be idle in a batch."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.accepts_loss_kwargs = False
        self.encoder = base.bert
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
        self.classifier = base.classifier

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        pooled = self.encoder(input_ids)[1]
        chosen = input_ids[:, 0] % 2
        mixed = pooled.clone()
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).nonzero()[:, 0]
            if len(rows):
                mixed = mixed.index_add(0, rows, expert(pooled[rows]))
        logits = self.classifier(mixed)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def one_expert_a_rank(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of which every second global batch of 8 has its first half for one expert and its second for the other."""
    for number, row in enumerate(rows):
        expert = (number // 4) % 2 if (number // 8) % 2 else number % 2
        row["input_ids"][0] = row["input_ids"][0] // 2 * 2 + expert
    return rows


class CommHook(TrainerCallback):
    """Registers a communication hook, as a user's callback would, and counts what passes through it each step."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.numels: list[int] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        wrapper = self.trainer.model_wrapped
        if isinstance(wrapper, nn.parallel.DistributedDataParallel):
            wrapper.register_comm_hook(None, self.reduce)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.numels.append(0)

    def reduce(self, state: Any, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
        self.numels[-1] += bucket.buffer().numel()
        return allreduce_hook(state, bucket)


def unfreezing(groups: LayerGroups, ranks: int, **kwargs: Any) -> GradualUnfreezing:
    openings = kwargs.pop("openings", OPENINGS[: len(groups) - 1])
    return GradualUnfreezing(groups, at_steps(openings), **kwargs)


def nothing(wrapper: Any) -> None:
    """No rebuild."""


def rebuild_without_hooks(wrapper: Any) -> None:
    """A rebuild that forgets the communication hooks."""
    parameters, sparse = wrapper._build_params_for_reducer()
    names = wrapper._build_debug_param_to_name_mapping(parameters)
    wrapper._ddp_init_helper(parameters, sparse, names, wrapper.static_graph)


CHECKPOINTING = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}}
REENTRANT = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}}
COMPILED = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
EVALUATION = {"eval_strategy": "steps", "eval_steps": 1}
GRADUAL: Callbacks = lambda g, n: [unfreezing(g, n)]  # noqa: E731
PENALTY: Callbacks = lambda g, n: [WeightAnchoring(STRENGTH["penalty"], form="penalty")]  # noqa: E731
ALL: Callbacks = lambda g, n: [unfreezing(g, n, rates="own"), *PENALTY(g, n)]  # noqa: E731
PROBES: Callbacks = lambda g, n: [  # noqa: E731
    unfreezing(g, n),
    RepresentationProbes("eval", g, reference_set=tiny.texts(21, seed=9)),
]


def remembered() -> ForgettingMonitor:
    """Three measures of numbers of rows that no number of ranks divides; what random weights score serves as well."""
    ids = [row["input_ids"][: 3 + n % 5] for n, row in enumerate(tiny.texts(23, seed=9))]
    torch.manual_seed(5)
    masked = [{"input_ids": row, "labels": [-100, row[1], *[-100] * (len(row) - 2)]} for row in ids]
    return ForgettingMonitor(
        [
            LanguageModelling(masked, kind="masked", head=nn.Linear(16, 50).double(), kl_tokens=11),
            SourceTask(tiny.texts(21, seed=9)),
            Retrieval([({"input_ids": row[:3]}, {"input_ids": row}) for row in ids]),
        ]
    )


FORGETTING: Callbacks = lambda g, n: [unfreezing(g, n), remembered()]  # noqa: E731
# 16 rows in batches of 6, so that the last ones are filled up with rows that must not count twice
PROBED = {"eval_strategy": "steps", "eval_steps": 4, "per_device_eval_batch_size": 6}
THREE = tuple(OPENINGS)
ACCUMULATION = {"gradient_accumulation_steps": 2}
SGD = {"optim": "sgd", "learning_rate": 0.5}
# AdamW turns the rounding noise of a gradient that is zero, the attention keys' bias, into whole steps; a penalty
# carries them into the norm that clips all gradients. SGD has no such trouble, so there the tolerance stays.
NOISY = 1e-4

CELLS: dict[str, Cell] = {
    "all trainable": Cell(),
    "all trainable, double batch": Cell(batch=16),
    "all trainable, accumulation": Cell(overrides=ACCUMULATION, like="all trainable, double batch"),
    "other data": Cell(seed=2, like="all trainable", broken="single"),
    "unfreezing": Cell(GRADUAL, openings=THREE),
    "unfreezing, double batch": Cell(GRADUAL, openings=THREE, batch=16),
    "unfreezing, accumulation": Cell(GRADUAL, ACCUMULATION, openings=THREE, like="unfreezing, double batch"),
    "unfreezing, no search for unused": Cell(GRADUAL, {"ddp_find_unused_parameters": False}, openings=THREE),
    "unfreezing, activation checkpointing": Cell(GRADUAL, CHECKPOINTING, openings=THREE),
    "unfreezing, compiled": Cell(GRADUAL, COMPILED, openings=THREE, like="unfreezing"),
    "unfreezing, compiled, no rebuild": Cell(
        GRADUAL, COMPILED, openings=THREE, rebuild=nothing, like="unfreezing", broken="ranks"
    ),
    "unfreezing, SGD": Cell(GRADUAL, SGD, openings=THREE),
    "unfreezing, evaluation": Cell(GRADUAL, EVALUATION, openings=THREE),
    "own rates, layer-wise decay": Cell(lambda g, n: [unfreezing(g, n, rates="own")], decay=0.7, openings=THREE, lag=1),
    "slanted triangular": Cell(lambda g, n: [unfreezing(g, n, rates=slanted_triangular())], decay=0.7, openings=THREE),
    "keep frozen": Cell(lambda g, n: [unfreezing(g, n, openings=[3, 6], keep_frozen=["embeddings"])], openings=(3, 6)),
    "decoupled": Cell(lambda g, n: [WeightAnchoring(STRENGTH["decoupled"])]),
    "penalty": Cell(PENALTY, tolerance=NOISY),
    "penalty, SGD": Cell(PENALTY, SGD),
    "penalty, SGD, double batch": Cell(PENALTY, SGD, batch=16),
    "penalty, SGD, accumulation": Cell(PENALTY, {**SGD, **ACCUMULATION}, like="penalty, SGD, double batch"),
    "penalty at every micro-batch": Cell(
        lambda g, n: [WeightAnchoring(STRENGTH["penalty"] * 2, form="penalty")],
        {**SGD, **ACCUMULATION},
        like="penalty, SGD, double batch",
        broken="single",
    ),
    "an expert idle on one rank": Cell(overrides=SGD, model="experts"),
    "decoupled, an expert idle on one rank": Cell(
        lambda g, n: [WeightAnchoring(STRENGTH["decoupled"], exclude=())], SGD, model="experts"
    ),
    "penalty, an expert idle on one rank": Cell(
        lambda g, n: [WeightAnchoring(STRENGTH["penalty"], form="penalty", exclude=())], SGD, model="experts"
    ),
    "penalty once a rank": Cell(
        lambda g, n: [WeightAnchoring(STRENGTH["penalty"] * n, form="penalty")],
        SGD,
        like="penalty, SGD",
        broken="single",
    ),
    "unfreezing and probes": Cell(PROBES, PROBED, openings=THREE),
    "unfreezing and probes, another start on each rank": Cell(
        PROBES, PROBED, openings=THREE, seeded_by_rank=True, like="unfreezing and probes"
    ),
    "unfreezing and forgetting": Cell(FORGETTING, PROBED, openings=THREE),
    "unfreezing and forgetting, another start on each rank": Cell(
        FORGETTING, PROBED, openings=THREE, seeded_by_rank=True, like="unfreezing and forgetting"
    ),
    "unfreezing and decoupled": Cell(
        lambda g, n: [unfreezing(g, n), WeightAnchoring(STRENGTH["decoupled"])], openings=THREE
    ),
    "unfreezing and penalty": Cell(lambda g, n: [unfreezing(g, n), *PENALTY(g, n)], SGD, openings=THREE),
    "penalty and unfreezing": Cell(
        lambda g, n: [*PENALTY(g, n), unfreezing(g, n)], SGD, openings=THREE, like="unfreezing and penalty"
    ),
    "all together": Cell(
        ALL,
        {**ACCUMULATION, "eval_strategy": "steps"},
        decay=0.7,
        openings=THREE,
        lag=1,
        tolerance=NOISY,
    ),
    "LoRA": Cell(GRADUAL, openings=(3, 6), model="lora"),
    "LoRA, activation checkpointing": Cell(GRADUAL, CHECKPOINTING, openings=(3, 6), model="lora", like="LoRA"),
    "second training": Cell(
        lambda g, n: [unfreezing(g, n), *PENALTY(g, n)],
        {**SGD, "ddp_find_unused_parameters": False},
        openings=THREE,
        trains=2,
    ),
    "training after an interruption": Cell(
        lambda g, n: [unfreezing(g, n), *PENALTY(g, n), Interrupt(5)],
        {**SGD, "ddp_find_unused_parameters": False},
        openings=THREE,
        trains=2,
    ),
    "hook registered before": Cell(lambda g, n: [CommHook(), unfreezing(g, n)], openings=THREE, like="unfreezing"),
    "hook registered after": Cell(lambda g, n: [unfreezing(g, n), CommHook()], openings=THREE, like="unfreezing"),
    "another start on each rank": Cell(GRADUAL, openings=THREE, seeded_by_rank=True, like="unfreezing"),
    "decoupled, another start on each rank": Cell(
        lambda g, n: [WeightAnchoring(STRENGTH["decoupled"])], seeded_by_rank=True, like="decoupled"
    ),
    # A remedy switched off must fail the same assertions; the others follow the matrix below.
    "hook forgotten": Cell(
        lambda g, n: [CommHook(), unfreezing(g, n)],
        openings=THREE,
        rebuild=rebuild_without_hooks,
        like="unfreezing",
        broken="hook",
    ),
}


def compared(form: Any, factor: float = 1.0) -> Callbacks:
    """An anchor that compares each batch with the reference's forward."""
    return lambda g, n: [WeightAnchoring(STRENGTH[form] * factor, form=form)]


for _form in ("features", "outputs"):
    _whole = f"{_form}, double batch"
    CELLS[_form] = Cell(compared(_form), SGD)
    CELLS[_whole] = Cell(compared(_form), SGD, batch=16)
    CELLS[f"{_form}, accumulation"] = Cell(compared(_form), {**SGD, **ACCUMULATION}, like=_whole)
    CELLS[f"{_form}, activation checkpointing"] = Cell(compared(_form), {**SGD, **CHECKPOINTING}, like=_form)
    CELLS[f"{_form}, another start on each rank"] = Cell(compared(_form), SGD, seeded_by_rank=True, like=_form)
    CELLS[f"{_form}, a micro-batch's mean"] = Cell(
        compared(_form, 4.0), {**SGD, **ACCUMULATION}, like=_whole, broken="single"
    )
    CELLS[f"{_form} and unfreezing"] = Cell(
        lambda g, n, form=_form: [unfreezing(g, n), WeightAnchoring(STRENGTH[form], form=form)], SGD, openings=THREE
    )


class Apart(TrainerCallback):
    """Logs at each evaluation what improves on the first rank and stands still on the others."""

    def on_evaluate(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        value = 2.0**state.global_step if args.process_index == 0 else 1.0
        state.log_history.append({"tl/apart/first": value, "step": state.global_step})


def probes(groups: LayerGroups, metric: str = "eval_loss", **kwargs: Any) -> GradualUnfreezing:
    return GradualUnfreezing(groups, schedule_from_probes(metric, threshold=0.5, max_wait=3, **kwargs))


# Decided by plateaus at 3 and 9 and at the latest at 6, after the gradients of step 5; and by the first rank's record.
EVALUATED = {"eval_strategy": "steps", "eval_steps": 3}
RGN: Callbacks = lambda g, n: [probes(g, order="relative_gradient_norm")]  # noqa: E731
CELLS["probes, relative gradient norm"] = Cell(
    RGN, EVALUATED, openings=THREE, layouts=("1 rank", "2 ranks", "FSDP2", "HSDP")
)
CELLS["probes, relative gradient norm, accumulation"] = Cell(
    RGN, {**EVALUATED, **ACCUMULATION}, openings=THREE, like="probes, relative gradient norm, double batch"
)
CELLS["probes, relative gradient norm, double batch"] = Cell(RGN, EVALUATED, openings=THREE, batch=16)
CELLS["probes that differ by rank"] = Cell(
    lambda g, n: [probes(g, "tl/apart/first", greater_is_better=True), Apart()],
    {"eval_strategy": "steps", "eval_steps": 1},
    openings=THREE,
)


def importance() -> dict[str, torch.Tensor]:
    """An importance of each weight, the same on all ranks."""
    generator = torch.Generator().manual_seed(4)
    named = tiny.bert(layers=2).named_parameters()
    return {name: torch.rand(p.shape, generator=generator, dtype=torch.float64) for name, p in named}


ANNEALED: Callbacks = lambda g, n: [  # noqa: E731
    WeightAnchoring(0.2, form=Decoupled(annealing=sigmoid_annealing(0.5, 6)))
]
MIXOUT: Callbacks = lambda g, n: [WeightAnchoring(0.3, form="mixout")]  # noqa: E731
SHARDED = ("1 rank", "2 ranks", "FSDP2")
CELLS["EWC"] = Cell(lambda g, n: [WeightAnchoring(5.0, form=Penalty(importance=importance()))], SGD, layouts=SHARDED)
CELLS["annealed"] = Cell(ANNEALED, layouts=SHARDED)
CELLS["mixout"] = Cell(MIXOUT, SGD)
CELLS["mixout, double batch"] = Cell(MIXOUT, SGD, batch=16)
CELLS["mixout, accumulation"] = Cell(MIXOUT, {**SGD, **ACCUMULATION}, like="mixout, double batch")
CELLS["mixout, another mask on each rank"] = Cell(
    MIXOUT, {**SGD, "seed": int(os.environ.get("RANK", "0"))}, like="mixout", broken="single"
)
CELLS["unfreezing and mixout"] = Cell(lambda g, n: [unfreezing(g, n), *MIXOUT(g, n)], SGD, openings=THREE)


def halfway(groups: LayerGroups, ranks: int) -> list[TrainerCallback]:
    """An interpolation that its rule leaves halfway: retention is 0 at the tuned weights, which are measured first."""
    return [WeightInterpolation([0.5], retention=iter([0.0, 1.0]).__next__, min_retention=0.9)]


CELLS["interpolation"] = Cell(halfway, layouts=SHARDED)
CELLS["interpolation, another start on each rank"] = Cell(halfway, seeded_by_rank=True, like="interpolation")
CELLS["interpolation, LoRA"] = Cell(halfway, model="lora", layouts=SHARDED)
CELLS["penalty, LoRA"] = Cell(PENALTY, SGD, model="lora", layouts=SHARDED)
CELLS["decoupled, LoRA"] = Cell(lambda g, n: [WeightAnchoring(0.2)], model="lora", layouts=SHARDED)


# The parity matrix of the method card: every layout trains each of these, and each has its remedy switched off once.
MATRIX = (
    "unfreezing",
    "unfreezing and decoupled",
    "unfreezing and penalty",
    "LoRA",
    "unfreezing, activation checkpointing",
    "unfreezing, reentrant checkpointing",
    "unfreezing, accumulation",
    "unfreezing, evaluation",
    "unfreezing and probes",
    "unfreezing and forgetting",
)
CELLS["unfreezing, reentrant checkpointing"] = Cell(GRADUAL, REENTRANT, openings=THREE)
for _name in MATRIX:
    _cell = CELLS[_name]
    CELLS[_name] = replace(_cell, layouts=tuple(LAYOUTS) if _cell.like is None else tuple(LAYOUTS)[1:])
    CELLS[f"{_name}, no rebuild"] = replace(
        _cell, rebuild=nothing, like=_cell.like or _name, broken="ranks", layouts=("2 ranks", "4 ranks")
    )
CELLS["unfreezing, evaluation, no reshard"] = replace(
    CELLS["unfreezing, evaluation"], reshard=nothing, like="unfreezing, evaluation", broken="frozen", layouts=("FSDP2",)
)
CELLS["weights read by the first rank"] = Cell(
    lambda g, n: [unfreezing(g, n), WeightAnchoring(STRENGTH["decoupled"])],
    {"fsdp_config": {**FSDP2, "cpu_ram_efficient_loading": True}},
    openings=THREE,
    seeded_by_rank=True,
    like="unfreezing and decoupled",
    layouts=("FSDP2",),
)
CELLS["probes, weights read by the first rank"] = Cell(
    PROBES,
    {**PROBED, "fsdp_config": {**FSDP2, "cpu_ram_efficient_loading": True}},
    openings=THREE,
    seeded_by_rank=True,
    like="unfreezing and probes",
    layouts=("FSDP2",),
)
CELLS["forgetting, weights read by the first rank"] = replace(
    CELLS["probes, weights read by the first rank"], callbacks=FORGETTING, like="unfreezing and forgetting"
)
for _name in ("second training", "decoupled", "own rates, layer-wise decay", "all together"):
    CELLS[_name] = replace(CELLS[_name], layouts=("1 rank", "2 ranks", "FSDP2"))


class Witness(TrainerCallback):
    """Records after each step a hash of each group's bytes on this rank. Comes after ours."""

    def __init__(self, groups: LayerGroups) -> None:
        self.groups = groups
        self.hashes: list[dict[str, str]] = []
        self.begins: list[int] = []
        self.trainable: list[int] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begins.append(len(self.hashes))
        self.hashes.append(self._now(kwargs["model"]))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        parameters = parameters_by_name(kwargs["model"])
        self.trainable.append(sum(p.numel() for n in self.groups.parameters if (p := parameters[n]).requires_grad))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.hashes.append(self._now(kwargs["model"]))

    def _now(self, model: nn.Module) -> dict[str, str]:
        parameters = {name: whole(p.detach()).double().numpy() for name, p in parameters_by_name(model).items()}
        return {
            group.name: hashlib.sha256(b"".join(parameters[n].tobytes() for n in group.parameters)).hexdigest()[:16]
            for group in self.groups
        }


SHARDING: dict[str, Any] = {}  # the training arguments of a layout that shards


def shard(layout: str) -> None:
    """Let accelerate shard on CPUs, which its own switch takes for plain DDP, and set what asks for it."""
    join = PartialState.__init__

    def joined(self: Any, *args: Any, **kwargs: Any) -> None:
        join(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = joined
    SHARDING["fsdp"] = True
    SHARDING["fsdp_config"] = dict(FSDP2)
    if layout == "HSDP":
        SHARDING["parallelism_config"] = ParallelismConfig(dp_replicate_size=2, dp_shard_size=2)


def make(
    folder: Path, callbacks: Callbacks, *, ranks: int, cell: Cell, dropout: float = 0.0, **overrides: Any
) -> tuple[Trainer, Witness]:
    """A trainer in double precision, so that a sum's order is far below what a wrong sum would change.

    The per-device batch shrinks with the number of ranks, so that the global batches stay the same.
    """
    seed = int(os.environ.get("RANK", "0")) if cell.seeded_by_rank else 0
    model: Any = tiny.bert(layers=2, dropout=dropout, seed=seed)
    rows = tiny.texts(16 * STEPS, seed=cell.seed)
    if cell.model == "lora":
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules="all-linear"))
    if cell.model == "experts":
        model, rows = Routed(model), one_expert_a_rank(rows)
    model = model.double()
    defaults = {
        "max_steps": STEPS,
        "max_grad_norm": 0.05,
        "learning_rate": 1e-3,
        "train_sampling_strategy": "sequential",
        "per_device_train_batch_size": cell.batch // ranks,
    }
    args = tiny.arguments(folder, **{**defaults, **SHARDING, **cell.overrides, **overrides})
    groups = group_layers(model)
    kwargs: dict[str, Any] = {}
    if cell.decay is not None:
        kwargs["optimizer_cls_and_kwargs"] = layerwise_optimizer(args, groups, decay=cell.decay)
    witness = Witness(groups)
    ours = callbacks(groups, ranks)
    trainer = tiny.trainer(model, args, rows, callbacks=[*ours, witness], **kwargs)
    for hook in ours:
        if isinstance(hook, CommHook):
            hook.trainer = trainer
    return trainer, witness


def facts(trainer: Trainer, witness: Witness, start: dict[str, torch.Tensor]) -> dict[str, Any]:
    model: Any = trainer.model
    return {
        "start": start,
        "end": {name: whole(tensor) for name, tensor in tiny.state(model).items()},
        "opened": [
            name
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and "key.bias" not in name  # the bias of attention keys has no gradient
        ],
        "hashes": witness.hashes,
        "begins": witness.begins,
        "trainable": witness.trainable,
        "events": events.read(trainer.state.log_history, "opening"),
        "references": events.read(trainer.state.log_history, "anchoring"),
        "interpolation": events.read(trainer.state.log_history, "interpolation"),
        "gradient_norms": gradient_norms(trainer.state.log_history),
        "wrapper": type(trainer.model_wrapped).__name__,
        "measured": [
            {key: value for key, value in entry.items() if key == "step" or key.startswith("tl/")}
            for entry in trainer.state.log_history
            if any(key.startswith("tl/effective_rank") for key in entry)
        ],
        "forgotten": [
            {key: value for key, value in entry.items() if key == "step" or key.startswith("tl/")}
            for entry in trainer.state.log_history
            if any(key.startswith("tl/forgetting") for key in entry)
        ],
        "baseline": [event["baseline"] for event in events.read(trainer.state.log_history, "forgetting")],
        "reduced": next((c.numels for c in trainer.callback_handler.callbacks if isinstance(c, CommHook)), None),
    }


@contextmanager
def remedies(cell: Cell) -> Iterator[None]:
    """Let the callback rebuild and reshard as the cell says."""
    callback.rebuild_reducer, callback.reshard = cell.rebuild, cell.reshard
    try:
        yield
    finally:
        callback.rebuild_reducer, callback.reshard = rebuild_reducer, reshard


def run(cell: Cell, folder: Path, ranks: int) -> dict[str, Any]:
    """Train one cell and return what this rank saw."""
    trainer, witness = make(folder, cell.callbacks, ranks=ranks, cell=cell)
    start = tiny.state(trainer.model)
    attach(trainer, verify_ranks=0 if cell.broken else 2)
    with remedies(cell):
        for _ in range(cell.trains):
            with suppress(KeyboardInterrupt):
                trainer.train()
    return facts(trainer, witness, start)


class StopAt(TrainerCallback):
    """Ends a training early, as a user's own limit would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


def resume(folder: Path, ranks: int) -> dict[str, Any]:
    """Train straight, stop at checkpoint 6 and resume; and resume from the checkpoints around it."""
    cell = Cell(decay=0.7)

    def train(name: str, source: str | bool | None, *, stop: int | None = None, save: int = 1) -> dict[str, Any]:
        callbacks: Callbacks = lambda g, n: [*ALL(g, n), *([StopAt(stop)] if stop else [])]  # noqa: E731
        trainer, witness = make(
            folder / name, callbacks, ranks=ranks, cell=cell, dropout=0.1, save_strategy="steps", save_steps=save
        )
        start = tiny.state(trainer.model)
        attach(trainer)
        trainer.train(resume_from_checkpoint=source)
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        return facts(trainer, witness, start)

    found = {"straight": train("straight", None)}
    found["stopped"] = train("killed", None, stop=6, save=6)
    found["resumed from 6"] = train("killed", True, save=6)
    for step in (5, 7):
        found[f"resumed from {step}"] = train(f"from-{step}", str(folder / "straight" / f"checkpoint-{step}"), save=12)
    return found


class Plant(TrainerCallback):
    """Makes the last rank differ, once, at the end of a step and before the ranks are compared."""

    def __init__(self, change: Callable[[dict[str, nn.Parameter]], None], step: int) -> None:
        self.change = change
        self.step = step

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step and args.process_index == args.world_size - 1:
            reshard(kwargs["model"])
            self.change(parameters_by_name(kwargs["model"]))


def flip(name: str) -> Callable[[dict[str, nn.Parameter]], None]:
    """A change of the lowest bit of one element."""

    def change(parameters: dict[str, nn.Parameter]) -> None:
        with torch.no_grad():
            local(parameters[name]).view(-1).view(torch.int64)[1] ^= 1

    return change


def freeze(parameters: dict[str, nn.Parameter]) -> None:
    """A change of what trains."""
    parameters[HEAD].requires_grad_(False)


HEAD = "classifier.weight"
FROZEN = "bert.embeddings.word_embeddings.weight"
# What is planted, after which step, `verify_ranks`, and the step at which it is found; None: it is not.
PLANTS: dict[str, tuple[Callable[[dict[str, nn.Parameter]], None], int, int, int | None]] = {
    "a frozen weight, at the interval": (flip(FROZEN), 1, 2, 2),
    "a frozen weight, at the next transition": (flip(FROZEN), 1, 100, 4),
    "an open weight": (flip(HEAD), 5, 3, 6),
    "what trains": (freeze, 4, 1, 4),
    "the control: nobody looks": (flip(FROZEN), 1, 0, None),
}


def planted(folder: Path, ranks: int) -> dict[str, Any]:
    """Train with each defect planted, and return the error and the step it came at."""
    found = {}
    for name, (change, step, interval, _) in PLANTS.items():
        trainer, _ = make(
            folder / name, lambda g, n, c=change, s=step: [unfreezing(g, n), Plant(c, s)], ranks=ranks, cell=Cell()
        )
        attach(trainer, verify_ranks=interval)
        try:
            trainer.train()
            error = None
        except RuntimeError as raised:
            error = str(raised)
        assert trainer.model is not None
        frozen = [n for n, p in trainer.model.named_parameters() if not p.requires_grad]
        found[name] = {"error": error, "step": trainer.state.global_step, "frozen": frozen}
    return found


def low_precision(folder: Path, ranks: int) -> dict[str, Any]:
    """Train weights that were loaded in bfloat16 in mixed precision, and again with each remedy switched off."""
    found = {}
    for name in ("plain", "unfreezing", "casts_what_trains", "renew_precision"):
        trainer, witness = make(
            folder / name, Cell().callbacks if name == "plain" else GRADUAL, ranks=ranks, cell=Cell(), bf16=True
        )
        assert trainer.model is not None
        trainer.model.bfloat16()
        attach(trainer)
        remedy = getattr(callback, name, None)
        if remedy is not None:
            setattr(callback, name, lambda argument: False)
        error = None
        try:
            trainer.train()
        except (AssertionError, RuntimeError) as raised:
            error = f"{type(raised).__name__}: {raised}"
        finally:
            if remedy is not None:
                setattr(callback, name, remedy)
        found[name] = {
            "dtypes": sorted({str(parameter.dtype) for parameter in trainer.model.parameters()}),
            "error": error,
            "step": trainer.state.global_step,
            "hashes": witness.hashes,
        }
    return found


def another_start(folder: Path, ranks: int) -> dict[str, Any]:
    """Attach to models that each rank made under a seed of its own, and return the error."""
    trainer, _ = make(folder, GRADUAL, ranks=ranks, cell=Cell(seeded_by_rank=True))
    try:
        attach(trainer)
    except RuntimeError as raised:
        return {"error": str(raised)}
    return {"error": None}


def other_groups(folder: Path, ranks: int) -> dict[str, Any]:
    """Resume a run onto other groups, and return the error."""
    found: dict[str, Any] = {"error": None}
    for resumes in (False, True):
        trainer, _ = make(folder, GRADUAL, ranks=ranks, cell=Cell(), max_steps=4, save_strategy="steps", save_steps=2)
        assert trainer.model is not None
        groups = group_layers(trainer.model)
        if resumes:
            groups = groups.merge(["embeddings", "encoder.layer.0"], "lower")
        trainer.callback_handler.pop_callback(GradualUnfreezing)
        trainer.add_callback(GradualUnfreezing(groups, at_steps([3])))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                attach(trainer)
                trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2") if resumes else None)
        except ValueError as raised:
            found = {"error": str(raised), "step": trainer.state.global_step}
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
    return found


def unattached(folder: Path, ranks: int) -> dict[str, Any]:
    """Train without `attach`, and return the error."""
    trainer, _ = make(folder, GRADUAL, ranks=ranks, cell=Cell())
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.train()
    except RuntimeError as error:
        return {"error": str(error), "warnings": []}
    return {"error": None, "warnings": [str(warning.message) for warning in caught]}


def main(folder: Path, layout: str) -> None:
    """Run all cells of this layout."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", PreflightWarning)
    if layout in ("FSDP2", "HSDP"):
        shard(layout)
    world = tiny.arguments(folder, **SHARDING)  # joins the process group
    rank, ranks = world.process_index, world.world_size

    def write(name: str, found: dict[str, Any]) -> None:
        torch.save(found, folder / f"{name}.{rank}.pt")

    for name, cell in CELLS.items():
        if layout in cell.trained_by:
            write(name, run(cell, folder / "runs" / name, ranks))
    if layout in RESUMED:
        for kind in ("SHARDED_STATE_DICT", "FULL_STATE_DICT") if SHARDING else ("",):
            if SHARDING:
                SHARDING["fsdp_config"]["state_dict_type"] = kind
            write(f"resume{kind}", resume(folder / "runs" / f"resume{kind}", ranks))
    if layout == "FSDP2":
        write("low precision", low_precision(folder / "runs" / "low-precision", ranks))
        write("another start", another_start(folder / "runs" / "another-start", ranks))
    if layout in RESUMED:
        write("other groups", other_groups(folder / "runs" / "other-groups", ranks))
    if layout in PLANTED:
        write("planted", planted(folder / "runs" / "planted", ranks))
    if layout in ("1 rank", "2 ranks"):
        write("unattached", unattached(folder / "runs" / "unattached", ranks))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
