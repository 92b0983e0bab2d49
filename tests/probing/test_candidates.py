"""probe_model and rank_models: a known signal is found where it is, and the model is left as it was."""

import math

import pytest
import torch
from torch import nn

from tests import tiny
from tl_callbacks import group_layers, probe_model, rank_models
from tl_callbacks.probing.candidates import ProbeTable

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(120, 6, generator=GENERATOR)
PARITY = ((X[:, 0] > 0) ^ (X[:, 1] > 0)).long()
ROWS = [{"input": x, "label": int(label), "text": "left out"} for x, label in zip(X, PARITY, strict=True)]


class Xor(nn.Module):
    """Its upper layer holds what its lower one does not tell linearly; other weights lose all but one feature."""

    def __init__(self, *, knows: bool) -> None:
        super().__init__()
        self.lower, self.upper, self.head = nn.Linear(6, 6), nn.Linear(2, 4), nn.Linear(4, 2)
        with torch.no_grad():
            self.lower.weight.copy_(torch.eye(6))
            self.lower.bias.zero_()
        self.knows = knows

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        z = self.lower(input).sign()
        parity = z[:, :1] * z[:, 1:2] if self.knows else z[:, 5:]
        return self.head(self.upper(torch.cat([parity, z[:, 2:3]], 1)))


def test_a_signal_is_found_in_the_layer_that_has_it() -> None:
    found = probe_model(Xor(knows=True), ROWS)
    assert [row.group for row in found] == ["lower", "upper", "head"]
    assert found["upper"].probe > 0.95
    assert found["lower"].probe < 0.7
    assert abs(found["upper"].shuffled - found["upper"].chance) < 0.2
    assert found["upper"].log_me > found["lower"].log_me + 0.1
    assert found.best is not None
    assert found.best.group in ("upper", "head")
    assert found["lower"].probe_se == pytest.approx(
        math.sqrt(found["lower"].probe * (1 - found["lower"].probe) / 120), abs=1e-9
    )
    assert found.samples == 120
    with pytest.raises(KeyError, match="`middle` is none of the groups"):
        found["middle"]


def test_the_random_network_stands_beside() -> None:
    found = probe_model(Xor(knows=True), ROWS)
    assert found["upper"].random_init < 0.75, "random weights below lose the signal"
    assert found["upper"].gain == pytest.approx(found["upper"].probe - found["upper"].random_init)
    assert math.isnan(probe_model(Xor(knows=True), ROWS, controls=False)["upper"].random_init)


def test_models_and_layers_are_ranked() -> None:
    models = {"blind": Xor(knows=False), "knowing": Xor(knows=True)}
    found = rank_models(models, ROWS)
    assert (found.rows[0].model, found.rows[0].group in ("upper", "head")) == ("knowing", True)
    assert [row.log_me for row in found] == sorted((row.log_me for row in found), reverse=True)
    assert len(found) == 6
    text = str(found)
    assert text.splitlines()[0].split() == [
        "model", "group", "probe", "random", "shuffled", "chance", "LogME", "rank", "cosine",
    ]  # fmt: skip
    assert "knowing  upper" in text or "knowing  head" in text
    own = rank_models(models, {"blind": ROWS[:50], "knowing": ROWS}, controls=False, batch_size=7)
    assert len(own) == 6


def test_the_model_is_left_as_it_was() -> None:
    model = tiny.bert()
    model.bert.eval()
    before, state = tiny.state(model), torch.get_rng_state()
    modes = [module.training for module in model.modules()]
    found = probe_model(model, tiny.texts(30), batch_size=4)
    assert tiny.moved(before, tiny.state(model)) == set()
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert [row.group for row in found] == list(group_layers(model).names)
    assert [row.width for row in found] == [16] * 5


def test_the_batch_size_changes_nothing() -> None:
    one, other = (probe_model(tiny.bert(), tiny.texts(30), batch_size=size, controls=False) for size in (4, 30))
    for a, b in zip(one, other, strict=True):
        assert a.log_me == pytest.approx(b.log_me, abs=1e-5)
        assert a.effective_rank == pytest.approx(b.effective_rank, rel=1e-4)


def test_images_and_rows_without_labels() -> None:
    found = probe_model(tiny.resnet(), tiny.images(30))
    assert [row.width for row in found] == [4, 4, 8, 8, 8]
    bare = [{"input_ids": row["input_ids"]} for row in tiny.texts(20)]
    found = probe_model(tiny.bert(), bare)
    assert found.best is None
    assert {key for key, value in found.as_dicts()[0].items() if value is None} == {
        "probe", "probe_se", "random_init", "shuffled", "chance", "log_me",
    }  # fmt: skip
    assert "-" in str(found)
    with pytest.raises(ValueError, match="no labels to rank by"):
        rank_models({"one": tiny.bert()}, bare)
    with pytest.raises(ValueError, match="no model to rank"):
        rank_models({}, bare)
    assert isinstance(found, ProbeTable)


def test_a_model_that_gives_no_vector_a_row_is_refused() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return self.head.weight.sum() + self.layer.weight.sum() + input.sum()

    with pytest.raises(ValueError, match="no layer group of the model gave a vector a row"):
        probe_model(Flat(), ROWS)
