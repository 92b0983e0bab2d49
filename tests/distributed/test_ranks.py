"""Several ranks: bitwise equal after every step, and equal to one process with the same global batches."""

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.worker import (
    CELLS,
    FROZEN,
    HEAD,
    LAYOUTS,
    MATRIX,
    OPENINGS,
    PLANTED,
    PLANTS,
    PROBES,
    RESUMED,
    STEPS,
)
from tests.launching import launch

pytestmark = pytest.mark.distributed

WORKER = Path(__file__).with_name("worker.py")
TRAINED = [(name, layout) for name, cell in CELLS.items() for layout in cell.trained_by]
SEVERAL = [(name, layout) for name, layout in TRAINED if layout != "1 rank"]
OPENING = [(name, layout) for name, layout in TRAINED if CELLS[name].openings]
RESUMES = [
    (f"resume{kind}", start, layout)
    for layout in RESUMED
    for kind in (("SHARDED_STATE_DICT", "FULL_STATE_DICT") if layout == "FSDP2" else ("",))
    for start in ("resumed from 5", "resumed from 6", "resumed from 7")
]


class Runs:
    """What the ranks of each layout wrote, by cell. A layout is launched once, when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._status: dict[str, int] = {}

    def status(self, layout: str) -> int:
        if layout not in self._status:
            (folder := self.folder / layout).mkdir()
            ranks = LAYOUTS[layout] if LAYOUTS[layout] > 1 else None
            self._status[layout] = launch(str(WORKER), str(folder), layout, ranks=ranks, log=folder / "log.txt")
        return self._status[layout]

    def log(self, layout: str) -> str:
        return (self.folder / layout / "log.txt").read_text()[-4000:]

    def ranks(self, name: str, layout: str = "2 ranks") -> list[dict[str, Any]]:
        """One dict a rank."""
        self.status(layout)
        files = [self.folder / layout / f"{name}.{rank}.pt" for rank in range(LAYOUTS[layout])]
        assert all(file.is_file() for file in files), self.log(layout)
        return [torch.load(file) for file in files]

    def single(self, name: str) -> dict[str, Any]:
        return self.ranks(name, "1 rank")[0]


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


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_ranks_finish(layout: str, runs: Runs) -> None:
    assert runs.status(layout) == 0, runs.log(layout)


@pytest.mark.parametrize(("name", "layout"), SEVERAL)
def test_the_ranks_are_bitwise_equal_after_every_step(name: str, layout: str, runs: Runs) -> None:
    cell, (first, *others) = CELLS[name], runs.ranks(name, layout)
    wrapper = "DistributedDataParallel" if "ranks" in layout else "FSDP"
    wrapper = "OptimizedModule" if "torch_compile" in cell.overrides else wrapper
    assert all(rank["wrapper"].startswith(wrapper) for rank in (first, *others))
    assert len(trainings(first)) == cell.trains
    assert len(trainings(first)[-1]) == STEPS + 1
    for hashes in trainings(first):
        assert len({tuple(step.values()) for step in hashes}) == len(hashes), "the control must move at each step"
    for other in others:
        pairs = zip(first["hashes"], other["hashes"], strict=True)
        differing = [step for step, (one, two) in enumerate(pairs) if one != two]
        if cell.broken == "ranks":
            assert differing[:1] == [cell.openings[0] + 1], "a remedy switched off must show at the first opening"
        else:
            assert differing == []
            assert first["events"] == other["events"]


def undecided(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Openings without the numbers that decided them, which are of another sum's order in another layout."""
    return [{key: value for key, value in event.items() if key != "decision"} for event in found]


