"""Squares of the gradients of each sample's log-likelihood, vectorised where the model's forward can be."""

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from tl_callbacks.anchoring.fisher.likelihood import (
    draw_labels,
    log_likelihood,
    mean_loss,
    predicts_each_label,
    predicts_next_token,
)

Sample = dict[Any, Any] | tuple[Any, ...]
"""A batch of one row: a dict with the labels in it, or (inputs, labels)."""
Loss = Callable[[Any, Any], Tensor]
_ALONE = "one backward a sample"
_LABELS = ("labels", "label", "label_ids")


def samples_of(batch: Mapping[str, Any] | Sequence[Any], device: torch.device) -> list[Sample]:
    """Return a batch's rows, as batches of one row each, on a device.

    Args:
        batch: a dict or a tuple; each tensor in it has one row a sample.
        device: where the rows should be.

    Raises:
        ValueError: it is neither a dict nor a tuple with labels, or its tensors differ in their rows.

    Example:
        >>> [sample["x"].tolist() for sample in samples_of({"x": torch.tensor([1, 2])}, torch.device("cpu"))]
        [[1], [2]]
    """
    if isinstance(batch, Tensor) or (not isinstance(batch, Mapping) and len(batch) < 2):
        what = "one tensor" if isinstance(batch, Tensor) else f"a {type(batch).__name__} of {len(batch)}"
        raise ValueError(f"a batch is {what}; expected a dict with `labels`, or a tuple (inputs, labels).")
    entries: dict[Any, Any] = dict(batch) if isinstance(batch, Mapping) else dict(enumerate(batch))
    entries = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in entries.items()}
    rows = {key: len(value) if value.ndim else 0 for key, value in entries.items() if isinstance(value, Tensor)}
    if len(set(rows.values())) != 1 or 0 in rows.values():
        raise ValueError(f"the tensors of a batch have {rows or 'no'} rows; expected one row a sample in each.")
    samples: list[Sample] = []
    for number in range(next(iter(rows.values()))):
        row = {key: value[number : number + 1] if key in rows else value for key, value in entries.items()}
        samples.append(row if isinstance(batch, Mapping) else tuple(row.values()))
    return samples


