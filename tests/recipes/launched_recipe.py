"""The text-classification recipe, each of whose processes writes its weights: launched by `test_accelerate.py`.

`python launched_recipe.py <folder> rebuild | no-rebuild <the recipe's options>`. Without the rebuild DDP goes on
reducing what was open at first.
"""

import sys
from pathlib import Path
from typing import Any

import text_classification
import torch
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


def main(folder: Path, rebuild: str, options: list[str]) -> None:
    """Run the recipe, so that each of its Trainers gets the callback."""
    if rebuild == "no-rebuild":
        callback.rebuild_reducer = lambda wrapper: None
    DEFAULT_CALLBACKS.append(Weights(folder))
    text_classification.main(*parse((text_classification.Recipe, TrainingArguments), options))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
