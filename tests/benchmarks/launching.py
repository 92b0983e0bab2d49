"""Two ranks on this machine, for benchmarks: processes of their own, started by torchrun, over gloo."""

import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def two_ranks(module: str, *arguments: str, log: Path, seconds: int) -> int:
    """Run `python -m module *arguments` on two ranks of one thread each and return the exit status.

    Args:
        module: what to run; it finds its rank where torchrun puts it.
        arguments: its command line.
        log: the file that what it prints goes to.
        seconds: after which all of it is killed.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", module]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, *arguments],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return process.wait()
