"""The form that keeps the old outputs (Learning without Forgetting)."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from tl_callbacks.anchoring.forms.activations import Activations, head_parameters
from tl_callbacks.anchoring.forms.observing import Observed
from tl_callbacks.anchoring.operations.features import distillation_loss
from tl_callbacks.fingerprints import base_model
from tl_callbacks.frozen.state import openable
from tl_callbacks.groups import LayerGroups
from tl_callbacks.reading.points import ReadPoint, Stream, read_points


class Outputs(Activations):
    """The loss plus strength * the divergence of the old outputs from the reference's (Learning without Forgetting).

    The divergence is temperature^2 * KL(reference || tuned) of the softened outputs, its mean over the step's rows and
    over the places of a row that the mask keeps. The old outputs are logits of the model itself (a causal language
    model, or a classifier that keeps its head and learns further classes), or of an old head that is given. With
    adapters, prompts too, the reference is the model without them.

    Args:
        temperature: what logits are divided by, more than 0; 2 in the paper.
        classes: numbers of the old classes among the logits; None: all.
        old_head: where the model's head is new: the pretrained one, given what the new one is given. It is kept as it
            is; it must return logits.

    Raises:
        ValueError: the temperature is not above 0; when training begins: there is no logit of that number in `classes`.

    Example:
        >>> Outputs(classes=range(5))
        Outputs(temperature=2.0, classes=range(0, 5), old_head=None)

    References:
        Li and Hoiem, "Learning without Forgetting", ECCV 2016. https://arxiv.org/abs/1606.09282
    """

    name = "outputs"
    unit = "the factor of the divergence from the old outputs"
    by_group = False

    def __init__(
        self, *, temperature: float = 2.0, classes: Sequence[int] | None = None, old_head: nn.Module | None = None
    ) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"`temperature` is {temperature}; expected a number above 0, such as 2.")
        self.temperature = temperature
        self.classes = classes
        self.old_head = old_head

    def __repr__(self) -> str:
        head = None if self.old_head is None else type(self.old_head).__name__
        return f"Outputs(temperature={self.temperature}, classes={self.classes!r}, old_head={head})"

    def names(self, model: nn.Module, groups: LayerGroups, strengths: Mapping[str, float]) -> list[str]:
        """Return all that may train, with the head, unless an old one stands in for it."""
        left_out = set() if self.old_head is None else head_parameters(groups)
        return [name for name in openable(model) if name not in left_out] if strengths else []

    def take(self, model: nn.Module, names: list[str], given: Mapping[str, Tensor] | None) -> Mapping[str, Tensor]:
        """Keep the buffers; of an old head all that it is made of belongs to the reference too."""
        kept = super().take(model, names, given)
        head = {} if self.old_head is None else self.old_head.state_dict()
        return {**kept, **{f"old head {name}": tensor for name, tensor in head.items()}}

    def points(self, model: nn.Module) -> dict[str, ReadPoint]:
        """Return where the head is given its features, if an old head is to be given them too."""
        if self.old_head is None:
            return {}
        head = self.opening.groups.head or ""
        point = read_points(model, self.opening.groups).get(head)
        if point is None:
            raise ValueError(
                f"no module stands for the head group `{head}`, so what an old head would be given cannot be read. "
                'Choose form="features".'
            )
        self.old_head.to(next(model.parameters()).device).eval()
        return {head: point}

    def measures(self) -> list[str]:
        """Return one name."""
        return ["outputs"]

    def is_open(self, seen: Observed) -> bool:
        """Return whether the outputs have a gradient: so far as the model trains at all."""
        return self.old_head is None or any(features.requires_grad for features in seen.features.values())

    def terms(self, seen: Observed, reference: Observed) -> dict[str, tuple[float, Tensor]]:
        """Return the distillation loss."""
        config = getattr(base_model(self.opening.model), "config", None)
        problem = getattr(config, "problem_type", None) if self.old_head is None else None
        ours, theirs = self._logits(seen), self._logits(reference)
        if problem == "regression" or (ours.shape[-1] < 2 and problem != "multi_label_classification"):
            raise ValueError(
                f"the model has outputs of shape {tuple(ours.shape)} for the problem type {problem}; distillation "
                'expects the logits of two classes or more. Choose form="features".'
            )
        stream: Stream = "decoder" if getattr(config, "is_encoder_decoder", False) else "main"
        ours, theirs, mask = self._side_by_side(ours, theirs, seen, stream)
        independent = problem == "multi_label_classification"
        loss = distillation_loss(ours, theirs, mask, temperature=self.temperature, independent=independent)
        return {"outputs": (max(self.opening.strengths.values()), loss)}

    def what(self) -> str:
        """Return that outputs are kept."""
        return "keeps the old outputs near the reference's"

    def facts(self, strength: float | Mapping[str, float]) -> dict[str, Any]:
        """Return temperature, classes and whether an old head is given."""
        classes = None if self.classes is None else list(self.classes)
        return {"temperature": self.temperature, "classes": classes, "old_head": self.old_head is not None}

    def _logits(self, seen: Observed) -> Tensor:
        """Return the old logits of a forward, the classes last."""
        logits = self._of_old_head(seen) if self.old_head is not None else logits_in(seen.output)
        if logits.ndim == 4:
            logits = logits.movedim(1, -1)  # maps
        if self.classes is None:
            return logits
        if wrong := [number for number in self.classes if not 0 <= number < logits.shape[-1]]:
            raise ValueError(
                f"`classes` has {wrong[0]}, and there are {logits.shape[-1]} logits; expected numbers from 0 to "
                f"{logits.shape[-1] - 1}, of the old classes."
            )
        return logits[..., list(self.classes)]

    def _of_old_head(self, seen: Observed) -> Tensor:
        assert self.old_head is not None
        weights = {name: weight.detach() for name, weight in self.old_head.named_parameters()}
        return logits_in(functional_call(self.old_head, weights, (*seen.features.values(),)))


def logits_in(output: Any) -> Tensor:
    """Return the logits in what a model returns.

    Raises:
        ValueError: it returns none under that name.

    Example:
        >>> import torch
        >>> logits_in({"loss": torch.zeros(()), "logits": torch.ones(1, 2)})
        tensor([[1., 1.]])
    """
    found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if found is None and isinstance(output, Mapping):
        found = output.get("logits")
    if not isinstance(found, Tensor):
        raise ValueError(
            f"the model returns {type(output).__name__} without `logits`; expected an output of that name to distil. "
            'Choose form="features", or give an old head: Outputs(old_head=...).'
        )
    return found
