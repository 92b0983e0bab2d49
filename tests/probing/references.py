"""Data and independent formulas that the tests of similarity compare with."""

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor


def digits() -> tuple[Tensor, Tensor, Tensor]:
    """The pixels of 1797 digits, 0 to 16; their classes, one-hot; 128 random rectified features of them."""
    data = load_digits()
    x = torch.from_numpy(data.data)
    noise = torch.from_numpy(np.random.default_rng(0).standard_normal((64, 128)))
    return x, torch.nn.functional.one_hot(torch.from_numpy(data.target)).double(), torch.relu(x @ noise / 8)


def gram_cka(x: Tensor, y: Tensor, *, debiased: bool = True) -> float:
    """CKA as it is defined on Gram matrices, with matrices of ones."""
    x, y = (z.double() - z.double().mean(0) for z in (x, y))
    n = len(x)
    one = torch.ones(n, dtype=torch.float64)

    def hsic(a: Tensor, b: Tensor) -> Tensor:
        k, m = a @ a.T, b @ b.T
        if not debiased:
            return torch.trace(k @ m)
        k, m = k - k.diag().diag(), m - m.diag().diag()
        ends = (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
        return (torch.trace(k @ m) + ends - 2 / (n - 2) * (one @ k @ m @ one)) / (n * (n - 3))

    return float(hsic(x, y) / (hsic(x, x) * hsic(y, y)).sqrt())


def sample(rows: int, width: int, *, seed: int = 0, offset: float = 0.0) -> Tensor:
    """Independent normal features in float64."""
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + offset
