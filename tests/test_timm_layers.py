"""timm models: groups by their own matcher, with what matchers leave out or misplace put right."""

import warnings
from typing import Any

import pytest
import torch
import transformers
from torch import nn

pytest.importorskip("timm", reason="timm is no dependency; make installs it")

from tests.survey_architectures.timm_families import FAMILIES, WITHOUT_A_MATCHER, build, first_use, judge, survey
from tl_callbacks.timm_layers import classifier_parameters, timm_parts


def numbered(pattern: str, *counts: int, first: int = 0) -> tuple[str, ...]:
    return tuple(pattern.format(stage, block) for stage, count in enumerate(counts, first) for block in range(count))


DENSE = tuple(
    f"features.denseblock{i}.denselayer{j}"
    for i, count in ((1, 6), (2, 12), (3, 24), (4, 16))
    for j in range(1, count + 1)
)
NAMES: dict[str, tuple[str, ...]] = {
    "vit_tiny_patch16_224": ("embeddings", *numbered("blocks.{1}", 12), "head"),
    "resnet18": ("stem", *numbered("layer{}.{}", 2, 2, 2, 2, first=1), "head"),
    "convnext_atto": ("stem", *numbered("stages.{}.blocks.{}", 2, 2, 6, 2), "head"),
    "inception_v3": (
        "stem", "Conv2d_3b_1x1", "Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d",
        "Mixed_6e", "Mixed_7a", "Mixed_7b", "Mixed_7c", "head",
    ),
    "densenet121": ("stem", *DENSE, "head"),
    "levit_128s": ("stem", *numbered("stages.{}.blocks.{}", 2, 3, 4), "head"),
    "cait_xxs24_224": ("embeddings", *numbered("blocks.{1}", 24), *numbered("blocks_token_only.{1}", 2), "head"),
    "selecsls42": ("stem", *(f"features.{i}" for i in range(6)), "blocks_head", "head"),
    "vgg11_bn": ("stem", *(f"features.{i}" for i in (4, 8, 11, 15, 18, 22, 25)), "head"),
}  # fmt: skip

HEADS: dict[str, tuple[str, ...]] = {
    "deit_tiny_distilled_patch16_224": ("head", "head_dist"),
    "crossvit_tiny_240": ("head.0", "head.1"),
    "convnext_atto": ("head.fc",),
    "volo_d1_224": ("aux_head", "head"),
    "efficientvit_b0": ("head.classifier.4",),
    "repvit_m1": ("head.head.l", "head.head_dist.l"),
    "vgg11": ("head.fc",),
}


def parts_of(model: nn.Module) -> dict[str, tuple[str, ...]]:
    parts = timm_parts(model)
    assert parts is not None
    assert sorted(name for _, names in parts for name in names) == sorted(name for name, _ in model.named_parameters())
    assert len(dict(parts)) == len(parts)
    return dict(parts)


@pytest.mark.parametrize("name", NAMES)
def test_groups_have_the_names_of_the_blocks(name: str) -> None:
    assert tuple(parts_of(build(name))) == NAMES[name]


@pytest.mark.parametrize("name", HEADS)
def test_the_head_is_the_classifier_alone(name: str) -> None:
    parts = parts_of(build(name))
    assert tuple(dict.fromkeys(p.rpartition(".")[0] for p in parts["head"])) == HEADS[name]
    assert not set(parts["head"]) & {p for title, names in parts.items() if title != "head" for p in names}


@pytest.mark.parametrize(
    "name",
    [
        "vit_tiny_patch16_224",
        "convnext_atto",
        "levit_128s",
        "inception_v3",
        "inception_next_atto",
        "shvit_s1",
        "efficientvit_b0",
    ],
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # a classifier of no classes
def test_without_classes_there_is_no_head(name: str) -> None:
    model = build(name, num_classes=0)
    assert classifier_parameters(model) == ()
    assert "head" not in parts_of(model)


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("vit_small_patch14_reg4_dinov2", ["cls_token", "reg_token", "pos_embed"]),
        ("mvitv2_base_cls", ["cls_token"]),
        ("vit_base_patch32_clip_224", ["cls_token", "norm_pre.weight", "norm_pre.bias"]),
        ("vit_srelpos_small_patch16_224", ["shared_rel_pos.mlp.fc1.weight"]),
    ],
)  # fmt: skip
def test_tokens_and_positions_are_at_the_bottom(name: str, tokens: list[str]) -> None:
    assert set(tokens) <= set(parts_of(build(name))["embeddings"])


