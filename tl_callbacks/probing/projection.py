"""A fixed random projection for layers too wide for d x d sums."""

import torch
from torch import Tensor


class RandomProjection:
    """Projects features of width d to k numbers with a fixed Gaussian matrix of variance 1 / k.

    Distances and inner products are kept up to about sqrt(2 / k) of their size (Johnson and Lindenstrauss). The matrix
    depends on the seed and the two widths alone: the same on each rank, at each evaluation and for each layer of one
    width, without a word between them, and it leaves the global random state alone. What is read from the sums is then
    of the projected features: ranks are k at most, and single features are mixed before they are standardised.

    Args:
        width: features of a row, d.
        size: numbers that are kept, k, at most d.
        seed: of the matrix.

    Example:
        >>> RandomProjection(1000, 64)(torch.ones(2, 1000)).shape
        torch.Size([2, 64])

    References:
        Achlioptas, "Database-friendly random projections", Journal of Computer and System Sciences 66, 2003, section 2.
    """

    def __init__(self, width: int, size: int, *, seed: int = 0) -> None:
        if not 1 <= size <= width:
            raise ValueError(f"size is {size}; expected 1 to {width}, the features of a row.")
        self.width, self.size = width, size
        generator = torch.Generator().manual_seed(seed)
        self.matrix = torch.randn(width, size, dtype=torch.float64, generator=generator) / size**0.5

    @torch.no_grad()
    def __call__(self, features: Tensor) -> Tensor:
        """Return the projected rows, (n, k), in float64.

        Args:
            features: (n, d), of any floating dtype.
        """
        if features.ndim != 2 or features.shape[1] != self.width:
            raise ValueError(f"features have shape {tuple(features.shape)}; expected (rows, {self.width}).")
        if features.device.type == "mps":  # has no float64
            features = features.cpu()
        if self.matrix.device != features.device:
            self.matrix = self.matrix.to(features.device)
        return torch.mm(features.double(), self.matrix)
