"""Trains the parity matrix and prints it as a table: `python -m tests.distributed`.

A cell is the largest distance of a tensor's final weights from those of one process with the same global batches, as a
ratio to the distance that it travelled (float64, 12 steps; the bias of attention keys left out); `ranks apart` where
the ranks are not bit for bit equal after every step. The column on the right is the same without the rebuild of DDP's
reducer on two ranks.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.distributed.test_ranks import Runs, deviation
from tests.distributed.worker import CELLS, LAYOUTS, MATRIX


def cell(ranks: list[dict[str, Any]], single: dict[str, Any]) -> str:
    """One cell of the table."""
    ratio = f"{max(deviation(rank, single) for rank in ranks):.0e}"
    apart = any(rank["hashes"] != ranks[0]["hashes"] for rank in ranks)
    return f"ranks apart, {ratio}" if apart else ratio


def main() -> None:
    """Launch each layout once."""
    layouts = [layout for layout in LAYOUTS if layout != "1 rank"]
    lines = [["", *layouts, "2 ranks, no rebuild"], ["---"] * (len(layouts) + 2)]
    with tempfile.TemporaryDirectory() as folder:
        runs = Runs(Path(folder))
        for name in MATRIX:
            single = runs.single(CELLS[name].like or name)
            cells = [cell(runs.ranks(name, layout), single) for layout in layouts]
            lines.append([name, *cells, cell(runs.ranks(f"{name}, no rebuild"), single)])
            print(name, file=sys.stderr)
    print("\n".join(f"| {' | '.join(line)} |" for line in lines))


if __name__ == "__main__":
    main()
