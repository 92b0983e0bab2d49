"""When: the head first, then group by group downwards."""

from tl_callbacks.unfreezing.adaptive import ProbeSchedule, schedule_from_probes
from tl_callbacks.unfreezing.callback import GradualUnfreezing
from tl_callbacks.unfreezing.plan import Phase, UnfreezePlan
from tl_callbacks.unfreezing.rates import SlantedTriangular, slanted_triangular
from tl_callbacks.unfreezing.schedule import UnfreezeSchedule, at_fractions, at_steps, every, per_epoch, staged

__all__ = [
    "GradualUnfreezing",
    "Phase",
    "ProbeSchedule",
    "SlantedTriangular",
    "UnfreezePlan",
    "UnfreezeSchedule",
    "at_fractions",
    "at_steps",
    "every",
    "per_epoch",
    "schedule_from_probes",
    "slanted_triangular",
    "staged",
]
