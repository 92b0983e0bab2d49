"""Arguments of a recipe: one YAML file, overridden by the command line, with near names for what is unknown."""

import os
import sys
from collections.abc import Sequence
from typing import Any

import yaml
from transformers import HfArgumentParser, TrainingArguments

from tl_callbacks import closest


def parse(dataclasses: Sequence[type], arguments: Sequence[str] | None = None) -> tuple[Any, ...]:
    """Return one instance of each dataclass from `--config file.yaml` and the options after it.

    Args:
        dataclasses: dataclasses whose fields are the known keys.
        arguments: the command line without the program; None: `sys.argv[1:]`.

    Returns:
        The instances, in the order of `dataclasses`. An option wins over the file, the file over a default.

    Raises:
        ValueError: a key of the file or an option is unknown; the nearest names are listed. Or several processes were
            started that do not see each other: see `check_processes`.
    """
    parser = HfArgumentParser(tuple(dataclasses))
    known = [action.dest for action in parser._actions if action.dest != "help"]
    parser.add_argument("--config", help="YAML file with any of the other options")
    options = list(sys.argv[1:] if arguments is None else arguments)
    first, _ = parser.parse_known_args([o for o in options if o not in ("-h", "--help")])
    if first.config:
        with open(first.config) as file:
            values = yaml.safe_load(file) or {}
        _check_keys(values, known, first.config)
        parser.set_defaults(**values)
    *instances, namespace, unknown = parser.parse_args_into_dataclasses(options, return_remaining_strings=True)
    assert set(vars(namespace)) == {"config"}
    _check_keys([o.split("=")[0].lstrip("-") for o in unknown if o.startswith("--")], known, "the command line")
    if unknown:
        raise ValueError(f"`{unknown[0]}` on the command line belongs to no option; write --name value.")
    for instance in instances:
        if isinstance(instance, TrainingArguments):
            check_processes(instance)
    return tuple(instances)


def check_processes(args: TrainingArguments) -> None:
    """Refuse a launch whose processes would each train alone: what starts them does not make them find each other.

    So it is where they were started for GPUs on a machine without one, and were not told to use the CPU.

    Args:
        args: the arguments, made in the process that the launcher started.

    Raises:
        ValueError: the launcher started several processes, and the Trainer counts fewer.
    """
    started = int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1
    if args.world_size < started:
        raise ValueError(
            f"{started} processes were started, but the Trainer sees {args.world_size}: each would train alone and "
            "write the same files. Expected one GPU a process; on a machine without GPUs add --use_cpu true."
        )


def _check_keys(keys: Any, known: Sequence[str], where: str) -> None:
    for key in keys:
        if key not in known:
            raise ValueError(f"unknown key `{key}` in {where}. Closest names: {closest(key, known)}.")
