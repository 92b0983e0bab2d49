"""The diagonal of the Fisher information: how much each weight matters to a task."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tl_callbacks.anchoring.fisher.per_sample import Loss, SquaredGradients, samples_of
from tl_callbacks.fingerprints import tensor_hash
from tl_callbacks.names import closest, normalise
from tl_callbacks.reading.quiet import evaluating

_KEY = "tl_callbacks"


class Fisher(dict[str, Tensor]):
    """The importance of each parameter's elements by normalised name, 0 or more, and `facts` of how it was estimated.

    Args:
        values: parameter name to a tensor of the parameter's shape.
        facts: JSON values.

    Example:
        >>> Fisher({"weight": torch.ones(2)}, {"samples": 8}).facts
        {'samples': 8}
    """

    def __init__(self, values: Mapping[str, Tensor], facts: Mapping[str, Any] | None = None) -> None:
        super().__init__(values)
        self.facts = dict(facts or {})


def diagonal_fisher(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any] | Sequence[Any]],
    *,
    names: Iterable[str] | None = None,
    labels: Literal["given", "sampled"] = "given",
    loss: Loss | None = None,
    samples: int | None = None,
    chunk_size: int = 8,
    seed: int = 0,
    reduce: bool = False,
) -> Fisher:
    """Return the diagonal of the Fisher information: the mean over samples of the squared gradient of log p(y | x).

    The gradient of each sample is squared alone. The square of a batch's mean gradient, which some packages take, is
    another quantity: it goes to 0 where the model fits the data, however much a weight matters.

    `labels="given"` takes the data's labels, which is the *empirical* Fisher; `"sampled"` draws them from the model's
    own predictions, an unbiased estimate of the Fisher information itself. A sample is one row: of a text with many
    labels the log-likelihoods are added before the gradient is squared.

    What log p is follows from the labels: classes, targets with Gaussian noise, or, of a model whose `problem_type` is
    "multi_label_classification", labels of which each holds or not by itself. Where a model of transformers has a loss
    of its own, it must be the one that belongs to it.

    The model is in eval mode meanwhile, and left as it was: modes, gradients, random states. Gradients come from
    `torch.func`, `chunk_size` samples at a time, or, where the model's forward cannot be vectorised (as that of a
    transformers model which looks whether its attention mask is all ones), from one backward a sample. The values are
    the same; `facts["gradients"]` says which it was.

    Args:
        model: a model without wrappers; one of transformers, or one that returns logits.
        batches: dicts of tensors with one row a sample, with the labels under `labels`; or tuples (inputs, labels).
        names: normalised names of the parameters, such as `group.parameters`; None: those that train.
        labels: "given" or "sampled".
        loss: the negative log-likelihood of one sample, a scalar, from the model's outputs and the batch, which has one
            row and goes to the model with its labels; None: by `log_likelihood`, from the logits.
        samples: how many samples to take at the most; None: all.
        chunk_size: samples whose gradients are held at once; memory: so many times the parameters.
        seed: of the labels that are sampled.
        reduce: whether the ranks have seen different samples and each should have the mean over all of them. Give each
            rank another `seed` then.

    Returns:
        A `Fisher` of tensors in float32, or float64 for parameters in float64, on the parameters' devices.

    Raises:
        ValueError: an argument is out of its range, a name is unknown, there are no samples, weights are sharded, the
            labels are missing or do not go with the logits, the model's own loss is another one, or a gradient is not
            finite.

    Example:
        >>> batches = [(torch.randn(4, 3), torch.tensor([0, 1, 1, 0]))]
        >>> fisher = diagonal_fisher(nn.Linear(3, 2), batches)
        >>> {name: tuple(tensor.shape) for name, tensor in fisher.items()}, fisher.facts["samples"]
        ({'weight': (2, 3), 'bias': (2,)}, 4)

    References:
        Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks", PNAS 2017.
        https://arxiv.org/abs/1612.00796
        Kunstner, Balles and Hennig, "Limitations of the Empirical Fisher Approximation for Natural Gradient Descent",
        NeurIPS 2019. https://arxiv.org/abs/1905.12558
    """
    if labels not in ("given", "sampled"):
        raise ValueError(f'`labels` is {labels!r}; expected "given" or "sampled".')
    if labels == "sampled" and loss is not None:
        raise ValueError('labels="sampled" draws from the logits; leave `loss` out, or take labels="given".')
    if chunk_size < 1 or (samples is not None and samples < 1):
        raise ValueError(f"`chunk_size` is {chunk_size} and `samples` is {samples}; expected numbers from 1.")
    chosen = _chosen(model, names)
    sums = {name: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for name, p in chosen.items()}
    device = next(iter(chosen.values())).device
    generator = torch.Generator().manual_seed(seed)
    count = 0
    with evaluating(model):
        gradients = SquaredGradients(model, chosen, loss)
        for batch in batches:
            rows = samples_of(batch, device)[: None if samples is None else samples - count]
            if count == 0:
                gradients.check_loss(rows[0])
            if labels == "sampled":
                rows = [gradients.relabelled(row, generator) for row in rows]
            for start in range(0, len(rows), chunk_size):
                gradients.add(rows[start : start + chunk_size], sums)
                _check_finite(sums, count + start)
            count += len(rows)
            if count == samples:
                break
    if reduce:
        count = _add_ranks(sums, count, device)
    if count == 0:
        raise ValueError("`batches` gave no samples; expected at least one. An iterator can be read only once.")
    facts = {
        "kind": "empirical" if labels == "given" else "sampled",
        "samples": count,
        "gradients": gradients.way,
        "weights": {normalise(name): tensor_hash(parameter) for name, parameter in chosen.items()},
    }
    return Fisher({normalise(name): total.div_(count) for name, total in sums.items()}, facts)


def save_fisher(fisher: Mapping[str, Tensor], path: str | os.PathLike[str], **facts: Any) -> None:
    """Write a diagonal Fisher to a safetensors file, with how it was estimated in the metadata.

    Args:
        fisher: as `diagonal_fisher` returned it, or another importance by parameter name.
        path: the file.
        facts: further JSON values to keep with it, such as `data="wikitext"`.

    Example:
        >>> import tempfile
        >>> path = f"{tempfile.mkdtemp()}/fisher.safetensors"
        >>> save_fisher(Fisher({"weight": torch.ones(2)}, {"samples": 8}), path, data="digits")
        >>> loaded = load_fisher(path)
        >>> loaded["weight"], loaded.facts
        (tensor([1., 1.]), {'samples': 8, 'data': 'digits'})
    """
    known = {**(fisher.facts if isinstance(fisher, Fisher) else {}), **facts}
    tensors = {name: tensor.detach().contiguous() for name, tensor in fisher.items()}
    save_file(tensors, path, {"format": "pt", _KEY: json.dumps({"fisher": known})})


def load_fisher(path: str | os.PathLike[str]) -> Fisher:
    """Return a Fisher that `save_fisher` wrote, on the CPU, with its facts.

    Args:
        path: the file.

    Raises:
        ValueError: another kind of file, or a damaged one.

    Example:
        See `save_fisher`.
    """
    try:
        with safe_open(path, framework="pt") as file:
            kept = json.loads((file.metadata() or {}).get(_KEY, "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(
            f"`{path}` cannot be read: {error}; expected a whole file that save_fisher wrote. Write it anew."
        ) from error
    if not isinstance(kept, dict) or not isinstance(kept.get("fisher"), dict):
        raise ValueError(f"`{path}` holds no Fisher information; expected a file that save_fisher wrote.")
    return Fisher(tensors, kept["fisher"])


def check_importance(
    importance: Mapping[str, Tensor], parameters: Mapping[str, Tensor], names: Iterable[str]
) -> dict[str, Tensor]:
    """Return the importance of some parameters by normalised name.

    Args:
        importance: by parameter name.
        parameters: all of the model's, by normalised name.
        names: normalised names of those that need one.

    Raises:
        ValueError: an entry names no parameter, a parameter has none or one of another shape, or it is negative or not
            finite.

    Example:
        >>> list(check_importance({"a": torch.ones(1)}, {"a": torch.zeros(1)}, ["a"]))
        ['a']
    """
    known = {normalise(name): tensor for name, tensor in importance.items()}
    for name, tensor in known.items():
        if name not in parameters:
            raise ValueError(
                f"the importance has an entry `{name}`, but the model has no such parameter (closest: "
                f"{closest(name, parameters)}). Estimate it for this architecture, or leave the entry out."
            )
        if tensor.shape != parameters[name].shape:
            raise ValueError(
                f"the importance of `{name}` has shape {tuple(tensor.shape)}; expected "
                f"{tuple(parameters[name].shape)}. Estimate it for this architecture."
            )
        if not bool((tensor >= 0).all() and tensor.isfinite().all()):
            raise ValueError(f"the importance of `{name}` is negative or not finite somewhere; expected 0 or more.")
    for name in names:
        if name not in known:
            raise ValueError(
                f"the importance lacks `{name}` (closest: {closest(name, known)}). Estimate it for all anchored "
                "parameters, or name the group in `exclude`."
            )
    return {name: known[name] for name in names}


def weights_elsewhere(importance: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> list[str]:
    """Return the names whose weights are not those that a Fisher was estimated at; of other importances none.

    Args:
        importance: a `Fisher`, or another mapping.
        weights: the reference, by normalised name.

    Example:
        >>> fisher = diagonal_fisher(nn.Linear(1, 2), [(torch.ones(1, 1), torch.tensor([0]))], names=["bias"])
        >>> weights_elsewhere(fisher, {"bias": torch.zeros(2)})
        ['bias']
    """
    known = importance.facts.get("weights", {}) if isinstance(importance, Fisher) else {}
    held = {name: weight for name, weight in weights.items() if name in known and not weight.is_meta}
    return [name for name, weight in held.items() if tensor_hash(weight) != known[name]]


def _chosen(model: nn.Module, names: Iterable[str] | None) -> dict[str, nn.Parameter]:
    """Return the parameters that are asked for, by their name in the model."""
    known = {normalise(name): (name, parameter) for name, parameter in model.named_parameters()}
    wanted = [name for name, (_, p) in known.items() if p.requires_grad] if names is None else list(names)
    for name in wanted:
        if name not in known:
            raise ValueError(
                f"the model has no parameter `{name}` (closest: {closest(name, known)}). Give names as "
                "group.parameters holds them."
            )
    chosen = dict(known[name] for name in wanted)
    if not chosen:
        raise ValueError("no parameter trains and no `names` are given; expected parameters to estimate for.")
    for name, parameter in chosen.items():
        if isinstance(parameter, DTensor) or parameter.is_meta or not parameter.is_floating_point():
            raise ValueError(
                f"`{name}` is sharded, empty or quantised; expected whole weights, such as before train()."
            )
    return chosen


def _check_finite(sums: Mapping[str, Tensor], start: int) -> None:
    for name, total in sums.items():
        if not bool(total.sum().isfinite()):
            raise ValueError(
                f"the squared gradient of `{name}` is not finite at sample {start} or one of the next. Leave out "
                "samples without a finite loss, or estimate in float32 or bfloat16."
            )


def _add_ranks(sums: Mapping[str, Tensor], count: int, device: torch.device) -> int:
    """Add the sums of all ranks in place; return the number of samples of all."""
    if not (dist.is_available() and dist.is_initialized()):
        return count
    for total in sums.values():
        dist.all_reduce(total)
    counted = torch.tensor(count, device=device)
    dist.all_reduce(counted)
    return int(counted)
