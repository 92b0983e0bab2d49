"""The form that keeps the features of chosen groups near the reference's (DELTA without attention)."""

from collections.abc import Mapping

from torch import Tensor, nn

from tl_callbacks.anchoring.forms.activations import Activations, head_parameters
from tl_callbacks.anchoring.forms.observing import Observed
from tl_callbacks.anchoring.operations.features import feature_distance
from tl_callbacks.frozen.state import openable
from tl_callbacks.groups import LayerGroups
from tl_callbacks.reading.adapters import has_prompt
from tl_callbacks.reading.points import ReadPoint, read_points


class Features(Activations):
    """The loss plus strength * the mean squared difference of each group's output to the reference's.

    The mean is over the step's rows, over the places of a row that the mask keeps, and over the features: DELTA without
    its attention. A group is read where `RepresentationProbes` reads it. The tuned model computes with dropout and
    batch statistics while it trains, the reference without. What is frozen from the input up to a group has no term.
    With adapters the reference is the model without them; of a prompt it is the prompt as it was made.

    Example:
        >>> Features()
        Features()

    References:
        Li et al., "DELTA: Deep Learning Transfer using Feature Map with Attention for Convolutional Networks",
        ICLR 2019. https://arxiv.org/abs/1901.09229
    """

    name = "features"
    unit = "the factor of the mean squared difference"

    def __repr__(self) -> str:
        return "Features()"

    def names(self, model: nn.Module, groups: LayerGroups, strengths: Mapping[str, float]) -> list[str]:
        """Return all that may train, for the reference runs whole; without the head, whose weights are new."""
        left_out = set() if groups.head in strengths else head_parameters(groups)
        return [name for name in openable(model) if name not in left_out] if strengths else []

    def take(self, model: nn.Module, names: list[str], given: Mapping[str, Tensor] | None) -> Mapping[str, Tensor]:
        """Keep the buffers; what is read of a prompt is not there without it, so that it is compared with its start."""
        kept = super().take(model, names, given)
        self._switches_off &= not has_prompt(model)
        return kept

    def points(self, model: nn.Module) -> dict[str, ReadPoint]:
        """Return where the anchored groups are read."""
        found = read_points(model, self.opening.groups)
        if missing := [name for name in self.opening.strengths if name not in found]:
            raise ValueError(
                f"no module stands for the group `{missing[0]}` ({len(missing)} such in all), so its features cannot "
                "be read. Name it in `exclude`, or merge it with the group above."
            )
        self._points = {name: found[name] for name in self.opening.strengths}
        return self._points

    def measures(self) -> list[str]:
        """Return the groups' names."""
        return [f"features/{name}" for name in self._points]

    def is_open(self, seen: Observed) -> bool:
        """Return whether the features of any group have a gradient."""
        return any(features.requires_grad for features in seen.features.values())

    def terms(self, seen: Observed, reference: Observed) -> dict[str, tuple[float, Tensor]]:
        """Return the distance of each group that has a gradient and that both forwards have passed."""
        both = [n for n, ours in seen.features.items() if ours.requires_grad and n in reference.features]
        return {
            f"features/{name}": (self.opening.strengths[name], self._distance(name, seen, reference)) for name in both
        }

    def what(self) -> str:
        """Return which groups' features are kept."""
        return f"keeps the features of {', '.join(self._points)} near the reference's"

    def _distance(self, name: str, seen: Observed, reference: Observed) -> Tensor:
        stream = self._points[name].stream
        ours, theirs, mask = self._side_by_side(seen.features[name], reference.features[name], seen, stream)
        if ours.shape != theirs.shape:
            raise ValueError(
                f"the group `{name}` has features of shape {tuple(ours.shape)} in training and "
                f"{tuple(theirs.shape)} in the reference's forward on the same inputs; expected the same, so that each "
                "place can be compared. Name the group in `exclude`, or choose another form."
            )
        return feature_distance(ours, theirs, mask)
