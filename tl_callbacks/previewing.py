"""What a training will do, before it does it: groups, rates and phases as a table."""

from transformers import Trainer

from tl_callbacks.discovery import group_layers
from tl_callbacks.groups import LayerGroup
from tl_callbacks.losses import loss_parameters
from tl_callbacks.preflight import factory_of, our_callbacks
from tl_callbacks.strategies import Strategy
from tl_callbacks.unfreezing.callback import GradualUnfreezing
from tl_callbacks.unfreezing.plan import training_lengths


def preview(trainer: Trainer) -> str:
    """Return a table of what will be trained when and at which rate, without training.

    Args:
        trainer: an attached trainer with a training set of known length.

    Returns:
        The strategy, one line a group, bottom to top, with its peak rate and the step at which it opens, and the
        phases.

    Example:
        >>> import tempfile
        >>> from transformers import BertConfig, BertForSequenceClassification, TrainingArguments
        >>> from tl_callbacks import adapt, attach
        >>> config = BertConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8)
        >>> args = TrainingArguments(tempfile.mkdtemp(), max_steps=20, use_cpu=True, report_to="none")
        >>> keywords = adapt(BertForSequenceClassification(config), args, "lp_ft")
        >>> trainer = Trainer(args=args, train_dataset=[{}] * 8, **keywords)
        >>> attach(trainer)
        >>> print(preview(trainer).splitlines()[-1].split())
        ['6', '6.00', 'encoder.layer.1,', 'encoder.layer.0,', 'embeddings', '4', '249,322', '0.1']
    """
    assert trainer.model is not None
    lengths = training_lengths(trainer)
    if lengths is None:
        raise ValueError(
            "preview needs the length of the training: give the Trainer a train_dataset with a length, or max_steps."
        )
    max_steps, steps_per_epoch = lengths
    callbacks = our_callbacks(trainer)
    unfreezing = next((callback for callback in callbacks if isinstance(callback, GradualUnfreezing)), None)
    plan = unfreezing.plan(max_steps, steps_per_epoch) if unfreezing else None
    factory = factory_of(trainer)
    groups = factory.groups if factory else group_layers(trainer.model)

    def rate(group: LayerGroup) -> str:
        return f"{trainer.args.learning_rate * (factory.scales[group.name] if factory else 1):.3g}"

    def opens(group: LayerGroup) -> str:
        step = plan.opening_step(group.name) if plan else 0
        return "never" if step is None else str(step)

    kind = getattr(trainer.args.lr_scheduler_type, "value", trainer.args.lr_scheduler_type)
    lines = [str(callback) for callback in callbacks if isinstance(callback, Strategy)]
    lines += [f"{max_steps} steps, {steps_per_epoch or 'unknown'} an epoch, {kind} schedule"]
    lines += [groups.describe({"peak rate": rate, "opens at step": opens})]
    if weights := loss_parameters(trainer):
        count = sum(parameter.numel() for parameter in weights.values())
        lines += [f"loss: {count:,} parameters of its own, open from step 0, peak {trainer.args.learning_rate:.3g}"]
    lines += [str(plan)] if plan else []
    return "\n".join(lines)
