"""Whether trainings leave memory behind: many in a row in one process, with our callbacks and without."""

import gc
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, Trainer

from tests import tiny
from tests.forked import Ranks
from tl_callbacks import GradualUnfreezing, WeightAnchoring, attach, every, group_layers, layerwise_optimizer

TRAININGS = 30
WARM = 10  # trainings until caches and the allocator are full
SIZE = 64  # of the hidden layers: a model of about 0.4 MB, so that one left behind stands out
BOUND = 32  # KiB a training
KEPT: list[Any] = []  # what a planted leak keeps


def trainings(folder: Path, ours: bool, leak: bool = False, count: int = TRAININGS) -> None:
    """Train `count` models one after the other and write what the process holds after each."""
    held = []
    for _ in range(count):
        train(folder, ours=ours, leak=leak and ours)
        gc.collect()
        modules = sum(isinstance(found, nn.Module) for found in gc.get_objects())
        held.append((resident(), modules))
    torch.save(held, folder / f"{'ours' if ours else 'plain'}.pt")


def train(folder: Path, *, ours: bool, leak: bool) -> None:
    """One training of a new model."""
    config = BertConfig(
        vocab_size=50, hidden_size=SIZE, num_hidden_layers=2, num_attention_heads=2, intermediate_size=2 * SIZE,
        num_labels=tiny.NUM_LABELS,
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    args = tiny.arguments(folder, max_steps=4)
    kwargs: dict[str, Any] = {}
    if ours:
        groups = group_layers(model)
        kwargs["callbacks"] = [GradualUnfreezing(groups, every(1)), WeightAnchoring(0.1, form="penalty")]
        kwargs["optimizer_cls_and_kwargs"] = layerwise_optimizer(args, groups, decay=0.9)
    trainer = Trainer(model, args, train_dataset=tiny.texts(16), **kwargs)
    if ours:
        attach(trainer)
    trainer.train()
    if leak:
        KEPT.append(model)


def resident() -> float:
    """KiB of memory that the process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1024


def slope(held: list[tuple[float, int]]) -> float:
    """KiB that each training adds after the first ones: the median of all pairs' slopes, which a jump does not move."""
    values = torch.tensor([kib for kib, _ in held[WARM:]], dtype=torch.float64)
    places = torch.arange(len(values), dtype=torch.float64)
    upper = torch.ones(len(values), len(values)).triu(1).bool()
    slopes = (values - values[:, None])[upper] / (places - places[:, None])[upper]
    return float(slopes.median())


def run(folder: Path, *, leak: bool = False) -> dict[str, Any]:
    """What is written of the memory, with the failures."""
    folder.mkdir(parents=True, exist_ok=True)
    held = {}
    for name in ("ours", "plain"):
        Ranks(trainings, folder, name == "ours", leak, log=folder / f"{name}.txt", timeout=600).finish()
        held[name] = torch.load(folder / f"{name}.pt")
    slopes = {name: round(slope(values), 1) for name, values in held.items()}
    modules = {name: values[-1][1] - values[1][1] for name, values in held.items()}
    failures = []
    if slopes["ours"] > max(0.0, slopes["plain"]) + BOUND:
        failures.append(f"a training leaves {slopes['ours']} KiB behind, without our callbacks {slopes['plain']}")
    if modules["ours"] > 0:
        failures.append(f"{TRAININGS - 2} trainings leave {modules['ours']} modules behind")
    return {"run": "memory", "KiB a training": slopes, "modules": modules, "failures": failures}
