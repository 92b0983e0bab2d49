"""timm's families, one small model each, and the order in which a model uses its parameters.

`python -m tests.survey_architectures.timm_families` prints the table: groups, cover, order.
"""

import itertools
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from tl_callbacks.timm_layers import timm_parts

FAMILIES: dict[str, str] = {
    "beit": "beit_base_patch16_224",
    "botnet": "botnet26t_256",
    "byobnet": "gernet_s",
    "cait": "cait_xxs24_224",
    "coat": "coat_tiny",
    "coatnet": "coatnet_pico_rw_224",
    "coatnext": "coatnext_nano_rw_224",
    "convit": "convit_tiny",
    "convmixer": "convmixer_768_32",
    "convnext": "convnext_atto",
    "convnextv2": "convnextv2_atto",
    "crossvit": "crossvit_tiny_240",
    "cspnet": "cspresnet50",
    "cspdarknet": "cspdarknet53",
    "davit": "davit_tiny",
    "deit": "deit_tiny_patch16_224",
    "deit distilled": "deit_tiny_distilled_patch16_224",
    "deit3": "deit3_small_patch16_224",
    "densenet": "densenet121",
    "dinov2": "vit_small_patch14_reg4_dinov2",
    "dinov3": "vit_small_patch16_dinov3",
    "dla": "dla34",
    "dpn": "dpn48b",
    "edgenext": "edgenext_xx_small",
    "efficientformer": "efficientformer_l1",
    "efficientformer_v2": "efficientformerv2_s0",
    "efficientnet": "efficientnet_b0",
    "efficientvit_mit": "efficientvit_b0",
    "efficientvit_mit large": "efficientvit_l1",
    "efficientvit_msra": "efficientvit_m0",
    "eva": "eva02_tiny_patch14_224",
    "fasternet": "fasternet_t0",
    "fastvit": "fastvit_t8",
    "flexivit": "flexivit_small",
    "focalnet": "focalnet_tiny_srf",
    "gcvit": "gcvit_xxtiny",
    "ghostnet": "ghostnet_050",
    "ghostnetv2": "ghostnetv2_100",
    "gmixer": "gmixer_24_224",
    "gmlp": "gmlp_ti16_224",
    "hgnet": "hgnet_tiny",
    "hgnetv2": "hgnetv2_b0",
    "hiera": "hiera_tiny_224",
    "hieradet_sam2": "sam2_hiera_tiny",
    "hrnet": "hrnet_w18_small",
    "inception_next": "inception_next_atto",
    "inception_resnet_v2": "inception_resnet_v2",
    "inception_v3": "inception_v3",
    "inception_v4": "inception_v4",
    "levit": "levit_128s",
    "levit conv": "levit_conv_128s",
    "mambaout": "mambaout_femto",
    "maxvit": "maxvit_pico_rw_256",
    "mixer": "mixer_s32_224",
    "mixnet": "mixnet_s",
    "mnasnet": "mnasnet_small",
    "mobilenetv1": "mobilenetv1_100",
    "mobilenetv2": "mobilenetv2_035",
    "mobilenetv3": "mobilenetv3_small_050",
    "mobilenetv4": "mobilenetv4_conv_small_035",
    "mobilenetv5": "mobilenetv5_base",
    "mobileone": "mobileone_s0",
    "mobilevit": "mobilevit_xxs",
    "mobilevitv2": "mobilevitv2_050",
    "mvitv2": "mvitv2_tiny",
    "naflexvit": "naflexvit_base_patch16_gap",
    "nasnet": "nasnetalarge",
    "nest": "nest_tiny_jx",
    "nextvit": "nextvit_small",
    "nfnet": "dm_nfnet_f0",
    "pnasnet": "pnasnet5large",
    "pvt_v2": "pvt_v2_b0",
    "rdnet": "rdnet_tiny",
    "regnet": "regnetx_002",
    "regnety": "regnety_002",
    "repghost": "repghostnet_050",
    "repvgg": "repvgg_a0",
    "repvit": "repvit_m1",
    "res2net": "res2net50_26w_4s",
    "resmlp": "resmlp_12_224",
    "resnest": "resnest14d",
    "resnet": "resnet18",
    "resnetv2": "resnetv2_18",
    "resnext": "resnext50_32x4d",
    "rexnet": "rexnet_100",
    "sam": "samvit_base_patch16_224",
    "selecsls": "selecsls42",
    "senet": "legacy_seresnet18",
    "sequencer": "sequencer2d_s",
    "seresnet": "seresnet18",
    "shvit": "shvit_s1",
    "siglip": "vit_base_patch16_siglip_224",
    "sknet": "skresnet18",
    "starnet": "starnet_s050",
    "swiftformer": "swiftformer_xs",
    "swin": "swin_tiny_patch4_window7_224",
    "swinv2": "swinv2_tiny_window8_256",
    "swinv2_cr": "swinv2_cr_tiny_224",
    "tiny_vit": "tiny_vit_5m_224",
    "tinynet": "tinynet_e",
    "tnt": "tnt_s_patch16_224",
    "tresnet": "tresnet_m",
    "twins pcpvt": "twins_pcpvt_small",
    "twins svt": "twins_svt_small",
    "vgg": "vgg11",
    "vgg bn": "vgg11_bn",
    "visformer": "visformer_tiny",
    "vit": "vit_tiny_patch16_224",
    "vit clip": "vit_base_patch32_clip_224",
    "vit hybrid": "vit_tiny_r_s16_p8_224",
    "vit relpos": "vit_relpos_small_patch16_224",
    "vit srelpos": "vit_srelpos_small_patch16_224",
    "vitamin": "vitamin_small_224",
    "volo": "volo_d1_224",
    "vovnet": "ese_vovnet19b_slim_dw",
    "xception": "legacy_xception",
    "xception_aligned": "xception41p",
    "xcit": "xcit_nano_12_p8_224",
}

