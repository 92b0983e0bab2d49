"""Runs one draw: straight, interrupted and resumed, each in new processes, and the checks on what they saw."""

import dataclasses
import shutil
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from tests.forked import Ranks
from tests.soak.check import check, moves, tally
from tests.soak.draw import Draw
from tests.soak.train import train


def run(drawn: Draw, folder: Path, *, plant: str | None = None) -> dict[str, Any]:
    """What is written of a run: the draw, how long it took, and the failures."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    began = time.monotonic()
    counts = {}
    try:
        found = records(drawn, folder, plant)
        failures, counts = check(drawn, found), tally(drawn, found["straight"][0])
    except Exception:
        failures = [f"did not run: {traceback.format_exc()}"]
    if not failures:
        shutil.rmtree(folder)
    return {
        "run": drawn.name,
        "draw": dataclasses.asdict(drawn),
        "compared": "bitwise" if drawn.ranks <= 2 else "events and rates bitwise, weights to 1e-6 of their norms",
        **counts,
        "seconds": round(time.monotonic() - began, 1),
        "failures": failures,
    }


def records(drawn: Draw, folder: Path, plant: str | None) -> dict[str, list[dict[str, Any]]]:
    """What each rank of each part saw."""
    found: dict[str, list[dict[str, Any]]] = {}
    for part in ("straight", "interrupted", "resumed"):
        ranks = Ranks(train, folder, drawn, part, plant, log=folder / f"{part}.txt", ranks=drawn.ranks)
        if part == "interrupted" and drawn.interruption == "kill":
            wait_until_reached(ranks, folder, drawn.ranks)
            ranks.kill(drawn.order, pause=0.02)
            continue
        ranks.finish()
        files = [folder / f"{part}.{rank}.pt" for rank in range(drawn.ranks)]
        found[part] = [torch.load(file, weights_only=False) for file in files]
    if not all(moves(record) for part in ("straight", "resumed") for record in found[part]):
        raise RuntimeError("the training moved nothing")
    return found


def wait_until_reached(ranks: Ranks, folder: Path, count: int) -> None:
    """Wait until all ranks hold where they are to be killed."""
    while not all((folder / f"reached.{rank}").exists() for rank in range(count)):
        if not all(process.is_alive() for process in ranks.processes):
            ranks.finish()
            raise RuntimeError("the training ended before it was killed")
        time.sleep(0.002)
