"""Layer groups: a partition of every kind of model, in order, changed by hand, and errors with near names."""

import random
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn

from tests import tiny
from tl_callbacks import LayerGroup, LayerGroups, group_layers
from tl_callbacks.names import assign, closest, matches, normalise
from tl_callbacks.parameters import parameters_by_name

SMALL = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
BART = {"d_model": 8, "encoder_layers": 2, "decoder_layers": 2}
BART |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
CONV = {"conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (3, 3), "num_feat_extract_layers": 2}


class Plain(nn.Module):
    """No stack, no prefix: a recurrent classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 4)
        self.lstm = nn.LSTM(4, 4, 2)
        self.hidden = nn.Linear(4, 4)
        self.out = nn.Linear(4, 2)


class Bare(nn.Module):
    """A parameter of its own beside its children."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(2))
        self.body = nn.Linear(2, 2)
        self.head = nn.Linear(2, 2)


class HeadFirst(nn.Module):
    """A head that is registered before the blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Linear(4, 2)
        self.embed = nn.Embedding(4, 4)
        self.blocks = nn.ModuleList([nn.TransformerEncoderLayer(4, 2, 4) for _ in range(2)])


MODELS: dict[str, tuple[Any, tuple[str, ...], str | None]] = {
    "text encoder": (
        lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL)),
        ("embeddings", "encoder.layer.0", "encoder.layer.1", "head"),
        "head",
    ),
    "encoder without a head": (
        lambda: transformers.BertModel(transformers.BertConfig(**SMALL)),
        ("embeddings", "encoder.layer.0", "encoder.layer.1"),
        None,
    ),
    "vision encoder": (
        lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL)),
        ("embeddings", "layers.0", "layers.1", "head"),
        "head",
    ),
    "decoder": (
        lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)),
        ("embeddings", "layers.0", "layers.1", "head"),
        "head",
    ),
    "decoder with a tied head": (
        lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=8, n_layer=2, n_head=2)),
        ("embeddings", "h.0", "h.1"),
        None,
    ),
    "encoder-decoder with a tied head": (
        lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(d_model=8, num_layers=2, num_heads=2, d_ff=8, d_kv=4)
        ),
        ("embeddings", "encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"),
        None,
    ),
    "encoder-decoder classifier": (
        lambda: transformers.BartForSequenceClassification(transformers.BartConfig(**BART)),
        (
            "embeddings", "encoder.layers.0", "encoder.layers.1", "decoder.embeddings",
            "decoder.layers.0", "decoder.layers.1", "head",
        ),
        "head",
    ),
    "CNN": (
        tiny.resnet,
        ("embeddings", "encoder.stages.0.layers.0", "encoder.stages.1.layers.0", "encoder.stages.1.layers.1", "head"),
        "head",
    ),
    "hierarchical transformer": (
        lambda: transformers.SwinForImageClassification(
            transformers.SwinConfig(embed_dim=8, depths=[1, 2], num_heads=[1, 2])
        ),
        ("embeddings", "encoder.layers.0.blocks.0", "encoder.layers.1.blocks.0", "encoder.layers.1.blocks.1", "head"),
        "head",
    ),
    "speech encoder": (
        lambda: transformers.Wav2Vec2ForCTC(transformers.Wav2Vec2Config(**{**SMALL, "hidden_size": 32}, **CONV)),
        ("embeddings", "encoder.layers.0", "encoder.layers.1", "head"),
        "head",
    ),
    "task model with a new projection": (
        lambda: transformers.WhisperForAudioClassification(
            transformers.WhisperConfig(encoder_ffn_dim=8, decoder_ffn_dim=8, **BART)
        ),
        ("embeddings", "encoder.layers.0", "encoder.layers.1", "head"),
        "head",
    ),
    "stages of a plain CNN": (
        lambda: nn.Sequential(
            *[nn.Sequential(nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2), nn.ReLU()) for _ in range(2)],
            nn.Sequential(nn.Flatten(), nn.Linear(2, 2)),
        ),
        ("0", "1", "head"),
        "head",
    ),
    "plain module": (Plain, ("embeddings", "lstm.0", "lstm.1", "head"), "head"),
    "structure of arrays": (
        lambda: transformers.XLMForSequenceClassification(
            transformers.XLMConfig(vocab_size=50, emb_dim=8, n_layers=2, n_heads=2, max_position_embeddings=8)
        ),
        ("embeddings", "attentions.0", "attentions.1", "head"),
        "head",
    ),
    "stages in arrays": (
        lambda: transformers.SegformerForImageClassification(
            transformers.SegformerConfig(
                depths=[1, 2], num_encoder_blocks=2, hidden_sizes=[8, 8], sr_ratios=[1, 1], patch_sizes=[3, 3],
                strides=[2, 2], num_attention_heads=[2, 2], mlp_ratios=[2, 2], decoder_hidden_size=8,
            )
        ),
        ("stages.0.blocks.0", "stages.1.blocks.0", "stages.1.blocks.1", "head"),
        "head",
    ),
    "nested task model": (
        lambda: transformers.EncoderDecoderModel(
            transformers.EncoderDecoderConfig.from_encoder_decoder_configs(
                transformers.BertConfig(**SMALL), transformers.BertConfig(**SMALL, tie_word_embeddings=False)
            )
        ),
        (
            "embeddings", "encoder.encoder.layer.0", "encoder.encoder.layer.1", "decoder.embeddings",
            "decoder.bert.encoder.layer.0", "decoder.bert.encoder.layer.1", "head",
        ),
        "head",
    ),
    "recurrent layers": (
        lambda: nn.Sequential(nn.Embedding(4, 4), nn.GRU(4, 4, 2, bidirectional=True)),
        ("embeddings", "1.0", "1.1"),
        None,
    ),
    "plain module with a head registered first": (HeadFirst, ("embeddings", "blocks.0", "blocks.1", "head"), "head"),
    "plain module with a parameter": (Bare, ("stem", "body", "head"), "head"),
    "sequential": (lambda: nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), ("0", "head"), "head"),
}  # fmt: skip


@pytest.mark.parametrize("kind", MODELS)
def test_groups_are_an_ordered_partition(kind: str) -> None:
    build, names, head = MODELS[kind]
    with torch.device("meta"):
        model = build()
    groups = group_layers(model)
    assert groups.names == names
    assert groups.head == head
    assert sorted(groups.parameters) == sorted(parameters_by_name(model))
    assert sum(g.num_parameters for g in groups) == sum(p.numel() for p in model.parameters())


def test_a_cnn_stage_keeps_its_downsampling_with_the_block_it_feeds() -> None:
    with torch.device("meta"):
        config = transformers.ConvNextConfig(depths=[1, 1], hidden_sizes=[8, 8], num_stages=2)
        groups = group_layers(transformers.ConvNextForImageClassification(config))
    assert any("downsampling" in name for name in groups["encoder.stages.1.layers.0"].parameters)
    assert not any("downsampling" in name for name in groups["encoder.stages.0.layers.0"].parameters)


def test_a_token_that_belongs_to_a_stage_is_in_its_first_block() -> None:
    with torch.device("meta"):
        model = transformers.CvtForImageClassification(transformers.CvtConfig())
    groups = group_layers(model)
    assert sorted(groups.parameters) == sorted(parameters_by_name(model))
    assert "cvt.encoder.stages.2.cls_token" in groups["encoder.stages.2.layers.0"].parameters


def test_what_feeds_a_stage_is_in_its_first_block_wherever_it_is_registered() -> None:
    with torch.device("meta"):
        groups = group_layers(transformers.GroupViTVisionModel(transformers.GroupViTVisionConfig()))
    owner = {name: group.name for group in groups for name in group.parameters if "group_projector" in name}
    assert owner
    assert all(name.endswith("stages.1.layers.0") for name in owner.values())


@pytest.mark.parametrize(("stable", "group"), [(False, "embeddings"), (True, "encoder.layers.1")])
def test_a_speech_encoder_applies_its_norm_before_or_after_the_blocks(stable: bool, group: str) -> None:
    config = transformers.Wav2Vec2Config(**{**SMALL, "hidden_size": 32}, **CONV, do_stable_layer_norm=stable)
    with torch.device("meta"):
        groups = group_layers(transformers.Wav2Vec2ForCTC(config))
    assert "wav2vec2.encoder.layer_norm.weight" in groups[group].parameters


def test_the_final_norm_and_the_pooler_belong_to_the_top_block() -> None:
    assert any("pooler" in name for name in group_layers(tiny.bert())["encoder.layer.2"].parameters)


@pytest.mark.parametrize(
    ("build", "late"),
    [
        (lambda: transformers.BartForSequenceClassification(transformers.BartConfig(**BART)), "layernorm_embedding"),
        (
            lambda: transformers.DebertaV2ForSequenceClassification(
                transformers.DebertaV2Config(relative_attention=True, position_buckets=4, **SMALL)
            ),
            "rel_embeddings",
        ),
        (
            lambda: transformers.MPNetForSequenceClassification(transformers.MPNetConfig(**SMALL)),
            "relative_attention_bias",
        ),
    ],
)
def test_what_is_registered_after_the_blocks_but_works_below_them_is_below(build: Any, late: str) -> None:
    with torch.device("meta"):
        groups = group_layers(build())
    found = [group.name for group in groups for name in group.parameters if late in name]
    assert found
    assert all(name.endswith("embeddings") for name in found)


def test_a_tied_head_is_shown() -> None:
    with torch.device("meta"):
        groups = group_layers(transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=8, n_layer=2, n_head=2)))
    assert "the head is tied to `transformer.wte.weight`" in str(groups)


def test_peft_groups_hold_what_the_adapters_train() -> None:
    model = get_peft_model(tiny.bert(), LoraConfig(task_type="SEQ_CLS", target_modules=["query", "dense"]))
    groups = group_layers(model)
    trainable = {normalise(name) for name, p in model.named_parameters() if p.requires_grad}
    assert set(groups.parameters) == trainable
    assert groups.names == ("encoder.layer.0", "encoder.layer.1", "encoder.layer.2", "head")
    assert groups["head"].parameters == ("classifier.modules_to_save.weight", "classifier.modules_to_save.bias")
    assert "the base under the adapters" in str(groups)


def test_adapters_of_every_kind_leave_the_dead_copies_out() -> None:
    config = LoraConfig(target_modules=["query"], modules_to_save=["classifier", "pooler"], use_dora=True)
    model = get_peft_model(tiny.bert(), config)
    groups = group_layers(model)
    assert not any("original_module" in name or "base_layer" in name for name in groups.parameters)
    owner = {name: group.name for group in groups for name in group.parameters}
    saved = {name: group for name, group in owner.items() if "modules_to_save" in name}
    assert set(saved.values()) == {"encoder.layer.2", "head"}
    assert owner["bert.encoder.layer.1.attention.self.query.lora_magnitude_vector.weight"] == "encoder.layer.1"
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert {normalise(name) for name in frozen}.isdisjoint(groups.parameters)


def test_packed_weights_count_by_their_true_size() -> None:
    class State:
        shape = (16, 16)

    model = tiny.bert()
    weight = model.bert.encoder.layer[0].attention.self.query.weight
    before = group_layers(model)["encoder.layer.0"].num_parameters
    weight.data = torch.zeros(128, 1)  # two 4-bit numbers to a byte, as bitsandbytes packs them
    weight.quant_state = State()  # type: ignore[attr-defined]
    assert group_layers(model)["encoder.layer.0"].num_parameters == before


def test_what_the_model_never_trains_has_no_group_of_its_own() -> None:
    config = transformers.MarianConfig(vocab_size=50, pad_token_id=0, **BART)
    groups = group_layers(transformers.MarianMTModel(config))
    assert groups.names == ("embeddings", *(f"{part}.layers.{n}" for part in ("encoder", "decoder") for n in (0, 1)))
    assert "model.decoder.embed_positions.weight" in groups["decoder.layers.0"].parameters
    assert "is tied to `model.shared.weight`" in str(groups)
    assert "`embeddings` holds weights tied to `decoder.embeddings`, `head`" in str(groups)


def test_what_a_script_froze_keeps_its_groups() -> None:
    model = tiny.bert()
    names = group_layers(model).names
    model.bert.requires_grad_(False)
    assert group_layers(model).names == names


def test_prompt_tuning_has_its_prompt_at_the_bottom() -> None:
    model = get_peft_model(tiny.bert(), PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4))
    assert group_layers(model).names[0] == "prompt"


def test_wrapped_models_have_the_same_groups() -> None:
    model = tiny.bert()
    assert group_layers(torch.compile(model)) == group_layers(model)  # type: ignore[arg-type]


def test_a_model_with_wrapped_parts_has_the_same_groups() -> None:
    model = tiny.bert()
    expected = group_layers(model)
    model.bert.encoder = torch.compile(model.bert.encoder)
    assert group_layers(model) == expected

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(2, 2)
            self.head = nn.Linear(2, 2)

    assert group_layers(Outer()).names == ("module", "head")


def test_a_model_without_trainable_parameters_is_refused() -> None:
    model = get_peft_model(tiny.bert(), LoraConfig(task_type="SEQ_CLS"))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameters"):
        group_layers(model)


def test_json_round_trip_and_table() -> None:
    groups = group_layers(tiny.bert())
    assert LayerGroups.from_json(groups.to_json()) == groups
    lines = str(groups).splitlines()
    assert lines[0].split() == ["group", "parameters", "share", "dtype"]
    assert lines[-1].split()[0] == "head"
    with pytest.raises(ValueError, match="expected the JSON"):
        LayerGroups.from_json("[]")


def test_groups_by_pattern_never_confuse_layer_1_and_layer_10() -> None:
    model = tiny.bert(layers=11)
    groups = group_layers(
        model,
        patterns={
            "embeddings": "bert.embeddings",
            **{f"layer {n}": f"bert.encoder.layer.{n}" for n in range(11)},
            "pooler": "bert.pooler",
            "head": "classifier",
        },
    )
    assert groups.head == "head"
    assert all(name.startswith("bert.encoder.layer.1.") for name in groups["layer 1"].parameters)
    assert all(name.startswith("bert.encoder.layer.10.") for name in groups["layer 10"].parameters)


def test_by_pattern_errors_name_the_parameter_and_the_pattern() -> None:
    model = tiny.bert()
    with pytest.raises(ValueError, match=r"`bert\.pooler\.dense\.weight` is matched by no pattern"):
        group_layers(model, patterns={"a": "bert.embeddings", "b": "bert.encoder", "head": "classifier"})
    with pytest.raises(ValueError, match="matched by 2 patterns"):
        group_layers(model, patterns={"a": "bert", "b": "bert.encoder", "head": "classifier"})
    with pytest.raises(ValueError, match=r"pattern `bert\.encodr` matches no parameter. Closest names: `bert"):
        group_layers(model, patterns={"a": "bert", "b": "bert.encodr", "head": "classifier"})


def test_split_and_merge_keep_the_partition() -> None:
    groups = group_layers(tiny.bert())
    merged = groups.merge(["encoder.layer.0", "encoder.layer.1"], "lower")
    assert merged.names == ("embeddings", "lower", "encoder.layer.2", "head")
    assert merged["lower"].num_parameters == 2 * groups["encoder.layer.0"].num_parameters
    split = merged.split("lower", {"a": "bert.encoder.layer.0", "b": "bert.encoder.layer.1"})
    assert split["a"].parameters == groups["encoder.layer.0"].parameters
    assert sorted(split.parameters) == sorted(groups.parameters)
    with pytest.raises(ValueError, match="not neighbours"):
        groups.merge(["embeddings", "head"], "ends")
    assert groups.merge(["encoder.layer.2", "head"], "top").head == "top"


def test_a_repeated_or_empty_group_is_refused() -> None:
    with pytest.raises(ValueError, match="parameter `w` occurs 2 times"):
        LayerGroups((LayerGroup("a", ("w",)), LayerGroup("b", ("w",))))
    with pytest.raises(ValueError, match="group name `a` occurs 2 times"):
        LayerGroups((LayerGroup("a", ("w",)), LayerGroup("a", ("v",))))
    with pytest.raises(ValueError, match="group `a` has no parameters"):
        LayerGroups((LayerGroup("a", ()),))
    with pytest.raises(ValueError, match="there are no groups"):
        LayerGroups(())
    with pytest.raises(ValueError, match="head `a` is not the last group"):
        LayerGroups((LayerGroup("a", ("w",)), LayerGroup("b", ("v",))), head="a")


def test_select_names_what_is_near() -> None:
    groups = group_layers(tiny.bert())
    assert groups.select(["encoder.layer.*"]) == ("encoder.layer.0", "encoder.layer.1", "encoder.layer.2")
    with pytest.raises(ValueError, match=r"`encoder.layers.0` matches no group. Closest names: `encoder.layer.0`"):
        groups.select(["encoder.layers.0"])
    with pytest.raises(TypeError, match="expected a sequence of group names"):
        groups.select("head")


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("layer.1", "layer.1", True),
        ("layer.1", "layer.1.weight", True),
        ("layer.1", "layer.10.weight", False),
        ("layer.1", "encoder.layer.1", False),
        ("layer.*", "layer.10.weight", True),
        ("*.weight", "a.b.weight", False),
        ("**.weight", "a.b.weight", True),
        ("**.weight", "weight", True),
        ("a.b", "a+b", False),
    ],
)
def test_patterns_are_anchored(pattern: str, name: str, expected: bool) -> None:
    assert matches(pattern, name) is expected


def test_assign_is_exact_for_any_split_of_names() -> None:
    names = [f"block.{n}.weight" for n in range(30)]
    cut = random.Random(0).sample(range(30), 30)
    assert assign(names, {str(n): f"block.{n}" for n in cut}) == {str(n): (f"block.{n}.weight",) for n in cut}


def test_names_without_wrapper_parts() -> None:
    assert normalise("module._orig_mod.base_model.model.a._checkpoint_wrapped_module.w") == "a.w"
    assert normalise("a.lora_A.default.weight") == "a.lora_A.weight"
    assert normalise("a.defaults.weight") == "a.defaults.weight"
    assert closest("heda", ["head", "body"]) == "`head`"
