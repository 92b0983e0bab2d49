"""Small versions of a configuration: the same modules, fewer of each."""

import copy
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedConfig

LAYERS = 4
VOCABULARY = 1024
DEPTHS = {
    "num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth", "encoder_layers", "decoder_layers",
    "num_encoder_layers", "num_decoder_layers", "num_hidden_layers_encoder", "num_block", "num_attention_layers",
    "encoder_num_layers", "decoder_num_layers", "num_blocks", "max_window_layers", "decoder_depth",
}  # fmt: skip
EXPERTS = {"num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"}
EXPERTS_USED = ("num_experts_per_tok", "moe_top_k", "moe_k", "top_k_experts", "num_experts_per_token", "top_k")
WIDTHS = {
    "hidden_size", "intermediate_size", "d_model", "d_ff", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "n_embd",
    "moe_intermediate_size", "shared_expert_intermediate_size", "embed_dim", "out_hidden_size", "ffn_hidden_size",
    "projection_dim", "encoder_hidden_size", "output_dim", "hidden_dim", "n_inner", "word_embed_proj_dim",
    "cross_attention_dim", "mamba_d_ssm",
}  # fmt: skip
HEADS = {
    "num_attention_heads", "num_heads", "n_head", "n_heads", "encoder_attention_heads", "decoder_attention_heads",
    "attention_heads", "mamba_n_heads", "mamba_num_heads", "num_key_value_heads", "n_kv_heads", "kv_n_heads",
}  # fmt: skip


def shrunk(config: PreTrainedConfig, width: int = 1) -> PreTrainedConfig:
    """Return a copy with few layers, experts and words; `width` divides the hidden sizes and the attention heads."""
    small = copy.deepcopy(config)
    moved: dict[int, int] = {}
    for part in parts(small):
        for name, value in list(vars(part).items()):
            if name in EXPERTS and isinstance(value, int):
                _put(part, name, _experts(part, value))
            elif "vocab" in name and name.endswith("size") and isinstance(value, int):
                _put(part, name, min(value, VOCABULARY))
            elif name.endswith(("_token_id", "_token_index", "_index", "_id")) and isinstance(value, int):
                if value >= VOCABULARY:
                    _put(part, name, moved.setdefault(value, VOCABULARY - 1 - len(moved)))
            elif name == "vocabulary_map" and isinstance(value, dict):
                _put(part, name, {word: number % VOCABULARY for word, number in value.items()})
            elif name in WIDTHS and width > 1 and isinstance(value, int) and value % (width * 8) == 0:
                _put(part, name, value // width)
            elif name in HEADS and isinstance(value, int):
                _put(part, name, max(1, value // width))
        _cut_layers(part)
    return small


def parts(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """Yield a configuration and all that it contains."""
    yield config
    for value in list(vars(config).values()):
        if isinstance(value, PreTrainedConfig):
            yield from parts(value)


def _put(part: PreTrainedConfig, name: str, value: Any) -> None:
    setattr(part, name, value)


def _experts(part: PreTrainedConfig, count: int) -> int:
    used = max([getattr(part, name, None) or 1 for name in EXPERTS_USED if isinstance(getattr(part, name, 1), int)])
    groups = getattr(part, "n_group", None) or 1
    wanted = max(4, 2 * groups)
    while wanted < used:
        wanted *= 2
    return min(count, wanted)


def _cut_layers(part: PreTrainedConfig) -> None:
    for name, value in list(vars(part).items()):
        if name == "depths" and isinstance(value, list | tuple):
            _put(part, name, type(value)(min(3, depth) for depth in value))
        if name not in DEPTHS or not isinstance(value, int) or value <= LAYERS:
            continue
        layers = _layers(part, value)
        for other, listed in list(vars(part).items()):
            if isinstance(listed, list | tuple) and len(listed) == value and other != "depths":
                _put(part, other, listed[:layers])
            elif isinstance(listed, list | tuple) and listed and _indexes(other, listed):
                _put(part, other, type(listed)(_rescaled(listed, value, layers)))
        _put(part, name, layers)
        if getattr(part, "num_kv_shared_layers", None):
            part.num_kv_shared_layers = 0
        if getattr(part, "insert_layer_id", -1) >= layers:
            part.insert_layer_id = layers // 2


def _layers(part: PreTrainedConfig, count: int) -> int:
    types = getattr(part, "layer_types", None)
    layers = LAYERS
    if isinstance(types, list) and len(types) == count:
        while layers < count and set(types[:layers]) != set(types):
            layers += 1
    return layers


def _indexes(name: str, listed: Any) -> bool:
    return ("index" in name or "indices" in name or "layer" in name) and all(type(item) is int for item in listed)


def _rescaled(indexes: Any, count: int, layers: int) -> list[int]:
    return sorted({index * layers // count if index >= 0 else max(index, -layers) for index in indexes})
