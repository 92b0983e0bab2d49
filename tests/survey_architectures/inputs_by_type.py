"""Inputs for model types that the general rules do not serve: `BY_TYPE`."""

from collections.abc import Callable
from typing import Any

import torch

from tests.survey_architectures.known import Known

Arguments = dict[str, Any]
TEXT = 16


def _ids(*shape: int) -> torch.Tensor:
    return torch.full(shape, 3, dtype=torch.long)


def _ones(*shape: int) -> torch.Tensor:
    return torch.ones(*shape, dtype=torch.long)


def _zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.long)


def _wide(known: Known, *shape: int) -> torch.Tensor:
    return torch.rand(*shape, known.get("hidden_size", "d_model"))


def _image(known: Known, *before: int) -> torch.Tensor:
    return torch.rand(*(before or (1,)), known.channels(), *known.image_size())


def _decision(known: Known) -> Arguments:
    states, actions = known.get("state_dim"), known.get("act_dim")
    steps = {"rewards": torch.rand(1, 5, 1), "returns_to_go": torch.rand(1, 5, 1), "timesteps": _zeros(1, 5)}
    return {
        "states": torch.rand(1, 5, states),
        "actions": torch.rand(1, 5, actions),
        **steps,
        "attention_mask": _ones(1, 5),
    }


def _omdet(known: Known) -> Arguments:
    task = {"tasks_input_ids": _ids(1, 77), "tasks_attention_mask": _ones(1, 77)}
    classes = {"classes_input_ids": _ids(2, 77), "classes_attention_mask": _ones(2, 77)}
    return {"pixel_values": _image(known), **task, **classes, "classes_structure": torch.tensor([2])}


def _detr_decoder(known: Known) -> Arguments:
    tokens = {"vision_features": _wide(known, 1, 64), "vision_pos_encoding": _wide(known, 1, 64)}
    return {**tokens, "text_features": _wide(known, 1, 4), "spatial_shapes": torch.tensor([[8, 8]])}


def _detr_encoder(known: Known) -> Arguments:
    maps = {name: [_wide(known, 1, 8, 8).permute(0, 3, 1, 2)] for name in ("vision_features", "vision_pos_embeds")}
    return {**maps, "text_features": _wide(known, 1, 4)}


def _mask_decoder(known: Known) -> Arguments:
    maps = [_wide(known, 1, side, side).permute(0, 3, 1, 2) for side in (32, 16, 8)]
    prompts = {"encoder_hidden_states": _wide(known, 1, 64), "prompt_features": _wide(known, 1, 4)}
    return {"decoder_queries": _wide(known, 1, 10), "backbone_features": maps, **prompts}


def _qformer(known: Known) -> Arguments:
    seen = torch.rand(1, TEXT, known.get("encoder_hidden_size"))
    return {"query_embeds": _wide(known, 1, 8), "encoder_hidden_states": seen}


def _qformer_with_text(known: Known) -> Arguments:
    return {"input_ids": _ids(1, TEXT), "attention_mask": _ones(1, 8 + TEXT), **_qformer(known)}


def _tiles(known: Known) -> Arguments:
    tiles = known.get("max_num_tiles")
    ratio = {"aspect_ratio_ids": _ones(1, 1), "aspect_ratio_mask": _ones(1, 1, tiles)}
    return {"pixel_values": _image(known, 1, 1, tiles), **ratio}


def _tiles_with_text(known: Known) -> Arguments:
    seen = _ones(1, TEXT, 1, known.get("max_num_tiles"))
    return {"input_ids": _ids(1, TEXT), "attention_mask": _ones(1, TEXT), "cross_attention_mask": seen, **_tiles(known)}


def _rag(known: Known) -> Arguments:
    documents = known.get("n_docs")
    context = {"context_input_ids": _ids(documents, TEXT), "context_attention_mask": _ones(documents, TEXT)}
    scores = {"doc_scores": torch.rand(1, documents), "decoder_input_ids": _ids(documents, 8)}
    return {"input_ids": _ids(1, TEXT), "attention_mask": _ones(1, TEXT), **context, **scores}


def _kosmos(known: Known) -> Arguments:
    places = known.get("latent_query_num")
    ids, where = _ids(1, places + TEXT), torch.cat([_ones(1, places), _zeros(1, TEXT)], 1)
    return {"pixel_values": _image(known), "input_ids": ids, "image_embeds_position_mask": where}


def _codebooks(known: Known) -> torch.Tensor:
    return _ids(known.get("num_codebooks"), 8)


def _lengths(known: Known) -> Arguments:
    given = {"input_features": torch.rand(known.get("num_mel_bins"), 200), "feature_lens": torch.tensor([200])}
    return {**given, **({"aftercnn_lens": torch.tensor([100])} if known.takes("aftercnn_lens") else {})}


