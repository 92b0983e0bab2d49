"""One of several processes does something, the others wait for it, and all fail if it fails."""

import os
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

T = TypeVar("T")
_PATIENCE = timedelta(days=1)  # an upload takes longer than the half hour that a process group waits by default


def on_first_rank(action: Callable[[], T]) -> T:
    """Run an action on the first process, and return its result on every one.

    Alone, it is just run. In a process group of torch the others wait for the outcome over gloo, which needs no
    accelerator and has its own patience. torch is not imported: without it there is no group.

    Args:
        action: its result can be pickled.

    Returns:
        What the action returned on the first process.

    Raises:
        RuntimeError: on the other processes, when the action failed on the first, which raises its own error; or there
            are several processes, by the environment, and no group in which they could wait.

    Example:
        >>> on_first_rank(lambda: "done")
        'done'
    """
    torch = sys.modules.get("torch")
    distributed: Any = getattr(torch, "distributed", None)
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        if int(os.environ.get("WORLD_SIZE") or 1) > 1:
            raise RuntimeError(
                f"this is one of {os.environ['WORLD_SIZE']} processes (WORLD_SIZE), and they have no process group in "
                "which the others could wait for the first. Publish before the group is destroyed, or afterwards from "
                "a process of its own: python -m hub_cards publish RUN_DIR REPO_ID."
            )
        return action()
    if distributed.get_world_size() == 1:
        return action()
    group = distributed.new_group(backend="gloo", timeout=_PATIENCE) if distributed.is_gloo_available() else None
    try:
        return _broadcast(action, distributed, group)
    finally:
        if group is not None:
            distributed.destroy_process_group(group)


def _broadcast(action: Callable[[], T], distributed: Any, group: Any) -> T:
    if distributed.get_rank() == 0:
        try:
            result = action()
        except BaseException as error:  # the others must not wait for what does not come
            distributed.broadcast_object_list([None, f"{type(error).__name__}: {error}"], src=0, group=group)
            raise
        distributed.broadcast_object_list([result, None], src=0, group=group)
        return result
    outcome: list[Any] = [None, None]
    distributed.broadcast_object_list(outcome, src=0, group=group)
    if outcome[1] is not None:
        raise RuntimeError(f"the first process failed, so this one stops too. There: {outcome[1]}")
    done: T = outcome[0]
    return done
