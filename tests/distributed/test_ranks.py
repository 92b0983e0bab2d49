"""Two ranks: bitwise equal after every step, and equal to one process with the same global batches."""

import itertools
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.worker import CELLS, OPENINGS, STEPS

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("worker.py")
OPENING_CELLS = [(name, size) for name, cell in CELLS.items() for size in cell.world_sizes if cell.openings]
RESUMED = ["resumed from 5", "resumed from 6", "resumed from 7"]


def launch(folder: Path, *launcher: str) -> int:
    """Run the worker and return its exit status; what it printed is in log.txt."""
    folder.mkdir()
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, *launcher, str(WORKER), str(folder)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait(timeout=300)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return process.wait()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Runs:
    """What the ranks of both world sizes wrote, by cell."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        port = str(free_port())
        torchrun = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port)
        self.status = {1: launch(folder / "1"), 2: launch(folder / "2", *torchrun)}

    def log(self, world_size: int) -> str:
        return (self.folder / str(world_size) / "log.txt").read_text()[-4000:]

    def ranks(self, name: str, world_size: int = 2) -> list[dict[str, Any]]:
        """One dict a rank."""
        files = [self.folder / str(world_size) / f"{name}.{rank}.pt" for rank in range(world_size)]
        assert all(file.is_file() for file in files), self.log(world_size)
        return [torch.load(file) for file in files]

    def single(self, name: str) -> dict[str, Any]:
        return self.ranks(name, 1)[0]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("ranks"))


def trainings(rank: dict[str, Any]) -> list[list[dict[str, str]]]:
    """The hashes of each training: at its start and after each step."""
    bounds = itertools.pairwise([*rank["begins"], len(rank["hashes"])])
    return [rank["hashes"][begin:end] for begin, end in bounds]


def deviation(ours: dict[str, Any], single: dict[str, Any]) -> float:
    """The largest distance of a tensor from that of one process, as a ratio to the distance that one travelled."""
    ratios = []
    for name, end in single["end"].items():
        start = single["start"][name]
        if "key.bias" in name or not end.is_floating_point():
            continue  # the bias of attention keys has no gradient but noise
        travelled = (end - start).norm()
        if travelled == 0:
            assert torch.equal(ours["end"][name], end), name
        else:
            ratios.append(float((ours["end"][name] - end).norm() / travelled))
    assert ratios, "the control must move"
    return max(ratios)


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_ranks_finish(world_size: int, runs: Runs) -> None:
    assert runs.status[world_size] == 0, runs.log(world_size)


@pytest.mark.parametrize("name", CELLS)
def test_the_ranks_are_bitwise_equal_after_every_step(name: str, runs: Runs) -> None:
    cell, (first, second) = CELLS[name], runs.ranks(name)
    assert first["wrapper"] == second["wrapper"] == "DistributedDataParallel"
    assert len(trainings(first)) == cell.trains
    assert len(trainings(first)[-1]) == STEPS + 1
    for hashes in trainings(first):
        assert len({tuple(step.values()) for step in hashes}) == len(hashes), "the control must move at each step"
    differing = [
        step for step, pair in enumerate(zip(first["hashes"], second["hashes"], strict=True)) if pair[0] != pair[1]
    ]
    if cell.broken == "ranks":
        assert differing[:1] == [cell.openings[0] + 1], "a remedy switched off must show at the first opening"
    else:
        assert differing == []
        assert first["events"] == second["events"]


@pytest.mark.parametrize("name", CELLS)
def test_the_ranks_equal_one_process_with_the_same_global_batches(name: str, runs: Runs) -> None:
    cell, single = CELLS[name], runs.single(CELLS[name].like or name)
    assert single["wrapper"] != "DistributedDataParallel"
    for rank in runs.ranks(name):
        found = deviation(rank, single)
        if cell.broken in ("ranks", "single"):
            assert found > max(100 * cell.tolerance, 0.05)
        else:
            assert found < cell.tolerance
            assert rank["events"] == single["events"]


@pytest.mark.parametrize(("name", "world_size"), OPENING_CELLS)
def test_groups_stay_bit_for_bit_frozen_until_they_open(name: str, world_size: int, runs: Runs) -> None:
    cell = CELLS[name]
    for rank in runs.ranks(name, world_size):
        assert [event["step"] for event in rank["events"]] == [0, *cell.openings]
        opens = {group: event["step"] for event in rank["events"] for group in event["groups"]}
        for hashes in trainings(rank):
            for group in hashes[0]:
                values = [step[group] for step in hashes]
                opening = opens.get(group, STEPS)
                moving = opening + 1 + (cell.lag if opening else 0)
                assert set(values[: opening + 1]) == {values[0]}
                if moving < len(values):
                    assert values[moving] != values[opening], "an open group must move"


def test_without_a_schedule_every_group_moves_at_the_first_step(runs: Runs) -> None:
    for rank in runs.ranks("all trainable"):
        start, after = rank["hashes"][:2]
        assert all(start[group] != after[group] for group in start)


@pytest.mark.parametrize("name", ["hook registered before", "hook registered after", "hook forgotten"])
def test_a_communication_hook_survives_each_opening(name: str, runs: Runs) -> None:
    for rank in runs.ranks(name):
        assert len(set(rank["trainable"])) == len(OPENINGS) + 1
        assert (rank["reduced"] == rank["trainable"]) is (CELLS[name].broken != "hook")


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_equals_a_straight_one_bit_for_bit(name: str, world_size: int, runs: Runs) -> None:
    for rank in runs.ranks("resume", world_size):
        straight, resumed = rank["straight"], rank[name]
        done = int(name.split()[-1])
        assert resumed["hashes"] == straight["hashes"][done:]
        assert resumed["events"] == straight["events"]
        assert not torch.equal(resumed["start"]["classifier.weight"], resumed["end"]["classifier.weight"])


def test_a_stopped_run_is_not_yet_there(runs: Runs) -> None:
    for world_size in (1, 2):
        for rank in runs.ranks("resume", world_size):
            assert rank["stopped"]["hashes"] == rank["straight"]["hashes"][:7]
            assert rank["stopped"]["hashes"][-1] != rank["straight"]["hashes"][-1]
            assert rank["stopped"]["events"] != rank["straight"]["events"]


def test_resumed_ranks_are_bitwise_equal(runs: Runs) -> None:
    first, second = runs.ranks("resume")
    assert {name: run["hashes"] for name, run in first.items()} == {name: run["hashes"] for name, run in second.items()}


def test_an_unattached_callback_is_refused_on_several_ranks(runs: Runs) -> None:
    for rank in runs.ranks("unattached"):
        assert "GradualUnfreezing was not attached" in rank["error"]
        assert "2 processes" in rank["error"]
        assert "Call attach(trainer) before trainer.train()" in rank["error"]
    single = runs.single("unattached")
    assert single["error"] is None, "one process is warned only"
    assert any("not attached" in text for text in single["warnings"])
