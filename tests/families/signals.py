"""Speech, time series, and models that read several things: images with text, documents, tables."""

import functools
from typing import Any

import torch
import transformers
from torch import nn

from tests.families.core import (
    FIRST_WORD,
    IMAGE,
    LABELS,
    LAYERS,
    LENGTH,
    SEQ2SEQ,
    SMALL,
    SPECIAL,
    TEXT,
    VOCABULARY,
    Family,
    Row,
    lora,
    model,
    noise,
    words,
)  # fmt: skip
from tests.families.generative import GPT2

PLACE = FIRST_WORD - 1  # the token in whose place a patch of an image is put
PLAIN = {key: value for key, value in {**TEXT, **SPECIAL, "sep_token_id": 2}.items() if key != "num_labels"}
CONV = {"conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (5, 3), "num_feat_extract_layers": 2}
CONV |= {"num_conv_pos_embeddings": 2, "num_conv_pos_embedding_groups": 2, "layerdrop": 0.0}
SPEECH = {**SMALL, **CONV, "vocab_size": VOCABULARY, "pad_token_id": 0, "num_labels": LABELS}
PROJECTED = {"classifier_proj_size": 8, **SPEECH}
WHISPER = {
    "vocab_size": VOCABULARY,
    "num_mel_bins": 4,
    "max_source_positions": 8,
    "max_target_positions": 16,
    **SEQ2SEQ,
}
AST = {"patch_size": 4, "frequency_stride": 4, "time_stride": 4, "max_length": 16, "num_mel_bins": 8, **SMALL}
TOWER = {"image_size": IMAGE, "patch_size": 8, **SMALL}
TOWERS = {"text_config": PLAIN, "vision_config": TOWER}
LLAVA = {"text_config": {"model_type": "llama", **PLAIN}, "image_token_id": PLACE, "vision_feature_layer": -1}
LLAVA |= {"vision_config": {"model_type": "clip_vision_model", **TOWER}}
OPT = {"model_type": "opt", "ffn_dim": 24, "word_embed_proj_dim": 16, **PLAIN}
BRIDGE = {"vocab_size": VOCABULARY, "encoder_hidden_size": 16, "cross_attention_frequency": 1, **SMALL}
BLIP2 = {"vision_config": TOWER, "qformer_config": BRIDGE, "text_config": OPT, "num_query_tokens": 4}
LXMERT = {"l_layers": 2, "x_layers": 2, "r_layers": 2, "visual_feat_dim": 6, "num_qa_labels": LABELS}
LXMERT |= {"vocab_size": VOCABULARY, **SMALL}
LAYOUT = {"max_2d_position_embeddings": 32, **TEXT}
PAGES = {"input_size": IMAGE, "patch_size": 8, "coordinate_size": 2, "shape_size": 4, **LAYOUT}
TAPAS = {"type_vocab_sizes": [3, 8, 8, 2, 8, 8, 4], **PLAIN}
SERIES = {"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2], "num_time_features": 1, "d_model": 16}
SERIES |= {"encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0, **LAYERS}
PATCHES = {"num_input_channels": 2, "context_length": 16, "patch_length": 4, "patch_stride": 4, "num_targets": LABELS}
PATCHTST = {"d_model": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 24, **PATCHES}


def waves() -> list[Row]:
    """Waves with a class."""
    return [{"input_values": wave, "labels": n % LABELS} for n, wave in enumerate(noise(400))]


def transcribed() -> list[Row]:
    """Waves with a short text."""
    return [{"input_values": wave, "labels": ids} for wave, ids in zip(noise(400), words(length=4), strict=True)]


def spoken() -> list[Row]:
    """Spectra with a text."""
    return [{"input_features": sound, "labels": ids} for sound, ids in zip(noise(4, 16), words(), strict=True)]


def sounds() -> list[Row]:
    """Spectra with a class."""
    return [{"input_values": sound, "labels": n % LABELS} for n, sound in enumerate(noise(16, 8))]


def captioned() -> list[Row]:
    """Images with a text that ends."""
    rows = zip(noise(3, IMAGE, IMAGE), words(length=LENGTH - 1), strict=True)
    return [{"pixel_values": image, "input_ids": [*ids, 2], "attention_mask": [1] * LENGTH} for image, ids in rows]


def described(*, places: int = 0) -> list[Row]:
    """Images with a text to go on with, after places for the image."""
    rows = [(row["pixel_values"], [PLACE] * places + row["input_ids"]) for row in captioned()]
    return [{"pixel_values": i, "input_ids": t, "attention_mask": [1] * len(t), "labels": t} for i, t in rows]


def captions() -> list[Row]:
    """Images with the text to write."""
    return [{"pixel_values": row["pixel_values"], "labels": row["input_ids"]} for row in captioned()]


def collate_pairs(rows: list[Row]) -> dict[str, Any]:
    """A batch of pairs for a contrastive loss."""
    return {**transformers.default_data_collator(rows), "return_loss": True}


def regions() -> list[Row]:
    """Questions about regions of an image, with a class."""
    seen = zip(words(), noise(3, 6), noise(3, 4), strict=True)
    return [
        {"input_ids": ids, "token_type_ids": [1] * LENGTH, "visual_feats": what, "visual_pos": where, "labels": n % 3}
        for n, (ids, what, where) in enumerate(seen)
    ]


def documents() -> list[Row]:
    """Texts with the place of each word and its class."""
    box = [[n, n, n + 5, n + 5] for n in range(LENGTH)]
    return [{"input_ids": ids, "bbox": box, "labels": [token % LABELS for token in ids]} for ids in words()]


def pages() -> list[Row]:
    """Documents with their images."""
    return [{**row, "pixel_values": image} for row, image in zip(documents(), noise(3, IMAGE, IMAGE), strict=True)]


def tables() -> list[Row]:
    """Questions over tables of two columns, with the cells that answer them."""
    types = [[0 if n < 2 else 1, n % 2 + 1, n // 2, 0, 0, 0, 0] for n in range(LENGTH)]
    return [{"input_ids": ids, "token_type_ids": types, "labels": [0, 0, 0, 1, 0, 0, 0, 0]} for ids in words()]


def series() -> list[Row]:
    """Series with a future."""
    times = torch.arange(14.0).unsqueeze(1)
    known = {"past_time_features": times[:10], "past_observed_mask": torch.ones(10), "future_time_features": times[10:]}
    return [{"past_values": row[:10], "future_values": row[10:], **known} for row in noise(14)]


def classified_series() -> list[Row]:
    """Series of two channels with a class."""
    return [{"past_values": row, "target_values": n % LABELS} for n, row in enumerate(noise(16, 2))]


def captioner() -> nn.Module:
    """An encoder of images and a decoder of texts, joined."""
    torch.manual_seed(0)
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.ViTConfig(**TOWER), transformers.GPT2Config(**GPT2), decoder_start_token_id=1, pad_token_id=0
    )
    return transformers.VisionEncoderDecoderModel(config)


SOUND = (
    Family(
        "Wav2Vec2", "speech", model("Wav2Vec2ForCTC", **SPEECH), transcribed,
        lora("q_proj", "v_proj", saved=("lm_head",)),
    ),
    Family("HuBERT", "speech", model("HubertForSequenceClassification", **PROJECTED), waves),
    Family("Data2Vec", "speech", model("Data2VecAudioForSequenceClassification", **PROJECTED), waves),
    Family(
        "Whisper", "speech", model("WhisperForConditionalGeneration", **WHISPER), spoken, lora("q_proj", "v_proj")
    ),
    Family("AST", "speech", model("ASTForAudioClassification", num_labels=LABELS, **AST), sounds),
)  # fmt: skip

SEVERAL = (
    Family("CLIP", "multimodal", model("CLIPModel", projection_dim=8, **TOWERS), captioned, collate=collate_pairs),
    Family("SigLIP", "multimodal", model("SiglipModel", **TOWERS), captioned, collate=collate_pairs),
    Family("BLIP", "multimodal", model("BlipForConditionalGeneration", **TOWERS), described),
    Family(
        "BLIP-2", "multimodal", model("Blip2ForConditionalGeneration", image_token_id=PLACE, **BLIP2),
        functools.partial(described, places=4),
    ),
    Family(
        "LLaVA", "multimodal", model("LlavaForConditionalGeneration", **LLAVA),
        functools.partial(described, places=4), lora("q_proj", "v_proj"),
    ),
    Family("ViT with GPT-2", "multimodal", captioner, captions),
    Family("LXMERT", "multimodal", model("LxmertForQuestionAnswering", **LXMERT), regions),
    Family("LayoutLM", "document", model("LayoutLMForTokenClassification", **LAYOUT), documents),
    Family("LayoutLMv3", "document", model("LayoutLMv3ForTokenClassification", **PAGES), pages),
    Family("TAPAS", "table", model("TapasForQuestionAnswering", **TAPAS), tables, lora("query", "value")),
)  # fmt: skip

TIME = (
    Family("Time Series Transformer", "time series", model("TimeSeriesTransformerForPrediction", **SERIES), series),
    Family("PatchTST", "time series", model("PatchTSTForClassification", **PATCHTST), classified_series),
    Family(
        "PatchTSMixer", "time series",
        model("PatchTSMixerForTimeSeriesClassification", d_model=8, num_layers=2, **PATCHES), classified_series,
    ),
)  # fmt: skip

FAMILIES = SOUND + SEVERAL + TIME
