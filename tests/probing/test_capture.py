"""What the hooks see, against the hidden states that models return themselves; and what they leave alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    BartConfig,
    BartForSequenceClassification,
    BertForMultipleChoice,
    BertForSequenceClassification,
    CLIPConfig,
    CLIPModel,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    ResNetForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2ForSequenceClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from tests import tiny
from tl_callbacks import LayerGroup, LayerGroups, group_layers
from tl_callbacks.probing.capture import Batch, Capture
from tl_callbacks.reading.pooling import Pooling, pool

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
SEQ2SEQ: dict[str, Any] = {
    "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 50, "pad_token_id": 1,
    "eos_token_id": 2, "bos_token_id": 0, "decoder_start_token_id": 3,
}  # fmt: skip
IDS = torch.randint(4, 50, (3, 6), generator=torch.Generator().manual_seed(1))
RIGHT = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]])
TEXT = {"input_ids": IDS, "attention_mask": RIGHT}
LEFT = {"input_ids": IDS, "attention_mask": RIGHT.flip(1)}


def captured(
    model: nn.Module, inputs: dict[str, Any], *, groups: LayerGroups | None = None, pooling: Pooling = "mean"
) -> Batch:
    seen: list[Batch] = []
    model.eval()
    with Capture(model, groups or group_layers(model), seen.append, pooling=pooling), torch.no_grad():
        model(**inputs)
    (batch,) = seen
    return batch


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def gpt2() -> nn.Module:
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    return GPT2ForSequenceClassification(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50, **ids))


def vit() -> nn.Module:
    return ViTForImageClassification(ViTConfig(**SIZES, image_size=8, patch_size=4, num_channels=1))


STATES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], list[str]]] = {
    "BERT": (tiny.bert, TEXT, ["embeddings", "encoder.layer.0", "encoder.layer.1", "encoder.layer.2"]),
    "GPT-2, left padding": (gpt2, LEFT, ["embeddings", "h.0"]),
    "ViT": (vit, {"pixel_values": torch.randn(3, 1, 8, 8)}, ["embeddings", "layers.0", "layers.1"]),
}


@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
@pytest.mark.parametrize("name", STATES)
def test_blocks_are_read_as_the_model_returns_its_hidden_states(name: str, pooling: Pooling) -> None:
    make, inputs, names = STATES[name]
    model = make()
    batch = captured(model, inputs, pooling=pooling)
    assert set(batch.features) == set(group_layers(model).names)
    with torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states
    for group, state in zip(names, states, strict=False):
        expected = pool(state, 3, inputs.get("attention_mask"), pooling=pooling)
        assert torch.allclose(batch.features[group], expected, atol=1e-6), group
    one, other = (batch.features[name] for name in names[:2])
    assert (one - other).abs().max() > 100 * 1e-6, "the control must differ"


def test_the_head_is_read_at_its_input() -> None:
    model = tiny.bert().eval()
    with torch.no_grad():
        given = model.bert(**TEXT).pooler_output
    assert torch.equal(captured(model, TEXT).features["head"], given)


@pytest.mark.parametrize("labels", [True, False])
def test_encoder_and_decoder_have_masks_of_their_own(labels: bool) -> None:
    config = T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, vocab_size=50, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config).eval()
    target = torch.tensor([[5, 6, 7, 8], [5, 6, -100, -100], [5, -100, -100, -100]])
    kept = (target != -100).long()
    ids = torch.tensor([[0, 5, 6, 7], [0, 5, 0, 0], [0, 0, 0, 0]])
    inputs = {**TEXT, **({"labels": target} if labels else {"decoder_input_ids": ids, "decoder_attention_mask": kept})}
    batch = captured(model, inputs)
    blocks = ["encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"]
    assert list(batch.features) == ["embeddings", *blocks]
    with torch.no_grad():
        output = model(**inputs, output_hidden_states=True)
    for group, state, mask in (
        ("embeddings", output.encoder_hidden_states[0], RIGHT),
        ("encoder.block.0", output.encoder_hidden_states[1], RIGHT),
        ("decoder.block.0", output.decoder_hidden_states[1], kept),
    ):
        assert torch.allclose(batch.features[group], pool(state, 3, mask), atol=1e-5), group


def test_a_decoder_that_reads_the_shifted_input() -> None:
    model = BartForSequenceClassification(BartConfig(**SEQ2SEQ)).eval()
    ids = torch.where(RIGHT.bool(), IDS, 1)
    ids[torch.arange(3), RIGHT.sum(1) - 1] = 2
    batch = captured(model, {"input_ids": ids, "attention_mask": RIGHT})
    with torch.no_grad():
        states = model(input_ids=ids, attention_mask=RIGHT, output_hidden_states=True).decoder_hidden_states
    shifted = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    assert torch.allclose(batch.features["decoder.layers.0"], pool(states[1], 3, shifted), atol=1e-6)
    assert {"embeddings", "decoder.embeddings", "head"} < set(batch.features)


def test_speech_is_pooled_over_the_frames_that_hold_sound() -> None:
    sizes: dict[str, Any] = {"conv_dim": (8, 8), "conv_kernel": (10, 3), "conv_stride": (5, 2)}
    more = {"num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    model = Wav2Vec2ForSequenceClassification(Wav2Vec2Config(**SIZES, vocab_size=50, **sizes, **more)).eval()
    sound = torch.randn(3, 400)
    mask = (torch.arange(400) < torch.tensor([400, 200, 100])[:, None]).long()
    inputs = {"input_values": sound, "attention_mask": mask}
    batch = captured(model, inputs)
    with torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states
    frames = model._get_feature_vector_attention_mask(states[1].shape[1], mask)
    assert frames.sum(1).tolist()[1] < frames.sum(1).tolist()[0]
    assert torch.allclose(batch.features["encoder.layers.0"], pool(states[1], 3, frames), atol=1e-6)
    assert set(batch.features) == set(group_layers(model).names)


def test_speech_to_text() -> None:
    config = WhisperConfig(**SEQ2SEQ, num_mel_bins=8, max_source_positions=20, max_target_positions=8)
    inputs = {"input_features": torch.randn(3, 8, 40), "labels": torch.tensor([[5, 6, -100]] * 3)}
    model = WhisperForConditionalGeneration(config)
    batch = captured(model, inputs)
    assert set(batch.features) == set(group_layers(model).names)
    mask = (torch.arange(40) < torch.tensor([40, 20, 10])[:, None]).long()
    masked = captured(model, {**inputs, "attention_mask": mask})
    assert torch.allclose(masked.features["encoder.layers.0"][0], batch.features["encoder.layers.0"][0], atol=1e-5)
    assert not torch.allclose(masked.features["encoder.layers.0"][1], batch.features["encoder.layers.0"][1], atol=1e-3)


def test_towers_of_images_are_not_pooled_by_the_mask_of_the_text() -> None:
    config = CLIPConfig(
        text_config={**SIZES, "vocab_size": 50, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1},
        vision_config={**SIZES, "image_size": 10, "patch_size": 5, "num_channels": 1},  # 5 places
        projection_dim=8,
    )
    model = CLIPModel(config)
    ids, mask = IDS[:, :5], RIGHT[:, :5]
    pixels = torch.randn(3, 1, 10, 10)
    batch = captured(model, {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels})
    with torch.no_grad():
        seen = model.vision_model(pixel_values=pixels, output_hidden_states=True).hidden_states[1]
        read = model.text_model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[1]
    assert torch.allclose(batch.features["vision_model.encoder.layers.0"], seen.mean(1), atol=1e-6)
    assert torch.allclose(batch.features["text_model.encoder.layers.0"], pool(read, 3, mask), atol=1e-6)


def test_maps_of_a_cnn() -> None:
    model = tiny.resnet()
    batch = captured(model, {"pixel_values": torch.randn(3, 1, 16, 16)})
    assert {name: features.shape[1] for name, features in batch.features.items()} == {
        "embeddings": 4, "encoder.stages.0.layers.0": 4, "encoder.stages.1.layers.0": 8,
        "encoder.stages.1.layers.1": 8, "head": 8,
    }  # fmt: skip
    assert isinstance(model, ResNetForImageClassification)


def test_packed_rows_give_a_vector_a_sample() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, vocab_size=50, num_key_value_heads=2, bos_token_id=0, eos_token_id=0)
    model = LlamaForCausalLM(config)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1]])
    packed = captured(model, {"input_ids": IDS[:1], "position_ids": positions})
    alone = captured(model, {"input_ids": IDS[:1, :4]})
    assert {len(features) for features in packed.features.values()} == {2}
    for name, features in alone.features.items():
        assert torch.allclose(packed.features[name][:1], features, atol=1e-5), name


def test_choices_stand_side_by_side() -> None:
    model = BertForMultipleChoice(tiny.bert().config)
    inputs = {"input_ids": IDS.view(3, 2, 3), "attention_mask": torch.ones(3, 2, 3, dtype=torch.long)}
    assert captured(model, inputs).features["encoder.layer.0"].shape == (3, 32)


def test_a_block_that_is_used_again_counts_at_last() -> None:
    config = AlbertConfig(**SIZES, embedding_size=8, vocab_size=50)
    model = AlbertForSequenceClassification(config).eval()
    with pytest.warns(UserWarning, match="share the weights"):
        groups = group_layers(model)
    batch = captured(model, TEXT, groups=groups)
    with torch.no_grad():
        states = model(**TEXT, output_hidden_states=True).hidden_states
    block = next(name for name in groups.names if name.startswith("encoder"))
    assert torch.allclose(batch.features[block], pool(states[-1], 3, RIGHT), atol=1e-6)


def test_adapters_and_soft_prompts() -> None:
    plain = tiny.bert()
    expected = captured(plain, TEXT).features
    lora = get_peft_model(plain, LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
    found = captured(lora, TEXT).features
    assert set(found) == {"encoder.layer.0", "encoder.layer.1", "encoder.layer.2", "head"}
    assert all(torch.allclose(found[name], expected[name], atol=1e-6) for name in found)
    prompted = get_peft_model(tiny.bert(), PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2))
    assert captured(prompted, TEXT).features["head"].shape == (3, 16), "a prompt is no vector of a sample"
    block = "base_model.bert.encoder.layer.2"
    body = LayerGroups((LayerGroup(block, (f"{block}.output.dense.weight",)),))
    lengthened = captured(prompted, TEXT, groups=body).features[block]
    inside: list[Tensor] = []
    layer = prompted.base_model.bert.encoder.layer[2]
    handle = layer.register_forward_hook(lambda m, a, o: inside.append(o if isinstance(o, Tensor) else o[0]))
    with torch.no_grad():
        prompted(**TEXT)
    handle.remove()
    mask = torch.nn.functional.pad(RIGHT, (2, 0), value=1)
    assert torch.allclose(lengthened, pool(inside[0], 3, mask), atol=1e-6)


def test_groups_made_by_hand() -> None:
    model = tiny.bert()
    groups, expected = group_layers(model), captured(model, TEXT).features
    lower = captured(model, TEXT, groups=groups.merge(["embeddings", "encoder.layer.0"], "lower")).features
    assert torch.equal(lower["lower"], expected["encoder.layer.0"])
    upper = captured(model, TEXT, groups=groups.merge(["encoder.layer.2", "head"], "upper")).features
    assert torch.equal(upper["upper"], expected["head"])
    places = {"first": "attention", "second": "intermediate", "third": "output"}
    parts = {name: f"bert.encoder.layer.1.{place}" for name, place in places.items()}
    split = captured(model, TEXT, groups=groups.split("encoder.layer.1", parts)).features
    assert torch.equal(split["third"], expected["encoder.layer.1"])
    assert not torch.allclose(split["first"], expected["encoder.layer.1"])


class OneLayer(nn.Module):
    """A list of a single block, which is never called itself."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layers, self.head = nn.Linear(3, 4), nn.ModuleList([nn.Linear(4, 4)]), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.head(self.layers[0](self.stem(x))), None


