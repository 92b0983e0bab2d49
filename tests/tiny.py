"""Tiny models and data: random weights, no download, milliseconds a step."""

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainingArguments,
)

NUM_LABELS = 3


def bert(*, layers: int = 3, dropout: float = 0.1, seed: int = 0, **config: Any) -> BertForSequenceClassification:
    """A BERT classifier; `accepts_loss_kwargs=False` keeps the Trainer from scaling its loss by the accumulation."""
    torch.manual_seed(seed)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=layers,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=16,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            num_labels=NUM_LABELS,
            **config,
        )
    )
    model.accepts_loss_kwargs = False
    return model


def resnet(*, seed: int = 0) -> ResNetForImageClassification:
    """A CNN with BatchNorm."""
    torch.manual_seed(seed)
    config = ResNetConfig(
        num_channels=1,
        embedding_size=4,
        hidden_sizes=[4, 8],
        depths=[1, 2],
        layer_type="basic",
        num_labels=NUM_LABELS,
    )
    return ResNetForImageClassification(config)


def texts(count: int = 64, *, length: int = 8, seed: int = 1) -> list[dict[str, Any]]:
    """Rows for a text classifier."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 50, (count, length), generator=generator)
    return [{"input_ids": row.tolist(), "labels": number % NUM_LABELS} for number, row in enumerate(ids)]


def images(count: int = 64, *, seed: int = 1) -> list[dict[str, Any]]:
    """Rows for an image classifier, shifted so that BatchNorm statistics want to move."""
    generator = torch.Generator().manual_seed(seed)
    pixels = 3 + torch.randn(count, 1, 16, 16, generator=generator)
    return [{"pixel_values": row, "labels": number % NUM_LABELS} for number, row in enumerate(pixels)]


def arguments(folder: str | Path, **overrides: Any) -> TrainingArguments:
    """Training arguments for a CPU, without reports, saves or progress bars."""
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "max_steps": 12,
        "logging_steps": 4,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "log_level": "error",
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(str(folder), **{**defaults, **overrides})


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all parameters and buffers by name."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def moved(
    before: dict[str, torch.Tensor], after: dict[str, torch.Tensor], names: Iterable[str] | None = None
) -> set[str]:
    """Names of the tensors that are not bit for bit equal. Refuses to compare nothing."""
    names = list(before) if names is None else list(names)
    assert names, "nothing to compare"
    assert set(before) == set(after)
    return {name for name in names if not torch.equal(before[name], after[name])}


def trainer(
    model: nn.Module, args: TrainingArguments, data: list[dict[str, Any]] | None = None, **kwargs: Any
) -> Trainer:
    """A real Trainer on tiny data."""
    data = texts() if data is None else data
    return Trainer(model, args, train_dataset=data, eval_dataset=data[:16], **kwargs)


def clone(model: nn.Module) -> nn.Module:
    """A copy with the same weights."""
    return copy.deepcopy(model)
