"""What is refused of FSDP 1, on a real Trainer that is told so: accelerate leaves FSDP out on a CPU."""

from pathlib import Path
from typing import Any

import pytest
from accelerate import FullyShardedDataParallelPlugin
from transformers import Trainer

from tests import tiny
from tl_callbacks import GradualUnfreezing, PreflightError, WeightAnchoring, at_steps, attach, group_layers
from tl_callbacks.layerwise.factory import layerwise_optimizer
from tl_callbacks.sharding import anchoring_findings, sharding, zero_stage


def fsdp(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *callbacks: Any, version: int = 1, use_orig_params: bool = True
) -> Trainer:
    """A Trainer that says that FSDP is on."""
    model = tiny.bert(layers=1)
    args = tiny.arguments(folder)
    groups = group_layers(model)
    made = [callback(groups) for callback in callbacks]
    trainer = tiny.trainer(
        model, args, callbacks=made, optimizer_cls_and_kwargs=layerwise_optimizer(args, groups, decay=0.5)
    )
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=version, use_orig_params=use_orig_params if version == 1 else None, sync_module_states=False
    )
    monkeypatch.setitem(trainer.accelerator.state.__dict__, "fsdp_plugin", plugin)
    trainer.is_fsdp_enabled = True
    return trainer


def test_without_sharding_nothing_is_found(tmp_path: Path) -> None:
    trainer = tiny.trainer(tiny.bert(layers=1), tiny.arguments(tmp_path))
    assert sharding(trainer) == "none"
    assert zero_stage(trainer) == 0
    assert anchoring_findings(trainer) == []


@pytest.mark.parametrize("version", [1, 2])
def test_the_version_of_fsdp_is_told(version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sharding(fsdp(tmp_path, monkeypatch, version=version)) == f"fsdp{version}"


def test_rates_need_the_original_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attach(fsdp(tmp_path, monkeypatch))
    with pytest.raises(PreflightError, match=r'use_orig_params=False .*Set "use_orig_params": true in fsdp_config'):
        attach(fsdp(tmp_path, monkeypatch, use_orig_params=False))


def test_attach_gives_no_factory_where_parameters_are_flat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for use_orig_params in (False, True):
        trainer = fsdp(tmp_path, monkeypatch, use_orig_params=use_orig_params)
        trainer.optimizer_cls_and_kwargs = None
        attach(trainer)
        assert (trainer.optimizer_cls_and_kwargs is not None) is use_orig_params


def test_unfreezing_and_anchoring_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PreflightError, match=r"GradualUnfreezing does not support FSDP 1, .*Use FSDP 2"):
        attach(fsdp(tmp_path, monkeypatch, lambda groups: GradualUnfreezing(groups, at_steps([3, 6]))))
    with pytest.raises(PreflightError, match=r"WeightAnchoring does not support FSDP 1, .*Train with DDP"):
        attach(fsdp(tmp_path, monkeypatch, lambda groups: WeightAnchoring(0.1)))
