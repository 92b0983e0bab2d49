"""What a Trainer shards with, and what the optimizer of each way of sharding cannot do."""

from typing import Any, Literal, cast

from transformers import Trainer

Sharding = Literal["none", "fsdp1", "fsdp2", "deepspeed"]


def sharding(trainer: Trainer) -> Sharding:
    """Return what the trainer shards the training with, as accelerate has set it up.

    `args.fsdp` and `args.deepspeed` alone do not tell: accelerate's own config may ask for either, and on a CPU
    accelerate leaves FSDP out.

    Example:
        >>> import tempfile
        >>> from torch import nn
        >>> from transformers import TrainingArguments
        >>> args = TrainingArguments(tempfile.mkdtemp(), use_cpu=True, report_to="none")
        >>> sharding(Trainer(nn.Linear(2, 2), args))
        'none'
    """
    if trainer.is_deepspeed_enabled:
        return "deepspeed"
    if trainer.is_fsdp_enabled:
        return "fsdp2" if _plugin(trainer, "fsdp_plugin").fsdp_version == 2 else "fsdp1"
    return "none"


def zero_stage(trainer: Trainer) -> int:
    """Return DeepSpeed's ZeRO stage, 0 to 3; 0 also where the trainer does not use DeepSpeed."""
    return int(_plugin(trainer, "deepspeed_plugin").zero_stage) if sharding(trainer) == "deepspeed" else 0


def factory_findings(trainer: Trainer, *, own_rates: bool) -> list[str]:
    """Return why an optimizer with a group per layer would not do what it says, one text a finding.

    Args:
        trainer: the Trainer.
        own_rates: whether the layer groups differ in their rates, now or later.
    """
    found = []
    config = _deepspeed_config(trainer)
    if "optimizer" in config:
        kind = config["optimizer"].get("type")
        found.append(
            f'the DeepSpeed config has a section "optimizer" ({kind}), which takes the place of layerwise_optimizer: '
            "the layer groups would have no rates of their own. Remove the section; args.optim names the optimizer."
        )
    if own_rates and "scheduler" in config:
        kind = config["scheduler"].get("type")
        found.append(
            f'the DeepSpeed config has a section "scheduler" ({kind}), which gives all groups one rate. Remove the '
            "section; args.lr_scheduler_type names the scheduler."
        )
    optim = str(getattr(trainer.args.optim, "value", trainer.args.optim))
    if optim == "adagrad" and zero_stage(trainer) in (1, 2):
        found.append(
            f"DeepSpeed ZeRO-{zero_stage(trainer)} makes torch's Adagrad anew with a single parameter group. Choose "
            "another args.optim, such as adamw_torch_fused."
        )
    if sharding(trainer) == "fsdp1" and not _plugin(trainer, "fsdp_plugin").use_orig_params:
        found.append(
            "FSDP 1 with use_orig_params=False replaces the parameters by flat ones across layer groups; expected "
            'parameters that keep their names. Set "use_orig_params": true in fsdp_config, or use FSDP 2 '
            '("version": 2).'
        )
    return found


def anchoring_findings(trainer: Trainer) -> list[str]:
    """Return why weights cannot be pulled toward a reference, one text a finding."""
    why = {
        "deepspeed": "DeepSpeed: ZeRO steps flat partitions of its own and overwrites the model's parameters with "
        "them, so a pull on the parameters would be lost",
        "fsdp1": "FSDP 1, whose parameters are pieces of flat ones and no longer have the shape of the reference",
    }.get(sharding(trainer))
    return [f"WeightAnchoring does not support {why}. Train with DDP."] if why else []


def _plugin(trainer: Trainer, name: str) -> Any:
    return getattr(trainer.accelerator.state, name)


def _deepspeed_config(trainer: Trainer) -> dict[str, Any]:
    if sharding(trainer) != "deepspeed":
        return {}
    return cast(dict[str, Any], _plugin(trainer, "deepspeed_plugin").deepspeed_config)
