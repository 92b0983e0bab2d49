"""Whether a checkpoint is the recorded one: by name, by contents, through other types and names."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hub_cards.publishing.proof import Proof, prove
from tl_callbacks.fingerprints import tensor_hash

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def odd_numbers() -> torch.Tensor:
    """Ties, overflows, subnormal numbers, infinities, and all the exponents."""
    torch.manual_seed(0)
    bits = torch.randint(-(2**31), 2**31 - 1, (20_000,), dtype=torch.int64).to(torch.int32)
    ties = torch.arange(-500, 500, dtype=torch.int32) * 0x8000 + 0x3F800000
    half = torch.arange(-500, 500, dtype=torch.int32) * 0x1000 + 0x3F800000
    numbers = torch.cat([bits, ties, half]).view(torch.float32)
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 65504.0, 65520.0, 1e-8, 6e-8, 3e-45])
    return torch.cat([numbers[~numbers.isnan()], special])


def saved(folder: Path, **tensors: torch.Tensor) -> Path:
    path = folder / "model.safetensors"
    save_file({name.replace("__", "."): tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


@pytest.mark.parametrize("source", FLOATS, ids=str)
@pytest.mark.parametrize("target", FLOATS, ids=str)
def test_a_type_that_loading_changed(source: torch.dtype, target: torch.dtype, tmp_path: Path) -> None:
    values = odd_numbers().to(source)
    path = saved(tmp_path, weight=values)
    assert prove({"weight": tensor_hash(values.to(target))}, [path]).holds
    changed = values.to(target).clone()
    changed.view(torch.uint8)[0] ^= 1
    assert prove({"weight": tensor_hash(changed)}, [path]) == Proof(1, 0, ("weight",), ())


def test_integers_are_not_converted(tmp_path: Path) -> None:
    path = saved(tmp_path, ids=torch.arange(4))
    assert prove({"ids": tensor_hash(torch.arange(4))}, [path]).holds
    assert not prove({"ids": tensor_hash(torch.arange(4).float())}, [path]).holds


def test_another_shape_is_another_tensor(tmp_path: Path) -> None:
    path = saved(tmp_path, weight=torch.ones(2, 3))
    recorded = {"weight": tensor_hash(torch.ones(3, 2))}
    assert prove(recorded, [path]).different == ("weight",)
    assert prove(recorded, [path], shapes={"weight": (3, 2)}).different == ()
    assert prove(recorded, [path], brought={"weight"}).different == ()


@pytest.mark.parametrize("front", ["model", "bert.encoder"])
def test_a_part_in_front(front: str, tmp_path: Path) -> None:
    one, two = torch.rand(3), torch.rand(4)
    recorded = {"a.w": tensor_hash(one), "b.w": tensor_hash(two)}
    longer = {f"{front}.{name}": value for name, value in recorded.items()}
    assert prove(longer, [saved(tmp_path, a__w=one, b__w=two)]).holds
    assert prove(recorded, [saved(tmp_path, **{f"{front}.a.w": one, f"{front}.b.w": two})]).holds
    wrong = prove({**longer, f"{front}.a.w": "0" * 16}, [saved(tmp_path, a__w=one, b__w=two)])
    assert not wrong.holds


def test_tied_weights_are_in_the_checkpoint_once(tmp_path: Path) -> None:
    embedding = torch.rand(5, 2)
    recorded = dict.fromkeys(["embed.weight", "lm_head.weight"], tensor_hash(embedding.bfloat16()))
    proof = prove(recorded, [saved(tmp_path, embed__weight=embedding)])  # converted, and tied
    assert (proof.found, proof.absent) == (2, ())


def test_what_was_random_is_absent(tmp_path: Path) -> None:
    body = torch.rand(3)
    recorded = {"body.w": tensor_hash(body), "pooler.w": "0" * 16, "head.w": "1" * 16, "body.position_ids": "2" * 16}
    path = saved(tmp_path, body__w=body)
    assert prove(recorded, [path]).absent == ("head.w", "pooler.w")
    assert prove(recorded, [path], brought={"head.w"}).absent == ("pooler.w",)


def test_what_loading_built_from_others_was_not_random(tmp_path: Path) -> None:
    parts = {f"mlp.experts.{number}.w": torch.rand(3) for number in range(4)}
    recorded = {"mlp.experts.w": "0" * 16, "head.w": "1" * 16}
    path = saved(tmp_path, **parts)
    proof = prove(recorded, [path])
    assert proof.absent == ("head.w",)
    assert not proof.holds


@pytest.mark.parametrize("beside", ["layer.w.absmax", "layer.SCB"])
def test_quantised_weights_cannot_be_compared(beside: str, tmp_path: Path) -> None:
    norm = torch.rand(3)
    path = saved(tmp_path, layer__w=torch.rand(4), norm__w=norm)
    recorded = {"layer.w": "0" * 16, "norm.w": tensor_hash(norm)}
    assert prove(recorded, [path]).different == ("layer.w",)
    assert prove({**recorded, beside: "1" * 16}, [path]).different == ()


def test_half_of_it_has_to_be_there(tmp_path: Path) -> None:
    path = saved(tmp_path, a=torch.rand(3), b=torch.rand(3))
    tensors = {name: tensor_hash(value) for name, value in load_file(path).items()}
    assert prove({**tensors, "c": "0" * 16, "d": "0" * 16}, [path]).holds
    assert not prove({**tensors, "c": "0" * 16, "d": "0" * 16, "e": "0" * 16}, [path]).holds
    assert not prove({}, [path]).holds
