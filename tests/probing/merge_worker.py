"""A rank that counts its own rows and adds its moments up with those of the others."""

from pathlib import Path

import torch
import torch.distributed as dist

from tl_callbacks.probing.moments import Moments, all_reduce_, pack

ROWS = 700


def rows() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """All rows and labels, far from zero."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, 12, generator=generator) * torch.linspace(0.1, 3, 12) + 40
    return x, {"task": torch.arange(ROWS) % 3, "value": x[:, 0] * 2 + 100}


def share(rank: int, ranks: int, shares: str) -> slice:
    """The rows of a rank: of equal size, or none but the last rank's."""
    if shares == "all at the last":
        return slice(0, ROWS) if rank == ranks - 1 else slice(0, 0)
    return slice(rank * ROWS // ranks, (rank + 1) * ROWS // ranks)


def count(folder: Path, shares: str) -> None:
    """Write what each rank has after the all-reduce."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    x, labels = rows()
    mine = share(rank, dist.get_world_size(), shares)
    layers = [Moments(width, {"task": 3, "value": None}) for width in (12, 5)]
    for layer in layers:
        layer.update(x[mine, : layer.width], {name: values[mine] for name, values in labels.items()})
    state = torch.get_rng_state()
    all_reduce_(layers)
    assert torch.equal(state, torch.get_rng_state())
    torch.save((pack(layers), [layer.centred() for layer in layers]), folder / f"{rank}.pt")
    dist.destroy_process_group()
