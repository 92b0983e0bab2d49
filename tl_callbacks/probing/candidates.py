"""Probes without training: what the layers of a model know of a data set, and which of several models knows most."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from torch import nn
from transformers import DataCollatorWithPadding, default_data_collator

from tl_callbacks.discovery import group_layers
from tl_callbacks.groups import LayerGroups
from tl_callbacks.probing.copies import copies
from tl_callbacks.probing.measures import Measures, measure
from tl_callbacks.probing.passes import read_rows
from tl_callbacks.probing.reference import random_twin
from tl_callbacks.probing.rows import Source, chosen_places
from tl_callbacks.probing.targets import as_targets, why_no_probe
from tl_callbacks.reading.pooling import Pooling
from tl_callbacks.tables import table


@dataclass(frozen=True)
class GroupProbe:
    """What one layer group of a model shows.

    Args:
        model: name of the model, "" where there is one.
        group: name of the group.
        width: features a row.
        probe: held-out accuracy of a linear probe, or R^2 for real-valued labels; nan without labels.
        probe_se: its standard error.
        random_init: the same of the network with random weights; nan where it was not measured.
        shuffled: the same with shuffled labels.
        chance: accuracy of always answering the most frequent class.
        log_me: log evidence of the labels per row, higher is better.
        effective_rank: directions that the features use.
        anisotropy: mean cosine between rows.

    Example:
        >>> GroupProbe("", "layer.0", 8, 0.9, 0.02, 0.6, 0.5, 0.5, -0.1, 5.0, 0.3).gain
        0.30000000000000004
    """

    model: str
    group: str
    width: int
    probe: float
    probe_se: float
    random_init: float
    shuffled: float
    chance: float
    log_me: float
    effective_rank: float
    anisotropy: float

    @property
    def gain(self) -> float:
        """How much better the probe is than on the network with random weights."""
        return self.probe - self.random_init


@dataclass(frozen=True)
class ProbeTable:
    """What `probe_model` and `rank_models` found, one row a layer group; prints as a table.

    Args:
        rows: the groups, bottom to top, or best first.
        samples: rows of data that were read.
        unprobed: in words why there is no probe; "" where there is one.

    Example:
        >>> ProbeTable((), 0).best is None
        True
    """

    rows: tuple[GroupProbe, ...]
    samples: int
    unprobed: str = ""

    def __iter__(self) -> Iterator[GroupProbe]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, group: str) -> GroupProbe:
        for row in self.rows:
            if row.group == group:
                return row
        raise KeyError(f"`{group}` is none of the groups: {', '.join(row.group for row in self.rows)}.")

    @property
    def best(self) -> GroupProbe | None:
        """The row of the highest LogME, without labels None; rows within a standard error are not told apart by it."""
        known = [row for row in self.rows if math.isfinite(row.log_me)]
        return max(known, key=lambda row: row.log_me, default=None)

    def as_dicts(self) -> list[dict[str, Any]]:
        """Return the rows as dicts, with None for what was not measured."""
        return [
            {
                key: None if isinstance(value, float) and math.isnan(value) else value
                for key, value in asdict(row).items()
            }
            for row in self.rows
        ]

    def __str__(self) -> str:
        several = len({row.model for row in self.rows}) > 1
        head = [
            *(["model"] if several else []),
            "group",
            "probe",
            "random",
            "shuffled",
            "chance",
            "LogME",
            "rank",
            "cosine",
        ]
        lines = [head]
        for row in self.rows:
            probe = f"{_shown(row.probe)} ± {_shown(row.probe_se)}" if math.isfinite(row.probe) else "-"
            numbers = (row.random_init, row.shuffled, row.chance, row.log_me)
            shape = [_shown(row.effective_rank, 1), _shown(row.anisotropy)]
            lines.append([*([row.model] if several else []), row.group, probe, *map(_shown, numbers), *shape])
        probe = (
            f"no probe: {self.unprobed}"
            if self.unprobed
            else "probe: held-out accuracy (R^2 of values) ± standard error"
        )
        return f"{table(lines)}\n{self.samples} rows; {probe}"


def probe_model(
    model: nn.Module,
    dataset: Any,
    *,
    groups: LayerGroups | None = None,
    processing_class: Any = None,
    collate: Callable[[list[Any]], Any] | None = None,
    batch_size: int = 32,
    pooling: Pooling = "mean",
    max_rows: int = 2000,
    controls: bool = True,
    seed: int = 0,
) -> ProbeTable:
    """Return what every layer group of a model shows of a data set, from one forward pass, without training.

    Mode, random states and weights of the model stay as they are, and no hook is left. The controls stand beside each
    accuracy: a network with random weights often gives most of it.

    Args:
        model: any model, on its device; the head is read at its input and need not be trained.
        dataset: rows with what the model takes and `labels` or `label`, one number a row: integers for classes,
            floating point for values; or several of floating point, 0.0 and 1.0 for several labels a row. Other columns
            are left out. The model is not given them, so its head need not fit.
        groups: the layer groups; None: `group_layers(model)`.
        processing_class: a tokenizer that pads the rows of a batch.
        collate: makes a batch of rows; None: pads with `processing_class`, or stacks.
        batch_size: rows a forward.
        pooling: "mean", "first" or "last" of the places that the attention mask keeps.
        max_rows: rows that are read, drawn at random; their pooled features stay in memory.
        controls: whether the network with random weights is measured too, which takes as long again.
        seed: of the rows, folds, shuffled labels and random weights.

    Returns:
        The groups, bottom to top. `print` shows them; compare the ranks at equal rows only.

    Raises:
        TypeError: `dataset` has no length, or no rows by number.
        ValueError: no group gives a vector a row, or there are no rows.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> x = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
        >>> rows = [{"input": row, "label": int(row[0] > 0)} for row in x]
        >>> found = probe_model(model, rows)
        >>> [(row.group, row.width) for row in found]
        [('0', 8), ('head', 8)]

    References:
        You et al., "LogME: Practical Assessment of Pre-trained Models for Transfer Learning", ICML 2021.
        https://arxiv.org/abs/2102.11005
    """
    groups = groups or group_layers(model)
    padding = default_data_collator if processing_class is None else DataCollatorWithPadding(processing_class)
    source = Source(dataset, chosen_places(dataset, max_rows, seed), collate or padding, batch_size)
    part = read_rows(model, groups, source, pooling=pooling, seed=seed).sorted()
    alike = copies(part.features)
    found = measure(part.features, part.labels, shuffled=True, log_me=True, copies=alike, seed=seed)
    if controls and as_targets(part.labels) is not None:
        twin = random_twin(model, seed)
        drawn = read_rows(twin, groups, source, pooling=pooling, seed=seed).sorted()
        found["random_init"] = measure(drawn.features, drawn.labels, copies=alike, seed=seed).get("probe", {})
    widths = {name: features.shape[1] for name, features in part.features.items()}
    rows = tuple(_row(name, width, found) for name, width in widths.items())
    return ProbeTable(rows, len(source.places), why_no_probe(part.labels, part.unlabelled))


def rank_models(models: Mapping[str, nn.Module], dataset: Any, **options: Any) -> ProbeTable:
    """Return the layer groups of several models, best first by LogME: candidates for a task before any is trained.

    LogME rewards what a linear model can do with frozen features. How well it foretells fine-tuning is disputed: see
    the references, and the standard errors of the probes beside it.

    Args:
        models: by name.
        dataset: as in `probe_model`; or by name of the model, where each needs its own (another tokenizer).
        options: those of `probe_model`; a dict under `processing_class` gives each model its own.

    Raises:
        ValueError: there is no model, or the rows have no labels to rank by.

    Example:
        >>> import torch
        >>> models = {f"d={d}": nn.Sequential(nn.Linear(4, d), nn.Linear(d, 2)) for d in (2, 8)}
        >>> x = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
        >>> found = rank_models(models, [{"input": row, "label": int(row[0] > 0)} for row in x], controls=False)
        >>> len(found), found.rows[0].log_me >= found.rows[1].log_me
        (4, True)

    References:
        Agostinelli et al., "How stable are Transferability Metrics evaluations?", ECCV 2022.
        https://arxiv.org/abs/2204.01403
    """
    if not models:
        raise ValueError("there is no model to rank; expected at least one. Give {name: model}.")
    rows: list[GroupProbe] = []
    samples = 0
    for name, model in models.items():
        own = {
            key: value[name] if isinstance(value, dict) and name in value else value for key, value in options.items()
        }
        data = dataset[name] if isinstance(dataset, dict) and name in dataset else dataset
        found = probe_model(model, data, **own)
        rows += [GroupProbe(**{**asdict(row), "model": name}) for row in found]
        samples = found.samples
    if not any(math.isfinite(row.log_me) for row in rows):
        raise ValueError(
            f"the rows have no labels to rank by: {found.unprobed or 'no feature is finite'}. Add a column `labels` or "
            "`label` with one number a row and two values at least, or use probe_model, which measures without too."
        )
    order = sorted(rows, key=lambda row: -row.log_me if math.isfinite(row.log_me) else math.inf)
    return ProbeTable(tuple(order), samples)


def _row(name: str, width: int, found: Measures) -> GroupProbe:
    kinds = {"shuffled": "probe_shuffled", "chance": "probe_chance"}
    numbers = [field.name for field in fields(GroupProbe) if field.name not in ("model", "group", "width")]
    values = {number: found.get(kinds.get(number, number), {}).get(name, math.nan) for number in numbers}
    return GroupProbe("", name, width, **values)


def _shown(value: float, digits: int = 3) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else "-"
