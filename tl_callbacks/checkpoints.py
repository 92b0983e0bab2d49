"""Which checkpoint folders are whole: a run may have been killed while it wrote the last one."""

import json
import re
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors", "pytorch_model.bin")


def last_complete_checkpoint(folder: str | Path, *, world_size: int = 1) -> str | None:
    """Return the path of the last checkpoint that was written to its end, None if there is none.

    The Trainer writes `trainer_state.json` last, but each rank its own random state; a checkpoint is whole when the
    state can be read and weights, optimizer, scheduler and every rank's random state are there.

    Args:
        folder: the Trainer's `output_dir`.
        world_size: number of ranks that wrote.

    Example:
        >>> import tempfile
        >>> last_complete_checkpoint(tempfile.mkdtemp()) is None
        True
    """
    steps = {
        int(match[1]): path
        for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if (match := re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name))
    }
    complete = [step for step, path in steps.items() if _is_complete(path, world_size)]
    return str(steps[max(complete)]) if complete else None


def _is_complete(path: Path, world_size: int) -> bool:
    random_states = ["rng_state.pth"] if world_size == 1 else [f"rng_state_{rank}.pth" for rank in range(world_size)]
    needed = ["trainer_state.json", "optimizer.pt", "scheduler.pt", *random_states]
    if not all((path / name).is_file() for name in needed) or not any((path / name).is_file() for name in _WEIGHTS):
        return False
    try:
        json.loads((path / "trainer_state.json").read_text())
    except ValueError:
        return False
    return True
