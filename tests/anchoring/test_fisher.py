"""The diagonal Fisher against loops written out, and against exact values."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    ViTConfig,
    ViTForImageClassification,
)

from tests import tiny
from tests.anchoring import fisher_worker
from tests.forked import Ranks
from tl_callbacks import group_layers
from tl_callbacks.anchoring import Fisher, diagonal_fisher, load_fisher, save_fisher


def texts(count: int = 12) -> list[dict[str, Tensor]]:
    """Batches of 4 rows, every second one padded."""
    rows = tiny.texts(count)
    ids, labels = torch.tensor([r["input_ids"] for r in rows]), torch.tensor([r["labels"] for r in rows])
    mask = torch.ones_like(ids)
    mask[::2, 5:] = 0
    return [
        {"input_ids": ids[i : i + 4], "attention_mask": mask[i : i + 4], "labels": labels[i : i + 4]}
        for i in range(0, count, 4)
    ]


def loop(model: nn.Module, batches: list[Any], negative: Any) -> dict[str, Tensor]:
    """One backward a sample through `.grad`, squared and averaged."""
    model.eval()
    sums = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    count = 0
    for batch in batches:
        for row in range(len(batch["labels"] if isinstance(batch, dict) else batch[1])):
            one = (
                {key: value[row : row + 1] for key, value in batch.items()}
                if isinstance(batch, dict)
                else tuple(value[row : row + 1] for value in batch)
            )
            model.zero_grad()
            negative(model, one).backward()
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    sums[name] += parameter.grad.square()
            count += 1
    model.zero_grad()
    return {name: total / count for name, total in sums.items()}


def worst(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest deviation of a tensor relative to the size of all; refuses to compare nothing."""
    scale = max(float(tensor.abs().max()) for tensor in theirs.values())
    assert scale > 1e-6
    assert set(ours) == set(theirs)
    return max(float((ours[name] - theirs[name]).abs().max()) for name in theirs) / scale


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Dropout(0.5), nn.Linear(7, 3)).double()


def mlp_batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(n, 5, generator=generator, dtype=torch.float64), torch.randint(0, 3, (n,), generator=generator))
        for n in (6, 5)
    ]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_it_is_the_loop_over_samples_for_a_text_model(dtype: torch.dtype, tolerance: float) -> None:
    model = tiny.bert().to(dtype)
    theirs = loop(model, texts(), lambda m, one: m(**one).loss)
    ours = diagonal_fisher(model, texts())
    assert worst(ours, theirs) < tolerance
    assert ours.facts["gradients"] == "one backward a sample"
    assert ours.facts["samples"] == 12
    assert ours.facts["kind"] == "empirical"


@pytest.mark.parametrize("chunk_size", [1, 4, 100])
def test_it_is_the_loop_over_samples_where_it_is_vectorised(chunk_size: int) -> None:
    model = mlp()
    theirs = loop(model, mlp_batches(), lambda m, one: functional.cross_entropy(m(one[0]), one[1]))
    ours = diagonal_fisher(model, mlp_batches(), chunk_size=chunk_size)
    assert worst(ours, theirs) < 1e-12
    assert (ours.facts["gradients"] == "torch.func") is (chunk_size > 1)


def test_a_vision_model_is_vectorised() -> None:
    torch.manual_seed(0)
    config = ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=8)
    config.patch_size, config.num_channels, config.num_labels = 4, 1, 3
    model = ViTForImageClassification(config).double()
    batch = {"pixel_values": torch.randn(6, 1, 8, 8).double(), "labels": torch.tensor([0, 1, 2, 0, 1, 2])}
    theirs = loop(model, [batch], lambda m, one: m(**one).loss)
    ours = diagonal_fisher(model, [batch])
    assert ours.facts["gradients"] == "torch.func"
    assert worst(ours, theirs) < 1e-12


def test_a_batch_that_cannot_be_vectorised_may_come_after_one_that_can() -> None:
    model = tiny.bert().double()
    mixed = [{key: value for key, value in texts(4)[0].items() if key != "attention_mask"}, *texts()]
    theirs = loop(model, mixed, lambda m, one: m(**one).loss)
    ours = diagonal_fisher(model, mixed)
    assert ours.facts["gradients"] == "torch.func, then one backward a sample"
    assert ours.facts["samples"] == 16
    assert worst(ours, theirs) < 1e-12


def test_the_square_of_a_batchs_gradient_is_another_quantity() -> None:
    model = mlp().eval()
    ours = diagonal_fisher(model, mlp_batches())
    sums = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for inputs, labels in mlp_batches():  # as avalanche's EWC accumulates it
        model.zero_grad()
        functional.cross_entropy(model(inputs), labels).backward()
        for name, p in model.named_parameters():
            assert p.grad is not None
            sums[name] += p.grad.square() * len(labels)
    theirs = {name: total / 11 for name, total in sums.items()}
    assert worst(theirs, ours) > 0.1
    assert sum(float(t.sum()) for t in theirs.values()) < 0.5 * sum(float(t.sum()) for t in ours.values())


def test_a_loss_of_ones_own() -> None:
    model = tiny.bert().double()
    theirs = loop(model, texts(), lambda m, one: 3 * m(**one).loss)
    ours = diagonal_fisher(model, texts(), loss=lambda outputs, batch: 3 * outputs.loss)
    assert worst(ours, theirs) < 1e-12


