"""Which parameter a forward pass uses when: `first_use`."""

import contextlib
import io
import signal
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx.experimental import _config
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig, PreTrainedModel

from tests.survey_architectures.catalogue import make
from tests.survey_architectures.inputs import candidates
from tests.survey_architectures.shrink import parts, shrunk

SECONDS = 30  # for one pass, and for a model after which no further pass is begun
ENOUGH = 0.95  # the share of the parameters after which no further inputs are tried
LARGE, LARGEST = 150_000_000, 600_000_000  # parameters: of a model that is slow to make, that is not made on the CPU
WIDTHS = (1, 2, 4, 8)  # what the hidden sizes are divided by

READS = {"item", "tolist", "__bool__", "__float__", "__int__"}
SHAPED_LIKE = {"zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "randint_like"}
SHAPED_LIKE |= {"new_zeros", "new_ones", "new_empty", "new_full", "new_tensor", "resolve_conj", "requires_grad_"}
TAKES_SECOND_AS_SHAPE = {"to", "type_as", "expand_as", "view_as", "reshape_as"}


@dataclass(frozen=True)
class Trace:
    """When a forward pass first and last used the parameters of the model that it ran on."""

    model: nn.Module
    order: dict[str, int]
    complete: bool
    how: str
    error: str
    last: dict[str, int]

    @property
    def coverage(self) -> float:
        """The share of the parameters that were used."""
        return len(self.order) / max(1, sum(1 for _ in self.model.parameters()))


def first_use(model: nn.Module) -> Trace:
    """Run a forward pass with made-up inputs and return when each parameter was first used.

    Inputs are tried on the model as it is, then on a small one of the same class on the CPU, until a pass is complete
    and has used nearly all parameters. The best pass is returned: a complete one before the one that used the most.
    """
    best = Trace(model, {}, False, "none", "no inputs are known for the signature", {})
    start = time.monotonic()
    for trace in _attempts(model):
        if (trace.complete, round(trace.coverage, 2)) > (best.complete, round(best.coverage, 2)) or best.how == "none":
            best = trace
        if (best.complete and best.coverage >= ENOUGH) or time.monotonic() - start > SECONDS:
            break
    return best


def _attempts(model: nn.Module) -> Iterator[Trace]:
    device = next(model.parameters()).device.type
    plain(model)
    yield from _passes(model, device, device)
    if not isinstance(model, PreTrainedModel) or device != "meta":
        return
    for width, config in _small_configurations(model):
        try:
            with limited(SECONDS):
                small = plain(make(type(model), config, "cpu"))
        except Exception as error:
            yield Trace(model, {}, False, f"cpu/{width}", reason_of(error), {})
            continue
        complete = False
        for trace in _passes(small, "cpu", f"cpu/{width}"):
            complete = complete or trace.complete
            yield trace
        if complete:
            return


def _passes(model: nn.Module, device: str, how: str) -> Iterator[Trace]:
    inputs = candidates(model, device)
    while True:
        try:
            with limited(SECONDS):
                name, arguments = next(inputs)
        except (StopIteration, TimeoutError):
            return
        yield _run(model, arguments, f"{how} {name}")


def _small_configurations(model: PreTrainedModel) -> list[tuple[int, PreTrainedConfig]]:
    """Return (width, configuration) to run on the CPU: as wide as is quick, then as wide as fits."""
    sizes = {}
    for width in WIDTHS:
        with contextlib.suppress(Exception):  # a configuration that the class refuses once it is narrowed
            config = shrunk(model.config, width)
            sizes[width] = (sum(p.numel() for p in make(type(model), config).parameters()), config)
    fit = [(size > LARGE, width, config) for width, (size, config) in sizes.items() if size <= LARGEST]
    quickest = sorted(fit, key=lambda item: item[:2])[:1]
    widest = [item for item in fit[:1] if item[1] != quickest[0][1]]
    return [(width, config) for _, width, config in quickest + widest]


def plain(model: nn.Module) -> nn.Module:
    """Choose what runs on any device without a look at the values: attention, experts, no cache."""
    for part in parts(model.config) if isinstance(model, PreTrainedModel) else ():
        if getattr(part, "use_cache", None):
            part.use_cache = False
    with contextlib.suppress(Exception):
        model.set_attn_implementation("eager")
    with contextlib.suppress(Exception):
        on_meta = next(model.parameters()).device.type == "meta"
        model.set_experts_implementation("batched_mm" if on_meta else "eager")  # batched, each token copies its experts
    return model


def _run(model: nn.Module, arguments: dict[str, Any], how: str) -> Trace:
    recorder = _Recorder(model)
    error = ""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            with limited(SECONDS), _config.patch(meta_nonzero_assume_all_nonzero=True), recorder:
                model(**arguments)
        except Exception as raised:  # whatever a model raises is what the trace tells
            error = reason_of(raised)
    last = {recorder.names[key]: number for key, number in recorder.last.items()}
    return Trace(model, recorder.by_name(), not error, how, error, last)


def reason_of(error: Exception) -> str:
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    where = f"{frame.tb_frame.f_code.co_filename.rsplit('/', 1)[-1]}:{frame.tb_lineno}" if frame else ""
    return f"{type(error).__name__} at {where}: {' '.join(str(error).split())[:300]}"


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"longer than {seconds} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


class _Recorder(TorchFunctionMode):
    """Numbers the torch functions of a pass and notes which was the first to take each parameter."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.calls = 0
        self.first: dict[int, int] = {}
        self.last: dict[int, int] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.calls += 1
        number = self.calls
        name = getattr(func, "__name__", "")
        if name not in SHAPED_LIKE and (name in READS or _has_tensor(result)):
            for parameter in _tensors(args[:1] if name in TAKES_SECOND_AS_SHAPE else (args, kwargs)):
                if id(parameter) in self.names:
                    self.first.setdefault(id(parameter), number)
                    self.last[id(parameter)] = number
        return result

    def by_name(self) -> dict[str, int]:
        return {self.names[key]: number for key, number in sorted(self.first.items(), key=lambda item: item[1])}


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)


def _has_tensor(value: Any) -> bool:
    return next(_tensors(value), None) is not None
