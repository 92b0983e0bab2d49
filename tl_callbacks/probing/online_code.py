"""How many bits the labels cost given the features: a probe's accuracy and the rows it takes to get there, in one."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tl_callbacks.probing.discriminant import fit_calibrated_lda

# Shares of the rows after which the probe is fitted again; Voita and Titov's.
FRACTIONS = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.0625, 0.125, 0.25, 0.5)


@dataclass(frozen=True)
class OnlineCode:
    """The length of the labels' code.

    Attributes:
        bits: of all labels.
        uniform_bits: rows * log2(classes), what they cost without features.
        compression: uniform_bits / bits; about 1 where features tell nothing.
        rows: that the probe was fitted on, before each block.
        block_bits: mean bits a label of each block, in the same order: the curve of sample efficiency.
    """

    bits: float
    uniform_bits: float
    compression: float
    rows: tuple[int, ...]
    block_bits: tuple[float, ...]


@torch.no_grad()
def online_code(
    x: Tensor, labels: Tensor, *, classes: int | None = None, fractions: Sequence[float] = FRACTIONS, seed: int = 0
) -> OnlineCode:
    """Return the prequential (online) code length of labels given features: each block by a probe of those before it.

    The first block is sent uniformly. The probe is a calibrated discriminant in closed form; fitted on n rows, its
    probabilities p are sent as (n p + 1) / (n + classes), so that no label costs more than log2(n + classes) bits.

    Args:
        x: (n, d), of any floating dtype; rows with a feature that is not finite are left out.
        labels: (n,), integers from 0.
        classes: how many; None: as occur.
        fractions: of the rows after which the probe is fitted, ascending, in (0, 1).
        seed: of the order in which rows are sent.

    Example:
        >>> x = torch.randn(300, 5, generator=torch.Generator().manual_seed(0))
        >>> online_code(x, (x[:, 0] > 0).long()).compression > 2
        True

    References:
        Voita and Titov, "Information-theoretic probing with minimum description length", EMNLP 2020, section 2.2.2.
        https://arxiv.org/abs/2003.12298
    """
    if list(fractions) != sorted(set(fractions)) or not fractions or not 0 < fractions[0] <= fractions[-1] < 1:
        raise ValueError(f"fractions are {list(fractions)}; expected ascending numbers in (0, 1).")
    finite = x.isfinite().all(dim=1)
    x, labels = x[finite], labels.to(x.device)[finite]
    n = len(labels)
    classes = classes or (int(labels.max()) + 1 if n else 1)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).to(x.device)
    x, labels = x[order], labels[order]
    starts = sorted({round(fraction * n) for fraction in fractions} - {0, n})
    first = starts[0] if starts else n
    bits, block_bits = first * math.log2(classes), []
    for start, stop in zip(starts, [*starts[1:], n], strict=False):
        probe = fit_calibrated_lda(x[:start], labels[:start], classes=classes, seed=seed)
        block = labels[start:stop].unsqueeze(1)
        right = probe.probabilities(x[start:stop]).gather(1, block.to(probe.weights.device))
        cost = -float(((start * right + 1) / (start + classes)).log2().sum())
        bits += cost
        block_bits.append(cost / (stop - start))
    uniform = n * math.log2(classes)
    return OnlineCode(bits, uniform, uniform / bits if bits else math.nan, tuple(starts), tuple(block_bits))
