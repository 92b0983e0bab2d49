"""Makes timm importable where its wheel of torchvision holds CUDA kernels and torch does not.

timm needs torchvision's Python part only. Beside a CPU build of torch the wheel of the package index fails when it is
imported, because it describes operators that its kernels would have registered; and then no vision model of
transformers imports either. So `make` keeps both in a folder of their own, outside the environment's packages.
"""

import importlib.util
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent.parent / ".venv" / "timm"
_library: list[Any] = []


def make_importable() -> bool:
    """Put the folder on the path, and register the operators that are missing. Return whether timm is there."""
    if FOLDER.is_dir() and str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    if importlib.util.find_spec("timm") is None:
        return False
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "does not exist" not in str(error):
            raise
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = importlib.import_module("torch").library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _library.append(library)  # kept, or the operators would go with it
    return True