def test_the_model_and_the_random_state_are_left_as_they_were() -> None:
    model = tiny.bert()
    model.train()
    model.bert.embeddings.eval()
    model.classifier.weight.requires_grad_(False)
    model.classifier.bias.grad = torch.ones(3)
    modes = [module.training for module in model.modules()]
    before, random = tiny.state(model), torch.get_rng_state()
    ours = diagonal_fisher(model, texts(), labels="sampled")
    assert [module.training for module in model.modules()] == modes
    assert not tiny.moved(before, tiny.state(model))
    assert torch.equal(torch.get_rng_state(), random)
    assert not model.classifier.weight.requires_grad
    assert torch.equal(model.classifier.bias.grad, torch.ones(3))
    assert [n for n, p in model.named_parameters() if p.grad is not None] == ["classifier.bias"]
    assert "classifier.weight" not in ours
    frozen = diagonal_fisher(model, texts(), names=["classifier.weight"])
    assert float(frozen["classifier.weight"].sum()) > 0


def test_low_precision_adds_up_in_float32() -> None:
    model = tiny.bert().bfloat16()
    ours = diagonal_fisher(model, texts())
    assert {tensor.dtype for tensor in ours.values()} == {torch.float32}
    theirs = loop(tiny.bert(), texts(), lambda m, one: m(**one).loss)
    assert worst(ours, theirs) < 0.1


def test_names_are_groups_parameters_and_samples_a_limit() -> None:
    model = tiny.bert()
    names = group_layers(model)["encoder.layer.1"].parameters
    ours = diagonal_fisher(model, texts(), names=names, samples=6)
    assert tuple(ours) == names
    assert ours.facts["samples"] == 6
    assert set(ours.facts["weights"]) == set(names)


def test_a_file_holds_the_tensors_and_the_facts(tmp_path: Path) -> None:
    ours = diagonal_fisher(mlp(), mlp_batches())
    save_fisher(ours, tmp_path / "fisher.safetensors", data="noise")
    loaded = load_fisher(tmp_path / "fisher.safetensors")
    assert isinstance(loaded, Fisher)
    assert loaded.facts == {**ours.facts, "data": "noise"}
    assert all(torch.equal(loaded[name], ours[name]) for name in ours)
    assert json.dumps(loaded.facts)


def test_a_file_that_is_none_of_ours_or_damaged_is_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "other.safetensors"
    for kept in ({}, {"tl_callbacks": "[1]"}, {"tl_callbacks": '{"fisher": 1}'}):
        save_file({"a": torch.ones(1)}, file, kept)
        with pytest.raises(ValueError, match=r"other\.safetensors` holds no Fisher information"):
            load_fisher(file)
    save_file({"a": torch.ones(1)}, file, {"tl_callbacks": "no JSON"})
    with pytest.raises(ValueError, match=r"other\.safetensors` cannot be read: Expecting value"):
        load_fisher(file)
    save_fisher(diagonal_fisher(mlp(), mlp_batches()), file)
    for size in (file.stat().st_size - 3, 0):
        os.truncate(file, size)
        with pytest.raises(ValueError, match=r"other\.safetensors` cannot be read: .* expected a whole file"):
            load_fisher(file)


class OtherLoss(nn.Module):
    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.out(x)
        return {"logits": logits, "loss": 7 + logits.sum()}

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(3, 2)


LINE = nn.Linear(3, 2)
PAIR = (torch.ones(2, 3), torch.tensor([0, 1]))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: diagonal_fisher(LINE, [PAIR], names=["weigth"]), "no parameter `weigth` .closest: `weight`"),
        (lambda: diagonal_fisher(LINE, []), "gave no samples"),
        (lambda: diagonal_fisher(LINE, [PAIR], labels="true"), "`labels` is 'true'"),  # type: ignore[arg-type]
        (lambda: diagonal_fisher(LINE, [PAIR], labels="sampled", loss=lambda o, b: o.sum()), "draws from the logits"),
        (lambda: diagonal_fisher(LINE, [PAIR], chunk_size=0), "`chunk_size` is 0"),
        (lambda: diagonal_fisher(LINE, [(torch.ones(2, 3), torch.tensor([0]))]), "one row a sample"),
        (lambda: diagonal_fisher(LINE, [(torch.ones(2, 3), torch.ones(2, 3))]), "do not go together"),
        (lambda: diagonal_fisher(LINE, [(torch.full((2, 3), torch.nan), PAIR[1])]), "`weight` is not finite"),
        (lambda: diagonal_fisher(OtherLoss(), [{"x": PAIR[0], "labels": PAIR[1]}]), "cross-entropy of its logits"),
        (lambda: diagonal_fisher(OtherLoss(), [{"x": PAIR[0]}]), "no labels, only x"),
        (lambda: diagonal_fisher(LINE, [PAIR[:1]]), r"a batch is a tuple of 1; expected .* tuple \(inputs, labels\)"),
        (lambda: diagonal_fisher(LINE, [*PAIR]), "a batch is one tensor; expected a dict"),
        (lambda: diagonal_fisher(nn.Linear(3, 2, device="meta"), [PAIR]), "expected whole weights"),
    ],
)
def test_what_cannot_be_is_refused(make: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.distributed
@pytest.mark.parametrize("split", [4, 0])
def test_ranks_have_the_mean_over_the_samples_of_all(split: int, tmp_path: Path) -> None:
    ranks = Ranks(fisher_worker.estimate, tmp_path, split, log=tmp_path / "log", ranks=2)
    assert ranks.wait() == [0, 0], (tmp_path / "log").read_text()
    whole = diagonal_fisher(fisher_worker.model(), fisher_worker.batches(0, fisher_worker.ROWS))
    for rank in range(2):
        found = load_fisher(tmp_path / f"{rank}.safetensors")
        assert found.facts["samples"] == fisher_worker.ROWS
        for name, tensor in whole.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-12, atol=0)
