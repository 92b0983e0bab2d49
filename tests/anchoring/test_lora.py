"""LoRA updates: norm, gradients and pull from the factors, against the dense update of the adapted model."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from tests import tiny
from tl_callbacks import WeightAnchoring, attach
from tl_callbacks.anchoring import LoraUpdate, lora_updates, shrink_, update_gradients, update_norm
from tl_callbacks.anchoring.reference.below import weights_below, with_updates


class Net(nn.Module):
    """An embedding, a linear layer, a grouped and a plain convolution, an attention and a stack of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.line = nn.Linear(8, 6)
        self.kernel = nn.Conv1d(4, 6, 3)
        self.plane = nn.Conv2d(3, 5, 2)
        self.grouped = nn.Conv1d(8, 12, 3, groups=2)
        self.attention = nn.MultiheadAttention(8, 2)
        self.stack = nn.Module()
        self.stack.experts = nn.Parameter(torch.randn(3, 8, 5))


LAYERS = ["table", "line", "kernel", "plane", "grouped", "attention"]


def adapted(**config: Any) -> PeftModel:
    """Adapters on every layer of `Net`, in double precision."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"target_modules": LAYERS, "r": 4, "lora_alpha": 6, **config}
    return get_peft_model(Net(), LoraConfig(**options)).double()


def fill(model: nn.Module) -> None:
    """Give every factor values, as training does."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter))


def dense(model: nn.Module, update: LoraUpdate, adapter: str = "default") -> Tensor:
    """What the layer's output changes by, as PEFT itself would merge it into the weight."""
    layer = model.base_model.model.get_submodule(update.name.removesuffix(f".{adapter}"))
    return layer.get_delta_weight(adapter)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("layer", [name for name in LAYERS if name != "grouped"])
def test_norm_gradients_and_pull_are_those_of_the_dense_update(layer: str, rslora: bool) -> None:
    model = adapted(target_modules=[layer], use_rslora=rslora)
    updates = {update.name: update for update in lora_updates(model)}
    update = updates[layer]
    assert update_norm(update) == 0
    assert update.scaling == pytest.approx(3.0 if rslora else 1.5)
    fill(model)
    change = dense(model, update)
    assert update_norm(update) == pytest.approx(float(change.detach().norm()), rel=1e-12)
    assert update_norm(update) > 1
    (0.25 * change.square().sum()).backward()
    gradients = update_gradients(update, 0.25)
    assert [parameter for parameter, _ in gradients] == [update.down, update.up]
    for parameter, gradient in gradients:
        assert parameter.grad is not None
        assert gradient.shape == parameter.shape
        assert torch.allclose(gradient, parameter.grad, rtol=1e-12, atol=1e-12)
    before, other = change.detach().clone(), "down" if update.zero == "up" else "up"
    kept = getattr(update, other).detach().clone()
    shrink_(update, 0.3)
    assert torch.allclose(dense(model, update), 0.7 * before, rtol=1e-12, atol=1e-12)
    assert torch.equal(getattr(update, other), kept)
    assert update.zero == ("down" if layer == "table" else "up")


def test_a_grouped_convolution_is_what_the_layer_computes() -> None:
    with pytest.warns(UserWarning, match="Merging is not supported"):
        model = adapted(target_modules=["grouped"])
    (update,) = lora_updates(model)
    fill(model)
    layer = model.base_model.model.grouped
    # The response to each unit input is the kernel of the update.
    x = torch.eye(24, dtype=torch.float64).reshape(24, 8, 3)  # rows: channel and place
    response = layer(x)
    layer._disable_adapters = True
    change = response - layer(x)
    assert update_norm(update) == pytest.approx(float(change.detach().norm()), rel=1e-12)
    change.square().sum().backward()
    for parameter, gradient in update_gradients(update, 1.0):
        assert torch.allclose(gradient, parameter.grad, rtol=1e-10, atol=1e-10)


def test_a_stack_of_experts() -> None:
    model = adapted(target_modules=[], target_parameters=["stack.experts"])
    (update,) = lora_updates(model)
    assert (update.experts, update.groups) == (True, 3)
    fill(model)
    module = next(m for m in model.modules() if type(m).__name__ == "ParamWrapper")
    change = module.get_delta_weight("default")
    assert update_norm(update) == pytest.approx(float(change.detach().norm()), rel=1e-12)
    change.square().sum().backward()
    for parameter, gradient in update_gradients(update, 1.0):
        assert torch.allclose(gradient, parameter.grad, rtol=1e-10, atol=1e-10)


def test_the_bias_of_an_adapter_is_part_of_its_update() -> None:
    model = adapted(target_modules=["line"], lora_bias=True)
    (update,) = lora_updates(model)
    fill(model)
    assert update.bias is not None
    change = torch.cat([dense(model, update).flatten(), update.scaling * update.bias])
    assert update_norm(update) == pytest.approx(float(change.detach().norm()), rel=1e-12)
    change.square().sum().backward()
    assert len(update_gradients(update, 1.0)) == 3
    for parameter, gradient in update_gradients(update, 1.0):
        assert torch.allclose(gradient, parameter.grad, rtol=1e-10, atol=1e-10)
    size = update_norm(update)
    shrink_(update, 0.5)
    assert update_norm(update) == pytest.approx(0.5 * size)


