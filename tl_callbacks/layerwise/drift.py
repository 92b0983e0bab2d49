"""The rule: each group's rate from how far an earlier run moved its representations. No torch."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from tl_callbacks.groups import LayerGroups
from tl_callbacks.names import closest

Direction = Literal["follow", "hold"]
_STATE = "trainer_state.json"


def rates_from_drift(
    history: Sequence[Mapping[str, Any]] | Mapping[str, Any] | str | Path,
    groups: LayerGroups,
    *,
    measure: str = "drift",
    direction: Direction = "follow",
    strength: float = 1.0,
    floor: float = 0.1,
) -> dict[str, float]:
    """Return factors for `layerwise_optimizer(factors=...)` from the drift that an earlier run logged for each group.

    With d the last drift that was logged for a group,

    - `follow`: (d / the largest d) ** strength. Groups that the task moved little get small rates in the next run:
      layer-wise decay with ratios that were measured. Auto-RGN weighs layers by a measured ratio to the largest in the
      same way.
    - `hold`: (the smallest d / d) ** strength. To first order drift is proportional to the rate, so that with
      `strength=1` all groups would move as little as the one that moved least: for what must be kept, at the price of
      the task.

    No factor is below `floor`, so that no group stops. The drift of representations adds up with depth, from all groups
    below; that of weights (`measure="anchor"`, what `WeightAnchoring` logs, here as the root mean square over a group's
    parameters) is a group's own. Groups for which nothing was logged, and the head, which has no pretrained state, are
    left out, and so keep the factor that `decay` and `head_factor` give them.

    Args:
        history: `log_history` of the earlier run, what `trainer_state.json` holds, its path, or the run's folder.
        groups: the layer groups of the new run, with the names of the earlier one.
        measure: what was logged as `tl/<measure>/<group>`, 0 or more; `cka`, a similarity, counts as 1 - CKA.
        direction: `follow` or `hold`.
        strength: exponent, in [0, 1]; 0 makes all factors 1.
        floor: the smallest factor, in (0, 1].

    Returns:
        Group name to factor in [floor, 1], bottom to top.

    Raises:
        FileNotFoundError: the folder has no `trainer_state.json`.
        ValueError: nothing of this measure was logged for these groups, nothing moved, or a number is out of range.

    Example:
        >>> from tl_callbacks import LayerGroup
        >>> groups = LayerGroups(tuple(LayerGroup(name, (name,)) for name in ("low", "high", "head")), "head")
        >>> log = [{"tl/cka/low": 0.9, "tl/cka/high": 0.6, "step": 40}]
        >>> {name: round(factor, 2) for name, factor in rates_from_drift(log, groups, measure="cka").items()}
        {'low': 0.25, 'high': 1.0}

    References:
        Lee et al., "Surgical Fine-Tuning Improves Adaptation to Distribution Shifts", ICLR 2023 (Auto-RGN).
        https://arxiv.org/abs/2210.11466
        Ro and Choi, "AutoLR: Layer-wise Pruning and Auto-tuning of Learning Rates in Fine-tuning of Deep Networks",
        AAAI 2021 (rates from how far each layer moved). https://arxiv.org/abs/2002.06048
    """
    if direction not in get_args(Direction):
        raise ValueError(f"`direction` is {direction!r}; expected one of {', '.join(get_args(Direction))}.")
    if not 0 <= strength <= 1:
        raise ValueError(f"`strength` is {strength}; expected an exponent in [0, 1].")
    if not 0 < floor <= 1:
        raise ValueError(f"`floor` is {floor}; expected the smallest factor, in (0, 1].")
    drifts = _drifts(_log(history), groups, measure)
    if max(drifts.values()) <= 0:
        raise ValueError(
            f"`tl/{measure}/...` is without drift in all {len(drifts)} groups, so nothing can be told from it. Take "
            "the record of a run that trained these groups."
        )
    # A group without drift was frozen or stood still: it is the lowest to follow, and needs no holding.
    if direction == "follow":
        ratios = {name: drift / max(drifts.values()) for name, drift in drifts.items()}
    else:
        least = min(drift for drift in drifts.values() if drift > 0)
        ratios = {name: least / drift if drift > 0 else 1.0 for name, drift in drifts.items()}
    return {name: max(floor, ratio**strength) for name, ratio in ratios.items()}


def _drifts(log: Sequence[Mapping[str, Any]], groups: LayerGroups, measure: str) -> dict[str, float]:
    """Return the last finite value of each group that has one, as a drift of 0 or more, bottom to top."""
    found = {}
    for name in groups.names:
        key = f"tl/{measure}/{name}"
        values = [float(entry[key]) for entry in log if key in entry]
        finite = [value for value in values if math.isfinite(value)]
        if finite and name != groups.head:
            found[name] = _drift(finite[-1], measure, groups[name].num_parameters)
    if not found:
        wanted = f"tl/{measure}/{groups.names[0]}"
        known = sorted({key for entry in log for key in entry if key.startswith("tl/") and key.count("/") > 1})
        near = closest(wanted, known) if known else "none was logged"
        raise ValueError(
            f"the record holds no `tl/{measure}/<group>` for any of these {len(groups)} groups (closest to `{wanted}`: "
            f"{near}). Name what was logged in `measure`, and give the groups that the run was started with."
        )
    return found


def _drift(value: float, measure: str, num_parameters: int) -> float:
    if measure.partition("/")[0] == "cka":
        return max(0.0, 1 - value)
    return max(0.0, value) / (math.sqrt(num_parameters or 1) if measure == "anchor" else 1)


def _log(history: Sequence[Mapping[str, Any]] | Mapping[str, Any] | str | Path) -> Sequence[Mapping[str, Any]]:
    if isinstance(history, str | Path):
        path = Path(history)
        path = path / _STATE if path.suffix != ".json" else path
        if not path.is_file():
            raise FileNotFoundError(
                f"`{path}` is missing; expected the record of a training. Call trainer.save_state() after it, or give "
                "the folder of one of its checkpoints."
            )
        loaded: Mapping[str, Any] = json.loads(path.read_text())
        history = loaded
    log: Sequence[Mapping[str, Any]] = history["log_history"] if isinstance(history, Mapping) else history
    return log