@pytest.mark.parametrize(("name", "layout"), [(n, layout) for n, layout in TRAINED if n.startswith("probes, relative")])
def test_gradients_of_frozen_groups_are_those_of_one_process(name: str, layout: str, runs: Runs) -> None:
    expected = runs.single(CELLS[name].like or name)["gradient_norms"]
    assert {step: len(norms) for step, norms in expected.items()} == {2: 3, 5: 2}
    assert all(value > 0 for norms in expected.values() for value in norms.values())
    for rank in runs.ranks(name, layout):
        assert rank["gradient_norms"].keys() == expected.keys()
        for step, norms in expected.items():
            assert rank["gradient_norms"][step] == pytest.approx(norms, rel=1e-9), step
        assert rank["gradient_norms"] == runs.ranks(name, layout)[0]["gradient_norms"], "every rank logs the same"


@pytest.mark.parametrize(("name", "layout"), SEVERAL)
def test_the_ranks_equal_one_process_with_the_same_global_batches(name: str, layout: str, runs: Runs) -> None:
    cell, single = CELLS[name], runs.single(CELLS[name].like or name)
    assert single["wrapper"] != "DistributedDataParallel"
    for rank in runs.ranks(name, layout):
        found = deviation(rank, single)
        if cell.broken in ("ranks", "single", "frozen"):
            assert found > max(100 * cell.tolerance, 0.05)
        else:
            assert found < cell.tolerance
            assert undecided(rank["events"]) == undecided(single["events"])
            assert rank["trainable"] == single["trainable"]


PROBING = [(name, layout) for name, layout in SEVERAL if CELLS[name].callbacks is PROBES and not CELLS[name].broken]


@pytest.mark.parametrize(("name", "layout"), PROBING)
def test_probes_measure_on_several_ranks_what_they_measure_on_one(name: str, layout: str, runs: Runs) -> None:
    single = runs.single(CELLS[name].like or name)["measured"]
    assert [entry["step"] for entry in single] == [0, 4, 4, 8, 8, STEPS, STEPS]
    assert single[-2]["tl/procrustes/encoder.layer.1"] > 0.001
    for rank in runs.ranks(name, layout):
        assert [list(entry) for entry in rank["measured"]] == [list(entry) for entry in single]
        for entry, expected in zip(rank["measured"], single, strict=True):
            assert entry == pytest.approx(expected, abs=1e-6)


FORGETTING = [(name, layout) for name, layout in SEVERAL if "forgetting" in name and CELLS[name].broken is None]


@pytest.mark.parametrize(("name", "layout"), FORGETTING)
def test_several_ranks_have_forgotten_what_one_has(name: str, layout: str, runs: Runs) -> None:
    single = runs.single(CELLS[name].like or name)
    assert [entry["step"] for entry in single["forgotten"]] == [4, 8, STEPS]
    assert {"source", "source_reprobed", "retrieval", "language"} == {*single["baseline"][0]}
    for key in ("forgetting/language", "forgetting/language_kl", "retention/retrieval"):
        assert len({entry[f"tl/{key}"] for entry in single["forgotten"]}) > 1, "the control must move"
    for rank in runs.ranks(name, layout):
        assert rank["forgotten"] == runs.ranks(name, layout)[0]["forgotten"], "every rank logs the same"
        assert rank["baseline"][0] == pytest.approx(single["baseline"][0], abs=1e-9)
        for entry, expected in zip(rank["forgotten"], single["forgotten"], strict=True):
            assert entry == pytest.approx(expected, abs=1e-6)


INTERPOLATED = [(name, layout) for name, layout in SEVERAL if name.startswith("interpolation")]


@pytest.mark.parametrize(("name", "layout"), INTERPOLATED)
def test_several_ranks_end_at_the_same_place_between_the_same_weights(name: str, layout: str, runs: Runs) -> None:
    single, first = runs.single(CELLS[name].like or name), runs.ranks(name, layout)[0]
    if name == "interpolation":
        tuned = runs.single("all trainable")
        for parameter in ("bert.encoder.layer.0.attention.output.dense.weight", HEAD):
            start, end, way = single["start"][parameter], first["end"][parameter], tuned["end"][parameter]
            alpha = 1.0 if parameter == HEAD else 0.5
            assert (end - torch.lerp(start, way, alpha)).norm() < 1e-9 * (way - start).norm()
    for rank in runs.ranks(name, layout):
        assert all(torch.equal(rank["end"][parameter], tensor) for parameter, tensor in first["end"].items())
        (event,), (expected,) = rank["interpolation"], single["interpolation"]
        assert event["alpha"] == expected["alpha"] == 0.5
        assert event == first["interpolation"][0], "every rank logs the same"
        for one, other in zip(event["curve"], expected["curve"], strict=True):
            assert one == pytest.approx(other, rel=1e-9)


