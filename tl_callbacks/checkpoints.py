"""Which checkpoint folders are whole: a run may have been killed while it wrote the last one."""

import json
import re
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

_WEIGHTS = {"model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors", "pytorch_model.bin"}
# What FSDP writes instead, with whole or with sharded state; the metadata are written when all ranks have finished.
_WEIGHTS |= {"pytorch_model_fsdp.bin", "pytorch_model_fsdp_0/.metadata"}
_OPTIMIZERS = {"optimizer.pt", "optimizer.bin", "optimizer_0/.metadata"}


def last_complete_checkpoint(folder: str | Path, *, world_size: int = 1) -> str | None:
    """Return the path of the last checkpoint that was written to its end, None if there is none.

    The Trainer writes `trainer_state.json` last, but each rank its own random state; a checkpoint is whole when the
    state can be read and weights, optimizer, scheduler and random states are there, of DeepSpeed its own folder. A
    checkpoint of several ranks, but fewer than now, counts as not whole: it cannot be told from one that some ranks did
    not finish.

    Args:
        folder: the Trainer's `output_dir`.
        world_size: number of ranks now.

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


def lacks_optimizer(path: str | Path) -> bool:
    """Return whether a checkpoint holds weights alone, as `save_only_model=True` writes it.

    Args:
        path: the checkpoint's folder.

    Example:
        >>> import tempfile
        >>> lacks_optimizer(tempfile.mkdtemp())
        True
    """
    # DeepSpeed's folder is global_step<n>, FSDP's optimizer_0.
    folder = Path(path)
    held = ("optimizer", "global_step")
    return folder.is_dir() and not any(file.name.startswith(held) for file in folder.iterdir())


def _is_complete(path: Path, world_size: int) -> bool:
    written = {file.name for file in path.iterdir() if file.is_file()}
    written |= {f"{file.parent.name}/{file.name}" for file in path.glob("*/.metadata")}
    ranks = {f"rng_state_{rank}.pth" for rank in range(max(2, world_size))}
    if "rng_state.pth" not in written and not ranks <= written:
        return False
    if not (({"scheduler.pt"} <= written and written & _OPTIMIZERS) or _is_deepspeed(path)):
        return False
    if "trainer_state.json" not in written or not written & _WEIGHTS:
        return False
    try:
        json.loads((path / "trainer_state.json").read_text())
    except ValueError:
        return False
    return True


def _is_deepspeed(path: Path) -> bool:
    """Return whether DeepSpeed wrote its states; it names their folder in `latest` afterwards."""
    latest = path / "latest"
    return latest.is_file() and (name := latest.read_text().strip()) != "" and (path / name).is_dir()
