"""What `test_accelerate.py` launches; each process leaves one file in a folder.

`python launched.py ranks <folder> [--use_cpu]` writes what the process knows of the others. `python launched.py recipe
<folder> <options>` runs the text-classification recipe and writes the weights it ends with; with `recipe-no-rebuild`,
DDP goes on reducing what was open at first.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import text_classification
import torch
from accelerate import PartialState
from arguments import parse
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer import DEFAULT_CALLBACKS

from tl_callbacks.unfreezing import callback


class Weights(TrainerCallback):
    """Writes the weights of this rank before and after the training."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.before: dict[str, torch.Tensor] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.before = {name: tensor.clone() for name, tensor in kwargs["model"].state_dict().items()}

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        found = {"world_size": args.world_size, "steps": state.global_step, "before": self.before}
        torch.save(found | {"after": kwargs["model"].state_dict()}, self.folder / f"{args.process_index}.pt")


def main(what: str, folder: Path, options: list[str]) -> None:
    """Write this process's file."""
    if what == "ranks":
        state = PartialState(cpu="--use_cpu" in options)
        found = {"rank": state.process_index, "world_size": state.num_processes}
        found["machine"] = int(os.environ.get("GROUP_RANK", "0"))
        (folder / f"{os.getpid()}.json").write_text(json.dumps(found))
        return
    if what == "recipe-no-rebuild":
        callback.rebuild_reducer = lambda wrapper: None
    DEFAULT_CALLBACKS.append(Weights(folder))
    text_classification.main(*parse((text_classification.Recipe, TrainingArguments), options))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
