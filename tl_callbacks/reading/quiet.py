"""What a look into a model must leave as it was: the mode of its modules, and every random state."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy
import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set every module to eval mode, and each to its own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def random_states_kept(device: torch.device, seed: int) -> Iterator[None]:
    """Draw random numbers from a seed inside, and go on as if nothing had been drawn after."""
    accelerator = device.type not in ("cpu", "meta")
    devices, kind = ([device], device.type) if accelerator else ([], "cuda")
    python, arrays = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng(devices, device_type=kind):
            torch.default_generator.manual_seed(seed)
            if accelerator:
                torch.get_device_module(device).manual_seed(seed)
            random.seed(seed)
            numpy.random.seed(seed)
            yield
    finally:
        random.setstate(python)
        numpy.random.set_state(arrays)
