"""What a training took of this machine: time, memory, processes."""

import sys
import time
from typing import Any

import torch
from transformers import TrainingArguments

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]


class Meter:
    """Measures from the moment it is made.

    Args:
        from_step: the optimizer step that training begins with: 0, or that of the checkpoint.

    Example:
        >>> Meter(0)
        Meter(from_step=0)
    """

    def __init__(self, from_step: int) -> None:
        self.from_step = from_step
        self._started = time.perf_counter()
        self._cpu_started = time.process_time()

    def __repr__(self) -> str:
        return f"Meter(from_step={self.from_step})"

    def read(self, args: TrainingArguments) -> dict[str, Any]:
        """Return `training.cost` of `recipe.json`: of this process, memory since it began."""
        seconds = time.perf_counter() - self._started
        on_cpu = args.device.type == "cpu"
        module = None if on_cpu else torch.get_device_module(args.device)
        peak = getattr(module, "max_memory_allocated", None)
        name = getattr(module, "get_device_name", None)
        return {
            "from_step": self.from_step,
            "seconds": seconds,
            "cpu_seconds": time.process_time() - self._cpu_started,
            "accelerator_seconds": None if on_cpu else seconds * args.world_size,
            "peak_memory_bytes": _peak_memory(),
            "peak_accelerator_memory_bytes": None if peak is None else int(peak(args.device)),
            "processes": args.world_size,
            "device": args.device.type if name is None else str(name(args.device)),
        }


def _peak_memory() -> int | None:
    """Return the most memory that this process has had, in bytes."""
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * unit
