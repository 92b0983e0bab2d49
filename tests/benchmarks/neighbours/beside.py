"""Makes Lightning and finetuning-scheduler importable from a folder beside the environment, where `make` puts them.

Nothing of this project needs them, so they stay out of the environment.
"""

import importlib.util
import sys
from importlib import metadata

from tests.launching import ROOT

FOLDER = ROOT / ".venv" / "neighbours"
PACKAGES = ("lightning", "finetuning-scheduler")


def make_importable() -> bool:
    """Put the folder on the path. Return whether they are there."""
    if FOLDER.is_dir() and str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    return all(importlib.util.find_spec(name.replace("-", "_")) for name in PACKAGES)


def versions() -> dict[str, str]:
    """The versions of what is compared, as far as it is there."""
    names = ("torch", "transformers", "accelerate", *(PACKAGES if make_importable() else ()))
    return {name: metadata.version(name) for name in names}