class SquaredGradients:
    """Adds up squared gradients, each of one sample's log-likelihood.

    Args:
        model: the model, in eval mode.
        parameters: the parameters by their name in the model.
        loss: a sample's negative log-likelihood from the model's outputs and the sample; None: from its logits.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, nn.Parameter], loss: Loss | None = None) -> None:
        self.model = model
        # Parameters of their own with the same memory: what the user froze or accumulated stays as it is.
        self.parameters = {name: nn.Parameter(parameter.detach()) for name, parameter in parameters.items()}
        self.loss = loss
        self._ways: dict[str, None] = {}
        self._vectorise = True  # until the model's forward cannot be
        self._next_token = predicts_next_token(model)
        self._each_label = predicts_each_label(model)
        self._encoder_decoder = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))

    @property
    def way(self) -> str:
        """How the gradients were taken."""
        return ", then ".join(self._ways or [_ALONE])

    def add(self, samples: Sequence[Sample], sums: Mapping[str, Tensor]) -> None:
        """Add the samples' squared gradients to `sums` in place."""
        if self._vectorise and len(samples) > 1 and _alike(samples):
            try:
                gradients = self._together(samples)
            except (RuntimeError, ValueError, NotImplementedError):  # an error of the samples' own comes again below
                self._vectorise = False
                self._ways[_ALONE] = None
            else:
                self._ways["torch.func"] = None
                for name, gradient in gradients.items():  # they may share memory: no square in place
                    sums[name].add_(gradient.to(sums[name].dtype).square().sum(0))
                return
        for sample in samples:
            for name, one in self._alone(sample).items():
                if one is not None:
                    sums[name].add_(one.to(sums[name].dtype).square())

    def relabelled(self, sample: Sample, generator: torch.Generator) -> Sample:
        """Return a sample with labels drawn from the model's predictions."""
        with torch.no_grad():
            logits = _logits(self.model, self._inputs(sample))
        key, labels = _labels(sample)
        drawn = draw_labels(logits, labels, generator, **self._meaning)
        return {**sample, key: drawn} if isinstance(sample, dict) else (*sample[:-1], drawn)

    def check_loss(self, sample: Sample) -> None:
        """Raise if the model's own loss of a sample is not the one that belongs to what is taken for its likelihood.

        Raises:
            ValueError: it is not.
        """
        if self.loss is not None or not isinstance(sample, dict):
            return
        key, labels = _labels(sample)
        if key not in inspect.signature(self.model.forward).parameters:
            return
        with torch.no_grad():
            outputs = self.model(**sample)
            self._each_label = predicts_each_label(self.model)  # settled by the first loss at the latest
            own = outputs.get("loss") if isinstance(outputs, Mapping) else None
            if own is None:
                return
            ours, name = mean_loss(_logits_in(outputs), labels, **self._meaning)
        if not ours.isnan() and not torch.allclose(own.double(), ours.double(), rtol=2e-2, atol=1e-3):
            raise ValueError(
                f"the loss of {type(self.model).__name__} for the first sample is {float(own):.6g}, but the "
                f"{name} of its logits is {float(ours):.6g}. Give `loss`, such as lambda outputs, batch: outputs.loss."
            )

    @property
    def _meaning(self) -> dict[str, bool]:
        return {"next_token": self._next_token, "each_label": self._each_label}

    def _negative(self, parameters: Mapping[str, Tensor], sample: Sample) -> Tensor:
        """Return a sample's negative log-likelihood as a function of the parameters."""
        if self.loss is not None:
            inputs = sample if isinstance(sample, dict) else sample[:-1]
            return self.loss(_call(_Functional(self.model, parameters), inputs), sample)
        logits = _logits(_Functional(self.model, parameters), self._inputs(sample))
        return -log_likelihood(logits, _labels(sample)[1], **self._meaning)

    def _inputs(self, sample: Sample) -> dict[str, Any] | tuple[Any, ...]:
        """Return what the model is called with: no labels, except where a decoder's input is made of them."""
        if not isinstance(sample, dict):
            return sample[:-1]
        kept = self._encoder_decoder
        return {key: value for key, value in sample.items() if kept or key not in _LABELS}

    def _together(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        keys = list(samples[0]) if isinstance(samples[0], dict) else list(range(len(samples[0])))
        columns = {key: [sample[key] for sample in samples] for key in keys}
        tensors = {key: torch.stack(column) for key, column in columns.items() if isinstance(column[0], Tensor)}

        def negative(parameters: Mapping[str, Tensor], given: dict[Any, Tensor]) -> Tensor:
            entries = {key: given.get(key, columns[key][0]) for key in keys}
            return self._negative(parameters, entries if isinstance(samples[0], dict) else tuple(entries.values()))

        with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            warnings.filterwarnings("ignore", "There is a performance drop")
            found: dict[str, Tensor] = vmap(grad(negative), in_dims=(None, 0))(self.parameters, tensors)
        return found

    def _alone(self, sample: Sample) -> dict[str, Tensor | None]:
        with torch.enable_grad():
            negative = self._negative(self.parameters, sample)
            if not negative.requires_grad:
                return {}
            gradients = torch.autograd.grad(negative, list(self.parameters.values()), allow_unused=True)
        return dict(zip(self.parameters, gradients, strict=True))


class _Functional:
    """A model called with other tensors in the place of its parameters."""

    def __init__(self, model: nn.Module, parameters: Mapping[str, Tensor]) -> None:
        self.model, self.parameters = model, dict(parameters)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return functional_call(self.model, self.parameters, args, kwargs)


def _call(model: Callable[..., Any], inputs: dict[str, Any] | tuple[Any, ...]) -> Any:
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def _logits(model: Callable[..., Any], inputs: dict[str, Any] | tuple[Any, ...]) -> Tensor:
    return _logits_in(_call(model, inputs))


def _logits_in(outputs: Any) -> Tensor:
    found = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", outputs)
    if not isinstance(found, Tensor):
        raise ValueError(f"the model returns {type(outputs).__name__} without logits. Give a `loss` of your own.")
    return found


def _labels(sample: Sample) -> tuple[str, Tensor]:
    if not isinstance(sample, dict):
        if not isinstance(sample[-1], Tensor):
            raise ValueError("a batch that is a tuple must be (inputs, labels), with tensors.")
        return "", sample[-1]
    for key in _LABELS:
        if isinstance(sample.get(key), Tensor):
            return key, sample[key]
    raise ValueError(f"a batch has no labels, only {', '.join(map(str, sample))}; expected a tensor under `labels`.")


def _alike(samples: Sequence[Sample]) -> bool:
    """Return whether samples, perhaps of two batches, can be stacked."""
    shapes = [
        [tuple(v.shape) for v in (s.values() if isinstance(s, dict) else s) if isinstance(v, Tensor)] for s in samples
    ]
    return all(shape == shapes[0] for shape in shapes)
