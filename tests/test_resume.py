"""A resumed run equals a straight one bit for bit: weights, optimizer, events, rates and losses."""

import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint

from tests import tiny
from tests.resume_worker import HOLDING, RESULT, SETTINGS, STEPS, Hold, Regroup, Setting, make, result, unfreezing
from tl_callbacks import (
    LayerGroup,
    LayerGroups,
    at_fractions,
    at_steps,
    events,
    last_complete_checkpoint,
    per_epoch,
)

ROOT = Path(__file__).parents[1]
WORKER = Path(__file__).with_name("resume_worker.py")
RESUMES = [(name, step) for name, setting in SETTINGS.items() for step in setting.checkpoints]

Straight = Callable[[str], Trainer]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Straight:
    """The uninterrupted training of a setting, with a checkpoint at every step; each is trained once."""

    @functools.cache
    def trained(name: str) -> Trainer:
        trainer = make(tmp_path_factory.mktemp("straight"), SETTINGS[name], save_strategy="steps", save_steps=1)
        trainer.train()
        return trainer

    return trained


def checkpoint(trainer: Trainer, step: int) -> str:
    return f"{trainer.args.output_dir}/checkpoint-{step}"


def saved_weights(trainer: Trainer, step: int) -> dict[str, torch.Tensor]:
    return load_file(next(Path(checkpoint(trainer, step)).glob("*model.safetensors")))


def differing(ours: Any, theirs: Any, path: str = "") -> list[str]:
    """The paths at which two nested values differ; tensors bit for bit."""
    if isinstance(ours, dict) and isinstance(theirs, dict) and ours.keys() == theirs.keys():
        return [found for key in ours for found in differing(ours[key], theirs[key], f"{path}.{key}")]
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        pairs = enumerate(zip(ours, theirs, strict=True))
        return [found for place, pair in pairs for found in differing(*pair, f"{path}[{place}]")]
    same = torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs
    return [] if same else [path]