WITHOUT_A_MATCHER: dict[str, str] = {
    "csatv2": "csatv2",
    "metaformer": "caformer_s18",
    "pit": "pit_ti_224",
    "poolformer": "poolformer_s12",
}


@dataclass(frozen=True)
class Verdict:
    """Whether a model's groups cover it, and which neighbours a forward pass meets in another order."""

    groups: int
    missing: int
    twice: int
    swapped: tuple[tuple[str, str], ...]
    overlapping: int

    @property
    def covered(self) -> bool:
        return not self.missing and not self.twice

    @property
    def ordered(self) -> bool:
        return not self.swapped


class _FirstUse(TorchFunctionMode):
    """Notes the parameters that functions get, in the order of their first call."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.seen: dict[str, None] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        if getattr(func, "__name__", "") not in {"__get__", "size", "dim", "is_floating_point", "requires_grad_"}:
            self._look(args)
            self._look(kwargs or {})
        return func(*args, **(kwargs or {}))

    def _look(self, value: Any) -> None:
        if isinstance(value, nn.Parameter) and id(value) in self.names:
            self.seen.setdefault(self.names[id(value)])
        elif isinstance(value, dict):
            self._look(tuple(value.values()))
        elif isinstance(value, list | tuple):
            for one in value:
                self._look(one)


def build(name: str, **options: Any) -> nn.Module:
    """Return a timm model of random weights, on the meta device where it can be made there."""
    try:
        with torch.device("meta"):
            return timm.create_model(name, pretrained=False, **options).eval()
    except (NotImplementedError, RuntimeError):
        return timm.create_model(name, pretrained=False, **options).eval()


def first_use(model: nn.Module) -> list[str]:
    """Return the names of a timm model's parameters in the order in which a forward pass first uses them."""
    size = (getattr(model, "pretrained_cfg", None) or {}).get("input_size", (3, 224, 224))
    device = next(model.parameters()).device
    with torch.no_grad(), _FirstUse(model) as mode:
        model(torch.zeros(1, *size, device=device))
    return list(mode.seen)


def judge(model: nn.Module, parts: Sequence[tuple[str, tuple[str, ...]]], order: Sequence[str]) -> Verdict:
    """Return whether the parts cover the model and follow each other as the forward pass meets them.

    Neighbours are in order when the first parameter used of the lower one comes before that of the upper one. They
    overlap, which is no fault, when a parameter of the lower one is first used after that.
    """
    counts = Counter(name for _, names in parts for name in names)
    place = {name: number for number, name in enumerate(order)}
    used = [(title, [place[name] for name in names if name in place]) for title, names in parts]
    used = [(title, numbers) for title, numbers in used if numbers]
    pairs = list(itertools.pairwise(used))
    return Verdict(
        len(parts),
        sum(name not in counts for name, _ in model.named_parameters()),
        sum(count > 1 for count in counts.values()),
        tuple((low, high) for (low, first), (high, then) in pairs if min(first) > min(then)),
        sum(max(first) > min(then) for (_, first), (_, then) in pairs),
    )


def survey(families: dict[str, str]) -> dict[str, Verdict]:
    """Return the verdict on one model of each family."""
    result = {}
    for family, name in families.items():
        model = build(name)
        try:
            order = first_use(model)
        except (NotImplementedError, RuntimeError):
            model = timm.create_model(name, pretrained=False).eval()
            order = first_use(model)
        parts = timm_parts(model)
        assert parts is not None, f"{family}: no groups"
        result[family] = judge(model, parts, order)
    return result


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    chosen = {family: name for family, name in FAMILIES.items() if not sys.argv[1:] or family in sys.argv[1:]}
    for number, (title, model_name) in enumerate(chosen.items()):
        start = time.perf_counter()
        verdict = survey({title: model_name})[title]
        faults = "; ".join(" > ".join(pair) for pair in verdict.swapped[:3])
        print(
            f"{number + 1:3} {title:24}{model_name:36}{verdict.groups:4} groups  missing {verdict.missing} twice "
            f"{verdict.twice} overlapping {verdict.overlapping:3} swapped {len(verdict.swapped)} {faults} "
            f"{time.perf_counter() - start:.1f} s",
            flush=True,
        )