def _seggpt(known: Known) -> Arguments:
    height, width = known.image_size()
    return {
        name: torch.rand(1, 3, height // 2, width) for name in ("pixel_values", "prompt_pixel_values", "prompt_masks")
    }


def _series(known: Known) -> Arguments:
    length = known.get("context_length")
    return {"past_values": torch.rand(1, length), "past_values_padding": _zeros(1, length), "freq": _zeros(1, 1)}


def _spectrogram(known: Known) -> Arguments:
    return {"spectrogram": torch.rand(1, 50, known.get("model_in_dim"))}


def _regions(known: Known) -> Arguments:
    regions = {"visual_feats": torch.rand(1, 10, known.get("visual_feat_dim")), "visual_pos": torch.rand(1, 10, 4)}
    return {"input_ids": _ids(1, TEXT), **regions}


def _speech(known: Known) -> Arguments:
    return {"input_values": _wide(known, 1, TEXT), "decoder_input_values": _wide(known, 1, TEXT)}


def _audio_mel(known: Known) -> Arguments:
    mel = torch.rand(1, 64, known.get("input_feat_size"))
    return {"audio_mel": mel, "audio_mel_mask": torch.zeros(1, 64, dtype=torch.bool)}


def _cross_attended(known: Known) -> Arguments:
    text = {"input_ids": _ids(1, TEXT), "attention_mask": _ones(1, TEXT)}
    return {**text, "pixel_values": _image(known, 1, 1), "image_attention_mask": _ones(1, TEXT, 1)}


BY_TYPE: dict[str, Callable[[Known], Arguments]] = {
    "blip_2_qformer": _qformer,
    "bridgetower_vision_model": lambda known: {"image": _image(known)},
    "decision_transformer": _decision,
    "depth_pro": lambda known: {"pixel_values": torch.rand(1, 3, 1536, 1536)},
    "dia": lambda known: {"input_ids": _ids(1, TEXT), "decoder_input_ids": _ids(1, 8, known.get("num_channels"))},
    "fastspeech2_conformer_hifigan": _spectrogram,
    "gemma3n_audio": _audio_mel,
    "granite_speech_encoder": lambda known: {"hidden_states": torch.rand(1, 64, known.get("input_dim"))},
    "granite_speech_plus_encoder": lambda known: {"hidden_states": torch.rand(1, 64, known.get("input_dim"))},
    "granite_speech5_ctc": lambda known: {"input_features": torch.rand(1, 64, 4 * known.get("num_mel_bins"))},
    "granite_speech5_encoder": lambda known: {"input_features": torch.rand(1, 64, 4 * known.get("num_mel_bins"))},
    "idefics": _cross_attended,
    "idefics2_perceiver": lambda known: {"context": _wide(known, 1, TEXT), "attention_mask": _ones(1, TEXT)},
    "instructblip_qformer": _qformer_with_text,
    "instructblipvideo_qformer": _qformer_with_text,
    "kosmos-2": _kosmos,
    "kyutai_speech_to_text": lambda known: {"input_ids": _ids(1, 8, known.get("num_codebooks") + 1)},
    "lxmert": _regions,
    "mimi_decoder": lambda known: {"latents": _wide(known, 1, TEXT).transpose(1, 2)},
    "mllama": _tiles_with_text,
    "mllama_text_model": lambda known: {"input_ids": _ids(1, TEXT), "cross_attention_states": _wide(known, 1, TEXT)},
    "mllama_vision_model": _tiles,
    "musicgen": lambda known: {"input_ids": _ids(1, TEXT), "decoder_input_ids": _codebooks(known)},
    "musicgen_decoder": lambda known: {"input_ids": _codebooks(known), "encoder_hidden_states": _wide(known, 1, TEXT)},
    "musicgen_melody": lambda known: {"input_ids": _ids(1, TEXT), "decoder_input_ids": _codebooks(known)},
    "musicgen_melody_decoder": lambda known: {"input_ids": _codebooks(known)},
    "omdet-turbo": _omdet,
    "oneformer": lambda known: {"pixel_values": _image(known), "task_inputs": _ids(1, known.get("task_seq_len"))},
    "perceiver": lambda known: {"inputs": _wide(known, 1, TEXT)},
    "phi4_multimodal_audio": lambda known: {"hidden_states": torch.rand(1, 64, known.get("input_size")), "mask": None},
    "qwen2_5_omni_audio_encoder": _lengths,
    "qwen2_5_omni_bigvgan": lambda known: {"mel_spectrogram": torch.rand(1, known.get("mel_dim"), 50)},
    "qwen3_omni_moe_audio_encoder": _lengths,
    "rag": _rag,
    "sam3_detr_decoder": _detr_decoder,
    "sam3_detr_encoder": _detr_encoder,
    "sam3_lite_text_detr_decoder": _detr_decoder,
    "sam3_lite_text_detr_encoder": _detr_encoder,
    "sam3_lite_text_mask_decoder": _mask_decoder,
    "sam3_mask_decoder": _mask_decoder,
    "seggpt": _seggpt,
    "speecht5": _speech,
    "speecht5_hifigan": _spectrogram,
    "timesfm": _series,
    "xmod": lambda known: {"input_ids": _ids(1, TEXT), "lang_ids": _zeros(1)},
}
