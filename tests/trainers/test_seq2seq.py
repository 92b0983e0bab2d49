"""Seq2SeqTrainer with generation in its evaluations."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
)

from tests.trainers.words import VOCABULARY, Steps, assert_left_as_found, check_openings, texts, tokenizer
from tl_callbacks import (
    GradualUnfreezing,
    LayerGroups,
    WeightAnchoring,
    adapt,
    at_steps,
    attach,
    group_layers,
    layerwise_optimizer,
)


def t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=len(VOCABULARY), d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, dropout_rate=0.1,
            decoder_start_token_id=0, pad_token_id=0, eos_token_id=3,
        )
    )  # fmt: skip


def bart() -> BartForConditionalGeneration:
    torch.manual_seed(0)
    return BartForConditionalGeneration(
        BartConfig(
            vocab_size=len(VOCABULARY), d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=16, dropout=0.1,
            decoder_start_token_id=3, pad_token_id=0, bos_token_id=2, eos_token_id=3, forced_eos_token_id=3,
        )
    )  # fmt: skip


MODELS = {"t5": t5, "bart": bart}


def trainer(folder: Path, model: Any, *callbacks: Any, **overrides: Any) -> Seq2SeqTrainer:
    words = tokenizer(eos_token="[SEP]")
    rows = [
        {"input_ids": words(text)["input_ids"], "labels": words(target)["input_ids"]}
        for text, target in zip(texts(32, seed=1), texts(32, seed=2), strict=True)
    ]
    options: dict[str, Any] = {
        "per_device_train_batch_size": 4, "learning_rate": 1e-2, "max_steps": 8, "logging_steps": 2,
        "eval_strategy": "steps", "eval_steps": 3, "predict_with_generate": True, "generation_max_length": 6,
        "save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True, "log_level": "error",
        "dataloader_pin_memory": False,
    }  # fmt: skip
    return Seq2SeqTrainer(
        model,
        Seq2SeqTrainingArguments(str(folder / "run"), **{**options, **overrides}),
        data_collator=DataCollatorForSeq2Seq(words, model),
        train_dataset=rows,
        eval_dataset=rows[:8],
        processing_class=words,
        compute_metrics=lambda found: {"rows": len(found.predictions)},
        callbacks=list(callbacks),
    )


def openings(groups: LayerGroups) -> list[int]:
    """From step 2 on one opening a step, for each group below the head."""
    return list(range(2, 1 + len(groups)))


def differ(one: nn.Module, other: nn.Module) -> set[str]:
    pairs = zip(one.named_parameters(), other.parameters(), strict=True)
    return {name for (name, mine), theirs in pairs if not torch.equal(mine, theirs)}


@pytest.mark.parametrize("name", MODELS)
def test_groups_open_in_their_turn_with_generation_between(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    groups = group_layers(model)
    steps = Steps(model)
    unfreezing = GradualUnfreezing(groups, at_steps(openings(groups)))
    made = trainer(tmp_path, model, unfreezing, WeightAnchoring(0.1), steps, max_steps=10)
    made.optimizer_cls_and_kwargs = layerwise_optimizer(made.args, groups, decay=0.8)
    attach(made)
    made.train()
    check_openings(steps, groups, dict(zip(reversed(groups.names), [0, *openings(groups)], strict=True)))
    assert [entry["eval_rows"] for entry in made.state.log_history if "eval_rows" in entry] == [8, 8, 8, 8]
    rates = next(entry for entry in made.state.log_history if "tl/rate/embeddings" in entry)
    assert 0 < rates["tl/rate/embeddings"] < rates[f"tl/rate/{groups.names[-1]}"]
    assert_left_as_found(model)


@pytest.mark.parametrize("name", MODELS)
def test_neutral_settings_and_a_resumed_run_are_bit_for_bit_the_plain_trainer_s(name: str, tmp_path: Path) -> None:
    def trained(attached: bool, *callbacks: Any, checkpoint: str | None = None) -> nn.Module:
        model = MODELS[name]()
        made = trainer(tmp_path, model, *callbacks, save_strategy="steps", save_steps=3)
        if attached:
            attach(made)
        made.train(resume_from_checkpoint=checkpoint)
        return model

    def unfreezing() -> GradualUnfreezing:
        groups = group_layers(MODELS[name]())
        return GradualUnfreezing(groups, at_steps(openings(groups)))

    plain = trained(False)
    assert not differ(plain, trained(True))
    straight = trained(True, unfreezing())
    assert differ(plain, straight), "the control"
    assert not differ(straight, trained(True, unfreezing(), checkpoint=str(tmp_path / "run" / "checkpoint-3")))


def test_a_strategy_by_name(tmp_path: Path) -> None:
    model = t5()
    made = trainer(tmp_path, model)
    keywords = adapt(model, made.args, "discriminative", decay=0.5)
    made.optimizer_cls_and_kwargs = keywords["optimizer_cls_and_kwargs"]
    for callback in keywords["callbacks"]:
        made.add_callback(callback)
    attach(made)
    made.train()
    rates = next(entry for entry in made.state.log_history if "tl/rate/embeddings" in entry)
    assert rates["tl/rate/decoder.block.0"] == pytest.approx(0.5 * rates["tl/rate/decoder.block.1"])
