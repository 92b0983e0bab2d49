"""Where DeepSpeed is for the tests: beside the environment, in a folder of its own that `make` fills.

transformers and accelerate take other paths as soon as DeepSpeed can be imported, and it asks for packages that nothing
else needs; so only the processes that `tests/distributed/test_deepspeed.py` launches see it.
"""

import importlib.util
import os
from pathlib import Path

FOLDER = Path(__file__).parent.parent / ".venv" / "deepspeed"


def is_there() -> bool:
    """Whether a launched process can import DeepSpeed."""
    return (FOLDER / "deepspeed").is_dir() or importlib.util.find_spec("deepspeed") is not None


def environment() -> dict[str, str]:
    """The variables of a process that trains with DeepSpeed on a CPU."""
    return {
        "PYTHONPATH": os.pathsep.join([str(FOLDER.parents[1]), str(FOLDER)]),
        "DS_ACCELERATOR": "cpu",
        "ACCELERATE_TORCH_DEVICE": "cpu",
    }