@pytest.mark.parametrize(
    ("name", "layout"), [(n, layout) for n, layout in SEVERAL if n in ("decoupled", "EWC", "features")]
)
def test_the_reference_that_is_recorded_is_that_of_one_process(name: str, layout: str, runs: Runs) -> None:
    (expected,) = runs.single(name)["references"]
    assert len(expected["reference"]) == 16
    for rank in runs.ranks(name, layout):
        assert rank["references"] == [expected]


@pytest.mark.parametrize(("name", "layout"), [(name, layout) for name in MATRIX for layout in CELLS[name].trained_by])
def test_every_opened_tensor_moves_far_more_than_the_tolerance(name: str, layout: str, runs: Runs) -> None:
    for rank in runs.ranks(name, layout):
        opened = {group for event in rank["events"] for group in event["groups"]}
        assert opened == set(rank["hashes"][0]), "the matrix opens every group"
        for parameter in rank["opened"]:
            start, end = rank["start"][parameter], rank["end"][parameter]
            assert (end - start).norm() > 100 * CELLS[name].tolerance * start.norm(), parameter


@pytest.mark.parametrize(("name", "layout"), OPENING)
def test_groups_stay_bit_for_bit_frozen_until_they_open(name: str, layout: str, runs: Runs) -> None:
    cell = CELLS[name]
    for rank in runs.ranks(name, layout):
        assert [event["step"] for event in rank["events"]] == [0, *cell.openings]
        opens = {group: event["step"] for event in rank["events"] for group in event["groups"]}
        moved_too_early = False
        for hashes in trainings(rank):
            for group in hashes[0]:
                values = [step[group] for step in hashes]
                opening = opens.get(group, STEPS)
                moving = opening + 1 + (cell.lag if opening else 0)
                moved_too_early |= set(values[: opening + 1]) != {values[0]}
                if moving < len(values):
                    assert values[moving] != values[opening] or cell.broken == "frozen", "an open group must move"
        assert not moved_too_early or cell.broken == "frozen"


def test_without_a_schedule_every_group_moves_at_the_first_step(runs: Runs) -> None:
    for rank in runs.ranks("all trainable"):
        start, after = rank["hashes"][:2]
        assert all(start[group] != after[group] for group in start)


@pytest.mark.parametrize("name", ["hook registered before", "hook registered after", "hook forgotten"])
def test_a_communication_hook_survives_each_opening(name: str, runs: Runs) -> None:
    for rank in runs.ranks(name):
        assert len(set(rank["trainable"])) == len(OPENINGS) + 1
        assert (rank["reduced"] == rank["trainable"]) is (CELLS[name].broken != "hook")


@pytest.mark.parametrize(("file", "start", "layout"), RESUMES)
def test_a_resumed_run_equals_a_straight_one_bit_for_bit(file: str, start: str, layout: str, runs: Runs) -> None:
    for rank in runs.ranks(file, layout):
        straight, resumed = rank["straight"], rank[start]
        done = int(start.split()[-1])
        assert resumed["hashes"] == straight["hashes"][done:]
        assert resumed["events"] == straight["events"]
        assert not torch.equal(resumed["start"]["classifier.weight"], resumed["end"]["classifier.weight"])


