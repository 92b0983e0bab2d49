"""scikit-learn's digits: a network of three hidden layers learns 0 to 4, then, with a new head, 5 to 9.

What it still knows of the old ones is the accuracy of the old head, which is kept as it was, and of a probe that is
fitted anew.
"""

import contextlib
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import default_collate
from transformers import Trainer, TrainingArguments, set_seed

from tests.benchmarks.tradeoff.choice import Way
from tl_callbacks import (
    ForgettingMonitor,
    GradualUnfreezing,
    SourceTask,
    WeightAnchoring,
    WeightInterpolation,
    at_steps,
    attach,
    group_layers,
)
from tl_callbacks.anchoring import Outputs, Penalty, diagonal_fisher

STEPS, BATCH, RATE, WIDTH = 300, 32, 1e-3, 128
Rows = list[dict[str, Tensor]]


class Network(nn.Module):
    """Three hidden layers and a head for five classes."""

    def __init__(self) -> None:
        super().__init__()
        widths = (64, WIDTH, WIDTH, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(widths))
        self.classifier = nn.Linear(WIDTH, 5)

    def forward(self, pixels: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Logits, and the loss where there are labels."""
        for layer in self.layers:
            pixels = layer(pixels).relu()
        logits = self.classifier(pixels)
        return {"logits": logits} if labels is None else {"loss": cross_entropy(logits, labels), "logits": logits}


@dataclass(frozen=True)
class Setting:
    """One seed's pretrained network, its old head, and the rows of both tasks: train, development, test."""

    seed: int
    weights: dict[str, Tensor]
    old_head: nn.Linear
    old: tuple[Rows, Rows, Rows]
    new: tuple[Rows, Rows, Rows]

    def model(self) -> Network:
        """Return the pretrained network with a new head."""
        set_seed(self.seed)
        model = Network()
        model.load_state_dict({**self.weights, **{n: p for n, p in model.state_dict().items() if "classifier" in n}})
        return model


@dataclass(frozen=True)
class Run:
    """What a way is given: the setting, the model with its new head, the strength, and what measures the old task."""

    setting: Setting
    model: Network
    strength: float
    monitor: ForgettingMonitor


def _anchor(**options: Any) -> Callable[[Run], list[Any]]:
    return lambda run: [WeightAnchoring(run.strength, **options)]


def _ewc(run: Run) -> list[Any]:
    """A penalty weighted by the empirical Fisher of the old task, with the old head, at the pretrained weights."""
    old = run.setting.model()
    old.load_state_dict(run.setting.weights)
    rows = run.setting.old[0]
    batches = [default_collate(rows[start : start + BATCH]) for start in range(0, len(rows), BATCH)]
    names = [name for name, _ in old.named_parameters() if "classifier" not in name]
    fisher = diagonal_fisher(old, batches, names=names)
    return [WeightAnchoring(run.strength, form=Penalty(importance=fisher))]


def _wise(run: Run) -> list[Any]:
    """The place of the best target accuracy that keeps a share of the old task; both by development rows."""

    def retention() -> float:
        return run.monitor.changes(run.model)["dev"].retention

    return [WeightInterpolation(metric="accuracy", retention=retention, min_retention=run.strength)]


def _lora(run: Run) -> nn.Module:
    rank = int(run.strength)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=r"layers\.\d", modules_to_save=["classifier"])
    return get_peft_model(run.model, config)  # type: ignore[arg-type]


WAYS = {
    "none": Way((0.0,)),
    "weight decay": Way((0.01, 0.1, 1.0, 10.0), arguments=lambda run: {"weight_decay": run.strength}),
    "L2-SP in the loss": Way((0.001, 0.01, 0.03, 0.1, 1.0), _anchor(form="penalty")),
    "decoupled pull": Way((0.001, 0.003, 0.006, 0.01, 0.03, 0.1), _anchor()),
    "EWC": Way((1e3, 1e4, 1e5, 1e6, 1e7), _ewc),
    "LwF": Way(
        (0.1, 0.3, 1.0, 3.0),
        lambda run: [WeightAnchoring(run.strength, form=Outputs(old_head=run.setting.old_head))],
    ),
    "features": Way((0.1, 0.3, 1.0, 3.0), _anchor(form="features")),
    "Mixout": Way((0.5, 0.7, 0.9), _anchor(form="mixout")),
    "WiSE-FT": Way((0.9, 0.95, 0.98, 0.99), _wise),
    "LoRA": Way((2, 4, 8), arguments=lambda run: {"learning_rate": 5 * RATE}, adapted=_lora),
    "smaller rate": Way((1e-4, 2e-4, 5e-4), arguments=lambda run: {"learning_rate": run.strength}),
    "head alone": Way((0.0,), lambda run: [GradualUnfreezing(group_layers(run.model), at_steps([]))]),
}


