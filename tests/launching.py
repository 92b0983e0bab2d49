"""Processes of their own on this machine: one, or the ranks that torchrun starts, which meet over gloo."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parent.parent


def launch(
    *command: str, ranks: int | None, log: Path, seconds: int = 600, environment: Mapping[str, str] | None = None
) -> int:
    """Run `python *command` from the project's folder, one thread each, and return the exit status.

    Args:
        command: a script, or `-m` and a module, and its arguments.
        ranks: processes that torchrun starts; None: one without torchrun.
        log: the file that what it prints goes to.
        seconds: after which all of it is killed.
        environment: variables besides this process's own.
    """
    torchrun = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}") if ranks else ()
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"}
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, *torchrun, *command],
            cwd=ROOT,
            env={**os.environ, **settings, **(environment or {})},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return process.wait()
