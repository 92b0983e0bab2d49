"""A rank that estimates the Fisher on its own samples and has the mean over those of all ranks."""

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tl_callbacks.anchoring import diagonal_fisher, save_fisher

ROWS = 11


def model() -> nn.Module:
    """A small classifier in float64."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def batches(start: int, end: int) -> list[tuple[Tensor, Tensor]]:
    """Rows of all samples, a batch of them or none."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(ROWS, 4, dtype=torch.float64, generator=generator)
    return [(x[start:end], torch.arange(ROWS)[start:end] % 3)] if end > start else []


def estimate(folder: Path, split: int) -> None:
    """Write what each rank has: the first rank sees the rows below `split`, the second the others."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    own = batches(0, split) if rank == 0 else batches(split, ROWS)
    save_fisher(diagonal_fisher(model(), own, reduce=True), folder / f"{rank}.safetensors")
    dist.destroy_process_group()
