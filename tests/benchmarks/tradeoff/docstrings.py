"""The demo's task: all-MiniLM-L6-v2 learns which of nine packages a docstring is from, by 200 labelled texts.

What it still can do is finding the paragraph that follows a docstring's first line among those of other packages,
recall@1 of 200 pairs. Steps, batch and rate are those of `make demo`. Development: 180 further texts of the training
pool and 100 further pairs, on which seed 0 also gave the ranges of the strengths. The old outputs of a sentence model
are its embedding, so learning without forgetting keeps the features of the last block, from which the embedding comes.
"""

import contextlib
import json
import multiprocessing
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars, load_from_disk
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments, set_seed
from transformers.utils import logging

from tests.benchmarks.tradeoff.choice import Results, Way
from tests.benchmarks.tradeoff.digits import accuracy
from tl_callbacks import (
    ForgettingMonitor,
    GradualUnfreezing,
    Retrieval,
    WeightAnchoring,
    WeightInterpolation,
    at_steps,
    attach,
    group_layers,
    ignores_item_count,
)
from tl_callbacks.anchoring import Penalty, diagonal_fisher, load_fisher, save_fisher
from tl_callbacks.probing.passes import Part
from tl_callbacks.reading.pooling import pool

sys.path.insert(0, str(Path(__file__).parents[3] / "recipes"))
from compare import packaged_model
from docstrings import draw, load_docstrings
from pairs import load_pairs
from rows import SETTINGS

LABELS, WATCHED, TOKENS = 200, 180, 64
ALPHAS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
PAIRS = {"test": 200, "dev": 100, "fisher": 100}
DOCUMENTS, SCALE = 16, 20.0  # that a query chooses among for the Fisher, and the factor of the cosines, as in training
_, _, RATE, BATCH, (_, STEPS) = SETTINGS["full"]


@dataclass(frozen=True)
class Run:
    """What a way is given: the model with its new head, the strength, what measures the old task, and the files."""

    model: nn.Module
    strength: float
    monitor: ForgettingMonitor
    folder: Path


class Chooser(nn.Module):
    """The old task as a likelihood: logits of which document belongs to the query, the first text of each row."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Logits (rows, documents), the loss too where there are labels, from ids of (rows, 1 + documents, tokens)."""
        rows, texts, _ = input_ids.shape
        mask = attention_mask.flatten(0, 1)
        states = self.bert(input_ids=input_ids.flatten(0, 1), attention_mask=mask).last_hidden_state
        pooled = pool(states, rows * texts, mask, pooling="mean")
        assert pooled is not None
        unit = normalize(pooled, dim=-1).unflatten(0, (rows, texts))
        logits = SCALE * (unit[:, 1:] @ unit[:, :1].mT).squeeze(-1)
        return {"logits": logits} if labels is None else {"loss": cross_entropy(logits, labels), "logits": logits}


class Known(Retrieval):
    """Retrieval whose features of the pretrained model, which are the same in every run, are read once."""

    def __init__(self, folder: Path, name: str) -> None:
        pairs = sorted(load_from_disk(str(folder / name)), key=lambda pair: len(pair["document"]))  # hardly any padding
        super().__init__(pairs, max_length=TOKENS, name=name)
        self.path = folder / f"{name}.pt"

    def read(self, *args: Any, base: bool, **options: Any) -> Part:
        """Return the features, of the pretrained model from the file if it is there."""
        if base and self.path.exists():
            return Part(*torch.load(self.path))
        found = super().read(*args, base=base, **options)
        if base:
            partial = self.path.with_suffix(f".{os.getpid()}")
            torch.save((found.places, found.features), partial)
            partial.replace(self.path)
        return found


def _anchor(**options: Any) -> Any:
    return lambda run: [WeightAnchoring(run.strength, **options)]


def _last_block(run: Run) -> list[Any]:
    groups = [group.name for group in group_layers(run.model)]
    return [WeightAnchoring({[name for name in groups if "encoder" in name][-1]: run.strength}, form="features")]


def _ewc(run: Run) -> list[Any]:
    return [WeightAnchoring(run.strength, form=Penalty(importance=load_fisher(run.folder / "fisher.safetensors")))]


def _wise(run: Run) -> list[Any]:
    def retention() -> float:
        return run.monitor.changes(run.model)["dev"].retention

    return [WeightInterpolation(ALPHAS, metric="accuracy", retention=retention, min_retention=run.strength)]


def _lora(run: Run) -> nn.Module:
    rank = int(run.strength)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", modules_to_save=["classifier"])
    return get_peft_model(run.model, config)  # type: ignore[arg-type]


WAYS = {
    "none": Way((0.0,)),
    "weight decay": Way((0.01, 1.0), arguments=lambda run: {"weight_decay": run.strength}),
    "L2-SP in the loss": Way((0.001, 0.01, 0.1, 1.0), _anchor(form="penalty")),
    "decoupled pull": Way((0.01, 0.1, 0.4, 0.8), _anchor()),
    "EWC": Way((10.0, 100.0, 1e3, 1e4), _ewc),
    "LwF": Way((3.0, 10.0, 30.0), _last_block),
    "features": Way((1.0, 3.0, 10.0), _anchor(form="features")),
    "Mixout": Way((0.5, 0.9), _anchor(form="mixout")),
    "WiSE-FT": Way((0.9, 0.95), _wise),
    "LoRA": Way((2, 8), arguments=lambda run: {"learning_rate": SETTINGS["lora"][2]}, adapted=_lora),
    "smaller rate": Way((1e-4,), arguments=lambda run: {"learning_rate": run.strength}),
    "head alone": Way((0.0,), lambda run: [GradualUnfreezing(group_layers(run.model), at_steps([]))],
                      lambda run: {"learning_rate": SETTINGS["probe"][2]}),
}  # fmt: skip


