"""Decoders, mixtures of experts, state-space models and encoder-decoders."""

from tests.families.core import SEQ2SEQ, SPECIAL, TEXT, VOCABULARY, Family, language, lora, model, texts

LM = {**TEXT, **SPECIAL}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, **SPECIAL}
BLOOM = {"vocab_size": VOCABULARY, "hidden_size": 16, "n_layer": 2, "n_head": 2}
GROUPED = {**LM, "num_key_value_heads": 1, "head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
DEEPSEEK = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 8}
DEEPSEEK |= {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
LINEAR = {"layer_types": ["linear_attention", "full_attention"], "shared_expert_intermediate_size": 8}
LINEAR |= {f"linear_num_{part}_heads": 2 for part in ("key", "value")}
LINEAR |= {f"linear_{part}_head_dim": 4 for part in ("key", "value")}
STATE = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "pad_token_id": 0}
FOUR = {**LM, "num_hidden_layers": 4, "mamba_d_state": 4}
JAMBA = {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "num_key_value_heads": 1}
ZAMBA = {"layers_block_type": ["mamba", "hybrid"] * 2, "n_mamba_heads": 2, "chunk_size": 4, "adapter_rank": 2}
GRIFFIN = {**LM, "num_hidden_layers": 3, "lru_width": 16, "num_key_value_heads": 1, "attention_window_size": 8}
T5 = {"vocab_size": VOCABULARY, "d_model": 16, "num_layers": 2, "num_heads": 2, "d_ff": 24, "d_kv": 8}
T5 |= {"decoder_start_token_id": 0, "pad_token_id": 0}
BART = {"vocab_size": VOCABULARY, "max_position_embeddings": 32, "forced_eos_token_id": 2, **SEQ2SEQ}
PROPHET = {"vocab_size": VOCABULARY, "hidden_size": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "pad_token_id": 0}
PROPHET |= {f"num_{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")}
PROPHET |= {"max_position_embeddings": 32, "decoder_start_token_id": 1, **SPECIAL}
RWKV = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2}

DECODERS = (
    Family("GPT-2", "decoder", model("GPT2LMHeadModel", **GPT2), language, lora("c_attn", fan_in_fan_out=True)),
    Family("GPT-NeoX", "decoder", model("GPTNeoXForCausalLM", **LM), language, lora("query_key_value")),
    Family("OPT", "decoder", model("OPTForCausalLM", ffn_dim=24, word_embed_proj_dim=8, **LM), language),
    Family("Llama", "decoder", model("LlamaForCausalLM", **LM), language, lora("q_proj", "v_proj")),
    Family(
        "Mistral", "decoder", model("MistralForSequenceClassification", **GROUPED), texts,
        lora("q_proj", saved=("score",)),
    ),
    Family("Qwen3", "decoder", model("Qwen3ForCausalLM", tie_word_embeddings=True, **GROUPED), language),
    Family("Gemma 3", "decoder", model("Gemma3ForCausalLM", **GROUPED), language, lora("q_proj", "o_proj")),
    Family("Phi", "decoder", model("PhiForCausalLM", **LM), language),
    Family("Bloom", "decoder", model("BloomForCausalLM", **BLOOM), language),
    Family("Falcon", "decoder", model("FalconForSequenceClassification", **LM), texts),
)  # fmt: skip

MIXTURES = (
    Family("Mixtral", "MoE", model("MixtralForCausalLM", num_local_experts=4, **GROUPED), language, lora("q_proj")),
    Family("Qwen3-MoE", "MoE", model("Qwen3MoeForCausalLM", **EXPERTS, **GROUPED), language),
    Family("Qwen3-Next", "MoE", model("Qwen3NextForCausalLM", **EXPERTS, **LINEAR, **GROUPED), language),
    Family("gpt-oss", "MoE", model("GptOssForCausalLM", num_local_experts=4, **GROUPED), language),
    Family("DeepSeek-V3", "MoE", model("DeepseekV3ForCausalLM", first_k_dense_replace=1, **DEEPSEEK, **LM), language),
)

STATE_SPACE = (
    Family("Mamba", "state-space", model("MambaForCausalLM", **STATE), language, lora("in_proj", "x_proj")),
    Family("Mamba2", "state-space", model("Mamba2ForCausalLM", num_heads=4, head_dim=8, n_groups=1, **STATE), language),
    Family("Jamba", "state-space", model("JambaForCausalLM", **JAMBA, **FOUR), language),
    Family("Zamba2", "state-space", model("Zamba2ForCausalLM", **ZAMBA, **FOUR), language),
    Family("RecurrentGemma", "state-space", model("RecurrentGemmaForCausalLM", **GRIFFIN), language),
    Family("RWKV", "state-space", model("RwkvForCausalLM", **RWKV), language),
)  # fmt: skip

ENCODER_DECODERS = (
    Family("T5", "encoder-decoder", model("T5ForConditionalGeneration", **T5), language, lora("q", "v")),
    Family("LongT5", "encoder-decoder", model("LongT5ForConditionalGeneration", local_radius=4, **T5), language),
    Family(
        "BART", "encoder-decoder", model("BartForConditionalGeneration", **BART), language, lora("q_proj", "v_proj")
    ),
    Family("Pegasus", "encoder-decoder", model("PegasusForConditionalGeneration", **BART), language),
    Family("Marian", "encoder-decoder", model("MarianMTModel", **BART), language),
    Family("ProphetNet", "encoder-decoder", model("ProphetNetForConditionalGeneration", **PROPHET), language),
)  # fmt: skip

FAMILIES = DECODERS + MIXTURES + STATE_SPACE + ENCODER_DECODERS
