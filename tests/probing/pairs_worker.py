"""A rank that sums up its own rows and adds its sums up with those of the others."""

from pathlib import Path

import torch
import torch.distributed as dist

from tl_callbacks.probing.minibatch import MinibatchCKA
from tl_callbacks.probing.streamed import PairSums, reduce_pairs_

ROWS = 96


def layers() -> list[torch.Tensor]:
    """All rows of two layers with a mean far from 0, and of a constant one."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, 6, generator=generator, dtype=torch.float64) + 1e4
    return [x, (x[:, :4] - 1e4).relu() - 30, torch.full((ROWS, 3), 0.1, dtype=torch.float64)]


def share(rank: int, ranks: int, shares: str) -> slice:
    """The rows of a rank: some each, or none but the last rank's."""
    if shares == "all at the last":
        return slice(0, ROWS) if rank == ranks - 1 else slice(0, 0)
    return slice(rank * 32, ROWS if rank == ranks - 1 else (rank + 1) * 32)


def count(folder: Path, shares: str) -> None:
    """Write what each rank finds after the all-reduce."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    mine = share(rank, dist.get_world_size(), shares)
    x, y, constant = (layer[mine] for layer in layers())
    pairs = [PairSums(6, 4).update(x, y), PairSums(6, 3).update(x, constant)]
    minibatch = MinibatchCKA(1, 1)
    for a, b in zip(x.split(16), y.split(16), strict=True):
        minibatch.update([a], [b])
    state = torch.get_rng_state()
    reduce_pairs_(pairs)
    minibatch.all_reduce_()
    assert torch.equal(state, torch.get_rng_state())
    found = {
        "n": [pair.n for pair in pairs],
        "cka": [pair.linear_cka() for pair in pairs],
        "biased": [pair.linear_cka(debiased=False) for pair in pairs],
        "procrustes": [pair.procrustes() for pair in pairs],
        "minibatch": minibatch.matrix().item(),
        "batches": minibatch.batches,
    }
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()
