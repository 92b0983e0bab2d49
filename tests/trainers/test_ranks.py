"""sentence-transformers' trainer on two ranks: DDP wraps the model, and the weights of the loss are beside it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.launching import launch
from tests.trainers.words import Steps, check_openings
from tl_callbacks import LayerGroups

pytest.importorskip("sentence_transformers", reason="tests of its trainer")
pytestmark = pytest.mark.distributed

LAYOUTS = ("1 rank", "2 ranks")
WORKER = Path(__file__).with_name("ranks.py")
Run = dict[str, Any]
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process and two ranks wrote."""
    folder = tmp_path_factory.mktemp("ranks")
    for layout in LAYOUTS:
        (folder / layout).mkdir()
        ranks = None if layout == "1 rank" else 2
        status = launch(str(WORKER), str(folder / layout), ranks=ranks, log=folder / layout / "log.txt")
        assert status == 0, (folder / layout / "log.txt").read_text()[-4000:]
    return folder


def ranks(folder: Path, name: str) -> tuple[Run, Run]:
    first, second = (torch.load(folder / "2 ranks" / f"{name}.{rank}.pt") for rank in (0, 1))
    assert first["wrapper"] == second["wrapper"] == "DistributedDataParallel"
    return first, second


def equal(one: Weights, other: Weights) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


def deviation(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], start: dict[str, torch.Tensor]
) -> float:
    """The distance from what is expected, as a ratio to the distance travelled."""
    apart, travelled = (
        sum(float((one[name] - other[name]).square().sum()) for name in expected) ** 0.5
        for one, other in ((found, expected), (expected, start))
    )
    return apart / travelled


@pytest.mark.parametrize("name", ["ranking", "weights", "weights, another start on each rank", "several"])
def test_the_ranks_are_bitwise_equal_and_groups_open_in_their_turn(name: str, folder: Path) -> None:
    first, second = ranks(folder, name)
    assert all(equal(*states) for states in zip(first["model"], second["model"], strict=True))
    assert bool(first["loss"]) == (name != "ranking")
    assert equal(first["loss"], second["loss"])
    assert all(not torch.equal(first["loss"][key], first["loss start"][key]) for key in first["loss"])
    assert equal(first["loss start"], second["loss start"]) == ("another start" not in name)
    groups = LayerGroups.from_json(first["groups"])
    steps = Steps(torch.nn.Identity())
    steps.states = first["model"]
    check_openings(steps, groups, dict(zip(reversed(groups.names), [0, 2, 4, 5], strict=True)))


def test_without_the_remedies_the_ranks_drift_apart(folder: Path) -> None:
    first, second = ranks(folder, "ranking, no rebuild")
    apart = [
        step for step, states in enumerate(zip(first["model"], second["model"], strict=True)) if not equal(*states)
    ]
    assert apart[0] == 3, "the first step after the first opening"
    first, second = ranks(folder, "weights, plain")
    assert not equal(first["loss"], second["loss"]), "the plain trainer averages no gradients of the loss's weights"


def test_two_ranks_equal_one_process_with_the_same_global_batches(folder: Path) -> None:
    single = torch.load(folder / "1 rank" / "weights.0.pt")
    assert single["wrapper"] == "SentenceTransformer"

    def apart(name: str) -> tuple[float, float]:
        found, expected = ranks(folder, name)[0], torch.load(folder / "1 rank" / f"{name}.0.pt")
        return (
            deviation(found["model"][-1], expected["model"][-1], expected["model"][0]),
            deviation(found["loss"], expected["loss"], expected["loss start"]),
        )

    assert max(apart("weights")) < 1e-10
    assert max(apart("weights, another start on each rank")) < 1e-10
    assert min(apart("weights, plain")) > 1e-3, "the control"
