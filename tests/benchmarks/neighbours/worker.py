"""Trains one cell on the rank that torchrun started, and writes what it saw: `module cell seed folder`."""

import importlib
import os
import sys
from pathlib import Path

from tests.benchmarks.neighbours import beside
from tests.benchmarks.neighbours.script import Record, make_model


def main() -> None:
    """Train it. An error is part of what is found."""
    module, cell, seed, folder = sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4])
    beside.make_importable()
    model = make_model(seed)
    record, error = Record(model), None
    try:
        importlib.import_module(module).train(cell, model, record, seed, folder / "run")
    except Exception as caught:
        error = f"{type(caught).__name__}: {caught}"
    record.write(folder / f"{os.environ['RANK']}.pt", error)


if __name__ == "__main__":
    main()
