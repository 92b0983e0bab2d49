"""Configurations for the model types whose default one is invalid or leaves a part out."""

from collections.abc import Callable
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

_EXPERTS = {"num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 512}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_OCR_TEXT = {
    "mlp_layer_types": ["dense"] + ["sparse"] * 31,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
}
_HALF_ROTATED = {"rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5, "mrope_section": [8, 12, 12]}}
_FOUR_AXES = {"head_dim": 128, "rope_parameters": {**_ROPE, "mrope_section": [16, 16, 16, 16]}}
_PROJECTED = {"projector_config": {"model_type": "blip_2_qformer", "encoder_hidden_size": 1024}}
_INDEXER = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 256,
    "indexer_budget": 64,
    "indexer_compress_ratio": 4,
    "ngram_vocab_size_base": 1000,
}
_COMPASS = {
    "layer_types": ["sliding_attention", "full_attention"] * 20,
    "rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE},
}
_WINDOWS = {
    f"{orientation}{kernel}ratio": [[high, wide], [1, 1], [high // 2, wide // 2]]
    for orientation, sizes in {
        "vertical_long_to_small_conv_": {"long": (7, 1), "mid": (5, 1), "short": (3, 1)},
        "horizontal_small_to_long_conv_": {"long": (1, 7), "mid": (1, 5), "short": (1, 3)},
        "symmetric_conv_long_": {"long": (7, 7), "mid": (5, 5), "short": (3, 3)},
    }.items()
    for kernel, (high, wide) in sizes.items()
}
_INTRACLASS = {"reduce_channel": [1, 1, 0], "return_channel": [1, 1, 0], **_WINDOWS}
_DETECTION = {"intraclass_block_config": _INTRACLASS, "scale_factor_list": [1, 2, 4, 8], "kernel_list": [3, 2, 2]}
_ASSISTANT = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0, "num_kv_shared_layers": 30}
_PERCEPTION = {
    "architecture": "vit_pe_core_large_patch14_336",
    "model_args": {"embed_dim": 1024, "img_size": [448, 448], "depth": 23, "global_pool": ""},
}


def _letters(code: int) -> str:
    return "".join(chr(ord("A") + int(digit)) for digit in str(code))


OVERRIDES: dict[str, dict[str, Any] | Callable[[], dict[str, Any]]] = {
    "autoformer": {"prediction_length": 8},
    "aria": {"projector_patch_to_query_dict": {49: 128}},
    "aya_vision": lambda: {"vision_config": default("siglip_vision_model")},
    "blip-2": {"image_token_index": 7},
    "chameleon": {"vocabulary_map": {"<image>": 4, **{f"IMGIMG{_letters(code)}Z": 5 + code for code in range(8192)}}},
    "eomt": {"num_blocks": 2},
    "eomt_dinov3": {"num_blocks": 2},
    "rwkv": {"rescale_every": 0},
    "cohere_compass": lambda: {"text_config": default("cohere_compass_text")},
    "cohere_compass_text": _COMPASS,
    "colmodernvbert": lambda: {"vlm_config": default("modernvbert")},
    "convnext": {"hidden_sizes": [96, 192, 384, 768]},
    "convnextv2": {"hidden_sizes": [96, 192, 384, 768]},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_ocr2": lambda: {"text_config": default("deepseek_ocr2_text")},
    "deepseek_ocr2_text": _OCR_TEXT,
    "deepseek_v2": {"num_experts_per_tok": 2},
    "diffusion_gemma": {"text_config": _EXPERTS},
    "diffusion_gemma_text": _EXPERTS,
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "emu3": {"vocabulary_map": {"<image>": 4, **{f"<|visual token {code:06}|>": 5 + code for code in range(32768)}}},
    "esm": {"vocab_size": 33, "pad_token_id": 1, "mask_token_id": 32},
    "focalnet": {"hidden_sizes": [192, 384, 768, 768]},
    "gemma3": {"mm_tokens_per_image": 49},
    "gemma4_assistant": {"text_config": _ASSISTANT},
    "glm46v": {"text_config": _HALF_ROTATED},
    "glm4v": {"text_config": _HALF_ROTATED},
    "glm4v_moe": {"text_config": {"head_dim": 128, **_HALF_ROTATED}},
    "glm4v_moe_text": {"head_dim": 128, **_HALF_ROTATED},
    "glm4v_text": _HALF_ROTATED,
    "glm_image": {"text_config": _HALF_ROTATED},
    "glm_image_text": _HALF_ROTATED,
    "glmga": {"text_config": _HALF_ROTATED},
    "granite_speech": _PROJECTED,
    "granite_speech_plus": _PROJECTED,
    "granite4_vision": {"deepstack_layer_map": [[3, 9], [6, 6]], "downsample_rate": "3/6"},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "hunyuan_vl": {"text_config": _FOUR_AXES},
    "hunyuan_vl_text": _FOUR_AXES,
    "idefics3": {"vision_config": {"image_size": 256}},
    "informer": {"prediction_length": 8},
    "instructblip": {"image_token_index": 7},
    "instructblipvideo": {"video_token_index": 7},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 8},
    "ministral": {"head_dim": 128},
    "moonshine_streaming": {"num_key_value_heads": 8},
    "modernvbert": {"vision_config": {"image_size": 256}},
    "nemotron": {"head_dim": 128, "num_key_value_heads": 8},
    "perception_lm": lambda: {"vision_config": CONFIG_MAPPING["timm_wrapper"](**_PERCEPTION)},
    "pp_ocrv5_server_det": _DETECTION,
    "pp_ocrv6_medium_det": _DETECTION,
    "qwen2_vl": {"vision_config": {"hidden_size": 8192}},
    "qwen3_omni_moe": {
        "talker_config": {"text_config": {"shared_expert_intermediate_size": 384}, "spatial_merge_size": 2}
    },
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 384},
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "shieldgemma2": {"mm_tokens_per_image": 49},
    "smolvlm": {"vision_config": {"image_size": 256}},
    "t5gemma2_decoder": {"dropout_rate": 0.0},
    "step3p5": {"sliding_window": 512},
    "step3p7": {"text_config": {"sliding_window": 512}},
    "t5gemma2": {"encoder": {"mm_tokens_per_image": 49}},
    "t5gemma2_encoder": {"text_config": {"dropout_rate": 0.0}, "mm_tokens_per_image": 49},
    "t5gemma2_text": {"dropout_rate": 0.0},
    "time_series_transformer": {"prediction_length": 8},
    "timm_backbone": {"backbone": "resnet18"},
    "vitmatte": {"convstream_hidden_sizes": [48, 96, 192], "fusion_hidden_sizes": [256, 128, 64, 32]},
}

