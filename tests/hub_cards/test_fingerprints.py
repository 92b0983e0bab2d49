"""The checking side of the fingerprints: the same as the recording side, for every dtype and for whole models."""

import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hub_cards.fingerprints import DTYPES, bytes_hash, file_hashes, file_sha256, read_header
from hub_cards.pulling import loading
from tests.hub_cards import pullable
from tl_callbacks import fingerprints as recorded

TENSORS = {
    "weight": torch.arange(6.0).reshape(2, 3),
    "half": torch.tensor([1.5, -2.0], dtype=torch.float16),
    "brain": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "double": torch.tensor([1.5], dtype=torch.float64),
    "eight": torch.ones(3).to(torch.float8_e4m3fn),
    "other eight": torch.ones(3).to(torch.float8_e5m2),
    "count": torch.tensor(3),
    "bytes": torch.tensor([1, 255], dtype=torch.uint8),
    "signed": torch.tensor([-1], dtype=torch.int8),
    "flag": torch.tensor([True, False]),
    "empty": torch.zeros(0, 4),
    "across": torch.arange(6.0).reshape(2, 3).T,
}


@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_has_the_hash_that_the_run_recorded(name: str, tmp_path: Path) -> None:
    tensor = TENSORS[name]
    found = loading.tensor_hash(tensor)
    assert found == recorded.tensor_hash(tensor)
    save_file({name: tensor.contiguous()}, tmp_path / "one.safetensors")
    assert file_hashes([tmp_path / "one.safetensors"]) == {name: found}
    assert loading.tensor_hash(tensor.reshape(-1)) != found or tensor.ndim == 1, "the control: the shape"
    if tensor.numel():
        flipped = tensor.contiguous().clone()
        flipped.reshape(-1).view(torch.uint8)[-1] ^= 1
        assert loading.tensor_hash(flipped) != found, "the control: one bit"


def test_dtypes_have_the_names_of_torch() -> None:
    assert all(isinstance(getattr(torch, name), torch.dtype) for name in DTYPES.values())


@pytest.mark.parametrize("kind", ["bert-lora", "bert-lora-bf16", "resnet-lora", "llama-lora"])
def test_a_base_has_the_fingerprint_that_the_run_recorded(kind: str) -> None:
    run = pullable.trained(kind)
    model = run.model_class.from_pretrained(run.base)
    expected = recorded.fingerprint(model)
    assert expected is not None
    assert {name: loading.tensor_hash(tensor) for name, tensor in model.state_dict().items()} == expected["tensors"]
    in_file = file_hashes([run.base / "model.safetensors"])
    assert len(in_file) > 10
    assert set(in_file.values()) < set(expected["tensors"].values())


def test_files_are_read_a_piece_at_a_time_and_shards_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {f"layer.{number}": torch.randn(50, 7) for number in range(5)}
    for number, (name, tensor) in enumerate(tensors.items()):
        save_file({name: tensor}, tmp_path / f"model-{number}.safetensors", {"format": "pt"})
    files = sorted(tmp_path.iterdir())
    whole = file_hashes(files)
    assert whole == {name: recorded.tensor_hash(tensor) for name, tensor in tensors.items()}
    monkeypatch.setattr("hub_cards.fingerprints.CHUNK", 64)
    assert file_hashes(files) == whole
    with pytest.raises(ValueError, match=r"tensor `layer.0` is in .* and in .*; expected it once"):
        file_hashes([files[0], files[0]])


@pytest.mark.parametrize("keep", [0, 4, 60, -1])
def test_a_file_cut_short_is_refused(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.randn(20)}, path)
    assert read_header(path)["weight"].shape == (20,)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"is no safetensors file|was cut short; restore it"):
        read_header(path)


@pytest.mark.parametrize("data", [b"{}", struct.pack("<Q", 2) + b"[]", struct.pack("<Q", 9) + b'{"a": {}}'])
def test_other_files_are_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(ValueError, match=r"is no safetensors file"):
        read_header(tmp_path / "x")


def test_the_sum_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"")
    assert file_sha256(tmp_path / "x") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert bytes_hash("int8", (3,), [b"a", b"bc"]) == bytes_hash("int8", (3,), [b"abc"])
