"""The evaluation on a card, done again on the same rows with the pulled model, and compared."""

import copy
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from sklearn.metrics import accuracy_score, f1_score
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

from hub_cards.facts import Data
from hub_cards.pulling.loading import shortened
from hub_cards.pulling.pull import Pulled, pull
from hub_cards.pulling.rows import find_rows, label_names

# What changes the numbers of an evaluation besides model and rows.
_ARGUMENTS = ("per_device_eval_batch_size", "bf16", "fp16", "bf16_full_eval", "fp16_full_eval")
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Task:
    """How a task is evaluated: rows to inputs of the model, and its metrics from predictions and labels."""

    encode: Callable[[Pulled, Dataset, Data], Dataset]
    metrics: Mapping[str, Callable[[Array, Array], float]]


@dataclass(frozen=True)
class Check:
    """One number on the card and the one found; `found` is None for a metric that cannot be computed again here."""

    split: str
    metric: str
    card: float
    found: float | None
    tolerance: float

    @property
    def ok(self) -> bool:
        """Whether the numbers are the same within the tolerance, or none was found."""
        return self.found is None or abs(self.found - self.card) <= self.tolerance


@dataclass(frozen=True)
class Verification:
    """The numbers on a card beside those found; `str()` is a table.

    Example:
        >>> print(Verification((Check("test", "accuracy", 0.9, 0.9, 1e-6), Check("test", "loss", 0.3, 0.4, 1e-4))))
        split  metric    card      found     difference
        test   accuracy  0.900000  0.900000  +0.0e+00
        test   loss      0.300000  0.400000  +1.0e-01 > 1e-04
    """

    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether all numbers that were found are those on the card."""
        return all(check.ok for check in self.checks)

    def __str__(self) -> str:
        """Return the table."""
        rows = [("split", "metric", "card", "found", "difference")]
        for check in self.checks:
            row = (check.split, check.metric, f"{check.card:.6f}")
            if check.found is None:
                rows.append((*row, "-", "not computed again"))
            else:
                beyond = "" if check.ok else f" > {check.tolerance:.0e}"
                rows.append((*row, f"{check.found:.6f}", f"{check.found - check.card:+.1e}{beyond}"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
        return "\n".join(line.rstrip() for line in lines)


def verify(
    pulled: Pulled | str | Path,
    *,
    data: Dataset | str | Path | None = None,
    split: str | None = None,
    tolerance: float = 1e-6,
    loss_tolerance: float | None = None,
    token: str | None = None,
) -> Verification:
    """Return the card's numbers beside those of the same evaluation done again.

    The rows are those of the data set at the recorded commit, or `data`; they are compared by their content first. The
    evaluation is that of the Trainer, with the recorded batch size and precision.

    Args:
        pulled: what `pull` returned, or what to pull.
        data: the rows, or a CSV, TSV, JSON, JSON Lines or Parquet file of them: for data that are not on the Hub. The
            file from which training held rows out will do as well.
        split: the split to evaluate, named as on the card; needed with `data` where the card has several.
        tolerance: allowed difference of a metric. No row may be classified otherwise.
        loss_tolerance: allowed difference of the loss, for machines that add in another order; 1e-5, and for 16-bit
            weights 1e-3, if None. With other batches and paddings the logits of a MiniLM on a CPU were at most 9e-7 and
            its loss 1e-8 apart in float32, in bfloat16 1e-2 and 1.3e-4; with the recorded batches nothing was.
        token: as for `pull`, and for the data set.

    Raises:
        ValueError: nothing on the card can be computed again, or the data are not those of the card.

    Example:
        >>> verify("hub_cards")
        Traceback (most recent call last):
        FileNotFoundError: `hub_cards` holds no recipe.json; expected the output_dir of a run: call ...
    """
    model = pulled if isinstance(pulled, Pulled) else pull(pulled, token=token)
    facts = model.facts
    task, known = TASKS.get(facts.task or ""), facts.data
    if task is None or known is None:
        raise ValueError(
            f"the task on the card is `{facts.task}`{'' if known else ', without data'}; expected one of "
            f"{', '.join(TASKS)} with the data it was evaluated on. Evaluate the pulled model yourself."
        )
    splits = [name for name in dict.fromkeys(result.split for result in facts.results) if name in known.splits]
    if split is not None:
        splits = [name for name in splits if name == split]
    if not splits or (data is not None and len(splits) > 1):
        raise ValueError(
            f"`split` is `{split}`; expected one that the card has both data and results of: "
            f"{shortened({result.split for result in facts.results} & known.splits.keys()) or 'there is none'}."
        )
    if loss_tolerance is None:
        loss_tolerance = 1e-3 if facts.dtype in ("bfloat16", "float16") else 1e-5
    checks: list[Check] = []
    for name in splits:
        found = _evaluate(model, task, find_rows(facts, name, data, token))
        for result in facts.results:
            if result.split == name:
                allowed = loss_tolerance if result.metric == "loss" else tolerance
                checks.append(Check(name, result.metric, result.value, found.get(result.metric), allowed))
    if all(check.found is None for check in checks):
        raise ValueError(
            f"the card has {shortened(check.metric for check in checks)}, of which none can be computed again; "
            f"expected one of {shortened([*task.metrics, 'loss'])}. Evaluate the pulled model yourself."
        )
    return Verification(tuple(checks))


def _evaluate(pulled: Pulled, task: Task, rows: Dataset) -> dict[str, float]:
    """Return the metrics of a model on rows, as the Trainer computes them with the run's batch size and precision."""
    facts = pulled.facts
    assert facts.data is not None
    recorded = {name: facts.training_arguments[name] for name in _ARGUMENTS if name in facts.training_arguments}
    model = pulled.model
    if recorded.get("bf16_full_eval") or recorded.get("fp16_full_eval"):
        model = copy.deepcopy(model)  # the Trainer casts it in place
    on_cpu = next(model.parameters()).device.type == "cpu"
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, report_to="none", disable_tqdm=True, use_cpu=on_cpu, label_names=["labels"],
            dataloader_pin_memory=not on_cpu, **recorded,
        )  # fmt: skip
        collator = DataCollatorWithPadding(pulled.processor)
        trainer = Trainer(model, args, data_collator=collator, processing_class=pulled.processor)
        outcome = trainer.predict(task.encode(pulled, rows, facts.data))
    model.eval()
    predictions: Any = outcome.predictions
    predictions = predictions[0] if isinstance(predictions, tuple) else predictions
    found = {name: metric(predictions, np.asarray(outcome.label_ids)) for name, metric in task.metrics.items()}
    return {**found, "loss": float((outcome.metrics or {})["test_loss"])}


def _encode_texts(pulled: Pulled, rows: Dataset, data: Data) -> Dataset:
    """Return tokenised texts with the numbers of their labels."""
    numbers: dict[str | None, int] = {name: number for number, name in enumerate(pulled.labels)}
    names = label_names(rows, data.columns["label"])
    if unknown := {str(name) for name in names if name not in numbers}:
        raise ValueError(
            f"the data have the labels {shortened(unknown)}; expected those of the model: {pulled.labels}."
        )
    texts = list(rows.with_format(None)[data.columns["text"]])
    encoded = pulled.processor(texts, truncation=True, max_length=pulled.facts.preprocessing.get("max_length"))
    return Dataset.from_dict({**encoded, "labels": [numbers[name] for name in names]})


def _accuracy(predictions: Array, labels: Array) -> float:
    return float(accuracy_score(labels, predictions.argmax(-1)))


def _macro_f1(predictions: Array, labels: Array) -> float:
    return float(f1_score(labels, predictions.argmax(-1), average="macro", zero_division=0))


TASKS = {"text-classification": Task(_encode_texts, {"accuracy": _accuracy, "f1": _macro_f1})}
