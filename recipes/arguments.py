"""Arguments of a recipe: one YAML file, overridden by the command line, with near names for what is unknown."""

import os
import sys
from collections.abc import Sequence
from typing import Any

import torch
import yaml
from transformers import HfArgumentParser

from tl_callbacks import closest


def parse(dataclasses: Sequence[type], arguments: Sequence[str] | None = None) -> tuple[Any, ...]:
    """Return one instance of each dataclass from `--config file.yaml` and the options after it.

    Args:
        dataclasses: dataclasses whose fields are the known keys.
        arguments: the command line without the program; None: `sys.argv[1:]`.

    Returns:
        The instances, in the order of `dataclasses`. An option wins over the file, the file over a default.

    Raises:
        ValueError: a key of the file or an option is unknown; the nearest names are listed.
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
    if "LOCAL_RANK" in os.environ and "use_cpu" in known and not torch.accelerator.is_available():
        # Several processes without a GPU find each other only on the CPU; accelerate does not tell the script so.
        parser.set_defaults(use_cpu=True)
    *instances, namespace, unknown = parser.parse_args_into_dataclasses(options, return_remaining_strings=True)
    assert set(vars(namespace)) == {"config"}
    _check_keys([o.split("=")[0].lstrip("-") for o in unknown if o.startswith("--")], known, "the command line")
    if unknown:
        raise ValueError(f"`{unknown[0]}` on the command line belongs to no option; write --name value.")
    return tuple(instances)


def _check_keys(keys: Any, known: Sequence[str], where: str) -> None:
    for key in keys:
        if key not in known:
            raise ValueError(f"unknown key `{key}` in {where}. Closest names: {closest(key, known)}.")
