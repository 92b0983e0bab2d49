"""Trains cells on two ranks each and compares what the ranks saw."""

import importlib
import itertools
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.neighbours import beside, script
from tests.launching import launch

SECONDS = 300  # after which a cell that hangs is ended
TRAINER = "tests.benchmarks.neighbours.with_trainer"
LIGHTNING = "tests.benchmarks.neighbours.with_lightning"
ABSENT = "left out: lightning and finetuning-scheduler, which `make bench-neighbours` puts in .venv/neighbours."


@dataclass(frozen=True)
class Opening:
    """What one opening did until the next one, or until training ended.

    Args:
        step: optimizer steps before it.
        parameters: how many tensors opened.
        moved: the largest change of a value that opened; 0: it had no effect.
        unmoved: how many of the opened tensors are bit for bit as before.
        apart: the largest difference of any parameter between the ranks at the end; 0: they are equal.
    """

    step: int
    parameters: int
    moved: float
    unmoved: int
    apart: float


@dataclass(frozen=True)
class Result:
    """What a training did. `steps`: optimizer steps that both ranks finished; `apart_before`: before any opening."""

    cell: str
    steps: int
    apart_before: float | None
    openings: tuple[Opening, ...]
    error: str | None

    @property
    def verdict(self) -> str:
        """In words."""
        if self.error:
            return f"error after step {self.steps}: {first_sentence(self.error)}"
        if not self.openings:
            return "nothing opened"
        if any(not opening.moved for opening in self.openings):
            return "no effect: what opened did not move"
        return "ranks drift apart" if any(opening.apart for opening in self.openings) else "ranks equal"

    def facts(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "verdict": self.verdict}


def first_sentence(text: str) -> str:
    """The first sentence of an error's first line, so that a table stays readable."""
    return text.strip().splitlines()[0].partition(". ")[0][:100]


def run(module: str, cell: str, seed: int) -> Result:
    """Train one cell of a module on two ranks, in processes of its own."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        worker = "tests.benchmarks.neighbours.worker"
        log = folder / "log.txt"
        status = launch("-m", worker, module, cell, str(seed), str(folder), ranks=2, log=log, seconds=SECONDS)
        files = [folder / f"{rank}.pt" for rank in range(2)]
        if status or not all(file.is_file() for file in files):
            end = log.read_text()[-1000:]
            return Result(cell, 0, None, (), f"no result (status {status}, at most {SECONDS} s): {end}")
        return compare(cell, [torch.load(file) for file in files])


def compare(cell: str, ranks: list[dict[str, Any]]) -> Result:
    """Compare the records of the ranks."""
    steps = min(len(rank["steps"]) for rank in ranks)
    opened = ranks[0]["open"][:steps]
    at = [step for step in range(1, steps) if set(opened[step]) - set(opened[step - 1])]
    openings = []
    for step, until in itertools.pairwise([*at, steps]):
        names = sorted(set(opened[step]) - set(opened[step - 1]))
        before, after = (ranks[0]["steps"][last - 1] for last in (step, until))
        changes = [distance(before, after, [name]) for name in names]
        openings.append(Opening(step, len(names), max(changes), changes.count(0.0), apart(ranks, until)))
    frozen = at[0] if at else steps
    error = next((rank["error"] for rank in ranks if rank["error"]), None)
    return Result(cell, steps, apart(ranks, frozen) if frozen else None, tuple(openings), error)


def apart(ranks: list[dict[str, Any]], steps: int) -> float:
    """The largest difference between the two ranks after that many steps."""
    first, second = (rank["steps"][steps - 1] for rank in ranks)
    return distance(first, second, list(first))


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], names: list[str]) -> float:
    """The largest absolute difference of the named tensors."""
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in names)


def table(results: list[Result]) -> str:
    """The results as a table in markdown."""
    head = ["set-up", "ranks apart after the first opening", "after the last", "opened layers moved", "outcome"]
    lines = [head, ["---", "---:", "---:", "---:", "---"]]
    for result in results:
        figures = ["-"] * 3
        if result.openings:
            first, last = result.openings[0], result.openings[-1]
            figures = [f"{value:.1e}" if value else "0" for value in (first.apart, last.apart, first.moved)]
        lines.append([result.cell, *figures, result.verdict])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def neighbours(seed: int = 0) -> dict[str, Any]:
    """Train every cell whose packages are there, and return what was found; progress and a table go to stderr."""
    present = beside.make_importable()
    modules = [LIGHTNING, TRAINER] if present else [TRAINER]
    if not present:
        print(ABSENT, file=sys.stderr)
    results = []
    for module in modules:
        for cell in importlib.import_module(module).CELLS:
            results.append(run(module, cell, seed))
            print(f"{cell}: {results[-1].verdict}", file=sys.stderr)
    print(f"\n{table(results)}", file=sys.stderr)
    return {
        "versions": beside.versions(),
        "left out": None if present else ABSENT,
        "seeds": {"weights": seed, "rows": seed + 1},
        "script": {
            "ranks": script.RANKS, "rows a rank and step": script.BATCH, "steps an epoch": script.STEPS_PER_EPOCH,
            "phases, one an epoch": script.PHASES, "AdamW rate": script.RATE,
        },
        "results": [result.facts() for result in results],
    }  # fmt: skip
