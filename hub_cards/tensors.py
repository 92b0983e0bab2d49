"""Safetensors files read without torch: their headers, whether they are whole, and hashes of their tensors."""

import hashlib
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

# As safetensors names them -> (as torch names them, bytes of an element).
_DTYPES = {
    "BOOL": ("bool", 1),
    "U8": ("uint8", 1),
    "I8": ("int8", 1),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "F8_E8M0": ("float8_e8m0fnu", 1),
    "U16": ("uint16", 2),
    "I16": ("int16", 2),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "U32": ("uint32", 4),
    "I32": ("int32", 4),
    "F32": ("float32", 4),
    "U64": ("uint64", 8),
    "I64": ("int64", 8),
    "F64": ("float64", 8),
    "C64": ("complex64", 8),
}
_CONVERTIBLE = ("float32", "float16", "bfloat16")
_LONGEST_HEADER = 100_000_000  # bytes, the format's own limit
_CHUNK = 1 << 22  # elements converted at a time


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies in a file: its dtype as torch names it, its shape, and its bytes from `start` to `end`."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file by name, from its header; the file has to be whole.

    Args:
        path: the file.

    Raises:
        ValueError: it is no safetensors file (a pickle of any name, for one), or it is cut short or too long.

    Example:
        >>> import tempfile
        >>> from safetensors.numpy import save_file
        >>> path = Path(tempfile.mkdtemp(), "model.safetensors")
        >>> save_file({"a": np.zeros((2, 3), np.float32)}, path)
        >>> read_header(path)["a"].shape
        (2, 3)
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(_LONGEST_HEADER, size - 8):
                raise ValueError("its header's length is beyond the file's end")
            header = json.loads(file.read(length))
        found = {name: _tensor(path, entry, 8 + length) for name, entry in header.items() if name != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise ValueError(
            f"`{path.name}` is no safetensors file ({error}); expected weights saved by `save_pretrained`. "
            "A pickle under another name is never published: save the model again."
        ) from None
    end = 8 + length
    for name, tensor in sorted(found.items(), key=lambda item: item[1].start):
        if tensor.start != end:
            raise ValueError(f"`{path.name}` has a gap before tensor `{name}`; it is damaged. Save the model again.")
        end = tensor.end
    if end != size:
        raise ValueError(
            f"`{path.name}` has {size:,} bytes, its header says {end:,}: it was cut short or overwritten. "
            "Save the model again."
        )
    return found


def tensor_hash(tensor: Tensor, dtype: str | None = None) -> str:
    r"""Return 16 hexadecimal digits of a tensor: the first of the SHA-256 of `dtype shape`, a newline, and its bytes.

    Args:
        tensor: from `read_header`.
        dtype: the floating-point type that it is converted to first; None: its own.

    Example:
        >>> import tempfile
        >>> from safetensors.numpy import save_file
        >>> path = Path(tempfile.mkdtemp(), "model.safetensors")
        >>> save_file({"a": np.zeros((2, 3), np.float32)}, path)
        >>> tensor_hash(read_header(path)["a"]) == hashlib.sha256(b"float32 2x3\n" + bytes(24)).hexdigest()[:16]
        True
    """
    shape = "x".join(str(size) for size in tensor.shape)
    digest = hashlib.sha256(f"{dtype or tensor.dtype} {shape}\n".encode())
    for chunk in _chunks(tensor):
        digest.update(_convert(chunk, tensor.dtype, dtype) if dtype and dtype != tensor.dtype else chunk)
    return digest.hexdigest()[:16]


def other_dtypes(tensor: Tensor) -> tuple[str, ...]:
    """Return the types that loading can have converted a tensor to; none for integers."""
    return tuple(dtype for dtype in _CONVERTIBLE if dtype != tensor.dtype) if tensor.dtype in _CONVERTIBLE else ()


def _tensor(path: Path, entry: dict[str, Any], offset: int) -> Tensor:
    dtype, width = _DTYPES[entry["dtype"]]
    shape, (start, end) = tuple(entry["shape"]), entry["data_offsets"]
    if end - start != width * int(np.prod(shape, dtype=np.int64)):
        raise ValueError("a tensor's size does not fit its shape")
    return Tensor(path, dtype, shape, offset + start, offset + end)


def _chunks(tensor: Tensor) -> Iterator[bytes]:
    left = tensor.end - tensor.start
    with tensor.file.open("rb") as file:
        file.seek(tensor.start)
        while left:
            chunk = file.read(min(left, 8 * _CHUNK))
            if not chunk:
                raise ValueError(f"`{tensor.file.name}` became shorter while it was read; publish again.")
            left -= len(chunk)
            yield chunk


def _convert(chunk: bytes, source: str, target: str) -> bytes:
    """Return floating-point numbers in another type, rounded to nearest, ties to even, as torch does it."""
    if source == "bfloat16":
        values = (np.frombuffer(chunk, "<u2").astype("<u4") << 16).view("<f4")
    else:
        values = np.frombuffer(chunk, {"float32": "<f4", "float16": "<f2"}[source]).astype("<f4")
    if target == "bfloat16":
        bits = values.view("<u4")
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return np.where(np.isnan(values), (bits >> 16) | 0x40, rounded).astype("<u2").tobytes()
    with np.errstate(over="ignore"):
        return values.astype({"float32": "<f4", "float16": "<f2"}[target]).tobytes()
