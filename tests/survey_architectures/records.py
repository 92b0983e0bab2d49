"""One record for each model type, task class and timm family."""

import contextlib
import io
import os
import resource
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing import get_context
from typing import Any

import torch
import transformers

from tests.survey_architectures import catalogue, heads, report, timm_families
from tests.survey_architectures.judge import Record, statics, traced
from tests.survey_architectures.trace import first_use

MEMORY = 8 * 2**30  # bytes a process may use; a pass that needs more fails, and so is not judged


def backbone(model_type: str) -> Record:
    """Return the record of a model type's base model."""
    return _guarded({"type": model_type}, lambda: _backbone(model_type))


def _backbone(model_type: str) -> Record:
    model = catalogue.build_backbone(model_type)
    return {"reads": report.reads(model), **statics(model), **traced(first_use(model))}


def head(entry: tuple[str, str, Any]) -> Record:
    """Return the record of a task class."""
    model_type, mapping, cls = entry
    found = {"type": model_type, "mapping": mapping, "class": cls.__name__}
    return _guarded(found, lambda: heads.judged(catalogue.build_head(model_type, cls)))


def timm_family(family: str) -> Record:
    """Return the record of a timm family."""

    def judged() -> Record:
        verdict = timm_families.survey({family: timm_families.FAMILIES[family]})[family]
        return {"covers": not (verdict.missing or verdict.twice), "groups": verdict.groups, "order": verdict.swapped}

    return _guarded({"family": family, "model": timm_families.FAMILIES[family]}, judged)


def _guarded(record: Record, make: Callable[[], Record]) -> Record:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            return {**record, **make()}
        except Exception as error:  # whatever a model raises when it is made is the reason
            where = traceback.extract_tb(error.__traceback__)[-1]
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
            ours = "tl_callbacks" in where.filename
            return {**record, "crashed" if ours else "not_made": reason}


def _begin() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def survey() -> Record:
    """Return all records."""
    start = time.perf_counter()
    types, classes = catalogue.model_types(), catalogue.head_classes()
    with get_context("spawn").Pool(os.cpu_count(), _begin, maxtasksperchild=100) as pool:
        result = {
            "backbones": list(pool.imap(backbone, types)),
            "heads": list(pool.imap(head, classes, chunksize=4)),
            "timm": list(pool.imap(timm_family, timm_families.FAMILIES, chunksize=2)),
        }
    return {
        "versions": {"transformers": transformers.__version__, "torch": torch.__version__.partition("+")[0]},
        "without_class": catalogue.without_class(),
        **result,
        "seconds_7b": report.seconds_to_group_7b(),
        "minutes": round((time.perf_counter() - start) / 60, 1),
    }
