"""Target accuracy and retention side by side: anchors, LwF, WiSE-FT and LoRA on a second task, over five seeds.

    python -m tests.benchmarks.tradeoff [digits | docstrings] [--seeds 5]

Each way tries several strengths. By the development rows, in the mean over all seeds, the strength is chosen that
retains most while the target accuracy is within one point of plain fine-tuning's, or, if there is none, the one of the
best target accuracy. The test rows play no part in the choice. Prints JSON.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse
import json

import torch
from transformers.utils import logging

from tests.benchmarks.tradeoff import digits, docstrings
from tests.benchmarks.tradeoff.choice import by_way

TASKS = {"digits": digits.results, "docstrings": docstrings.results}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", nargs="?", choices=TASKS, help="default: both")
    parser.add_argument("--seeds", type=int, default=5, help="at least 2")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    tasks = [options.task] if options.task else TASKS
    found = {task: by_way(TASKS[task](options.seeds)) for task in tasks}
    print(json.dumps({"seeds": options.seeds, **found}, indent=2))