def setting(seed: int) -> Setting:
    """Draw the splits, half, a fifth and the rest, and train the network on the old digits."""
    digits = load_digits()
    pixels, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    generator = torch.Generator().manual_seed(seed)
    tasks = []
    for low in (0, 5):
        places = torch.nonzero((labels >= low) & (labels < low + 5)).flatten()
        places = places[torch.randperm(len(places), generator=generator)]
        rows = [{"pixels": pixels[place], "labels": labels[place] - low} for place in places]
        half, most = len(rows) // 2, 7 * len(rows) // 10
        tasks.append((rows[:half], rows[half:most], rows[most:]))
    set_seed(seed)
    model = Network()
    optimizer = torch.optim.AdamW(model.parameters(), RATE)
    for _ in range(2 * STEPS):
        batch = default_collate([tasks[0][0][int(place)] for place in torch.randint(len(tasks[0][0]), (BATCH,))])
        optimizer.zero_grad()
        model(**batch)["loss"].backward()
        optimizer.step()
    old_head = nn.Linear(WIDTH, 5)
    old_head.load_state_dict(model.classifier.state_dict())
    return Setting(seed, {n: p.clone() for n, p in model.state_dict().items()}, old_head, tasks[0], tasks[1])


def trained(setting: Setting, way: Way, strength: float) -> dict[str, float]:
    """Fine-tune on the new digits and return, for development and test rows, the accuracies and the retention."""
    tasks = [SourceTask(setting.old[n], head=setting.old_head, name=name) for n, name in ((1, "dev"), (2, "test"))]
    run = Run(setting, setting.model(), strength, ForgettingMonitor(tasks))
    with tempfile.TemporaryDirectory() as folder:
        options = {"learning_rate": RATE, "weight_decay": 0.0, **way.arguments(run)}
        args = TrainingArguments(
            folder, max_steps=STEPS, per_device_train_batch_size=BATCH, per_device_eval_batch_size=256,
            warmup_steps=0.1, logging_steps=STEPS, save_strategy="no", report_to="none", use_cpu=True,
            disable_tqdm=True, dataloader_pin_memory=False, seed=setting.seed, **options,
        )  # fmt: skip
        trainer = Trainer(
            way.adapted(run), args, train_dataset=setting.new[0], eval_dataset=setting.new[1],
            compute_metrics=accuracy, callbacks=[*way.callbacks(run), run.monitor],
        )  # fmt: skip
        attach(trainer)
        with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet):
            trainer.train()
            new = {n: trainer.predict(setting.new[k]).metrics["test_accuracy"] for k, n in ((1, "dev"), (2, "test"))}
        measured = run.monitor.facts()["measures"]
    found = {f"{name} target": new[name] for name in ("dev", "test")}
    for name in ("dev", "test"):
        for part, title in ((name, "old"), (f"{name}_reprobed", "old, new probe")):
            found[f"{name} {title}"] = measured[part]["after"]
            found[f"{name} retention{title.removeprefix('old')}"] = measured[part]["retention"]
    return found


def accuracy(prediction: Any) -> dict[str, float]:
    """For the Trainer."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def results(seeds: int) -> dict[str, dict[float, list[dict[str, float]]]]:
    """Return by way and strength what each seed's run came to."""
    settings = [setting(seed) for seed in range(seeds)]
    return {
        name: {strength: [trained(one, way, strength) for one in settings] for strength in way.strengths}
        for name, way in WAYS.items()
    }
