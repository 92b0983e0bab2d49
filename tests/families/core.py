"""What a tiny family is, and the rows that families share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn

Row = dict[str, Any]
ROWS, LENGTH, VOCABULARY, LABELS = 16, 8, 50, 3
FIRST_WORD = 5  # below are special tokens
IMAGE = 16

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
TEXT = {"vocab_size": VOCABULARY, "max_position_embeddings": 32, "num_labels": LABELS, "pad_token_id": 0, **SMALL}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2}
LAYERS = {"encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 24}
LAYERS |= {"decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 24}
SEQ2SEQ = {"d_model": 16, "pad_token_id": 0, "decoder_start_token_id": 1, **SPECIAL, **LAYERS}


@dataclass(frozen=True)
class Family:
    """A tiny model with a task head, and data that gives it a loss.

    Args:
        name: unique.
        kind: what it reads or how it is built.
        build: makes the model with random weights, the same ones each time.
        rows: makes the training rows.
        lora: arguments of a `LoraConfig`, see `lora`; None: no run with LoRA.
        collate: makes a batch of rows; None: the Trainer's own way.
    """

    name: str
    kind: str
    build: Callable[[], nn.Module]
    rows: Callable[[], list[Row]]
    lora: Mapping[str, Any] | None = None
    collate: Callable[[list[Row]], dict[str, Any]] | None = None


def model(name: str, **config: Any) -> Callable[[], nn.Module]:
    """How to make a class of transformers by its name, from a config."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        model_class = getattr(transformers, name)
        return model_class(model_class.config_class(**config))

    return build


def lora(*targets: str, saved: tuple[str, ...] = (), **config: Any) -> dict[str, Any]:
    """Arguments of a `LoraConfig`: the modules to adapt, and those that train whole beside them."""
    return {"target_modules": list(targets), "modules_to_save": list(saved) or None, **config}


def words(count: int = ROWS, *, length: int = LENGTH) -> list[list[int]]:
    """Token ids without special tokens."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(FIRST_WORD, VOCABULARY, (count, length), generator=generator).tolist()


def noise(*shape: int) -> torch.Tensor:
    """One random tensor a row, shifted so that running statistics want to move."""
    return 1 + torch.randn(ROWS, *shape, generator=torch.Generator().manual_seed(1))


def texts() -> list[Row]:
    """Texts with a class."""
    return [{"input_ids": ids, "labels": number % LABELS} for number, ids in enumerate(words())]


def tagged() -> list[Row]:
    """Texts with a class a token."""
    return [{"input_ids": ids, "labels": [token % LABELS for token in ids]} for ids in words()]


def language() -> list[Row]:
    """Texts to go on with."""
    return [{"input_ids": ids, "labels": ids} for ids in words()]


def images(*, size: int = IMAGE) -> list[Row]:
    """Images with a class."""
    return [{"pixel_values": pixels, "labels": n % LABELS} for n, pixels in enumerate(noise(3, size, size))]
