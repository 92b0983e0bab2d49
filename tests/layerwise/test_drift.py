"""Rates from the drift that an earlier run logged."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tl_callbacks import (
    LayerGroup,
    LayerGroups,
    WeightAnchoring,
    attach,
    group_layers,
    layerwise_optimizer,
    rates_from_drift,
)

GROUPS = LayerGroups(
    tuple(LayerGroup(name, (name,), (size,)) for name, size in (("low", 4), ("middle", 1), ("high", 1), ("head", 1))),
    "head",
)
LOG: list[dict[str, Any]] = [
    {"tl/drift/low": 9.0, "step": 1},
    {"tl/drift/low": 0.1, "tl/drift/middle": 0.2, "tl/drift/high": 0.4, "tl/drift/head": 5.0, "step": 2},
    {"tl/cka/low": 1.0, "tl/cka/middle": 0.9, "tl/cka/high": 0.5, "step": 2},
    {"tl/anchor/low": 2.0, "tl/anchor/high": 4.0, "step": 2},
    {"tl/drift/high": float("nan"), "step": 3},
]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"low": 0.25, "middle": 0.5, "high": 1.0}),
        ({"strength": 0.5}, {"low": 0.5, "middle": 0.5**0.5, "high": 1.0}),
        ({"strength": 0.0}, {"low": 1.0, "middle": 1.0, "high": 1.0}),
        ({"floor": 0.4}, {"low": 0.4, "middle": 0.5, "high": 1.0}),
        ({"direction": "hold"}, {"low": 1.0, "middle": 0.5, "high": 0.25}),
        ({"measure": "cka"}, {"low": 0.1, "middle": 0.2, "high": 1.0}),
        ({"measure": "cka", "direction": "hold"}, {"low": 1.0, "middle": 1.0, "high": 0.2}),
        ({"measure": "anchor"}, {"low": 0.25, "high": 1.0}),  # per parameter: 2 / sqrt(4) against 4
    ],
)
def test_factors(options: dict[str, Any], expected: dict[str, float]) -> None:
    found = rates_from_drift(LOG, GROUPS, **options)
    assert found == pytest.approx(expected)
    assert list(found) == list(expected), "bottom to top"


def test_a_record_is_read_from_a_list_a_mapping_a_file_and_a_folder(tmp_path: Path) -> None:
    state = {"log_history": LOG}
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    sources: list[Any] = [state, tmp_path, str(tmp_path), tmp_path / "trainer_state.json"]
    assert all(rates_from_drift(source, GROUPS) == rates_from_drift(LOG, GROUPS) for source in sources)
    with pytest.raises(FileNotFoundError, match="is missing; expected the record of a training"):
        rates_from_drift(tmp_path / "elsewhere", GROUPS)


@pytest.mark.parametrize(
    ("log", "options", "message"),
    [
        (LOG, {"measure": "drif"}, r"holds no `tl/drif/<group>` .*tl/drift/low"),
        ([], {}, "none was logged"),
        ([{"tl/drift/low": 0.0, "step": 1}], {}, "is without drift in all 1 groups"),
        (LOG, {"direction": "up"}, "`direction` is 'up'; expected one of follow, hold"),
        (LOG, {"strength": 2}, "`strength` is 2; expected an exponent"),
        (LOG, {"floor": 0}, "`floor` is 0; expected the smallest factor"),
    ],
)
def test_what_tells_nothing_is_refused(log: list[dict[str, Any]], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rates_from_drift(log, GROUPS, **options)


def test_the_next_run_trains_at_the_rates_of_the_last(tmp_path: Path) -> None:
    model = tiny.bert()
    groups = group_layers(model)
    first = tiny.trainer(model, tiny.arguments(tmp_path, max_steps=4), callbacks=[WeightAnchoring(1e-9)])
    attach(first)
    first.train()
    first.save_state()
    factors = rates_from_drift(tmp_path, groups, measure="anchor")
    assert set(factors) == set(groups.names) - {groups.head}
    assert len(set(factors.values())) > 1
    args = tiny.arguments(tmp_path / "next")
    factory, _ = layerwise_optimizer(args, groups, factors=factors)
    assert factory.scales == {**factors, "head": 1.0}
