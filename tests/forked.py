"""Trainings in processes of their own, without the seconds that importing everything takes each time.

A server imports what the trainings need and does nothing else; each rank is a fork of it, so it starts at once, on one
thread, in a state that no other test has touched, and may be killed.
"""

import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
PRELOADED = ["pytest", "tests.kill_worker", "tests.soak.train", "tests.preloaded"]
TIMEOUT = 300  # seconds that a training may take


class Ranks:
    """The processes of one training, from their start on.

    Args:
        target: what each rank calls, importable.
        arguments: its arguments.
        log: where all ranks print to.
        ranks: how many.
        timeout: seconds after which a rank ends itself, so that none outlives a test for long.
    """

    def __init__(
        self, target: Callable[..., None], *arguments: Any, log: Path, ranks: int = 1, timeout: int = TIMEOUT
    ) -> None:
        self.log = log
        self.timeout = timeout
        log.parent.mkdir(parents=True, exist_ok=True)
        port = _free_port()
        self.processes = [
            _context().Process(target=_run, args=(rank, ranks, port, log, timeout, target, arguments), daemon=True)
            for rank in range(ranks)
        ]
        for process in self.processes:
            process.start()

    @property
    def alive(self) -> bool:
        return any(process.is_alive() for process in self.processes)

    def kill(self, order: Sequence[int] | None = None, *, pause: float = 0.0) -> None:
        """Send SIGKILL to the ranks in an order, with seconds between, and wait until they are gone."""
        for place, rank in enumerate(range(len(self.processes)) if order is None else order):
            time.sleep(pause if place else 0.0)
            pid = self.processes[rank].pid
            assert pid is not None
            if self.processes[rank].is_alive():
                os.kill(pid, signal.SIGKILL)
        self.wait()

    def wait(self) -> list[int]:
        """Wait for all ranks, end what a failed one leaves waiting, and return their exit statuses."""
        deadline = time.monotonic() + self.timeout
        while self.alive and time.monotonic() < deadline:
            if any(process.exitcode for process in self.processes):
                deadline = min(deadline, time.monotonic() + 5)  # the others wait for one that is gone
            for process in self.processes:
                process.join(0.02)
        for process in self.processes:
            process.kill()
            process.join()
        return [int(process.exitcode or 0) for process in self.processes]

    def finish(self) -> None:
        """Wait for all ranks and raise, with what they printed, unless all ended well."""
        if any(statuses := self.wait()):
            raise RuntimeError(f"the ranks ended with {statuses}:\n{self.log.read_text()[-4000:]}")


def _context() -> Any:
    os.environ["PYTHONPATH"] = str(ROOT)  # of the server, for what it preloads
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _run(
    rank: int, ranks: int, port: int, log: Path, timeout: int, target: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    """What a rank does: it is as one that torchrun started, or as a plain process where it is alone."""
    signal.alarm(timeout)
    with log.open("a") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    torch.set_num_threads(1)
    if ranks > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(ranks)}
    target(*arguments)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
