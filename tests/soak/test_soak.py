"""The soak on a few runs, and on trainings with a planted defect, each of which it must report."""

import dataclasses
import json
from pathlib import Path

import pytest

from tests.soak import memory
from tests.soak.__main__ import jobs, written
from tests.soak.draw import Draw, draw
from tests.soak.run import run
from tests.soak.train import PLANTS

QUICK = (1, 5, 7)  # among them are two ranks, LoRA on four, a kill and an error


def base(ranks: int, family: str = "BERT") -> Draw:
    """A run in which every defect shows: the lowest group opens late, and there is dropout after the resume."""
    return dataclasses.replace(
        draw(0, 5), name="planted", family=family, ranks=ranks, schedule="every", numbers=(2,), warmup=0, save=2,
        interruption="stop", at=5, order=tuple(range(ranks)), strength=0.1, anchor="decoupled", optim="adamw_torch",
    )  # fmt: skip


# The planted defect, the training that has it, and what the soak must say.
REPORTS = {
    "no rebuild": (base(2), "straight: ranks differ after step 4 in ['encoder.layer.1'"),
    "no eval mode": (base(1, "ResNet"), "straight, rank 0: buffers of ('embeddings',) moved before step 8"),
    "opens late": (base(1), "straight, rank 0: `encoder.layer.1` was not trainable in step 2, after 2"),
    "frozen weight moved": (base(1), "straight, rank 0: weights of `embeddings` moved before step 6"),
    "hook left": (
        base(1),
        "straight, rank 0: hooks were left behind: ['._forward_pre_hooks: tests.soak.train.LeaveHook",
    ),
    "left frozen": (
        base(1),
        "straight, rank 0: requires_grad was not restored: ['bert.embeddings.word",
    ),
    "other random numbers": (base(1), "resumed, rank 0: weights after a step differ from the straight run's"),
}


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("number", QUICK)
def test_the_soak_finds_nothing(number: int, tmp_path: Path) -> None:
    assert run(draw(0, number), tmp_path / "run")["failures"] == []


@pytest.mark.slow
@pytest.mark.parametrize("drawn", [base(1), base(2), base(1, "ResNet")], ids=["one rank", "two ranks", "ResNet"])
def test_the_runs_without_a_planted_defect_are_sound(drawn: Draw, tmp_path: Path) -> None:
    assert run(drawn, tmp_path / "run")["failures"] == []


@pytest.mark.slow
@pytest.mark.parametrize("plant", PLANTS)
def test_the_soak_reports_a_planted_defect(plant: str, tmp_path: Path) -> None:
    drawn, text = REPORTS[plant]
    failures = run(drawn, tmp_path / "run", plant=plant)["failures"]
    assert any(failure.startswith(text) for failure in failures), failures


@pytest.mark.slow
def test_a_leak_is_reported(tmp_path: Path) -> None:
    first, second = memory.run(tmp_path, leak=True)["failures"]
    assert "KiB behind, without our callbacks" in first
    assert "modules behind" in second


def test_a_run_is_drawn_from_its_seed_and_number() -> None:
    assert draw(0, 3) == draw(0, 3)
    assert len({dataclasses.replace(draw(seed, number), name="") for seed in (0, 1) for number in range(50)}) == 100


def test_the_schedules_open_as_the_draws_say() -> None:
    seen = set()
    for number in range(200):
        run = draw(0, number)
        schedule = run.unfreeze_schedule()
        for step in range(run.steps):
            expected = sum((opening := run.opening(level)) is not None and opening <= step for level in range(6))
            lengths = {"max_steps": run.steps, "steps_per_epoch": run.epoch}
            assert schedule.open_groups(step, num_groups=6, **lengths) == expected
        seen.add(run.schedule)
    assert len(seen) == 5


def test_what_is_written_is_not_run_again(tmp_path: Path) -> None:
    file = tmp_path / "seed-0.jsonl"
    file.write_text(json.dumps({"run": "0/1", "failures": []}) + '\n{"run": "0/2"')
    done = {result["run"] for result in written(file)}
    assert done == {"0/1"}
    assert len(list(jobs(0, 4, tmp_path, done))) == 4  # the memory and three runs
