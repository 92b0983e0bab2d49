"""The task that the model was trained on before: by its own head, and by a new linear probe on the features."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from tl_callbacks.forgetting.measures import Measure
from tl_callbacks.forgetting.models import head_replaced, logits_in, own_head_finding
from tl_callbacks.forgetting.readings import Reading
from tl_callbacks.groups import LayerGroups
from tl_callbacks.probing.capture import Batch, Capture
from tl_callbacks.probing.evaluation import Collate, resolved, source_of
from tl_callbacks.probing.linear_probe import held_out_ridge
from tl_callbacks.probing.measures import FOLDS, narrow
from tl_callbacks.probing.passes import Part
from tl_callbacks.probing.rows import Step, called, forwards
from tl_callbacks.probing.scores import classes_of, moments_of_folds, stratified_folds
from tl_callbacks.probing.targets import LABELS, as_targets, why_no_probe
from tl_callbacks.reading.pooling import Pooling

Score = Callable[[Tensor, Tensor], Tensor]

_SEVERAL = "its rows have several labels, as of tokens; expected a class a row"


class SourceTask(Measure):
    """Accuracy on the source task by its own head, and of a probe that is fitted anew on the features below.

    The first falls where features are lost and where they have merely moved away from the head (head drift); the
    second where they are lost alone. So what the two differ by can be had back by a new head. Rows are made into
    batches by the Trainer's collator. The probe is a ridge probe by 5 folds, the same ones each time, of what the head
    is given; there is none of labels that are numbers, several a row, or those of tokens. Retention is now / base.

    Args:
        rows: of the source task, with its labels, -100 none; or the name of one of the Trainer's evaluation sets.
        head: the source task's head, all modules of it (DistilBERT's are two, with a ReLU between them), which takes
            what the model's own head takes; None: the model's own, where that is
            still the source task's.
        classes: those among which the head chooses, where it has others too, whose logits count as -inf; None: all.
        score: from logits and labels one number a row, (rows,), 0 or more, higher is better; None: accuracy.
        pooling: of the features for the probe: "mean", "first" or "last".
        collate: makes a batch of rows; None: the Trainer's collator.
        max_rows: rows that are read, drawn at random.
        seed: of rows and folds.
        name: under which it is logged; the probe's ends in `_reprobed`.

    Raises:
        ValueError: a number is out of range.

    Example:
        >>> SourceTask([{"input_ids": [1], "labels": 0}], classes=[0, 1])
        SourceTask(rows=1, own_head=True)

    References:
        Davari et al., "Probing Representation Forgetting in Supervised and Unsupervised Continual Learning", CVPR 2022.
        https://arxiv.org/abs/2203.13381
    """

    def __init__(
        self,
        rows: Any,
        *,
        head: nn.Module | None = None,
        classes: Sequence[int] | None = None,
        score: Score | None = None,
        pooling: Pooling = "mean",
        collate: Collate | None = None,
        max_rows: int = 2000,
        seed: int = 0,
        name: str = "source",
    ) -> None:
        super().__init__(name, max_rows=max_rows, seed=seed)
        if classes is not None and (len(set(classes)) < 2 or min(classes) < 0):
            raise ValueError(
                f"`classes` are {list(classes)}; expected two or more numbers from 0 to choose among, or None for all."
            )
        self.given = rows
        self.head = head
        self.classes = classes
        self.own_score = score
        self.pooling = pooling
        self.collate = collate
        self._unprobed = ""

    def __repr__(self) -> str:
        rows = repr(self.given) if isinstance(self.given, str) else len(self.given)
        return f"SourceTask(rows={rows}, own_head={self.head is None})"

    @property
    def definitions(self) -> dict[str, str]:
        """The head's and the probe's."""
        what = "accuracy" if self.own_score is None else "score"
        return {
            self.name: f"{what} by the source task's head; retention: now / before",
            f"{self.name}_reprobed": f"not measured: {self._unprobed}"
            if self._unprobed
            else "accuracy of a new linear probe on the features; retention: now / before",
        }

    @property
    def unmeasured(self) -> dict[str, str]:
        """Why nothing is probed, where that is so."""
        return {f"{self.name}_reprobed": self._unprobed} if self._unprobed else {}

    def findings(self, trainer: Trainer) -> list[str]:
        """Return what would go wrong: rows that cannot be read, a head that trains."""
        return super().findings(trainer) + own_head_finding(trainer, self.head, self.name)

    def prepare(self, trainer: Trainer) -> None:
        """Take the rows."""
        dataset = resolved(trainer, self.given)
        self._source = source_of(trainer, dataset, self.max_rows, self.seed, collate=self.collate)
        row = dataset[int(self._source.places[0])] if len(self._source.places) else None
        words = [row.get(key) for key in self._source.label_names] if isinstance(row, Mapping) else []
        own = getattr(self._source.collate, "__module__", "").startswith("transformers.")
        if own and (found := next((word for word in words if isinstance(word, str)), None)) is not None:
            raise ValueError(f"the labels are words, such as {found!r}; expected the numbers of the classes.")

    def read(self, model: nn.Module, groups: LayerGroups, *, base: bool, rank: int, ranks: int) -> Part:
        """Return hits by the head, and features, of this rank's rows."""
        assert self._source is not None
        names, hits, features, labels = self._source.label_names, [], [], []

        def take(step: Step) -> None:
            held = (step.batch.get(name) for name in (*names, *LABELS))
            truth = next((value.cpu() for value in held if isinstance(value, Tensor)), None)
            if truth is None:
                raise ValueError(f"{self.name}: the rows have no labels. Expected the source task's, as integers.")
            truth = truth.long() if truth.dtype == torch.bool else truth
            hits.append(self._hits(logits_in(step.output).cpu(), truth))
            features.append(_top(seen.pop() if seen else Batch({}, {}), groups))
            labels.append(truth.reshape(len(truth), -1))

        seen: list[Batch] = []
        call = lambda batch: called(model, batch, labels=False)  # noqa: E731
        with Capture(model, groups, seen.append, pooling=self.pooling), head_replaced(model, groups, self.head):
            places, kept = forwards(model, self._source, take, call=call, seed=self.seed, rank=rank, ranks=ranks)
        single = all(part.shape[1] == 1 for part in labels)
        found = {"hits": torch.cat(hits)[kept], "features": torch.cat(features)[kept].double()}
        return Part(places[kept], found, torch.cat(labels)[kept, 0] if single else None, "" if single else _SEVERAL)

    def score(self, part: Part) -> dict[str, Reading]:
        """Return the accuracy of the head and of the probe, over the rows of all ranks."""
        hits, counts = part.features["hits"][:, :2].unbind(1)
        frequent = part.features["hits"][:, 2:].sum(0)
        chance = float(frequent.max() / counts.sum().clamp(min=1)) if len(frequent) else _chance(part.labels)
        found = {self.name: Reading(hits, counts, "score", chance if self.own_score is None else 0.0)}
        numbers = part.labels is not None and part.labels.is_floating_point()
        self._unprobed = "its labels are numbers, no classes" if numbers else why_no_probe(part.labels, _SEVERAL)
        targets = as_targets(part.labels)
        if self._unprobed or targets is None:
            return found
        again = _reprobed(narrow(part.features["features"]), targets[0]["task"], targets[1], seed=self.seed)
        return {**found, f"{self.name}_reprobed": Reading(*again, "score", _chance(part.labels))}

    def _hits(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return by row the sum of scores and how many labels count; of labels of tokens also how many of each class.

        (rows, 2), or (rows, 2 + classes).
        """
        if self.classes is not None:
            if max(self.classes) >= logits.shape[-1]:
                raise ValueError(
                    f"{self.name}: `classes` has {max(self.classes)} and the head gives {logits.shape[-1]} logits; "
                    f"expected numbers from 0 to {logits.shape[-1] - 1}."
                )
            others = torch.ones(logits.shape[-1], dtype=torch.bool)
            others[list(self.classes)] = False
            logits = logits.masked_fill(others, -torch.inf)
        if self.own_score is not None:
            scores = self.own_score(logits, labels)
            if not isinstance(scores, Tensor) or scores.shape != (len(labels),):
                got = f"shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else f"type {type(scores).__name__}"
                raise ValueError(
                    f"{self.name}: `score` gives a value of {got} for {len(labels)} rows; expected a tensor of shape "
                    f"({len(labels)},), one number a row."
                )
            return torch.stack([scores.double(), torch.ones(len(scores), dtype=torch.float64)], 1)
        labels = labels[:, 0] if labels.ndim == logits.ndim and labels.shape[1:] == (1,) else labels
        if labels.is_floating_point() or labels.shape != logits.shape[:-1]:
            raise ValueError(
                f"{self.name}: labels of shape {tuple(labels.shape)} and dtype {labels.dtype} are no classes of logits "
                f"of shape {tuple(logits.shape)}. Expected an integer for each; give `score` for another metric."
            )
        of_tokens, labels = labels.ndim > 1, labels.reshape(len(labels), -1)
        counts = labels >= 0
        right = (logits.argmax(-1).reshape(labels.shape) == labels) & counts
        found = torch.stack([right.sum(1), counts.sum(1)], 1).double()
        if not of_tokens:
            return found
        known = torch.where(counts & (labels < logits.shape[-1]), labels, logits.shape[-1])
        by_class = torch.zeros(len(labels), logits.shape[-1] + 1, dtype=torch.float64)
        by_class.scatter_add_(1, known, torch.ones_like(known, dtype=torch.float64))
        return torch.cat([found, by_class[:, :-1]], 1)


def _top(batch: Batch, groups: LayerGroups) -> Tensor:
    """Return what the head is given; of a model without one what its uppermost group gives."""
    if not batch.features:
        raise ValueError("no layer group gave a vector a row. Give ForgettingMonitor groups whose modules are called.")
    name = groups.head if groups.head in batch.features else list(batch.features)[-1]
    return batch.features[name].cpu()


def _reprobed(features: Tensor, labels: Tensor, rows: Tensor, *, seed: int) -> tuple[Tensor, Tensor]:
    """Return hits of held-out probes and ones, by row; 0 and 0 where a row has no label."""
    kept = features[rows]
    fold, kinds = stratified_folds(labels, FOLDS, seed=seed), classes_of({"task": labels})
    parts = moments_of_folds(kept, {"task": labels}, fold, FOLDS, kinds)
    scores = held_out_ridge(parts, kept, fold)["task"]
    right = (scores.argmax(1) == labels) & scores.isfinite().all(1)
    hits, counts = torch.zeros(len(rows), dtype=torch.float64), rows.double()
    hits[rows] = right.double()
    return hits, counts


def _chance(labels: Tensor | None) -> float:
    """Return the share of the most frequent class."""
    known = labels[labels >= 0] if labels is not None and not labels.is_floating_point() else None
    return float(torch.bincount(known).max()) / len(known) if known is not None and len(known) else 0.0