_UPSAMPLING = {
    "head_config": {
        "upsample_out_channels": [64, 64],
        "conv_out_channels": [64, 64],
        "scale_conv_out_channels": [64, 64],
        "scale_final_hidden_sizes": [64, 64],
        "scale_final_input_size": 3072,
    }
}
CLASS_OVERRIDES: dict[str, dict[str, Any]] = {
    "BeitForSemanticSegmentation": {"out_indices": [3, 5, 7, 11]},
    "HieraForPreTraining": {"decoder_hidden_size": 512, "decoder_depth": 8, "decoder_num_heads": 16},
    "PerceiverForImageClassificationConvProcessing": {"num_cross_attention_heads": 1},
    "PerceiverForImageClassificationFourier": {"num_cross_attention_heads": 1},
    "ReformerModelWithLMHead": {"is_decoder": True},
    "Sapiens2ForImageMatting": _UPSAMPLING,
    "Sapiens2ForNormalEstimation": _UPSAMPLING,
    "Sapiens2ForPointmapEstimation": _UPSAMPLING,
    "Sapiens2ForPoseEstimation": _UPSAMPLING,
    "Sapiens2ForSemanticSegmentation": _UPSAMPLING,
    "T5GemmaEncoderModel": {"is_encoder_decoder": False},
    "Wav2Vec2BertForCTC": {"vocab_size": 32},
    "Wav2Vec2ConformerForCTC": {"vocab_size": 32},
}


def default(model_type: str, class_name: str = "") -> PreTrainedConfig:
    """Return the default configuration of a model type, with what makes it valid for the class."""
    overrides = OVERRIDES.get(model_type, {})
    valid = overrides() if callable(overrides) else overrides
    config = CONFIG_MAPPING[model_type](**{**valid, **CLASS_OVERRIDES.get(class_name, {})})
    _fit(config)
    return config


def _fit(config: PreTrainedConfig) -> None:
    """Make the towers end as wide as the text model is; some defaults do not."""
    width = getattr(getattr(config, "text_config", None), "hidden_size", None)
    for tower in ("vision_config", "audio_config"):
        part = getattr(config, tower, None)
        for name in ("out_hidden_size", "output_dim"):
            if width and isinstance(getattr(part, name, None), int):
                setattr(part, name, width)