@pytest.mark.parametrize(("file", "layout"), sorted({(file, layout) for file, _, layout in RESUMES}))
def test_a_stopped_run_is_not_yet_there(file: str, layout: str, runs: Runs) -> None:
    for rank in runs.ranks(file, layout):
        assert rank["stopped"]["hashes"] == rank["straight"]["hashes"][:7]
        assert rank["stopped"]["hashes"][-1] != rank["straight"]["hashes"][-1]
        assert rank["stopped"]["events"] != rank["straight"]["events"]


@pytest.mark.parametrize(
    ("file", "layout"), sorted({(file, layout) for file, _, layout in RESUMES if layout != "1 rank"})
)
def test_resumed_ranks_are_bitwise_equal(file: str, layout: str, runs: Runs) -> None:
    first, second = runs.ranks(file, layout)
    assert {name: run["hashes"] for name, run in first.items()} == {name: run["hashes"] for name, run in second.items()}


@pytest.mark.parametrize("layout", PLANTED)
@pytest.mark.parametrize("name", PLANTS)
def test_a_planted_difference_stops_the_run_with_its_name(name: str, layout: str, runs: Runs) -> None:
    step = PLANTS[name][-1]
    found = [rank[name] for rank in runs.ranks("planted", layout)]
    last, other = LAYOUTS[layout] - 1, 1 if layout == "HSDP" and name != "what trains" else 0  # its replica
    assert all(rank["step"] == (STEPS if step is None else step) for rank in found)
    if step is None:
        assert [rank["error"] for rank in found] == [None] * len(found)
        return
    if name == "what trains":
        expected = rf"after step {step}, `{HEAD}` is frozen on rank {last} and trains on rank {other}; 1 of \d+"
    else:
        planted = HEAD if "open" in name else FROZEN
        expected = rf"after step {step}, the weights of `{planted}` on rank {last} are not those of rank {other}; "
    for rank in found:
        assert re.match(expected, rank["error"]), rank["error"]
        assert "when all were equal" in rank["error"]
    assert [rank["frozen"] for rank in found[:-1]] == [[]] * last, "an error leaves nothing frozen"


def test_weights_in_low_precision_open_in_mixed_precision_under_fsdp2(runs: Runs) -> None:
    first, second = runs.ranks("low precision", "FSDP2")
    for name in ("plain", "unfreezing"):
        assert (first[name]["error"], first[name]["step"], first[name]["dtypes"]) == (None, STEPS, ["torch.float32"])
        assert first[name]["hashes"] == second[name]["hashes"]
    hashes = first["unfreezing"]["hashes"]
    for group, opening in {"embeddings": 9, "encoder.layer.1": 3}.items():
        assert len({step[group] for step in hashes[: opening + 1]}) == 1
        assert hashes[opening][group] != hashes[opening + 1][group]
    assert "uniform original parameter dtype" in first["casts_what_trains"]["error"]
    assert "grad_dtype" in first["renew_precision"]["error"]
    assert first["casts_what_trains"]["step"] == first["renew_precision"]["step"] == 3, "at the first opening"


def test_ranks_that_start_apart_are_found_before_fsdp2_shards_them(runs: Runs) -> None:
    for rank in runs.ranks("another start", "FSDP2"):
        assert re.match(r"after step 0, the weights of `bert.embeddings.* differ from the start", rank["error"])
        assert "under a seed by rank" in rank["error"]


@pytest.mark.parametrize("layout", RESUMED)
def test_a_run_is_not_resumed_onto_other_groups(layout: str, runs: Runs) -> None:
    for rank in runs.ranks("other groups", layout):
        assert "other layer groups (first difference: `embeddings` there, `lower` here)" in rank["error"]
        assert rank["step"] == 2, "before the first step"


def test_an_unattached_callback_is_refused_on_several_ranks(runs: Runs) -> None:
    for rank in runs.ranks("unattached"):
        assert "GradualUnfreezing was not attached" in rank["error"]
        assert "2 processes" in rank["error"]
        assert "Call attach(trainer) before trainer.train()" in rank["error"]
    single = runs.single("unattached")
    assert single["error"] is None, "one process is warned only"
    assert any("not attached" in text for text in single["warnings"])