def test_what_follows_the_blocks_is_in_the_top_group() -> None:
    assert {"norm.weight", "norm.bias"} <= set(parts_of(build("vit_tiny_patch16_224"))["blocks.11"])
    assert {"fc_norm.weight"} <= set(parts_of(build("beit_base_patch16_224"))["blocks.11"])
    assert {"head.norm.weight"} <= set(parts_of(build("convnext_atto"))["stages.3.blocks.1"])
    assert {"conv_head.weight"} <= set(parts_of(build("mobilenetv3_small_050"))["blocks.5.0"])
    assert {"attn_pool.latent"} <= set(parts_of(build("vit_base_patch16_siglip_224"))["blocks.11"])


def test_a_stage_keeps_its_downsampling_with_the_block_it_feeds() -> None:
    parts = parts_of(build("convnext_atto"))
    assert "stages.1.downsample.1.weight" in parts["stages.1.blocks.0"]
    parts = parts_of(build("densenet121"))
    assert "features.transition1.conv.weight" in parts["features.denseblock1.denselayer6"]
    parts = parts_of(build("hgnetv2_b0"))  # its matcher leaves the downsampling out
    assert "stages.1.downsample.conv.weight" in parts["stages.1.blocks.0"]


class Plain(nn.Module):
    """Three blocks, a token, a norm before and one after them, and a classifier."""

    matcher: Any = None

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(2))
        self.patch = nn.Linear(2, 2)
        self.norm_pre = nn.LayerNorm(2)
        self.blocks = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
        self.norm = nn.LayerNorm(2)
        self.classifier = nn.Linear(2, 2)

    def group_matcher(self, coarse: bool = False) -> Any:
        assert not coarse
        return self.matcher() if callable(self.matcher) and self.matcher.__name__ == "crash" else self.matcher

    def get_classifier(self) -> nn.Module:
        return self.classifier


def crash() -> Any:
    raise KeyError("fc")


def ordinal(name: str) -> Any:
    if name.startswith("blocks.1"):
        raise ValueError(name)
    if name.startswith("blocks"):
        return (1, int(name.split(".")[1]))
    return None if name.startswith("patch") else float("inf")


BLOCKS = [(r"^blocks\.(\d+)", None)]
EXPECTED = {
    "embeddings": ["token", "patch", "norm_pre"],
    "blocks.0": ["blocks.0"], "blocks.1": ["blocks.1"], "blocks.2": ["blocks.2", "norm"], "head": ["classifier"],
}  # fmt: skip


@pytest.mark.parametrize(
    "matcher",
    [
        {"stem": r"^token|patch", "blocks": [*BLOCKS, (r"^norm", (99999,))]},
        {"stem": [(r"^token", None), (r"^patch", None)], "blocks": BLOCKS[0][0]},
        {"stem": None, "blocks": tuple(BLOCKS)},
        {"blocks": BLOCKS},
        {"stem": r"^patch", "blocks": r"^layers\.(\d+)"},
        {"stem": r"^patch", "blocks": r"^(blocks)\.(\d+)"},
        {"blocks": [(r"^blocks\.(\d+)(?:\.(\d+))?", None)]},
        {},
        None,
        crash,
        lambda name: int(name[7]) + 1 if name.startswith("blocks") else 0 if name[0] == "p" else float("inf"),
    ],
)  # fmt: skip
def test_every_kind_of_matcher_and_what_it_leaves_out(matcher: Any) -> None:
    model = Plain()
    model.matcher = matcher
    parts = parts_of(model)
    found = {
        title: list(dict.fromkeys(p.removesuffix(".weight").removesuffix(".bias") for p in names))
        for title, names in parts.items()
    }
    assert found == EXPECTED


def test_a_matcher_that_fails_on_a_name_leaves_it_with_its_neighbour() -> None:
    model = Plain()
    model.matcher = ordinal
    parts = parts_of(model)
    assert list(parts) == ["embeddings", "blocks.0", "blocks.2", "head"]
    assert "blocks.1.weight" in parts["blocks.0"]