def timeless(log_history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All that was logged, without times and without the mean loss of the steps that a run did itself."""
    return [
        {k: v for k, v in entry.items() if not re.search(r"_runtime$|_per_second$|^train_loss$", k)}
        for entry in log_history
    ]


def assert_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Two results are equal bit for bit, and hold something that could differ."""
    assert len(theirs["weights"]) > 10
    assert len(theirs["optimizer"]["state"]) > 5
    assert differing(ours["weights"], theirs["weights"]) == []
    assert differing(ours["optimizer"], theirs["optimizer"]) == []
    logs, expected = timeless(ours["log_history"]), timeless(theirs["log_history"])
    assert events.read(logs, "opening") == events.read(expected, "opening")
    assert sum(any(key.startswith("tl/rate/") for key in entry) for entry in logs) == STEPS
    assert logs == expected


@pytest.mark.parametrize(("name", "step"), RESUMES)
def test_a_resumed_run_equals_a_straight_one(name: str, step: int, straight: Straight, tmp_path: Path) -> None:
    whole = straight(name)
    resumed = make(tmp_path, SETTINGS[name])
    resumed.train(resume_from_checkpoint=checkpoint(whole, step))
    assert_same(result(resumed), result(whole))
    there, end = saved_weights(whole, step), saved_weights(whole, STEPS)
    assert tiny.moved(there, end), "the checkpoint must not be the end already"


@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_resumed_without_the_callbacks_is_seen(name: str, straight: Straight, tmp_path: Path) -> None:
    whole, setting = straight(name), SETTINGS[name]
    resumed = make(tmp_path, replace(setting, callbacks=lambda groups: []))
    resumed.train(resume_from_checkpoint=checkpoint(whole, setting.checkpoints[0]))
    assert differing(result(resumed)["weights"], result(whole)["weights"])
    assert differing(result(resumed)["optimizer"], result(whole)["optimizer"])


def swapped(groups: LayerGroups) -> LayerGroups:
    first, second, third, head = groups
    return LayerGroups((first, third, second, head), groups.head)


def renamed(groups: LayerGroups) -> LayerGroups:
    *lower, head = groups
    return LayerGroups((*lower, LayerGroup("top", head.parameters, head.sizes, head.dtype)), "top")


def merged(groups: LayerGroups) -> LayerGroups:
    return groups.merge(["embeddings", "encoder.layer.0"], "lower")


def unchanged(groups: LayerGroups) -> LayerGroups:
    return groups


# What changes between start and resume: the setting at the start, the setting at the resume, the groups, the arguments
# and the error. The cases without an error are the controls.
FROM = SETTINGS["unfreezing"]
FRACTIONS = SETTINGS["fractions"]
EPOCHS = SETTINGS["per epoch"]
CHANGES: dict[str, tuple[str, Setting, Regroup, dict[str, Any], str | None]] = {
    "nothing": ("unfreezing", FROM, unchanged, {}, None),
    "merged groups": ("unfreezing", FROM, merged, {}, "other layer groups .*`lower` here"),
    "swapped groups": ("unfreezing", FROM, swapped, {}, "other layer groups .*`encoder.layer.1` here"),
    "renamed group": ("unfreezing", FROM, renamed, {}, "other layer groups .*`head` there, `top` here"),
    "earlier schedule": (
        "unfreezing",
        replace(FROM, callbacks=unfreezing(at_steps([2, 3, 4]))),
        unchanged,
        {},
        r"step 6 records .* as open, but at_steps\(\[2, 3, 4\]\) would have opened",
    ),
    "later schedule": (
        "unfreezing",
        replace(FROM, callbacks=unfreezing(at_steps([7, 8, 9]))),
        unchanged,
        {},
        r"step 6 records .* as open, but at_steps\(\[7, 8, 9\]\) would have opened \['head'\]",
    ),
    "schedule of what is to come": (
        "unfreezing",
        replace(FROM, callbacks=unfreezing(at_steps([4, 5, 7]))),
        unchanged,
        {},
        None,
    ),
    "length, fractions": (
        "fractions",
        FRACTIONS,
        unchanged,
        {"max_steps": 15},
        "started with max_steps=12 and is resumed with 15",
    ),
    "length, steps": ("unfreezing", FROM, unchanged, {"max_steps": 15}, None),
    "fractions": (
        "fractions",
        replace(FRACTIONS, callbacks=unfreezing(at_fractions([0.1, 0.2, 0.3]))),
        unchanged,
        {},
        "step 6 records .* as open",
    ),
    "batch size, epochs": (
        "per epoch",
        EPOCHS,
        unchanged,
        {"per_device_train_batch_size": 12},
        r"step 6 records .* as open, but per_epoch\(1\)",
    ),
    "groups an epoch": (
        "per epoch",
        replace(EPOCHS, callbacks=unfreezing(per_epoch(2))),
        unchanged,
        {},
        "step 6 records .* as open",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_resume_that_would_be_another_run_is_refused(change: str, straight: Straight, tmp_path: Path) -> None:
    name, setting, regroup, overrides, message = CHANGES[change]
    resumed = make(tmp_path, setting, regroup=regroup, **overrides)
    with pytest.raises(ValueError, match=message) if message else nullcontext():
        resumed.train(resume_from_checkpoint=checkpoint(straight(name), 6))
    assert resumed.model is not None
    assert all(parameter.requires_grad for parameter in resumed.model.parameters()), "an error leaves nothing frozen"
    assert resumed.state.global_step == (6 if message else overrides.get("max_steps", STEPS))


@pytest.mark.parametrize("name", [None, "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"])
def test_a_checkpoint_that_was_cut_short_is_passed_over(
    name: str | None, straight: Straight, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (6, 8):
        shutil.copytree(checkpoint(straight("unfreezing"), step), tmp_path / f"checkpoint-{step}")
    if name is not None:
        file = tmp_path / "checkpoint-8" / name
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    resumed = make(tmp_path, SETTINGS["unfreezing"])
    watch = Hold(tmp_path, step=None)
    resumed.add_callback(watch)
    resumed.train(resume_from_checkpoint=True)
    assert watch.began == (8 if name is None else 6)
    said = re.findall("resuming from .*", capsys.readouterr().out)
    six, eight = tmp_path / "checkpoint-6", tmp_path / "checkpoint-8"
    whole = [] if name is None else [f"resuming from `{six}`; the newer `{eight}` was not written to its end"]
    assert said == whole
    assert_same(result(resumed), result(straight("unfreezing")))


def command(folder: Path, mode: str) -> list[str]:
    return [sys.executable, str(WORKER), str(folder), mode]


ENVIRONMENT = {"PYTHONPATH": str(ROOT)}


def finish(folder: Path, mode: str) -> dict[str, Any]:
    """Run the worker to its end and return what it wrote."""
    done = subprocess.run(
        command(folder, mode), env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = torch.load(folder / RESULT)
    return found


def kill(folder: Path, mode: str) -> None:
    """Run the worker until it says that it holds, and kill it there."""
    with (folder / "log.txt").open("w") as log:
        worker = subprocess.Popen(
            command(folder, mode), env={**os.environ, **ENVIRONMENT}, stdout=log, stderr=subprocess.STDOUT
        )
        deadline = time.monotonic() + 120
        while not (folder / HOLDING).exists() and worker.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        worker.send_signal(signal.SIGKILL)
        assert worker.wait() == -signal.SIGKILL, (folder / "log.txt").read_text()[-3000:]
    assert (folder / HOLDING).exists()
    assert not (folder / RESULT).exists()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return finish(tmp_path_factory.mktemp("uninterrupted"), "straight")


# Groups open at steps 4, 5 and 9; a checkpoint is written at every second step.
KILLS = {
    "hold-at-step:7": (6, 6),  # between two openings
    "hold-at-step:4": (4, 4),  # at an opening, right after a checkpoint
    "hold-at-step:9": (8, 8),  # at an opening that the last checkpoint does not know
    "hold-in-saving:8": (6, 8),  # with half a checkpoint
}


@pytest.mark.slow
@pytest.mark.parametrize("mode", KILLS)
def test_a_killed_run_resumes_to_the_same_end(mode: str, uninterrupted: dict[str, Any], tmp_path: Path) -> None:
    complete, newest = KILLS[mode]
    kill(tmp_path, mode)
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / f"checkpoint-{complete}")
    assert get_last_checkpoint(str(tmp_path)) == str(tmp_path / f"checkpoint-{newest}")
    assert (tmp_path / f"checkpoint-{newest}" / "model.safetensors").is_file()
    assert (tmp_path / f"checkpoint-{newest}" / "trainer_state.json").is_file() is (complete == newest)

    resumed = finish(tmp_path, "resume")
    assert (uninterrupted["began"], resumed["began"]) == (0, complete)
    assert [event["step"] for event in events.read(resumed["log_history"], "opening")] == [0, 4, 5, 9]
    assert_same(resumed, uninterrupted)


@pytest.mark.slow
def test_transformers_alone_would_resume_from_half_a_checkpoint(tmp_path: Path) -> None:
    kill(tmp_path, "hold-in-saving:8")
    trainer = make(tmp_path, SETTINGS["all together"])
    with (
        pytest.warns(UserWarning, match="checkpoint-8` holds no optimizer"),
        pytest.raises(FileNotFoundError, match="checkpoint-8"),
    ):
        trainer.train(resume_from_checkpoint=get_last_checkpoint(str(tmp_path)))
