"""Killed from outside at any moment, on one rank or two, and resumed in new processes: the same end, bit for bit."""

import functools
import itertools
import json
import random
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.forked import Ranks
from tests.kill_worker import OPENINGS, SAVE, SETTINGS, STEPS, Moment, train
from tests.test_resume import differing, timeless
from tl_callbacks import events

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

Straight = Callable[[str, int], Path]
RANDOM = 20
SAVING = ["half weights", "weights", "optimizer", "random states", "half random states", "half state"]
WORLDS = [1, 2]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Straight:
    """The folder of an uninterrupted training, by setting and number of ranks; each is trained once."""

    @functools.cache
    def trained(name: str, ranks: int) -> Path:
        folder = tmp_path_factory.mktemp("straight")
        Ranks(train, folder, name, log=folder / "log.txt", ranks=ranks).finish()
        return folder

    return trained


def results(folder: Path, ranks: int) -> list[dict[str, Any]]:
    return [torch.load(folder / f"result.{rank}.pt") for rank in range(ranks)]


def kill(
    folder: Path,
    name: str,
    moment: Moment,
    ranks: int,
    *,
    delay: float = 0.0,
    order: tuple[int, ...] = (),
    resume: bool = False,
    **overrides: Any,
) -> None:
    """Train until a moment comes and kill all ranks then, in an order, the second one a moment after the first."""
    group = Ranks(train, folder, name, moment, resume, overrides, log=folder / "killed.txt", ranks=ranks)
    # At a step's begin each rank has written what it had to write; in a checkpoint the first one is waited for.
    waiting = {"step": list(range(ranks)), "half random states": [ranks - 1]}.get(moment.event, [0])
    deadline = time.monotonic() + 60
    files = [folder / f"reached.{rank}" for rank in waiting]
    while not all(file.exists() for file in files) and group.alive and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(delay)
    group.kill(order or None, pause=0.05)
    assert all(file.exists() for file in files), group.log.read_text()[-4000:]
    assert not list(folder.glob("result.*"))
    for file in folder.glob("reached.*"):
        file.unlink()


def steps(folder: Path) -> dict[int, Path]:
    return {int(path.name.split("-")[1]): path for path in folder.glob("checkpoint-*")}


def whole(checkpoint: Path, ranks: int) -> bool:
    """Whether all of a checkpoint can be read. Shares nothing with what it is to judge."""
    random_states = ["rng_state.pth"] if ranks == 1 else [f"rng_state_{rank}.pth" for rank in range(ranks)]
    try:
        assert any(load_file(path) for path in checkpoint.glob("*model.safetensors"))
        assert json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
        for name in ("optimizer.pt", "scheduler.pt", *random_states):
            assert torch.load(checkpoint / name, weights_only=False)
    except Exception:
        return False
    return True


def resume(folder: Path, name: str, ranks: int, **overrides: Any) -> int:
    """Resume a killed training in new processes and return the step that it began with."""
    complete = max(step for step, path in steps(folder).items() if whole(path, ranks))
    newest = max(steps(folder))
    Ranks(train, folder, name, None, True, overrides, log=folder / "resumed.txt", ranks=ranks).finish()
    said = re.findall(r"resuming from .*", (folder / "resumed.txt").read_text())
    expected = [] if complete == newest else [(f"checkpoint-{complete}", f"checkpoint-{newest}")]
    assert [tuple(re.findall(r"checkpoint-\d+", line)) for line in said] == expected, "said once, by one rank"
    assert {found["began"] for found in results(folder, ranks)} == {complete}
    return complete


def assert_same(folder: Path, other: Path, ranks: int) -> None:
    """Each rank of two trainings ended alike, and the ranks of each as well."""
    for ours, theirs in zip(results(folder, ranks), results(other, ranks), strict=True):
        assert difference(ours, theirs) == []
        assert len(theirs["weights"]) > 10
        assert len(theirs["optimizer"]["state"]) > 5
        assert len(events.read(theirs["log_history"], "opening")) > 2
        assert sum(any(key.startswith("tl/rate/") for key in entry) for entry in theirs["log_history"]) == STEPS
    for first, second in itertools.pairwise(results(folder, ranks)):
        assert differing(first["weights"], second["weights"]) == []