def results(seeds: int) -> Results:
    """Return by way and strength what each seed's run came to; two processes of one thread train."""
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        jobs = [(way, s, seed, folder) for way in WAYS for s in WAYS[way].strengths for seed in range(seeds)]
        found: Results = {name: {strength: [] for strength in way.strengths} for name, way in WAYS.items()}
        with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as processes:
            for (way, strength, seed, _), facts in zip(jobs, processes.map(trained, jobs), strict=True):
                found[way][strength].append(facts)
                print(json.dumps([way, strength, seed, facts]), file=sys.stderr, flush=True)
    return found


def prepare(folder: Path) -> None:
    """Write the texts, the pairs, and the Fisher of finding the right document at the pretrained weights."""
    splits = load_docstrings(test_per_class=54)
    splits.save_to_disk(folder / "data")
    pairs = load_pairs(sum(PAIRS.values()), apart_from=[text for split in splits.values() for text in split["text"]])
    start = 0
    for name, count in PAIRS.items():
        pairs.select(range(start, start + count)).save_to_disk(folder / name)
        start += count
    tokenizer = AutoTokenizer.from_pretrained(packaged_model())
    own = load_from_disk(str(folder / "fisher"))
    documents = own["document"][:]
    rows = []
    for number, query in enumerate(own["query"]):
        near = [documents[(number + other) % len(documents)] for other in range(DOCUMENTS)]  # its own one first
        texts = tokenizer([query, *near], truncation=True, max_length=TOKENS, padding=True, return_tensors="pt")
        rows.append({**{key: texts[key][None] for key in ("input_ids", "attention_mask")}, "labels": torch.tensor([0])})
    chooser = Chooser(_network(2).bert)
    fisher = diagonal_fisher(chooser, rows)
    save_fisher(fisher, folder / "fisher.safetensors", data="pairs of first lines and paragraphs")


def trained(job: tuple[str, float, int, str]) -> dict[str, float]:
    """Fine-tune one way at one strength with one seed; return accuracy and retention of development and test rows."""
    name, strength, seed, files = job
    way, folder = WAYS[name], Path(files)
    torch.set_num_threads(1)
    disable_progress_bars()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    splits = load_from_disk(str(folder / "data"))
    drawn = draw(splits["train"], LABELS + WATCHED, seed)
    set_seed(seed)
    network = _network(drawn.features["label"].num_classes)
    run = Run(network, strength, ForgettingMonitor([Known(folder, part) for part in ("dev", "test")]), folder)
    tokenizer = AutoTokenizer.from_pretrained(packaged_model())

    def tokenized(rows: Dataset) -> Dataset:
        return rows.map(
            lambda batch: {**tokenizer(batch["text"], truncation=True, max_length=TOKENS), "labels": batch["label"]},
            batched=True,
            remove_columns=rows.column_names,
        )

    with tempfile.TemporaryDirectory() as output:
        options = {"learning_rate": RATE, "weight_decay": 0.0, **way.arguments(run)}
        args = TrainingArguments(
            output, max_steps=STEPS, per_device_train_batch_size=BATCH, per_device_eval_batch_size=64,
            warmup_steps=0.1, logging_steps=STEPS, save_strategy="no", report_to="none", use_cpu=True,
            disable_tqdm=True, dataloader_pin_memory=False, seed=seed, **options,
        )  # fmt: skip
        trainer = Trainer(
            way.adapted(run), args, train_dataset=tokenized(drawn.select(range(LABELS))),
            eval_dataset=tokenized(_by_length(drawn.select(range(LABELS, LABELS + WATCHED)))),
            processing_class=tokenizer, compute_metrics=accuracy, callbacks=[*way.callbacks(run), run.monitor],
        )  # fmt: skip
        attach(trainer)
        with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet):
            trainer.train()
            parts = {"dev": trainer.eval_dataset, "test": tokenized(_by_length(splits["test"]))}
            target = {part: trainer.predict(rows).metrics["test_accuracy"] for part, rows in parts.items()}
        measured = run.monitor.facts()["measures"]
    found = {}
    for part in parts:
        found |= {f"{part} target": target[part], f"{part} recall": measured[part]["after"]}
        found[f"{part} retention"] = measured[part]["retention"]
    return found


def _network(num_labels: int) -> Any:
    network = AutoModelForSequenceClassification.from_pretrained(
        packaged_model(), num_labels=num_labels, ignore_mismatched_sizes=True
    )
    if ignores_item_count(network):
        network.accepts_loss_kwargs = False  # as recipes/text_classification.py says; before adapters
    return network


def _by_length(rows: Dataset) -> Dataset:
    return rows.select(sorted(range(rows.num_rows), key=lambda place: len(rows[place]["text"])))
