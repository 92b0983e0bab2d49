"""What probes predict: the labels in a batch, the targets they give, and in words why there are none."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

LABELS = ("labels", "label", "label_ids")
VARYING = "its labels are of another width in each batch, as of tokens; expected one a row"
LEAST = 6  # rows with a label: one more than folds


def labels_in(batch: Any, names: Sequence[str]) -> tuple[Tensor | None, str]:
    """Return the labels of a batch, (n,), or (n, labels) of floating point; or None and why there are none.

    Args:
        batch: what the collator made.
        names: keys that hold labels, in the order in which they count; then the usual ones.

    Example:
        >>> labels_in({"labels": torch.tensor([2, 0])}, ())[0]
        tensor([2, 0])
        >>> labels_in({"labels": torch.zeros(2, 8, dtype=torch.long)}, ())[1]
        'its labels are (2, 8) integers a batch, as of tokens; expected one a row, or 0.0 and 1.0 for several a row'
    """
    held = [name for name in dict.fromkeys((*names, *LABELS)) if name in batch] if isinstance(batch, Mapping) else []
    held = [name for name in held if isinstance(batch[name], Tensor)]
    if not held:
        return None, "its batches have no labels; expected numbers under `labels` or `label`"
    if len(held) > 1 and not {*held} & {*LABELS}:
        return None, f"its rows have several labels ({', '.join(held)}); expected one"
    value: Tensor = batch[held[0]]
    if value.ndim == 2 and value.shape[1] != 1 and value.is_floating_point():
        return value, ""
    if value.ndim > 2 or (value.ndim == 2 and value.shape[1] != 1):
        kind = "numbers" if value.is_floating_point() else "integers"
        return None, (
            f"its labels are {tuple(value.shape)} {kind} a batch, as of tokens; expected one a row, or 0.0 and 1.0 for "
            "several a row"
        )
    return value.flatten(), ""


def agreed(labels: Tensor | None, unlabelled: str, ranks: int) -> tuple[Tensor | None, str]:
    """Return labels, and why there are none, where all ranks have labels of one shape; none where they differ.

    Args:
        labels: of this rank's rows.
        unlabelled: why there are none.
        ranks: how many there are; where more than one, call it on all.

    Example:
        >>> agreed(None, "its batches have no labels", 1)
        (None, 'its batches have no labels')
    """
    if ranks == 1 or (labels is None and not unlabelled):  # of features alone nothing is exchanged
        return labels, unlabelled
    found = gather_object([(None if labels is None else tuple(labels.shape[1:]), unlabelled)])
    if len({shape for shape, _ in found}) > 1:
        labels = None
    return labels, "" if labels is not None else next((why for _, why in found if why), VARYING)


def as_targets(labels: Tensor | None) -> tuple[dict[str, Tensor], Tensor] | None:
    """Return targets for probes by label set and the rows that have them; None where there are not two values.

    Integers are classes, numbered from 0; floating point holds values, except in a column of 0 and 1 of several, which
    are two classes. Negative classes and values that are no numbers mean that a row has no label. Columns that do not
    vary are left out.

    Args:
        labels: (n,), or (n, k): k labels a row.

    Example:
        >>> targets, rows = as_targets(torch.tensor([7, -100, 3, 7]))
        >>> targets["task"].tolist(), rows.tolist()
        ([1, 0, 1], [True, False, True, True])
        >>> list(as_targets(torch.tensor([[0.0, 1.0, 0.3], [1.0, 1.0, 0.5]]))[0])
        ['0', '2']
    """
    if labels is None:
        return None
    labels = labels.long() if labels.dtype == torch.bool else labels
    rows = _labelled(labels)
    kept, found = labels[rows], {}
    columns = {"task": kept} if kept.ndim == 1 else {str(n): column for n, column in enumerate(kept.T.contiguous())}
    for name, column in columns.items():
        values = torch.unique(column)
        if len(values) > 1:
            classes = not column.is_floating_point() or (kept.ndim == 2 and values.tolist() == [0, 1])
            found[name] = torch.searchsorted(values, column) if classes else column.double()
    return (found, rows) if found else None


def why_no_probe(labels: Tensor | None, unlabelled: str) -> str:
    """Return in words why there is no probe of a set; "" where there is one.

    Args:
        labels: of all its rows.
        unlabelled: why there are none, as `labels_in` says.

    Example:
        >>> why_no_probe(torch.tensor([1, 1, -100]), "")
        '2 of its rows have a label; expected 6 or more'
        >>> why_no_probe(torch.ones(20), "")
        'all its labels are equal'
        >>> why_no_probe(torch.arange(20) % 2, "")
        ''
    """
    if labels is None:
        return unlabelled
    labelled = int(_labelled(labels).sum())
    if labelled < LEAST:
        return f"{labelled} of its rows have a label; expected {LEAST} or more"
    return "" if as_targets(labels) is not None else "all its labels are equal"


def _labelled(labels: Tensor) -> Tensor:
    if not labels.is_floating_point():
        return labels >= 0
    return labels.isfinite() if labels.ndim == 1 else labels.isfinite().all(dim=1)