@pytest.mark.parametrize(
    "config",
    [
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": False},
        {"use_dora": True},
    ],
)
def test_what_does_not_start_at_zero_or_is_no_product_is_left_out(config: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = get_peft_model(Net(), LoraConfig(target_modules=["line"], r=4, **config))
    assert lora_updates(model) == []


@pytest.mark.parametrize("init", [True, "gaussian", "mica"])
def test_what_starts_at_zero_is_found(init: Any) -> None:
    torch.manual_seed(0)
    model = get_peft_model(Net(), LoraConfig(target_modules=["line"], r=4, init_lora_weights=init))
    (update,) = lora_updates(model)
    assert update.zero == ("down" if init == "mica" else "up")
    if init == "mica":
        assert [parameter is update.down for parameter, _ in update_gradients(update, 1.0)] == [True]


def test_only_active_adapters_count_and_moved_ones_are_found_by_name() -> None:
    model = adapted(target_modules=["line"])
    model.add_adapter("second", LoraConfig(target_modules=["line", "kernel"], r=2, lora_alpha=2))
    assert [update.name for update in lora_updates(model)] == ["line"]
    model.set_adapter("second")
    found = lora_updates(model)
    assert {update.name for update in found} == {"line.second", "kernel.second"}
    fill(model)
    assert lora_updates(model) == []
    again = lora_updates(model, {update.name: update.zero for update in found})
    assert [update.name for update in again] == [update.name for update in found]
    assert again[0].up is found[0].up
    assert update_norm(again[0]) > 0


def test_low_precision_is_summed_in_float32() -> None:
    model = adapted(target_modules=["line"]).bfloat16()
    (update,) = lora_updates(model)
    fill(model)
    exact = copy.deepcopy(model).double()
    (wide,) = lora_updates(exact, {"line": "up"})
    for (_, gradient), (_, expected) in zip(update_gradients(update, 1.0), update_gradients(wide, 1.0), strict=True):
        assert gradient.dtype == torch.bfloat16
        assert torch.allclose(gradient.double(), expected, rtol=1e-2, atol=1e-2)


def test_a_model_without_adapters_has_no_updates() -> None:
    assert lora_updates(tiny.bert()) == []


@pytest.mark.parametrize("form", ["decoupled", "penalty", "mixout", "features"])
def test_adalora_is_anchored_to_its_start(form: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = AdaLoraConfig(task_type="SEQ_CLS", target_modules=["query"], total_step=40, tinit=1, tfinal=2)
    model = get_peft_model(tiny.bert(), config)
    assert lora_updates(model) == []
    anchor = WeightAnchoring(0.3, form=form)
    trainer = tiny.trainer(model, tiny.arguments(tmp_path, max_steps=2), callbacks=[anchor])
    attach(trainer)
    trainer.train()
    assert max(anchor.distances(model).values()) > 0


def test_the_weights_below_are_found_in_every_kind_of_layer() -> None:
    layers = [name for name in LAYERS if name != "grouped"]
    model = adapted(target_modules=layers)
    updates = lora_updates(model)
    found = weights_below(model, {update.name: update.zero for update in updates})
    assert {name.split(".")[0] for name in found} == set(layers)
    assert found["line.weight"].shape == (6, 8)
    assert found["attention.in_proj_weight"].shape == (24, 8)
    assert weights_below(model, {}) == {}


def test_a_given_reference_needs_no_tensors_of_an_adapter_that_adds_nothing(tmp_path: Path) -> None:
    def run(folder: str, reference: Any) -> tuple[dict[str, Tensor], Any]:
        torch.manual_seed(0)
        config = LoraConfig(task_type="SEQ_CLS", target_modules=["query"], modules_to_save=["pooler"], bias="all")
        model = get_peft_model(tiny.bert(dropout=0.0), config)
        anchor = WeightAnchoring(0.3, reference=reference)
        trainer = tiny.trainer(model, tiny.arguments(tmp_path / folder), callbacks=[anchor])
        attach(trainer)
        trainer.train()
        assert anchor._taken is not None
        return tiny.state(model), anchor._taken.fingerprint

    pretrained = tiny.state(tiny.bert(dropout=0.0))
    (ours, fingerprint), (taken, same) = run("a", pretrained), run("b", None)
    assert not tiny.moved(ours, taken)
    assert fingerprint == same
    other = {**pretrained, "bert.pooler.dense.weight": torch.zeros(16, 16)}
    assert tiny.moved(ours, run("c", other)[0]), "the control: what is saved whole has the reference that is given"
    wrong = "bert.encoder.layer.1.attention.self.query.weight"
    with pytest.raises(
        ValueError, match=f"the reference's `{wrong[5:]}` is not the weight|`{wrong}` is not the weight"
    ):
        run("d", {**pretrained, wrong: torch.zeros(16, 16)})


def test_factors_that_are_given_are_what_is_anchored_to() -> None:
    model = adapted(target_modules=["line"])
    given = tiny.state(model)
    tensors, updates = with_updates(model, lora_updates(model), given)
    assert updates == []
    assert torch.equal(tensors["line.lora_A.weight"], given["base_model.model.line.lora_A.default.weight"])


def test_lora_on_mapped_files_has_nothing_to_warn_of(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    tiny.bert().save_pretrained(tmp_path)
    model = type(tiny.bert()).from_pretrained(tmp_path)
    model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
    anchor = WeightAnchoring(0.3, reference="checkpoint")
    trainer = tiny.trainer(model, tiny.arguments(tmp_path / "run", max_steps=2), callbacks=[anchor])
    attach(trainer)
    trainer.train()
    assert not [warning for warning in recwarn if "mapped" in str(warning.message)]
    assert anchor._taken is not None
    assert not anchor._taken.tensors
