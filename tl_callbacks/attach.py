"""`attach(trainer)`: checks the set-up, then lends the trainer to the callbacks."""

import warnings

from transformers import Trainer

from tl_callbacks.discovery import group_layers
from tl_callbacks.errors import PreflightWarning
from tl_callbacks.frozen.eval_mode import release
from tl_callbacks.frozen.state import set_frozen
from tl_callbacks.groups import LayerGroups
from tl_callbacks.identity import pin
from tl_callbacks.layerwise.factory import layerwise_optimizer, refusal
from tl_callbacks.losses import LossWeights, loss_module
from tl_callbacks.preflight import PreflightError, cautions, factory_of, our_callbacks, preflight
from tl_callbacks.ranks import VerifyRanks, holds_alike
from tl_callbacks.recorder import Recorder
from tl_callbacks.resuming import guard_loading, guard_train
from tl_callbacks.sharding import factory_findings
from tl_callbacks.unfreezing.callback import GradualUnfreezing


def attach(trainer: Trainer, *, verify_ranks: int = 100, base_revision: str | None = None) -> None:
    """Check a trainer's set-up and give this package's callbacks what the Trainer does not hand to callbacks.

    Call it once, after the Trainer was made and before `train()`. It

    - raises if anything is wrong, with all findings at once, and warns of what should be known beforehand;
    - lends the trainer to the callbacks and to the optimizer factory, and gives the Trainer a neutral factory (its own
      optimizer, with one named group per layer group) where it has none;
    - adds a recorder, which takes the weights' fingerprint, writes `recipe.json` and logs the rate of every group;
    - on several ranks compares their weights, bit for bit, after each transition and every `verify_ranks` steps;
    - makes `train(resume_from_checkpoint=True)` take the last checkpoint that was written to its end, and say which one
      that is where a newer one was not;
    - loads all weights of a checkpoint, also of architectures that are saved under other names than the model's;
    - restores the model when training ends, also by an exception.

    Args:
        trainer: the Trainer, with our callbacks or without.
        verify_ranks: optimizer steps between two comparisons of the ranks' weights; 0: none.
        base_revision: sha of the commit on the Hub that the pretrained weights were loaded from, for `recipe.json` and
            for the adapters' own configuration, which names none by itself. None: what can be known without it, that
            is the commit that an adapter names, or the only one that is in the local cache.

    Raises:
        PreflightError: a ValueError that lists every finding.
        TypeError: it is no `transformers.Trainer`, such as SetFit's trainer, which has one as `st_trainer`.
        ValueError: `verify_ranks` is no whole number of 0 or more; `base_revision` is no sha, or not the one that an
            adapter names.

    Example:
        >>> import tempfile
        >>> from transformers import BertConfig, BertForSequenceClassification, TrainingArguments
        >>> config = BertConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8)
        >>> args = TrainingArguments(tempfile.mkdtemp(), use_cpu=True, report_to="none")
        >>> trainer = Trainer(BertForSequenceClassification(config), args)
        >>> attach(trainer)
        >>> trainer.optimizer_cls_and_kwargs[0]
        LayerwiseOptimizer(embeddings: 5e-05, encoder.layer.0: 5e-05, encoder.layer.1: 5e-05, head: 5e-05)
    """
    _check_type(trainer)
    verify = VerifyRanks(verify_ranks) if verify_ranks != 0 else None
    known = cautions(trainer)
    if findings := preflight(trainer):
        raise PreflightError(findings, known)
    if known and trainer.is_world_process_zero():
        warnings.warn(
            "\n- ".join(["attach(trainer): to know before training:", *known]), PreflightWarning, stacklevel=2
        )
    assert trainer.model is not None
    if base_revision is not None:
        pin(trainer.model, base_revision)
    # What an earlier run that was stopped without attach left frozen; the callbacks of this one freeze their own.
    release(trainer.model)
    set_frozen(trainer.model, frozenset())
    _give_factory(trainer)
    factory = factory_of(trainer)
    if factory is not None:
        factory.trainer = trainer
    callbacks = our_callbacks(trainer)
    if not any(isinstance(callback, Recorder) for callback in callbacks):
        if verify is not None and trainer.args.world_size > 1 and holds_alike(trainer):
            trainer.add_callback(verify)
            callbacks.append(verify)
        methods = {type(method).__name__: method for method in (factory, *callbacks) if method is not None}
        trainer.add_callback(Recorder(factory.groups if factory else None, methods))
        if loss_module(trainer) is not None:
            trainer.add_callback(LossWeights())
        guard_train(trainer)
        guard_loading(trainer)
    for callback in our_callbacks(trainer):
        if isinstance(callback, Recorder) and base_revision is not None:
            callback.base_revision = base_revision
        callback.on_attach(trainer)


def _check_type(trainer: object) -> None:
    if not isinstance(trainer, Trainer):
        inside = " Its embedding trainer is one: attach(trainer.st_trainer)." if hasattr(trainer, "st_trainer") else ""
        raise TypeError(
            f"expected a transformers.Trainer or a subclass of it, got {type(trainer).__module__}."
            f"{type(trainer).__name__}.{inside or ' Pass the trainer whose train() is called.'}"
        )


def _give_factory(trainer: Trainer) -> None:
    """Install a neutral factory unless an optimizer is given or named that takes no groups from outside."""
    given = trainer.optimizer is not None or trainer.optimizer_cls_and_kwargs is not None
    if given or factory_findings(trainer, own_rates=False):
        return
    if refusal(trainer.args) is None:
        trainer.optimizer_cls_and_kwargs = layerwise_optimizer(trainer.args, _groups(trainer))  # type: ignore[assignment]


def _groups(trainer: Trainer) -> LayerGroups:
    assert trainer.model is not None
    for callback in our_callbacks(trainer):
        if isinstance(callback, GradualUnfreezing):
            return callback.groups
    return group_layers(trainer.model)
