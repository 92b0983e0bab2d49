"""Vision transformers, CNNs, segmentation and detection."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn

from tests.families.core import IMAGE, LABELS, LAYERS, SMALL, Family, Row, images, lora, model, noise

KIND = "vision"
VIT = {"image_size": IMAGE, "patch_size": 8, "num_labels": LABELS, **SMALL}
STAGES = {"num_labels": LABELS, "depths": [1, 2]}
SWIN = {"image_size": IMAGE, "patch_size": 2, "embed_dim": 8, "num_heads": [1, 2], "window_size": 4, **STAGES}
FOCAL = {
    "image_size": IMAGE,
    "patch_size": 2,
    "embed_dim": 8,
    "focal_levels": [1, 1],
    "focal_windows": [3, 3],
    **STAGES,
}
RESNET = {"embedding_size": 4, "hidden_sizes": [4, 8], "layer_type": "basic", **STAGES}
EFFICIENT = {"width_coefficient": 0.1, "depth_coefficient": 1.0, "depth_divisor": 4, "kernel_sizes": [3, 3]}
EFFICIENT |= {"in_channels": [32, 16], "out_channels": [16, 24], "strides": [1, 2], "num_block_repeats": [1, 2]}
EFFICIENT |= {"expand_ratios": [1, 6], "depthwise_padding": [], "hidden_dim": 128, "image_size": IMAGE}
EFFICIENT |= {"num_labels": LABELS, "initializer_range": 0.5}  # it scales BatchNorm's weights too
MOBILE = {"image_size": 64, "hidden_sizes": [8] * 3, "neck_hidden_sizes": [8] * 7, "num_attention_heads": 2}
SEGFORMER = {"num_encoder_blocks": 2, "hidden_sizes": [8, 16], "num_attention_heads": [1, 2], "sr_ratios": [2, 1]}
SEGFORMER |= {"patch_sizes": [3, 3], "strides": [2, 2], "mlp_ratios": [2, 2], "decoder_hidden_size": 8, **STAGES}
DETR = {"num_queries": 4, "d_model": 32, "num_labels": LABELS, **LAYERS}


def masks() -> list[Row]:
    """Images with a class a pixel."""
    return [{"pixel_values": image, "labels": (image[0] > 1).long()} for image in noise(3, IMAGE, IMAGE)]


def boxes() -> list[Row]:
    """Images with two boxes."""
    found = torch.tensor([[0.3, 0.3, 0.2, 0.2], [0.6, 0.6, 0.3, 0.2]])
    return [
        {"pixel_values": image, "labels": {"class_labels": torch.tensor([n % LABELS, 1]), "boxes": found}}
        for n, image in enumerate(noise(3, 2 * IMAGE, 2 * IMAGE))
    ]


def collate_boxes(rows: list[Row]) -> dict[str, Any]:
    """A batch of images, and a list of boxes."""
    return {"pixel_values": torch.stack([r["pixel_values"] for r in rows]), "labels": [r["labels"] for r in rows]}


def detector(name: str, **config: Any) -> Callable[[], nn.Module]:
    """How to make a detector on a small ResNet."""
    resnet = {**RESNET, "depths": [1, 1], "out_features": ["stage2"]}
    return model(name, backbone_config=transformers.ResNetConfig(**resnet), **config)


FAMILIES = (
    Family(
        "ViT", KIND, model("ViTForImageClassification", **VIT), images,
        lora("q_proj", "v_proj", saved=("classifier",)),
    ),
    Family("DeiT", KIND, model("DeiTForImageClassification", **VIT), images),
    Family(
        "Swin", KIND, model("SwinForImageClassification", **SWIN), images,
        lora("q_proj", "v_proj", saved=("classifier",)),
    ),
    Family("FocalNet", KIND, model("FocalNetForImageClassification", **FOCAL), images),
    Family("BEiT", KIND, model("BeitForImageClassification", **VIT), images),
    Family("DINOv2", KIND, model("Dinov2ForImageClassification", **VIT), images),
    Family(
        "ConvNeXt", KIND, model("ConvNextForImageClassification", num_stages=2, hidden_sizes=[8, 16], **STAGES), images
    ),
    Family("ResNet", KIND, model("ResNetForImageClassification", **RESNET), images),
    Family("EfficientNet", KIND, model("EfficientNetForImageClassification", **EFFICIENT), images),
    Family(
        "MobileViT", KIND, model("MobileViTForImageClassification", num_labels=LABELS, **MOBILE),
        functools.partial(images, size=64),
    ),
    Family(
        "timm", KIND, model("TimmWrapperForImageClassification", architecture="test_resnet", num_labels=LABELS), images
    ),
    Family(
        "SegFormer", KIND, model("SegformerForSemanticSegmentation", **SEGFORMER), masks,
        lora("q_proj", saved=("decode_head",)),
    ),
    Family("DETR", KIND, detector("DetrForObjectDetection", **DETR), boxes, collate=collate_boxes),
    Family(
        "Deformable DETR", KIND, detector("DeformableDetrForObjectDetection", **DETR), boxes, collate=collate_boxes
    ),
    Family(
        "YOLOS", KIND, model("YolosForObjectDetection", num_detection_tokens=4, **VIT | {"image_size": [32, 32]}),
        boxes, collate=collate_boxes,
    ),
)  # fmt: skip
