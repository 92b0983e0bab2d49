"""Which checkpoint folders are whole, as a run may be killed while it writes one, and how to load all their weights."""

import json
import re
import zipfile
from pathlib import Path

from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

_WEIGHTS = {"model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors", "pytorch_model.bin"}
# What FSDP writes instead, with whole or with sharded state; the metadata are written when all ranks have finished.
_WEIGHTS |= {"pytorch_model_fsdp.bin", "pytorch_model_fsdp_0/.metadata"}
_OPTIMIZERS = {"optimizer.pt", "optimizer.bin", "optimizer_0/.metadata"}


def last_complete_checkpoint(folder: str | Path, *, world_size: int = 1) -> str | None:
    """Return the path of the last checkpoint that was written to its end, None if there is none.

    The Trainer writes `trainer_state.json` last, but each rank its own random state; a checkpoint is whole when the
    state can be read, weights, optimizer, scheduler and random states are there (of DeepSpeed its own folder), and what
    torch wrote is not cut short. A checkpoint of several ranks, but fewer than now, counts as not whole: it cannot be
    told from one that some ranks did not finish.

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
    # torch writes a zip file, whose table of contents is at its end.
    if not all(zipfile.is_zipfile(path / name) for name in written if name.endswith((".pt", ".pth"))):
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


def loaded_checkpoint(model: nn.Module | None) -> str | None:
    r"""Return the checkpoint folder that a model was loaded from, so that its weights are not pretrained ones; or None.

    Example:
        >>> from types import SimpleNamespace
        >>> loaded_checkpoint(SimpleNamespace(config=SimpleNamespace(_name_or_path="runs/checkpoint-12")))
        'runs/checkpoint-12'
    """
    path = str(getattr(getattr(model, "config", None), "_name_or_path", ""))
    return path if re.search(rf"{PREFIX_CHECKPOINT_DIR}-\d+/?$", path) else None


def load_renamed(model: nn.Module, folder: str | Path) -> bool:
    """Load the weights of a checkpoint that holds them under other names than the model does.

    `save_pretrained` writes many architectures (ViT, Swin, DETR, LLaVA, Mixtral, ...) as their first release was, with
    other names and each expert by itself. `from_pretrained` reads that; the Trainer, when it resumes or takes the best
    checkpoint, does not (transformers 5.23), and goes on with the weights that the model happens to have.

    Args:
        model: the model without wrappers. Adapters and models of other packages are left as they are.
        folder: the checkpoint.

    Returns:
        Whether the names differ; then all weights were loaded.

    Raises:
        RuntimeError: what `from_pretrained` reads are not the weights of this model.

    Example:
        >>> import tempfile
        >>> from transformers import ViTConfig, ViTModel
        >>> folder = tempfile.mkdtemp()
        >>> config = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
        >>> ViTModel(config).save_pretrained(folder)
        >>> load_renamed(ViTModel(config), folder)
        True
    """
    if not isinstance(model, PreTrainedModel) or not _saved_names(Path(folder)) - model.state_dict().keys():
        return False
    # As wide as the widest tensor, so that no value is rounded on its way.
    widest = max((t.dtype for t in model.state_dict().values() if t.is_floating_point()), key=lambda d: d.itemsize)
    model.load_state_dict(type(model).from_pretrained(folder, dtype=widest).state_dict())
    return True


def _saved_names(folder: Path) -> set[str]:
    """Return the names of the weights in a checkpoint of the whole model, none if there is no safetensors file."""
    if (index := folder / SAFE_WEIGHTS_INDEX_NAME).is_file():
        return set(json.loads(index.read_text())["weight_map"])
    if not (file := folder / SAFE_WEIGHTS_NAME).is_file():
        return set()
    with safe_open(file, "pt") as weights:
        return set(weights.keys())
