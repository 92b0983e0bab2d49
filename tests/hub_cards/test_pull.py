"""Pulling: the same model as in training, from the Hub, from the cache, and never a wrong one."""

from pathlib import Path

import pytest
import torch

from hub_cards.pull import pull
from tests.hub_cards import pullable
from tests.hub_server import HubServer


def logits(pulled, run: pullable.Run) -> torch.Tensor:
    return pullable.logits(pulled.model, run.inputs)


@pytest.mark.parametrize("kind", pullable.KINDS)
def test_the_pulled_model_says_the_same_bit_for_bit(hub: HubServer, tmp_path: Path, kind: str) -> None:
    made = pullable.on_hub(hub, kind, tmp_path)
    pulled = pull(made.repo_id)
    assert not pulled.model.training
    assert torch.equal(logits(pulled, made.run), made.run.logits)
    assert pulled.labels == ("bad", "fair", "good")
    assert (pulled.repo_id, pulled.revision) == (made.repo_id, made.sha)
    assert pulled.base_revision == (made.base_sha if kind in pullable.ADAPTERS else None)
    assert (pulled.processor is None) is (pullable.KINDS[kind].inputs == "pixel_values")
    inner = pulled.model.get_base_model() if kind in pullable.ADAPTERS else pulled.model
    assert inner.config.id2label == pullable.LABELS
    for weight in inner.parameters():
        weight.data.add_(0.5)
    assert not torch.equal(logits(pulled, made.run), made.run.logits), "the control"
