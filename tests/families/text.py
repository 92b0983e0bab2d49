"""Text encoders."""

from tests.families.core import LABELS, SPECIAL, TEXT, VOCABULARY, Family, Row, lora, model, tagged, texts

KIND = "text encoder"
DEBERTA = {"relative_attention": True, "position_buckets": 4, "norm_rel_ebd": "layer_norm", "share_att_key": True}
DEBERTA |= {"pos_att_type": ["p2c", "c2p"]}
DISTIL = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "vocab_size": VOCABULARY, "num_labels": LABELS}
MODERN = {**SPECIAL, "cls_token_id": 1, "sep_token_id": 2, **TEXT}
XLM = {"emb_dim": 16, "n_layers": 2, "n_heads": 2, "n_words": VOCABULARY, "num_labels": LABELS, "pad_index": 0}
XLNET = {"vocab_size": VOCABULARY, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24, "num_labels": LABELS}
FUNNEL = {"vocab_size": VOCABULARY, "block_sizes": [1, 1], "num_decoder_layers": 1, "num_labels": LABELS}
FUNNEL |= {"d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 24}
CANINE = {"downsampling_rate": 2, "upsampling_kernel_size": 2, "num_hash_functions": 2, "num_hash_buckets": 16}
CANINE |= {"local_transformer_stride": 4}
PERCEIVER = {"num_latents": 4, "d_latents": 16, "d_model": 16, "num_blocks": 1, "num_self_attends_per_block": 2}
PERCEIVER |= {"num_self_attention_heads": 2, "num_cross_attention_heads": 2, "vocab_size": VOCABULARY}
PERCEIVER |= {"max_position_embeddings": 8, "num_labels": LABELS}


def inputs() -> list[Row]:
    """Texts with a class, under the name that Perceiver reads."""
    return [{"inputs": row["input_ids"], "labels": row["labels"]} for row in texts()]


FAMILIES = (
    Family(
        "BERT", KIND, model("BertForSequenceClassification", **TEXT), texts,
        lora("query", "value", saved=("classifier",)),
    ),
    Family(
        "RoBERTa", KIND, model("RobertaForTokenClassification", **TEXT), tagged, lora("query", saved=("classifier",))
    ),
    Family(
        "DeBERTa v3", KIND, model("DebertaV2ForSequenceClassification", **DEBERTA, **TEXT), texts,
        lora("query_proj", "value_proj", saved=("pooler", "classifier")),
    ),
    Family("DeBERTa v2", KIND, model("DebertaV2ForTokenClassification", conv_kernel_size=3, **DEBERTA, **TEXT), tagged),
    Family(
        "DistilBERT", KIND, model("DistilBertForSequenceClassification", **DISTIL), texts,
        lora("q_lin", "v_lin", saved=("pre_classifier", "classifier")),
    ),
    Family("ALBERT", KIND, model("AlbertForSequenceClassification", embedding_size=8, **TEXT), texts),
    Family("ELECTRA", KIND, model("ElectraForSequenceClassification", embedding_size=8, **TEXT), texts),
    Family(
        "ModernBERT", KIND, model("ModernBertForSequenceClassification", **MODERN), texts,
        lora("Wqkv", "Wo", saved=("head", "classifier")),
    ),
    Family("MPNet", KIND, model("MPNetForSequenceClassification", **TEXT), texts),
    Family("XLM", KIND, model("XLMForSequenceClassification", **XLM), texts),
    Family("XLNet", KIND, model("XLNetForSequenceClassification", **XLNET), texts),
    Family("Funnel", KIND, model("FunnelForSequenceClassification", **FUNNEL), texts),
    Family("Longformer", KIND, model("LongformerForSequenceClassification", attention_window=4, **TEXT), texts),
    Family("CANINE", KIND, model("CanineForSequenceClassification", **CANINE, **TEXT), texts),
    Family("FNet", KIND, model("FNetForSequenceClassification", **TEXT), texts),
    Family("Perceiver", KIND, model("PerceiverForSequenceClassification", **PERCEIVER), inputs),
)  # fmt: skip