@pytest.mark.parametrize(
    ("name", "replaced", "expected"),
    [
        ("vit_tiny_patch16_224", "head", ("head.weight", "head.bias")),
        ("shvit_s1", "head", ("head.weight", "head.bias")),
        ("shvit_s1", "head.l", ("head.l.weight", "head.l.bias")),
    ],
)
@pytest.mark.parametrize("options", [{}, {"num_classes": 5}])
def test_a_classifier_that_was_replaced_by_hand(
    name: str, replaced: str, expected: tuple[str, ...], options: dict[str, Any]
) -> None:
    model = build(name, **options)
    model.set_submodule(replaced, nn.Linear(8, 2))
    assert parts_of(model)["head"] == expected
    model.set_submodule(replaced, nn.Identity())
    assert "head" not in parts_of(model)


def test_a_classifier_on_a_model_made_without_one() -> None:
    model = build("vit_tiny_patch16_224", num_classes=0)
    model.head = nn.Linear(192, 2)
    assert parts_of(model)["head"] == ("head.weight", "head.bias")


def test_only_the_classifier_is_called_head() -> None:
    model: Any = Plain()
    model.matcher = {"blocks": BLOCKS, "head": r"^neck"}
    model.neck = nn.Linear(2, 2)
    parts = parts_of(model)
    assert list(parts) == ["embeddings", "blocks.0", "blocks.1", "blocks.2", "neck", "head"]
    assert parts["head"] == ("classifier.weight", "classifier.bias")
    model.classifier = nn.Identity()
    assert list(parts_of(model))[-1] == "neck"


@pytest.mark.parametrize("name", WITHOUT_A_MATCHER.values(), ids=WITHOUT_A_MATCHER)
def test_a_model_without_a_matcher_has_no_parts_but_a_classifier(name: str) -> None:
    model = build(name)
    assert timm_parts(model) is None
    assert classifier_parameters(model)


def test_a_model_whose_blocks_nobody_names_has_no_parts() -> None:
    model: Any = Plain()
    model.matcher = {"blocks": r"^nothing"}
    model.body, model.blocks = model.blocks, None
    assert timm_parts(model) is None
    assert timm_parts(nn.Linear(2, 2)) is None


@pytest.mark.parametrize("task", ["TimmWrapperForImageClassification", "TimmWrapperModel"])
def test_the_model_inside_the_wrapper_of_transformers(task: str) -> None:
    model = timm_wrapper(task)
    parts = parts_of(model.timm_model)
    assert list(parts)[:3] == ["embeddings", "blocks.0", "blocks.1"]
    assert ("head" in parts) is (task == "TimmWrapperForImageClassification")
    assert {f"timm_model.{name}" for names in parts.values() for name in names} == dict(model.named_parameters()).keys()


def timm_wrapper(task: str, architecture: str = "vit_tiny_patch16_224", num_labels: int = 3) -> Any:
    """A timm model of random weights inside transformers, without the network."""
    config = transformers.TimmWrapperConfig(
        architecture=architecture, num_labels=num_labels, model_args={"depth": 3} if "vit_" in architecture else None
    )
    with torch.device("meta"):
        return getattr(transformers, task)(config)


@pytest.mark.parametrize("family", ["vit", "resnet", "swin", "levit", "cait", "inception_v4", "hrnet", "regnet"])
def test_groups_cover_a_model_in_the_order_of_its_forward_pass(family: str) -> None:
    verdict = survey({family: FAMILIES[family]})[family]
    assert verdict.covered
    assert verdict.ordered


def test_the_judge_sees_groups_in_another_order() -> None:
    model = build("resnet18")
    parts = timm_parts(model) or []
    order = first_use(model)
    assert judge(model, parts, order).ordered
    turned = judge(model, [parts[0], parts[2], parts[1], *parts[3:]], order)
    assert turned.swapped == (("layer1.1", "layer1.0"),)
    assert not judge(model, parts[1:], order).covered


@pytest.mark.slow
def test_every_family_is_covered_and_in_order() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        verdicts = survey(FAMILIES)
    assert len(verdicts) >= 60
    assert [family for family, verdict in verdicts.items() if not verdict.covered] == []
    assert [family for family, verdict in verdicts.items() if not verdict.ordered] == []
