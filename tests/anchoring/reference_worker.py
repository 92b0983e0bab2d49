"""Places references beside plain and sharded parameters on several ranks: `reference_worker.py <folder>`."""

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import BertForSequenceClassification
from transformers.utils import logging

from tests.anchoring.test_reference import anonymous, body_names
from tl_callbacks.anchoring import Reference, distance, penalty_gradient, pull_
from tl_callbacks.dtensors import local, placed_like, whole
from tl_callbacks.parameters import parameters_by_name

WAYS: dict[str, dict[str, Any]] = {
    "own": {}, "mapped": {"source": "checkpoint"}, "bfloat16": {"dtype": torch.bfloat16}, "cpu": {"device": "cpu"},
}  # fmt: skip


def load(folder: Path) -> nn.Module:
    model: nn.Module = BertForSequenceClassification.from_pretrained(folder)
    torch.manual_seed(0)
    nn.init.normal_(model.classifier.weight)
    return model


def shard(model: nn.Module, mesh: Any) -> nn.Module:
    for layer in model.bert.encoder.layer:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def same(placed: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], model: nn.Module) -> None:
    """All are the first rank's weights, as this rank holds them, and the operations see no difference."""
    parameters = parameters_by_name(model)
    assert placed
    for name, tensor in placed.items():
        like = parameters[name]
        theirs = placed_like(expected[name], like)
        assert torch.equal(local(tensor), local(theirs).to(tensor.dtype)), name
        rounded = theirs.to(tensor.dtype).to(theirs.dtype)
        gradient = penalty_gradient(like, tensor, 0.3)
        assert isinstance(gradient, DTensor) == isinstance(like, DTensor)
        assert torch.equal(whole(gradient), whole((like - rounded).mul_(0.6))), name
        assert distance([(like, tensor)]) == distance([(like, rounded)]), name
        mine = local(like).detach().clone()
        assert torch.equal(pull_(mine.clone(), local(tensor), 0.3), mine.lerp(local(rounded), 0.3)), name


def main(folder: Path) -> None:
    """Check all ways, plain and in the shards of FSDP2 and HSDP."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    meshes = {"plain": None, "FSDP2": init_device_mesh("cpu", (ranks,))}
    if ranks == 4:
        meshes["HSDP"] = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    file = str(folder / "model.safetensors")
    first = {name: p.detach().clone() for name, p in parameters_by_name(load(folder)).items()}
    names = [name for name in body_names(load(folder)) if "layer.1" in name or "embeddings" in name]
    names.append("classifier.weight")
    changed = "bert.encoder.layer.1.output.dense.weight"
    for layout, mesh in meshes.items():
        for way, options in WAYS.items():
            for start in ("all equal", "one differs", "weights on the first rank alone"):
                if start.startswith("weights") and mesh is None:
                    continue
                model = load(folder)
                if start == "one differs" and rank == 1:
                    with torch.no_grad():
                        parameters_by_name(model)[changed].add_(1)
                bare = model
                if start.startswith("weights") and rank:
                    with torch.device("meta"):
                        bare = BertForSequenceClassification(model.config)
                reference = Reference.take(bare, names, **options)
                trained = load(folder)
                with torch.no_grad():
                    for parameter in trained.parameters():
                        parameter.add_(0.5)
                trained = shard(trained, mesh) if mesh is not None else trained
                placed = reference.placed(trained)
                same(placed, first, trained)
                placed = reference.placed(trained)  # for a second training
                assert all(
                    torch.equal(
                        local(tensor),
                        local(placed_like(first[name], parameters_by_name(trained)[name])).to(tensor.dtype),
                    )
                    for name, tensor in placed.items()
                )
                fingerprints: list[Any] = [None] * ranks
                dist.all_gather_object(fingerprints, reference.fingerprint)
                assert set(fingerprints) == {Reference.take(load(folder), names).fingerprint}, (layout, way, start)
                copied = {"classifier.weight"} | ({changed} if start == "one differs" else set())
                if way == "mapped":
                    assert set(reference.copied) == copied, (layout, start, reference.copied)
                    mapped = [local(placed[name]) for name in placed if name not in copied]
                    where = set(anonymous(part for part in mapped if part.numel()))
                    assert where == {(file, 0)}, (layout, start, where)
                elif (part := local(placed[changed])).numel():
                    assert not anonymous([part])[0][0].endswith(".safetensors")
    dist.destroy_process_group()


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        main(Path(sys.argv[1]))
