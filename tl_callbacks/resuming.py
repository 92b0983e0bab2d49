"""What `attach` adds to a trainer's own `train()` and loading: whole checkpoints, all weights, the model restored."""

import functools
import warnings
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint

from tl_callbacks.callbacks import announce
from tl_callbacks.checkpoints import lacks_optimizer, last_complete_checkpoint, load_renamed
from tl_callbacks.losses import load_loss
from tl_callbacks.preflight import our_callbacks
from tl_callbacks.sharding import sharding


def guard_train(trainer: Trainer) -> None:
    """Wrap this trainer's `train`: a whole checkpoint to resume from, and the model restored whatever happens."""
    train = trainer.train

    @functools.wraps(train)
    def guarded(resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        if resume_from_checkpoint is True:
            folder, world_size = str(trainer.args.output_dir), trainer.args.world_size
            resume_from_checkpoint = last_complete_checkpoint(folder, world_size=world_size)
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"no checkpoint in `{folder}` was written to its end by {world_size} or more ranks, or by one; "
                    "expected a folder checkpoint-<step> with weights, optimizer, random states and "
                    "trainer_state.json; save_only_model=True writes weights alone. Start without "
                    "resume_from_checkpoint, or give the path of one."
                )
            newest = Path(get_last_checkpoint(folder))  # type: ignore[no-untyped-call]
            if newest != Path(resume_from_checkpoint):
                announce(
                    f"resuming from `{resume_from_checkpoint}`; the newer `{newest}` was not written to its end",
                    trainer.state,
                )
        elif isinstance(resume_from_checkpoint, str) and lacks_optimizer(resume_from_checkpoint):
            warnings.warn(
                f"`{resume_from_checkpoint}` holds no optimizer: save_only_model=True leaves it out, and so does a run "
                "that is killed while it saves. The moments and the learning rate start anew while the steps and the "
                "openings go on, which is another run than an uninterrupted one. Resume from a whole checkpoint, or "
                "train from its weights without resuming.",
                UserWarning,
                stacklevel=2,
            )
        if resume_from_checkpoint:
            load_loss(trainer, resume_from_checkpoint)
        try:
            return train(resume_from_checkpoint, *args, **kwargs)
        finally:
            for callback in our_callbacks(trainer):
                if trainer.model is not None:
                    callback.restore(trainer.model)

    trainer.train = guarded  # type: ignore[method-assign]


def guard_loading(trainer: Trainer) -> None:
    """Wrap this trainer's loading of checkpoints, so that weights which the file names otherwise are loaded too.

    What shards the model loads from files of its own, by the names that the model has.
    """
    if sharding(trainer) != "none":
        return
    load, load_best = trainer._load_from_checkpoint, trainer._load_best_model

    @functools.wraps(load)
    def guarded(resume_from_checkpoint: str, *model: nn.Module) -> None:  # sentence-transformers' takes the path alone
        load(resume_from_checkpoint, *model)
        load_renamed(model[0] if model else trainer.model, resume_from_checkpoint)  # type: ignore[arg-type]

    @functools.wraps(load_best)
    def guarded_best() -> None:
        load_best()
        if trainer.state.best_model_checkpoint is not None:
            load_renamed(trainer.model, trainer.state.best_model_checkpoint)  # type: ignore[arg-type]

    trainer._load_from_checkpoint = guarded  # type: ignore[method-assign, assignment]
    trainer._load_best_model = guarded_best  # type: ignore[method-assign]
