"""Fingerprints of a model's weights, by which another base of the same shape is told from the one trained on."""

import hashlib
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tl_callbacks.names import normalise
from tl_callbacks.parameters import is_peft

# What a PEFT module calls the part of the base that it stands for; all else in it is the adapter's.
_INNER = ("original_module", "base_layer", "token_adapter", "model")
# The ways of initialising LoRA that leave the weights of the base as they are. Others (PiSSA, OLoRA, CorDA, LoftQ,
# LoRA-GA) write what is left of them after the adapter's part was taken out.
_KEEPS_BASE = ("gaussian", "eva", "orthogonal", "mica")


def tensor_hash(tensor: Tensor) -> str:
    r"""Return 16 hexadecimal digits that change with any bit of a tensor, its dtype and its shape.

    The first of the SHA-256 of `dtype shape`, a newline, and the values' bytes, row by row and little-endian.

    Args:
        tensor: any plain tensor, of any device.

    Example:
        >>> tensor_hash(torch.zeros(2, 3)) == hashlib.sha256(b"float32 2x3\n" + bytes(24)).hexdigest()[:16]
        True
    """
    shape = "x".join(str(size) for size in tensor.shape)
    digest = hashlib.sha256(f"{str(tensor.dtype).removeprefix('torch.')} {shape}\n".encode())
    # NumPy knows no bfloat16 and no float8, so the values are read as bytes.
    values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    if sys.byteorder == "big":
        values = values.reshape(-1, tensor.element_size())[:, ::-1].copy()
    digest.update(values.data)  # releases the interpreter's lock
    return digest.hexdigest()[:16]


def fingerprint(model: nn.Module, head: frozenset[str] = frozenset()) -> dict[str, object] | None:
    """Return the hashes of a model's weights by name, and one digest of all outside the head.

    Of a model with adapters it is the fingerprint of the base below them, under the names that the base alone has. It
    holds parameters and persistent buffers, tied ones under each of their names, of quantised models what their state
    dict holds as plain tensors. Takes about as long as reading the weights once, and no memory of their size.

    Args:
        model: the model before it is sharded; of a model on several ranks one is enough.
        head: normalised names of the head's parameters, with adapters or without; they are not in the digest, because
            a head is new.

    Returns:
        `digest`, 64 hexadecimal digits: the SHA-256 of the lines `name hash`, sorted by name, each ended by a newline;
        `tensors`: name to `tensor_hash`, the head's too. None where the weights are not there (meta tensors, DeepSpeed
        ZeRO-3, shards), or where the adapters have changed those of the base (PiSSA, LoftQ, KaSA and others).

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> before = fingerprint(model, head=frozenset({"1.weight", "1.bias"}))
        >>> list(before["tensors"])
        ['0.bias', '0.weight', '1.bias', '1.weight']
        >>> with torch.no_grad():
        ...     _ = model[1].bias.zero_()
        >>> after = fingerprint(model, head=frozenset({"1.weight", "1.bias"}))
        >>> before["digest"] == after["digest"], before["tensors"]["1.bias"] == after["tensors"]["1.bias"]
        (True, False)
    """
    if changes_base(model) or any(getattr(parameter, "ds_numel", 0) for parameter in model.parameters()):
        return None
    base = base_model(model)
    tensors = {name: tensor for key, value in base.state_dict().items() for name, tensor in _parts(base, key, value)}
    if any(tensor.is_meta or isinstance(tensor, DTensor) for tensor in tensors.values()):
        return None
    distinct = {_place(tensor): tensor for tensor in tensors.values()}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        hashes = dict(zip(distinct, pool.map(tensor_hash, distinct.values()), strict=True))
    found = {name: hashes[_place(tensors[name])] for name in sorted(tensors)}
    adapters = frozenset(getattr(model, "peft_config", None) or ())
    apart = {_without_adapters(name, adapters) for name in head}
    lines = "".join(f"{name} {value}\n" for name, value in found.items() if name not in apart)
    return {"digest": hashlib.sha256(lines.encode()).hexdigest(), "tensors": found}


def base_model(model: nn.Module) -> nn.Module:
    """Return the model below PEFT's wrapper, or the model itself.

    Example:
        >>> base_model(nn.Linear(2, 2))
        Linear(in_features=2, out_features=2, bias=True)
    """
    inside = getattr(model, "get_base_model", None) if is_peft(model) else None
    base: nn.Module = inside() if inside is not None else model
    return base


def changes_base(model: nn.Module) -> bool:
    """Return whether an adapter has rewritten the weights below it when it was made, as PiSSA does.

    Then the base below the adapters is not the pretrained model; base and adapters together are, or nearly.

    Example:
        >>> changes_base(nn.Linear(2, 2))
        False
    """
    for config in (getattr(model, "peft_config", None) or {}).values():
        way = getattr(config, "init_lora_weights", True)
        if (isinstance(way, str) and way.lower() not in _KEEPS_BASE) or getattr(config, "kasa_config", None):
            return True
    return False


def _parts(base: nn.Module, key: str, value: object) -> list[tuple[str, Tensor]]:
    """Return the plain tensors of an entry of the base's state dict, by the name that the base alone gives them."""
    name = _name_in_base(base, key)
    if name is None or not isinstance(value, Tensor) or value.layout != torch.strided or value.is_quantized:
        return []  # what is packed in another way has no bytes of its own to read
    if hasattr(value, "__tensor_flatten__") and not isinstance(value, DTensor):  # a quantised weight, as torchao's
        inner, _ = value.__tensor_flatten__()
        return [part for part_name in inner for part in _parts(base, f"{key}.{part_name}", getattr(value, part_name))]
    return [(name, value)]


def _name_in_base(module: nn.Module | None, key: str) -> str | None:
    """Return the name that the base alone has for an entry of its state dict; None if it is an adapter's."""
    kept = []
    for part in key.split("."):
        inner = _inner(module) if module is not None else None
        if inner is not None and part != inner:
            return None
        if inner is None:
            kept.append(part)
        below = getattr(module, part, None)
        module = below if isinstance(below, nn.Module) else None
    return normalise(".".join(kept))


def _inner(module: nn.Module) -> str | None:
    """Return what a PEFT module calls its part of the base; None if it is no PEFT module."""
    if not any(kind.__module__.startswith("peft.") for kind in type(module).__mro__):
        return None
    return next((name for name in _INNER if module._modules.get(name) is not None), "")


def _without_adapters(name: str, adapters: frozenset[str]) -> str:
    """Return a parameter's name without what PEFT puts into it, where it is the base's or a copy of the base's."""
    kept: list[str] = []
    before = ""
    for part in name.split("."):
        if part not in (*_INNER[:-1], "modules_to_save") and not (before == "modules_to_save" and part in adapters):
            kept.append(part)
        before = part
    return ".".join(kept)


def _place(tensor: Tensor) -> tuple[object, ...]:
    """Return what tied tensors have in common."""
    same_memory = tensor.data_ptr() or id(tensor)
    return (tensor.device, tensor.dtype, same_memory, tuple(tensor.shape), tensor.stride())
