"""Writes what each process that was started knows of the others: launched by `test_accelerate.py`.

`python launched_ranks.py <folder> [--use_cpu]`.
"""

import json
import os
import sys
from pathlib import Path

from accelerate import PartialState


def main(folder: Path, cpu: bool) -> None:
    """Write one file."""
    state = PartialState(cpu=cpu)
    found = {"rank": state.process_index, "world_size": state.num_processes}
    found["machine"] = int(os.environ.get("GROUP_RANK", "0"))
    (folder / f"{os.getpid()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), "--use_cpu" in sys.argv)
