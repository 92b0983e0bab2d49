"""`make soak`: short random trainings, each straight, interrupted and resumed, and what must hold of all of them.

Every run is drawn from the seed and its number. Results are appended to `<folder>/seed-<seed>.jsonl`, and runs that are
in it already are not run again. What a failed run wrote stays in `<folder>/<run>`; `--only <number>` repeats one run.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tests.soak import memory
from tests.soak.draw import draw
from tests.soak.run import run

Result = dict[str, Any]
SHOWN = ("family", "schedule", "rates", "anchor", "accumulation", "ranks", "bf16", "checkpointing", "interruption")


def written(file: Path) -> list[Result]:
    """The results so far; a line that was not finished does not count."""
    found = []
    for line in file.read_text().splitlines() if file.is_file() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def jobs(seed: int, runs: int, folder: Path, done: set[str]) -> Iterator[Callable[[], Result]]:
    """What is left to do: the runs and, first, the memory."""
    if "memory" not in done:
        yield partial(memory.run, folder / "memory")
    for number in range(runs):
        drawn = draw(seed, number)
        if drawn.name not in done:
            yield partial(run, drawn, folder / drawn.name.replace("/", "-"))


def results_of(left: Iterable[Callable[[], Result]], at_once: int) -> Iterator[Result]:
    """The results as they come. Each worker of several has a server of its own, see tests/forked.py."""
    if at_once == 1:
        for job in left:
            yield job()
        return
    with ProcessPoolExecutor(at_once, get_context("spawn")) as pool:
        for done in as_completed([pool.submit(job) for job in left]):
            yield done.result()


def show(result: Result) -> None:
    """One line, and one more for each failure."""
    print(f"{result['run']:>10} {'FAILED' if result['failures'] else 'ok'}", flush=True)
    for failure in result["failures"]:
        print(f"{'':>10} {failure}", flush=True)


def summary(results: list[Result]) -> str:
    """Counts of what ran, and the failures."""
    drawn = [result["draw"] | {"family": family(result)} for result in results if "draw" in result]
    lines = [f"{len(drawn)} runs, {sum(bool(result['failures']) for result in results)} failures"]
    for key in SHOWN:
        counts = Counter(str(values[key]) for values in drawn)
        lines.append(f"  {key}: " + ", ".join(f"{value} {count}" for value, count in sorted(counts.items())))
    held = [result for result in results if "moved" in result]
    sums = {key: sum(result[key] for result in held) for key in ("groups", "opened", "moved")}
    lines.append("  groups: {groups}, opened {opened}, of these with a step that must move them {moved}".format(**sums))
    lines += [f"  memory: {result['KiB a training']} KiB a training" for result in results if "draw" not in result]
    lines += [f"  failed: {result['run']}: {result['failures'][0][:300]}" for result in results if result["failures"]]
    return "\n".join(lines)


def family(result: Result) -> str:
    return str(result["draw"]["family"]) + (" LoRA" if result["draw"]["lora"] else "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, metavar="N", help="repeat this run alone; nothing is appended")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    parser.add_argument("--folder", type=Path, default=Path("runs/soak"))
    options = parser.parse_args()
    if options.only is not None:
        drawn = draw(options.seed, options.only)
        print(drawn)
        result = run(drawn, options.folder / "only")
        show(result)
        return int(bool(result["failures"]))
    file = options.folder / f"seed-{options.seed}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    left = jobs(options.seed, options.runs, options.folder, {result["run"] for result in written(file)})
    with file.open("a") as lines:
        for result in results_of(left, options.jobs):
            lines.write(json.dumps(result) + "\n")
            lines.flush()
            show(result)
    results = written(file)
    print(summary(results))
    return int(any(result["failures"] for result in results))


if __name__ == "__main__":
    sys.exit(main())
