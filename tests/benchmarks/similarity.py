"""What the CKA of all pairs of 13 x 13 layers costs at 256 rows, beside a loop over the pairs.

The loop does what torch_cka 0.21 does for a batch of features in float32: for each pair it computes the second layer's
Gram matrix, and of two pairs of Gram matrices the trace of their product as a matrix product. Ours is timed as it is
used in a training, where the reference's Gram matrices are kept, and from nothing; in the loop's float32 and in
float64. Processor time of one thread, the ways in turn.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tests.benchmarks.timing import ratios_in_short
from tl_callbacks.probing.similarity import cka_from_grams, cka_matrix, gram_vectors

LAYERS, ROWS = 13, 256
WIDTHS = (384, 768)


def hsic(k: Tensor, m: Tensor) -> float:
    """n (n - 3) times the unbiased estimate, from Gram matrices without their diagonals."""
    n = len(k)
    ones = torch.ones(n, 1)
    found = torch.trace(k @ m)
    found = found + (ones.T @ k @ ones @ ones.T @ m @ ones).squeeze() / ((n - 1) * (n - 2))
    return float(found - (ones.T @ k @ m @ ones).squeeze() * 2 / (n - 2))


def gram(x: Tensor) -> Tensor:
    """The products of all rows, without those of a row with itself."""
    return (x @ x.T).fill_diagonal_(0.0)


def loop(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> Tensor:
    """The baseline: (L, L')."""
    found = torch.zeros(len(xs), len(ys))
    for i, x in enumerate(xs):
        k = gram(x)
        own = hsic(k, k)
        for j, y in enumerate(ys):
            m = gram(y)
            found[i, j] = hsic(k, m) / (own * hsic(m, m)) ** 0.5
    return found


def seconds(function: Callable[[], object]) -> float:
    """Processor time of one call."""
    started = time.process_time()
    function()
    return time.process_time() - started


def ratios(width: int, rounds: int) -> dict[str, Any]:
    """Time the ways in turn."""
    generator = torch.Generator().manual_seed(0)
    xs, ys = ([torch.randn(ROWS, width, generator=generator) for _ in range(LAYERS)] for _ in range(2))
    single, double = torch.float32, torch.float64
    kept = {dtype: gram_vectors(ys, dtype=dtype) for dtype in (single, double)}
    ways: dict[str, Callable[[], object]] = {
        "reference kept, float32": lambda: cka_from_grams(gram_vectors(xs, dtype=single), kept[single]),
        "reference kept, float64": lambda: cka_from_grams(gram_vectors(xs), kept[double]),
        "both from nothing, float32": lambda: cka_from_grams(
            gram_vectors(xs, dtype=single), gram_vectors(ys, dtype=single)
        ),
        "both from nothing, float64": lambda: cka_matrix(xs, ys),
        "a model with itself, float64": lambda: cka_matrix(xs),
    }
    for way in ways.values():
        way()
    loop(xs, ys)
    times: dict[str, list[float]] = {"loop": [], **{name: [] for name in ways}}
    for _ in range(rounds):
        times["loop"].append(seconds(lambda: loop(xs, ys)))
        for name, way in ways.items():
            times[name].append(seconds(way))
    return {
        "the loop's time over ours": {
            name: ratios_in_short([a / b for a, b in zip(times["loop"], times[name], strict=True)]) for name in ways
        },
        "median, in seconds": {name: statistics.median(values) for name, values in times.items()},
        "rounds": rounds,
    }


def similarity(rounds: int) -> dict[str, Any]:
    """Return how many times as long the loop takes, for layers of two widths."""
    return {f"width {width}": ratios(width, rounds) for width in WIDTHS}
