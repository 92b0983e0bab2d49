"""`make bench-neighbours`: do two ranks hold the same weights after layers were opened? Here and elsewhere.

The same tiny classifier, rows, rates and openings on two CPU ranks over gloo, in float32: with finetuning-scheduler,
with Lightning's `BackboneFinetuning` and `BaseFinetuning`, with callbacks as they are often written for the Trainer,
and with ours. Prints JSON: for each opening how far the opened layers moved until the next one, and how far the ranks
are apart then; errors in their own words. The same as a table goes to stderr.
"""

import argparse
import json

from tests.benchmarks.neighbours.compare import neighbours

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--seed", type=int, default=0, help="of the weights; the rows have the next one")
print(json.dumps(neighbours(parser.parse_args().seed), indent=2))
