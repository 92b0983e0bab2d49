"""Whether the losses of the task classes ignore the number of items that the Trainer counts: measured, and read.

`python -m tests.survey_architectures.item_count` writes `item_count.json`.
On a busy machine the limits of time leave classes out.
"""

import contextlib
import inspect
import io
import json
import os
import time
import warnings
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from tests.survey_architectures.catalogue import configuration, head_classes, make
from tests.survey_architectures.inputs import TEXT, candidates
from tests.survey_architectures.shrink import shrunk
from tests.survey_architectures.trace import LARGE, WIDTHS, limited, plain, reason_of
from tl_callbacks.loss_scale import ignores_item_count

SECONDS = 15  # of the processor, for the tries with one model
FILE = Path(__file__).with_name("item_count.json")
COUNT = 7  # items; the second pass says twice as many


Entry = tuple[str, str, type[PreTrainedModel]]  # model type, auto mapping, class


def classes() -> list[Entry]:
    """Return the task classes that the Trainer counts items for: `labels` that are one tensor, and `**kwargs`."""
    return [entry for entry in head_classes() if counted(entry[2])]


def counted(cls: type[nn.Module]) -> bool:
    """Return whether a class takes `labels` as one tensor."""
    labels = inspect.signature(cls.forward).parameters.get("labels")
    return labels is not None and "dict" not in str(labels.annotation)


def measured(cls: type[PreTrainedModel], config: PreTrainedConfig) -> tuple[bool | None, str]:
    """Return whether the loss of a small model is the same for a count and for twice the count, and with what inputs.

    None where no made-up inputs and labels give a loss; the text then tells the last reason.
    """
    reason = "no small model could be made"
    for model in _small(cls, config):
        start = time.process_time()
        inputs = candidates(model, "cpu")
        while time.process_time() - start < SECONDS:
            try:
                with limited(SECONDS):
                    name, arguments = next(inputs)
                    answer, reason = _answer(model, arguments)
            except StopIteration:
                break
            except Exception as error:  # whatever a model raises on made-up inputs is the reason
                reason = reason_of(error)
                continue
            if answer is not None:
                return answer, name
    return None, reason


def _answer(model: PreTrainedModel, arguments: dict[str, Any]) -> tuple[bool | None, str]:
    if type(model).__name__.endswith("MultipleChoice"):
        arguments = {key: torch.stack([value, value], 1) for key, value in arguments.items()}
    reason = "no labels are known for the outputs"
    for labels in _labels(model, arguments, _passed(model, arguments)):
        try:
            once, twice = (_loss(model, {**arguments, **labels}, count) for count in (COUNT, 2 * COUNT))
        except TimeoutError:
            raise
        except Exception as error:
            reason = f"labels: {reason_of(error)}"
            continue
        if once is not None and twice is not None and once.isfinite() and once != 0:
            return bool(torch.allclose(once, twice, rtol=1e-3)), ""
        reason = f"the loss is {once}"
    return None, reason


def _small(cls: type[PreTrainedModel], config: PreTrainedConfig) -> Iterator[PreTrainedModel]:
    """Yield small models on the CPU, the narrowest first."""
    for width in sorted(WIDTHS, reverse=True):
        with contextlib.suppress(Exception), limited(SECONDS):  # a configuration that the class refuses when narrowed
            small = shrunk(config, width)
            if sum(p.numel() for p in make(cls, small).parameters()) <= LARGE:
                yield plain(make(cls, small, "cpu"))


def _passed(model: PreTrainedModel, arguments: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        warnings.simplefilter("ignore")
        return model(**arguments)


def _loss(model: PreTrainedModel, arguments: dict[str, Any], count: int) -> torch.Tensor | None:
    outputs = _passed(model, {**arguments, "num_items_in_batch": torch.tensor(count)})
    return outputs.get("loss")


def _labels(model: PreTrainedModel, arguments: dict[str, Any], outputs: Any) -> Iterator[dict[str, Any]]:
    """Yield labels to try: shaped as the first output, and as the inputs."""
    shapes: list[tuple[int, ...]] = []
    dtypes = (torch.long, torch.float)
    for value in outputs.values():
        if isinstance(value, torch.Tensor):
            shape = tuple(value.shape)
            shapes += [shape[:-1], shape, shape[:1], (shape[0], *shape[2:])]
    for name in ("decoder_input_ids", "input_ids", "pixel_values", "input_values", "input_features"):
        if isinstance(arguments.get(name), torch.Tensor):
            shape = tuple(arguments[name].shape)
            shapes += [shape, (shape[0], *shape[2:]), (shape[0], TEXT // 2)]
    ids = arguments.get("input_ids")
    first = [ids] if ids is not None and type(model).__name__.endswith(("LM", "LMHeadModel", "Generation")) else []
    options = first + [torch.ones(s, dtype=d) for d in dtypes for s in dict.fromkeys(shapes) if s and 0 not in s]
    extra = {
        name: torch.ones(1, dtype=torch.long)
        for name in ("start_positions", "end_positions", "next_sentence_label")
        if name in inspect.signature(model.forward).parameters
    }
    for labels in options:
        yield {"labels": labels, **extra}
        if "return_loss" in inspect.signature(model.forward).parameters:
            yield {"labels": labels, "return_loss": True, **extra}


def read(entry: Entry) -> bool | None:
    """Return what the source of a class says, of a model on the meta device; None also where none can be made."""
    model_type, _, cls = entry
    with contextlib.suppress(Exception):  # whatever a model raises when it is made
        return ignores_item_count(make(cls, shrunk(configuration(model_type, cls))))
    with contextlib.suppress(Exception):
        return ignores_item_count(make(cls, configuration(model_type, cls)))
    return None


def read_all() -> dict[str, bool | None]:
    """Return what the sources of all classes say, by class."""
    return {entry[2].__name__: read(entry) for entry in classes()}


def record(entry: Entry) -> dict[str, Any]:
    """Return what is measured and read of a class."""
    model_type, mapping, cls = entry
    found: tuple[bool | None, str] = (None, "no configuration")
    with contextlib.suppress(Exception), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        found = measured(cls, configuration(model_type, cls))
    answer, how = found
    result = {"mapping": mapping, "measured": answer, "read": read(entry)}
    return result if answer is not None else {**result, "reason": how[:160]}


def _begin() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()


def write(records: dict[str, dict[str, Any]]) -> None:
    """Write the records, one a line."""
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(records[name])}" for name in sorted(records))
    FILE.write_text(f'{{"transformers": "{transformers.__version__}", "classes": {{\n{lines}\n}}}}\n')


if __name__ == "__main__":
    entries = classes()
    with get_context("spawn").Pool(os.cpu_count(), _begin, maxtasksperchild=200) as pool:
        names = [cls.__name__ for _, _, cls in entries]
        write(dict(zip(names, pool.imap(record, entries, chunksize=4), strict=True)))
