"""Architectures whose checkpoints name the weights otherwise than the model: they resume with all of their weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel, Trainer

from tests import tiny
from tests.families import FAMILIES
from tests.test_families import marked
from tests.test_resume import differing
from tl_callbacks import GradualUnfreezing, attach, every, group_layers, resuming
from tl_callbacks.checkpoints import load_renamed

# Those that `save_pretrained` of transformers 5.23 renames.
RENAMED = {
    "GPT-NeoX", "Mixtral", "Qwen3-MoE", "Qwen3-Next", "DeepSeek-V3", "Jamba", "ViT", "DeiT", "Swin", "BEiT", "DINOv2",
    "SegFormer", "DETR", "Deformable DETR", "YOLOS", "AST", "LLaVA", "ViT with GPT-2",
}  # fmt: skip
STEPS = 6


def make(name: str, folder: Path, **overrides: Any) -> Trainer:
    """A new model, attached; all of its groups are open from step 3 on."""
    family = FAMILIES[name]
    model = family.build()
    args = tiny.arguments(folder, max_steps=STEPS, save_strategy="steps", save_steps=1, **overrides)
    unfreeze = GradualUnfreezing(group_layers(model), every(1))
    rows = family.rows()
    trainer = Trainer(
        model, args, train_dataset=rows, eval_dataset=rows, data_collator=family.collate, callbacks=[unfreeze]
    )
    attach(trainer)
    return trainer


@pytest.mark.filterwarnings("ignore::tl_callbacks.PreflightWarning")  # some have more groups than steps
@pytest.mark.filterwarnings("ignore::tl_callbacks.NoEffectWarning")  # a schedule that does not come to its end
@pytest.mark.parametrize("guarded", [True, False])
@pytest.mark.parametrize("name", marked(sorted(RENAMED), quick=("ViT", "Mixtral")))
def test_a_resumed_run_has_all_weights(
    name: str, guarded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not guarded:
        monkeypatch.setattr(resuming, "load_renamed", lambda model, folder: False)
    straight = make(name, tmp_path / "straight")
    straight.train()
    resumed = make(name, tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / f"checkpoint-{STEPS - 1}"))
    assert resumed.model is not None
    assert straight.model is not None
    differences = differing(tiny.state(resumed.model), tiny.state(straight.model))
    assert (differences == []) is guarded


@pytest.mark.parametrize("guarded", [True, False])
def test_the_best_checkpoint_is_loaded_whole(guarded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not guarded:
        monkeypatch.setattr(resuming, "load_renamed", lambda model, folder: False)
    # The loss rises, so that the first checkpoint is the best.
    trainer = make(
        "ViT", tmp_path, load_best_model_at_end=True, eval_strategy="steps", eval_steps=1, learning_rate=1.0,
        metric_for_best_model="loss",
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_model_checkpoint is not None
    assert not trainer.state.best_model_checkpoint.endswith(f"checkpoint-{STEPS}")
    best = type(trainer.model).from_pretrained(trainer.state.best_model_checkpoint)  # type: ignore[union-attr]
    differences = differing(tiny.state(trainer.model), tiny.state(best))  # type: ignore[arg-type]
    assert (differences == []) is guarded


@pytest.mark.parametrize("name", marked(FAMILIES, quick=("BERT", "T5", "LLaVA")))
def test_every_family_is_loaded_whole(name: str, tmp_path: Path) -> None:
    model, other = FAMILIES[name].build(), FAMILIES[name].build()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.rand_like(parameter) * parameter.requires_grad)
    assert isinstance(other, PreTrainedModel)
    other.save_pretrained(tmp_path)
    assert differing(tiny.state(model), tiny.state(other))
    assert load_renamed(model, tmp_path) is (name in RENAMED)
    if name not in RENAMED:
        model.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert differing(tiny.state(model), tiny.state(other)) == []


def test_shards_are_read(tmp_path: Path) -> None:
    model, other = FAMILIES["ViT"].build(), FAMILIES["ViT"].build()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    assert isinstance(other, PreTrainedModel)
    other.save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert load_renamed(model, tmp_path)
    assert differing(tiny.state(model), tiny.state(other)) == []


def test_what_is_no_model_of_transformers_is_left(tmp_path: Path) -> None:
    assert load_renamed(torch.nn.Linear(2, 2), tmp_path) is False
