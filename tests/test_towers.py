"""Models with several towers: where they stand, how they are addressed, and rates and openings together or apart."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from tests import tiny
from tl_callbacks import (
    GradualUnfreezing,
    LayerGroup,
    LayerGroups,
    PreflightWarning,
    adapt,
    at_steps,
    attach,
    every,
    group_layers,
    layerwise_optimizer,
    staged,
)
from tl_callbacks.layerwise.scales import layer_scales
from tl_callbacks.parameters import parameters_by_name

SMALL = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8}


def clip(text: int = 3, vision: int = 2) -> Any:
    config = transformers.CLIPConfig(
        text_config={**SMALL, "num_hidden_layers": text, "vocab_size": 50, "max_position_embeddings": 8},
        vision_config={**SMALL, "num_hidden_layers": vision, "image_size": 8, "patch_size": 4},
        projection_dim=8,
    )
    torch.manual_seed(0)
    return transformers.CLIPModel(config)


def llava() -> Any:
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**SMALL, num_hidden_layers=3, num_key_value_heads=2, vocab_size=50),
        vision_config=transformers.CLIPVisionConfig(**SMALL, num_hidden_layers=2, image_size=8, patch_size=4),
    )
    with torch.device("meta"):
        return transformers.LlavaForConditionalGeneration(config)


def pairs(count: int = 32) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "input_ids": torch.randint(0, 50, (4,), generator=generator),
            "pixel_values": torch.randn(3, 8, 8, generator=generator),
        }
        for _ in range(count)
    ]


def contrastive(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {**transformers.default_data_collator(rows), "return_loss": True}


def unfreezing_of(keywords: dict[str, Any]) -> GradualUnfreezing:
    return next(callback for callback in keywords["callbacks"] if isinstance(callback, GradualUnfreezing))


def test_parallel_towers_are_aligned_by_depth_from_the_output() -> None:
    groups = group_layers(clip())
    assert groups.towers == ("text_model", "vision_model")
    assert [[group.name for group in level] for level in groups.levels] == [
        ["text_model.embeddings"],
        ["text_model.encoder.layers.0", "vision_model.embeddings"],
        ["text_model.encoder.layers.1", "vision_model.encoder.layers.0"],
        ["text_model.encoder.layers.2", "vision_model.encoder.layers.1"],
    ]
    top = dict(zip(("text", "vision"), (group.parameters for group in groups.levels[-1]), strict=True))
    assert "text_projection.weight" in top["text"]
    assert "visual_projection.weight" in top["vision"]
    assert sorted(groups.parameters) == sorted(parameters_by_name(clip()))
    assert LayerGroups.from_json(groups.to_json()) == groups
    assert str(groups).splitlines()[0].split() == ["group", "parameters", "share", "dtype", "level"]


def test_a_projector_is_at_the_top_of_the_tower_that_it_reads() -> None:
    groups = group_layers(llava())
    owner = {name: group.name for group in groups for name in group.parameters}
    assert owner["model.multi_modal_projector.linear_1.weight"] == "vision_tower.encoder.layers.1"
    assert groups.head == "head"
    assert [len(level) for level in groups.levels] == [1, 2, 2, 2, 1]


def test_parallel_towers_one_on_the_other_on_request() -> None:
    groups = group_layers(clip(), towers=("vision_model", "text_model"))
    assert not any(group.beside for group in groups)
    assert [group.tower for group in groups] == ["vision_model"] * 3 + ["text_model"] * 4
    other = group_layers(clip(), towers=("text_model", "vision_model"))
    assert [group.tower for group in other] == ["text_model"] * 4 + ["vision_model"] * 3
    with pytest.raises(ValueError, match=r"tower `visio_model` is none of the parallel towers.*`vision_model`"):
        group_layers(clip(), towers=("visio_model",))
    with pytest.raises(TypeError, match="expected a sequence of tower names, got the text `text_model`"):
        group_layers(clip(), towers="text_model")
    with pytest.raises(ValueError, match="`patterns` gives the groups and their order"):
        group_layers(clip(), towers=("text_model",), patterns={"all": "**"})
    with pytest.raises(ValueError, match="it has none"):
        group_layers(tiny.bert(), towers=("text_model",))


def test_encoder_and_decoder_run_one_after_the_other() -> None:
    config = transformers.T5Config(d_model=8, num_layers=2, num_heads=2, d_ff=8, d_kv=4, vocab_size=50)
    groups = group_layers(transformers.T5ForConditionalGeneration(config))
    assert groups.towers == ("encoder", "decoder")
    assert len(groups.levels) == len(groups)
    assert groups.names[-1] == "decoder.block.1"


def test_decay_counts_levels_and_may_differ_by_tower() -> None:
    groups = group_layers(clip())
    scales = layer_scales(groups, decay=0.5)
    assert scales["text_model.encoder.layers.1"] == scales["vision_model.encoder.layers.0"] == 0.5
    assert scales["text_model.embeddings"] == 0.125
    apart = layer_scales(groups, decay={"vision_model": 0.1})
    assert apart["vision_model.encoder.layers.0"] == pytest.approx(0.1)
    assert apart["text_model.embeddings"] == 1
    with pytest.raises(ValueError, match="pattern `vision` matches no group"):
        layer_scales(groups, decay={"vision": 0.1})
    with pytest.raises(ValueError, match=r"`decay` is 2\.0; expected a ratio"):
        layer_scales(groups, decay={"vision_model": 2})


def test_a_schedule_opens_levels_or_each_tower_by_its_own() -> None:
    groups = group_layers(clip())
    together = GradualUnfreezing(groups, every(10)).plan(max_steps=100)
    assert [len(phase.opened) for phase in together] == [2, 2, 2, 1]
    apart = GradualUnfreezing(groups, {"text_model": at_steps([5, 6, 7]), "vision_model": every(50)})
    plan = apart.plan(max_steps=60)
    assert [(phase.step, phase.opened) for phase in plan] == [
        (0, ("text_model.encoder.layers.2", "vision_model.encoder.layers.1")),
        (5, ("text_model.encoder.layers.1",)),
        (6, ("text_model.encoder.layers.0",)),
        (7, ("text_model.embeddings",)),
        (50, ("vision_model.encoder.layers.0",)),
    ]
    assert plan.never == ("vision_model.embeddings",)
    text_only = GradualUnfreezing(groups, every(5), keep_frozen=["vision_model"]).plan(max_steps=60)
    assert [len(phase.opened) for phase in text_only] == [1, 1, 1, 1]


def test_schedules_by_tower_are_checked() -> None:
    groups = group_layers(clip())
    with pytest.raises(
        ValueError, match=r"group `vision_model.embeddings` has no schedule.*Towers: text_model, vision"
    ):
        GradualUnfreezing(groups, {"text_model": every(5)})
    with pytest.raises(ValueError, match=r"has 2 schedules \(\*\*, text_model\)"):
        GradualUnfreezing(groups, {"**": every(5), "text_model": every(5)})
    with pytest.raises(ValueError, match="changes rates by a factor"):
        GradualUnfreezing(groups, {"text_model": every(5), "vision_model": staged([(0.5, "all", 0.1)])})
    with pytest.raises(ValueError, match="`keep_frozen` holds"):
        GradualUnfreezing(groups, every(5), keep_frozen=[group.name for group in groups.levels[-1]])


@pytest.mark.parametrize("towers", [(), ("vision_model", "text_model")])
def test_towers_train_as_planned(towers: tuple[str, ...], tmp_path: Path) -> None:
    model = clip()
    groups = group_layers(model, towers=towers)
    args = tiny.arguments(tmp_path, max_steps=6, label_names=["return_loss"])
    schedule: Any = every(100) if towers else {"text_model": every(2), "vision_model": every(100)}
    unfreezing = GradualUnfreezing(groups, schedule, keep_frozen=["vision_model.embeddings"])
    trainer = tiny.trainer(
        model,
        args,
        pairs(),
        data_collator=contrastive,
        callbacks=[unfreezing],
        optimizer_cls_and_kwargs=layerwise_optimizer(args, groups),
    )
    with pytest.warns(PreflightWarning, match="never opens"):
        attach(trainer)
    before = tiny.state(model)
    trainer.train()
    changed = tiny.moved(before, tiny.state(model))
    opened = {name for phase in unfreezing.plan(6) for name in phase.opened}
    for group in groups:
        assert (group.name in opened) == bool(changed & set(group.parameters)), group.name


def test_a_run_with_schedules_by_tower_resumes_bit_for_bit(tmp_path: Path) -> None:
    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 4

    def run(name: str, callbacks: list[Any], resume: bool = False) -> dict[str, torch.Tensor]:
        model = clip()
        groups = group_layers(model)
        saving = {"save_strategy": "steps", "save_steps": 4, "label_names": ["return_loss"]}
        args = tiny.arguments(tmp_path / name, max_steps=9, **saving)
        unfreezing = GradualUnfreezing(groups, {"text_model": every(2), "vision_model": every(3)}, rates="own")
        optimizer = layerwise_optimizer(args, groups, decay={"text_model": 0.9, "vision_model": 0.5})
        trainer = tiny.trainer(
            model,
            args,
            pairs(),
            data_collator=contrastive,
            callbacks=[unfreezing, *callbacks],
            optimizer_cls_and_kwargs=optimizer,
        )
        attach(trainer)
        before = tiny.state(model)
        trainer.train(resume_from_checkpoint=resume or None)
        assert tiny.moved(before, tiny.state(model))
        return tiny.state(model)

    straight = run("straight", [])
    stopped = run("stopped", [Stop()])
    assert tiny.moved(straight, stopped)
    assert tiny.moved(straight, run("stopped", [], resume=True)) == set()


def test_adapters_of_parallel_towers_are_aligned_too() -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"])
    groups = group_layers(get_peft_model(clip(), config))
    assert [len(level) for level in groups.levels] == [1, 2, 2]
    assert groups.towers == ("text_model", "vision_model")


def test_strategies_count_levels(tmp_path: Path) -> None:
    args = tiny.arguments(tmp_path)
    top = unfreezing_of(adapt(clip(), args, "top_k", k=1))
    assert len(top.plan(100).phases[0].open) == 2
    gradual = adapt(clip(), args, "gradual", schedule={"text_model": {"every": 5}, "vision_model": {"every": 9}})
    steps = [phase.step for phase in unfreezing_of(gradual).plan(100)]
    assert steps == [0, 5, 9, 10, 15, 18]


def test_groups_that_stand_beside_each_other_survive_changes_by_hand() -> None:
    groups = group_layers(clip())
    split = groups.split("vision_model.encoder.layers.1", {"all": "**"})
    assert [len(level) for level in split.levels] == [len(level) for level in groups.levels]
    merged = groups.merge([group.name for group in groups.levels[-1]], "top")
    assert [len(level) for level in merged.levels] == [1, 2, 2, 1]
    assert merged["top"].tower == ""
    with pytest.raises(ValueError, match="group `a` is the first and stands beside none"):
        LayerGroups((LayerGroup("a", ("w",), beside=True),))
