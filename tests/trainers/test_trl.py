"""TRL's SFTTrainer: completion-only loss, packing, and adapters that it adds itself."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from tests.trainers.words import VOCABULARY, Steps, assert_left_as_found, check_openings, texts, tokenizer
from tl_callbacks import (
    GradualUnfreezing,
    PreflightError,
    WeightAnchoring,
    at_steps,
    attach,
    group_layers,
    layerwise_optimizer,
)

pytest.importorskip("trl", reason="tests of its trainer")
from trl import SFTConfig, SFTTrainer

# trl sets gradient_checkpointing, which transformers 5.23 calls activation_checkpointing.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")

OPENINGS = {"head": 0, "layers.2": 2, "layers.1": 4, "layers.0": 5}
LORA = LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.1)


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(VOCABULARY), hidden_size=16, intermediate_size=24, num_hidden_layers=3,
            num_attention_heads=2, max_position_embeddings=32, attention_dropout=0.1, pad_token_id=0, bos_token_id=2,
            eos_token_id=3,
        )
    )  # fmt: skip


def arguments(folder: Path, **overrides: Any) -> SFTConfig:
    defaults = {
        "per_device_train_batch_size": 4, "learning_rate": 1e-2, "max_steps": 8, "logging_steps": 2, "max_length": 16,
        "save_strategy": "no", "report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True,
        "log_level": "error", "dataloader_pin_memory": False,
    }  # fmt: skip
    return SFTConfig(str(folder / "run"), **{**defaults, **overrides})


def trainer(model: nn.Module, args: SFTConfig, **keywords: Any) -> SFTTrainer:
    """TRL's quick start on random words: prompts and completions, or texts where they are packed."""
    columns = {"text": texts(64, seed=1)}
    if not args.packing:
        columns = {"prompt": texts(32, seed=1), "completion": [f" {text}" for text in texts(32, seed=2)]}
    data = Dataset.from_dict(columns)
    return SFTTrainer(model, args, train_dataset=data, processing_class=tokenizer(eos_token="[SEP]"), **keywords)


def differ(one: nn.Module, other: nn.Module) -> set[str]:
    pairs = zip(one.named_parameters(), other.parameters(), strict=True)
    return {name for (name, mine), theirs in pairs if not torch.equal(mine, theirs)}


@pytest.mark.parametrize(
    "options",
    [{"completion_only_loss": True}, {"packing": True, "packing_strategy": "wrapped"}],
    ids=["completion only", "packing"],
)
def test_the_quick_start_with_our_callbacks(options: dict[str, Any], tmp_path: Path) -> None:
    model = llama()
    groups = group_layers(model)
    steps = Steps(model)
    args = arguments(tmp_path, **options)
    callbacks = [
        GradualUnfreezing(groups, at_steps([2, 4, 5]), keep_frozen=["embeddings"]),
        WeightAnchoring(0.1),
        steps,
    ]
    made = trainer(
        model, args, optimizer_cls_and_kwargs=layerwise_optimizer(args, groups, decay=0.5), callbacks=callbacks
    )
    attach(made)
    made.train()
    check_openings(steps, groups, OPENINGS)
    assert_left_as_found(model)
    rates = next(entry for entry in made.state.log_history if "tl/rate/head" in entry)
    assert rates["tl/rate/layers.1"] == pytest.approx(0.25 * rates["tl/rate/head"])
    assert "mean_token_accuracy" not in rates, "TRL's metrics are in its own record alone"
    assert any("mean_token_accuracy" in entry for entry in made.state.log_history)


def test_neutral_settings_and_a_resumed_run_are_bit_for_bit_the_plain_trainer_s(tmp_path: Path) -> None:
    def trained(attached: bool, *callbacks: Any, checkpoint: str | None = None) -> nn.Module:
        model = llama()
        args = arguments(tmp_path, save_strategy="steps", save_steps=4)
        made = trainer(model, args, callbacks=list(callbacks))
        if attached:
            attach(made)
        made.train(resume_from_checkpoint=checkpoint)
        return model

    def unfreezing() -> GradualUnfreezing:
        return GradualUnfreezing(group_layers(llama()), at_steps([2, 4, 5, 6]))

    plain = trained(False)
    assert not differ(plain, trained(True))
    straight = trained(True, unfreezing())
    assert differ(plain, straight), "the control"
    resumed = trained(True, unfreezing(), checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert not differ(straight, resumed)


def test_groups_from_before_the_adapters_are_refused_with_what_to_do(tmp_path: Path) -> None:
    model = llama()
    groups = group_layers(model)
    callbacks = [GradualUnfreezing(groups, at_steps([2, 4, 5, 6]))]
    made = trainer(model, arguments(tmp_path), callbacks=callbacks, peft_config=LORA)
    with pytest.raises(PreflightError, match=r"make them from trainer.model and add the callback with"):
        attach(made)
    args = arguments(tmp_path)
    optimizer = layerwise_optimizer(args, groups)
    made = trainer(llama(), args, optimizer_cls_and_kwargs=optimizer, peft_config=LORA)
    with pytest.raises(PreflightError, match=r"from trainer\.model, where the trainer adds them"):
        attach(made)


@pytest.mark.parametrize("who", ["the trainer", "the script"])
def test_adapters_open_in_their_turn_whoever_adds_them(who: str, tmp_path: Path) -> None:
    args = arguments(tmp_path)
    if who == "the trainer":
        made = trainer(llama(), args, peft_config=LORA)
        groups = group_layers(made.model)
        made.optimizer_cls_and_kwargs = layerwise_optimizer(args, groups, decay=0.5)
        made.add_callback(GradualUnfreezing(groups, at_steps([2, 4])))
    else:
        model = get_peft_model(llama(), LORA)
        groups = group_layers(model)
        optimizer = layerwise_optimizer(args, groups, decay=0.5)
        callbacks = [GradualUnfreezing(groups, at_steps([2, 4]))]
        made = trainer(model, args, optimizer_cls_and_kwargs=optimizer, callbacks=callbacks)
    trainable = {name for name, parameter in made.model.named_parameters() if parameter.requires_grad}
    steps = Steps(made.model)
    made.add_callback(steps)
    attach(made)
    made.train()
    check_openings(steps, groups, {"layers.2": 0, "layers.1": 2, "layers.0": 4})
    assert {name for name, parameter in made.model.named_parameters() if parameter.requires_grad} == trainable
    base = [name for name in steps.states[0] if "lora" not in name]
    assert base
    assert all(torch.equal(steps.states[0][name], steps.states[-1][name]) for name in base)
