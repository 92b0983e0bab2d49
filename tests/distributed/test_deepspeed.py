"""DeepSpeed on one and two ranks: against the same trainings without it, and what is refused."""

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import deepspeed_beside
from tests.distributed.deepspeed_cells import CELLS, STEPS
from tests.launching import launch

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.skipif(not deepspeed_beside.is_there(), reason="DeepSpeed is no dependency; make puts it beside"),
]

WORKER = Path(__file__).with_name("deepspeed_worker.py")
TOLERANCE = 1e-3  # of the distance travelled, in single precision, which is DeepSpeed's
BROKEN = 0.05
GRADUAL = [name for name, cell in CELLS.items() if cell.openings]
RESUMED = [2, 3, 4, 5, 6, 7]


class Runs:
    """What the ranks wrote, by cell."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.status = {ranks: self._train(ranks) for ranks in (0, 1, 2)}

    def _train(self, ranks: int) -> int:
        """Run the worker; no ranks: without DeepSpeed."""
        (folder := self.folder / str(ranks)).mkdir()
        environment = deepspeed_beside.environment()
        return launch(
            str(WORKER),
            str(folder),
            ranks=ranks or None,
            log=folder / "log.txt",
            seconds=900,
            environment=environment,
        )

    def log(self, ranks: int) -> str:
        return (self.folder / str(ranks) / "log.txt").read_text()

    def ranks(self, name: str, ranks: int) -> list[Any]:
        """What each rank wrote."""
        files = [self.folder / str(ranks) / f"{name}.{rank}.pt" for rank in range(max(1, ranks))]
        assert all(file.is_file() for file in files), self.log(ranks)[-4000:]
        return [torch.load(file) for file in files]

    def plain(self, name: str) -> dict[str, Any]:
        """The same training without DeepSpeed."""
        found: dict[str, Any] = self.ranks(name, 0)[0]
        return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("deepspeed"))


def deviation(ours: dict[str, Any], plain: dict[str, Any]) -> float:
    """The largest distance of a tensor from that without DeepSpeed, as a ratio to the distance that one travelled."""
    ratios = []
    for name, end in plain["end"].items():
        if "key.bias" in name or not end.is_floating_point():
            continue  # the bias of attention keys has no gradient but noise
        if (travelled := (end - plain["start"][name]).norm()) == 0:
            assert torch.equal(ours["end"][name], end), name
        else:
            ratios.append(float((ours["end"][name] - end).norm() / travelled))
    assert ratios, "the control must move"
    return max(ratios)


@pytest.mark.parametrize("ranks", [0, 1, 2])
def test_the_processes_finish(ranks: int, runs: Runs) -> None:
    assert runs.status[ranks] == 0, runs.log(ranks)[-4000:]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", CELLS)
def test_it_equals_the_training_without_deepspeed(name: str, ranks: int, runs: Runs) -> None:
    cell, plain = CELLS[name], runs.plain(CELLS[name].like)
    for rank in runs.ranks(name, ranks):
        assert rank["wrapper"] == "DeepSpeedEngine"
        assert plain["wrapper"] != "DeepSpeedEngine"
        found = deviation(rank, plain)
        assert found > BROKEN if "plain" in cell.broken else found < TOLERANCE
        if "plain" not in cell.broken:
            # A closed group's rate is 0 here and unused there.
            for ours, theirs in zip(rank["rates"], plain["rates"], strict=True):
                assert all(ours[key] in (0.0, theirs[key]) for key in ours if key.startswith("tl/rate/"))
            assert rank["rates"][-1] == {**plain["rates"][-1], **_closed(rank)}


def _closed(rank: dict[str, Any]) -> dict[str, float]:
    """The rates of the groups that never opened."""
    opened = {group for event in rank["events"] for group in event["groups"]}
    return {f"tl/rate/{group}": 0.0 for group in rank["hashes"][0] if opened and group not in opened}


@pytest.mark.parametrize("name", [name for name, cell in CELLS.items() if cell.zero != {"stage": 3}])
def test_the_ranks_are_bitwise_equal_after_every_step(name: str, runs: Runs) -> None:
    first, second = runs.ranks(name, 2)
    assert first["hashes"] == second["hashes"]
    assert first["events"] == second["events"]
    assert len({tuple(step.values()) for step in first["hashes"]}) == STEPS + 1, "the control must move at each step"


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", GRADUAL)
def test_groups_stay_bit_for_bit_frozen_until_they_open(name: str, ranks: int, runs: Runs) -> None:
    cell = CELLS[name]
    for rank in runs.ranks(name, ranks):
        assert [event["step"] for event in rank["events"]] == [0, *cell.openings]
        assert rank["events"] == runs.plain(cell.like)["events"]
        opens = {group: event["step"] for event in rank["events"] for group in event["groups"]}
        early = set()
        for group in rank["hashes"][0]:
            values = [step[group] for step in rank["hashes"]]
            opening = opens.get(group, STEPS)
            moving = opening + 1 + (cell.lag if opening else 0)
            if set(values[: opening + 1]) != {values[0]}:
                early.add(group)
            if moving < len(values):
                assert values[moving] != values[opening], "an open group must move"
        assert bool(early) is ("frozen" in cell.broken), early
        assert len(set(rank["trainable"])) == len(cell.openings) + 1, "frozen groups need no gradient"
        assert rank["training"] == [(False, True)] * STEPS, "frozen modules are in eval mode, the head is not"


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", GRADUAL)
def test_the_optimizer_state_of_a_frozen_group_stays_empty(name: str, ranks: int, runs: Runs) -> None:
    cell, filled, open_ones = CELLS[name], 0.0, []
    for rank in runs.ranks(name, ranks):
        opens = {group: event["step"] for event in rank["events"] for group in event["groups"]}
        for step, largest in enumerate(rank["states"]):
            for group, value in largest.items():
                if step < opens.get(group, STEPS):
                    filled = max(filled, value)
                else:
                    open_ones.append(value)
    assert max(open_ones) > 0, "the control must move"
    assert (filled > 0) is ("state" in cell.broken), filled


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("step", RESUMED)
def test_a_resumed_run_equals_a_straight_one_bit_for_bit(step: int, ranks: int, stage: int, runs: Runs) -> None:
    for rank in runs.ranks(f"resume-{stage}", ranks):
        straight, resumed = rank["straight"], rank[f"resumed from {step}"]
        assert resumed["hashes"] == straight["hashes"][step:]
        assert resumed["events"] == straight["events"]
        assert resumed["rates"] == straight["rates"]
        assert rank["stopped"]["hashes"][-1] != straight["hashes"][-1], "the control must differ"
        assert all(a != b for a, b in itertools.pairwise(resumed["hashes"])), "the control must move"


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_it_says_how_groups_are_frozen(stage: int, runs: Runs) -> None:
    rank, plain = runs.ranks(f"ZeRO-{stage}", 1)[0], runs.plain("unfreezing")
    assert rank["methods"]["GradualUnfreezing"]["frozen_by"] == "rate-frozen, not cheap"
    assert plain["methods"]["GradualUnfreezing"]["frozen_by"] == "requires_grad"
    assert f"Under DeepSpeed ZeRO-{stage} frozen groups are rate-frozen, not cheap" in runs.log(1)
    assert "rate-frozen" not in runs.log(0)


REFUSED = {
    "unfreezing under ZeRO-3": "GradualUnfreezing does not support DeepSpeed ZeRO-3, .*Use stage 2",
    "unfreezing with Adafactor": "not known to be sound for optim=adafactor. Expected one of adamw_torch, ",
    "Adagrad": "ZeRO-2 makes torch's Adagrad anew .*Choose another args.optim",
    "anchoring": "WeightAnchoring does not support DeepSpeed: .*Train with DDP",
    "an optimizer in the config": r'section "optimizer" \(AdamW\), .*Remove the section',
    "a scheduler in the config": r'section "scheduler" \(WarmupLR\), which gives all groups one rate. Remove',
    "unfreezing and a scheduler in the config": r'section "scheduler" \(WarmupLR\)',
    "a given optimizer": "drops the SGD that it was given .*Pass optimizer_cls_and_kwargs",
}
TAKEN = ["rates with Adafactor", "a scheduler in the config and one rate"]


@pytest.mark.parametrize("name", [*REFUSED, *TAKEN])
def test_what_deepspeed_cannot_do_is_refused(name: str, runs: Runs) -> None:
    for text in runs.ranks("refusals", 2):
        if name in TAKEN:
            assert text[name] == ""
        else:
            assert re.search(REFUSED[name], text[name]), text[name]
            assert "found 1 problem:" in text[name]
    assert {*REFUSED, *TAKEN} == set(runs.ranks("refusals", 2)[0])


def test_an_optimizer_in_the_config_is_left_alone_without_ours(runs: Runs) -> None:
    found = runs.ranks("section_alone", 2)[0]
    assert found["steps"] == 2
    assert found["groups"] is None
    assert "LayerwiseOptimizer" not in found["methods"]


def test_an_unattached_callback_is_refused(runs: Runs) -> None:
    for error in runs.ranks("unattached", 1):
        assert "GradualUnfreezing was not attached" in error
        assert "Call attach(trainer) before trainer.train()" in error
