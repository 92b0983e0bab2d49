"""`make bench`: what this package costs, measured beside what it is compared with, as JSON.

`python -m tests.benchmarks [name ...]`; without a name all but `neighbours`, which is no measurement of time. Nothing
is asserted: machines differ, ratios measured side by side differ least.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import platform

import torch
from transformers.utils import logging

from tests.benchmarks.anchoring import anchoring
from tests.benchmarks.frozen_prefix import frozen_prefix
from tests.benchmarks.neighbours.compare import neighbours
from tests.benchmarks.neutral import neutral
from tests.benchmarks.probe_fits import probe_fits
from tests.benchmarks.probes import probes
from tests.benchmarks.rank_check import rank_check
from tests.benchmarks.similarity import similarity

TIMED = {
    "neutral": neutral,
    "frozen-prefix": frozen_prefix,
    "rank-check": rank_check,
    "probe-fits": probe_fits,
    "probes": probes,
    "anchoring": anchoring,
    "similarity": similarity,
}


def main() -> None:
    """Run the benchmarks and print them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(TIMED)}, neighbours")
    parser.add_argument("--pairs", type=int, default=40, help="interleaved pairs (rounds) of segments, at least 2")
    options = parser.parse_args()
    if unknown := set(options.names) - {*TIMED, "neighbours"}:
        parser.error(f"{sorted(unknown)[0]!r} is no benchmark; expected one of {', '.join(TIMED)}, neighbours.")
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    found = {
        name: neighbours() if name == "neighbours" else TIMED[name](options.pairs) for name in options.names or TIMED
    }
    print(json.dumps({"torch": torch.__version__, "machine": platform.machine(), **found}, indent=2))


if __name__ == "__main__":
    main()