def test_a_list_of_one_block() -> None:
    model = OneLayer()
    groups = group_layers(model, patterns={"stem": "stem", "body": "layers", "head": "head"})
    x = torch.randn(5, 3)
    batch = captured(model, {"x": x}, groups=groups)
    with torch.no_grad():
        assert torch.equal(batch.features["body"], model.layers[0](model.stem(x)))
        assert torch.equal(batch.features["head"], batch.features["body"])


@pytest.mark.parametrize("wrap", ["none", "compiled"])
def test_wrapped_models_have_the_same_names(wrap: str) -> None:
    model = tiny.bert().eval()
    wrapped = torch.compile(model, backend="eager") if wrap == "compiled" else model
    seen: list[Batch] = []
    with Capture(wrapped, group_layers(model), seen.append), torch.no_grad():
        model(**TEXT) if wrap == "none" else wrapped(**TEXT)
    assert list(seen[0].features) == list(group_layers(model).names)


def test_training_and_recomputation_pass_through() -> None:
    model = tiny.bert(dropout=0.0)
    model.activation_checkpointing_enable({"use_reentrant": False})
    seen: list[Batch] = []
    with Capture(model, group_layers(model), seen.append):
        model.train()
        model(**TEXT, labels=torch.zeros(3, dtype=torch.long)).loss.backward()
        with torch.no_grad():
            model(**TEXT)  # in training mode
        model.eval()
        model(**TEXT, labels=torch.zeros(3, dtype=torch.long)).loss.backward()  # with gradient
        assert seen == []
        with torch.inference_mode():
            model(**TEXT)
        assert len(seen) == 1
    assert not any(features.requires_grad for features in seen[0].features.values())


class Broken(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("broken")


def test_nothing_is_left_behind_after_an_exception() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)).eval()
    groups = group_layers(model)
    before, state = hooks(model), torch.get_rng_state()
    seen: list[Batch] = []
    capture = Capture(model, groups, seen.append)
    working, model[1].forward = model[1].forward, Broken().forward
    with capture:
        assert hooks(model) > before
    with pytest.raises(RuntimeError, match="broken"), capture, torch.no_grad():
        model(torch.ones(2, 3))
    assert hooks(model) == before
    assert seen == []
    model[1].forward = working
    with capture, torch.no_grad():
        model(torch.ones(2, 3))
    assert [set(batch.features) for batch in seen] == [set(groups.names)]
    assert torch.equal(torch.get_rng_state(), state)
    capture.close()
    assert hooks(model) == before


def test_an_unknown_pooling_is_refused() -> None:
    model = tiny.bert()
    with pytest.raises(ValueError, match="`pooling` is 'max'; expected"):
        Capture(model, group_layers(model), print, pooling="max")  # type: ignore[arg-type]
    assert isinstance(model, BertForSequenceClassification)