def difference(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Which parts of two results differ."""
    parts = ["weights", "optimizer", "scheduler"]
    found = [path for part in parts for path in differing(ours[part], theirs[part], part)]
    return found + ["log_history"] * (timeless(ours["log_history"]) != timeless(theirs["log_history"]))


AROUND = sorted({step + away for step in OPENINGS for away in (-1, 0, 1)})


@pytest.mark.parametrize("ranks", WORLDS)
@pytest.mark.parametrize("step", AROUND)
def test_killed_around_an_opening(step: int, ranks: int, straight: Straight, tmp_path: Path) -> None:
    kill(tmp_path, "all together", Moment("step", step), ranks)
    assert resume(tmp_path, "all together", ranks) == step - step % SAVE
    assert_same(tmp_path, straight("all together", ranks), ranks)


@pytest.mark.parametrize("ranks", WORLDS)
@pytest.mark.parametrize("seed", range(RANDOM))
def test_killed_while_running(seed: int, ranks: int, straight: Straight, tmp_path: Path) -> None:
    rng = random.Random(seed)
    name = ["all together", *SETTINGS][seed % 4]
    moment = Moment("running", rng.randrange(SAVE + 1, STEPS))
    order = rng.choice([(), (0, 1), (1, 0)]) if ranks == 2 else ()
    kill(tmp_path, name, moment, ranks, delay=rng.uniform(0, 0.06), order=order)
    resume(tmp_path, name, ranks)
    assert_same(tmp_path, straight(name, ranks), ranks)


@pytest.mark.parametrize("ranks", WORLDS)
@pytest.mark.parametrize("event", SAVING)
def test_killed_in_saving(event: str, ranks: int, straight: Straight, tmp_path: Path) -> None:
    name = "LoRA" if event == "optimizer" else "all together"
    kill(tmp_path, name, Moment(event, 9), ranks, delay=0.3, order=(1, 0) if ranks == 2 else ())
    assert set(steps(tmp_path)) == {3, 6, 9}
    assert not whole(tmp_path / "checkpoint-9", ranks)
    assert resume(tmp_path, name, ranks) == 6
    assert_same(tmp_path, straight(name, ranks), ranks)
    assert all(whole(path, ranks) for path in steps(tmp_path).values()), "the half one was written over"
    again = load_file(next((tmp_path / "checkpoint-9").glob("*model.safetensors")))
    first = load_file(next((straight(name, ranks) / "checkpoint-9").glob("*model.safetensors")))
    assert differing(again, first) == []


@pytest.mark.parametrize("ranks", WORLDS)
def test_a_half_checkpoint_does_not_push_the_whole_one_out(ranks: int, straight: Straight, tmp_path: Path) -> None:
    name, keep = "all together", {"save_total_limit": 1}
    kill(tmp_path, name, Moment("weights", 9), ranks, **keep)
    assert set(steps(tmp_path)) == {6, 9}, "the whole one goes when the next one is whole"
    assert resume(tmp_path, name, ranks, **keep) == 6
    assert set(steps(tmp_path)) == {STEPS}
    assert_same(tmp_path, straight(name, ranks), ranks)


def test_killed_twice(straight: Straight, tmp_path: Path) -> None:
    kill(tmp_path, "all together", Moment("weights", 9), 1)
    kill(tmp_path, "all together", Moment("half state", 9), 1, resume=True)
    assert resume(tmp_path, "all together", 1) == 6
    assert_same(tmp_path, straight("all together", 1), 1)


def forget_openings(checkpoint: Path) -> None:
    path = checkpoint / "trainer_state.json"
    state = json.loads(path.read_text())
    state["log_history"] = [entry for entry in state["log_history"] if "tl/event" not in entry]
    path.write_text(json.dumps(state))


def forget_random_states(checkpoint: Path) -> None:
    for path in checkpoint.glob("rng_state*"):
        shutil.copy(next(checkpoint.parent.glob(f"checkpoint-3/{path.name}")), path)


def forget_moments(checkpoint: Path) -> None:
    saved = torch.load(checkpoint / "optimizer.pt")
    next(iter(saved["state"].values()))["exp_avg"].zero_()
    torch.save(saved, checkpoint / "optimizer.pt")


SPOILS = {
    "log_history": forget_openings,
    "weights": forget_random_states,
    "optimizer": forget_moments,
}


@pytest.mark.parametrize("ranks", WORLDS)
@pytest.mark.parametrize("part", SPOILS)
def test_a_resume_from_something_else_is_seen(part: str, ranks: int, straight: Straight, tmp_path: Path) -> None:
    kill(tmp_path, "all together", Moment("step", 10), ranks)
    SPOILS[part](tmp_path / "checkpoint-9")
    assert resume(tmp_path, "all together", ranks) == 9
    ours, theirs = results(tmp_path, ranks)[0], results(straight("all together", ranks), ranks)[0]
    assert any(path.startswith(part) for path in difference(ours, theirs))
