"""What a configuration tells about the inputs of its model."""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from tests.survey_architectures.shrink import parts

IMAGE = 224


class Known:
    """Looks up sizes in a configuration and its parts, the outer ones first."""

    def __init__(self, model: nn.Module, device: str) -> None:
        self.model = model
        self.device = device
        self.config: PreTrainedConfig = model.config
        self.model_type = self.config.model_type

    def get(self, *names: str, default: Any = None) -> Any:
        """Return the first value set under any of the names."""
        for part in parts(self.config):
            for name in names:
                value = getattr(part, name, None)
                if value is not None:
                    return value
        return default

    def visual(self) -> Iterator[PreTrainedConfig]:
        """Yield the parts that describe images, the ones called so first."""
        found = list(parts(self.config))
        yield from sorted(found, key=lambda part: "vision" not in type(part).__name__.lower())

    def image_size(self) -> tuple[int, int]:
        """Return height and width of an image."""
        for part in self.visual():
            trained_on = str(getattr(part, "architecture", "")).rpartition("_")[2]
            if trained_on.isdigit():  # a timm model, such as vit_pe_core_large_patch14_336
                return int(trained_on), int(trained_on)
            if part.model_type == "pixtral":  # any size will do, and the largest one takes minutes
                return 16 * part.patch_size, 16 * part.patch_size
            for name in ("image_size", "input_size", "img_size", "resolution", "input_image_size", "max_img_size"):
                size = getattr(part, name, None)
                if isinstance(size, int) and size > 8:
                    return size, size
                if isinstance(size, list | tuple) and len(size) == 2:
                    return size[0], size[1]
                if isinstance(size, dict) and "height" in size:
                    return size["height"], size["width"]
        return IMAGE, IMAGE

    def channels(self) -> int:
        """Return the number of channels of an image."""
        for part in self.visual():
            for name in ("num_channels", "in_channels", "in_chans"):
                if isinstance(value := getattr(part, name, None), int):
                    return value
        return 3

    def patch(self) -> int:
        """Return the side of a patch."""
        for part in self.visual():
            if size := getattr(part, "patch_size", None):
                return size if isinstance(size, int) else size[-1]
        return 16

    def merge(self) -> int:
        """Return how many patches a side are merged."""
        return self.get("spatial_merge_size", "merge_size", default=1)

    def takes(self, *names: str) -> bool:
        """Return whether the forward pass has an argument of one of the names."""
        return any(name in inspect.signature(self.model.forward).parameters for name in names)

    def words(self, count: int) -> torch.Tensor:
        """Return a row of tokens none of which is a special one."""
        vocabulary = self.get("vocab_size", default=100)
        special = {value for part in parts(self.config) for value in vars(part).values() if isinstance(value, int)}
        plain = [number for number in range(20, min(vocabulary, 1000)) if number not in special] or [3]
        return torch.tensor([[plain[index % len(plain)] for index in range(count)]])

    def features_need(self) -> list[str]:
        """Return the arguments that the methods need which make features of images, videos and sounds."""
        methods = [self.features_method(modality) for modality in ("image", "video", "audio")]
        given = [p for method in methods if method for p in inspect.signature(method).parameters.values()]
        return [p.name for p in given if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]

    def features_method(self, modality: str) -> Callable[..., Any] | None:
        """Return the method that makes features of an image, a video or a sound, of the model or one inside."""
        found = (getattr(module, f"get_{modality}_features", None) for module in self.model.modules())
        return next((method for method in found if method), None)

    def cross_width(self) -> int:
        """Return the width of what the cross-attention looks at."""
        names = ("encoder_hidden_size", "cross_attention_hidden_size", "hidden_size", "d_model")
        return self.get(*names[:2]) or self.get(*names[2:], default=64)

    def token(self, modality: str) -> int | None:
        """Return the token that stands in the text for a feature of an image, a video or a sound."""
        return self.get(f"{modality}_token_id", f"{modality}_token_index")
