"""Hashes of weights, by which another base of the same shape is told from the one trained on; without torch."""

import hashlib
import json
import os
import struct
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHUNK = 1 << 22  # bytes read at a time
# What safetensors calls a dtype, and what torch does.
DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
    "U64": "uint64", "I64": "int64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz", "F8_E8M0": "float8_e8m0fnu",
    "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64", "C64": "complex64",
}  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file: its dtype as torch names it, its shape, and where its bytes lie."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def bytes_hash(dtype: str, shape: Iterable[int], pieces: Iterable[Any]) -> str:
    r"""Return 16 hexadecimal digits that change with any bit of a tensor, its dtype and its shape.

    The first of the SHA-256 of `dtype shape`, a newline, and the values' bytes; so `recipe.json` has them.

    Args:
        dtype: as torch names it, without `torch.`.
        shape: the sizes.
        pieces: the values' bytes, row by row and little-endian, in one piece or several.

    Example:
        >>> bytes_hash("float32", (2, 3), [bytes(24)]) == hashlib.sha256(b"float32 2x3\n" + bytes(24)).hexdigest()[:16]
        True
    """
    digest = hashlib.sha256(f"{dtype} {'x'.join(str(size) for size in shape)}\n".encode())
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()[:16]


def read_header(path: str | Path) -> dict[str, Stored]:
    """Return the tensors of a safetensors file by name, from its header alone.

    Raises:
        ValueError: the file is no safetensors file, or is cut short.

    Example:
        >>> import numpy, safetensors.numpy, tempfile
        >>> file = Path(tempfile.mkdtemp(), "model.safetensors")
        >>> safetensors.numpy.save_file({"weight": numpy.zeros((2, 3), "float32")}, file)
        >>> stored = read_header(file)["weight"]
        >>> stored.dtype, stored.shape, stored.end - stored.start
        ('float32', (2, 3), 24)
    """
    size = Path(path).stat().st_size
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size:
                raise ValueError("its header goes beyond its end")
            header = json.loads(file.read(length))
        first = 8 + length
        found = {
            name: Stored(DTYPES[entry["dtype"]], tuple(entry["shape"]), *(first + at for at in entry["data_offsets"]))
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"`{path}` is no safetensors file ({error!r}); restore it.") from None
    end = max((stored.end for stored in found.values()), default=first)
    if end != size:
        raise ValueError(f"`{path}` has {size} bytes, expected {end} by its header: it was cut short; restore it.")
    return found


def file_hashes(paths: Iterable[str | Path]) -> dict[str, str]:
    """Return the hash of each tensor in safetensors files, by name, as `bytes_hash` computes it.

    Reads each file once, a few MB at a time. The names are those in the files; a model can have others.

    Args:
        paths: one file, or the shards of one checkpoint.

    Raises:
        ValueError: a file is no safetensors file or is cut short, or two files hold a tensor of the same name.

    Example:
        >>> import numpy, safetensors.numpy, tempfile
        >>> file = Path(tempfile.mkdtemp(), "model.safetensors")
        >>> safetensors.numpy.save_file({"weight": numpy.zeros((2, 3), "float32")}, file)
        >>> file_hashes([file]) == {"weight": bytes_hash("float32", (2, 3), [bytes(24)])}
        True
    """
    tensors: dict[str, tuple[Path, Stored]] = {}
    for path in map(Path, paths):
        for name, stored in read_header(path).items():
            if name in tensors:
                raise ValueError(f"tensor `{name}` is in `{tensors[name][0]}` and in `{path}`; expected it once.")
            tensors[name] = (path, stored)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(tensors, pool.map(lambda found: _stored_hash(*found), tensors.values()), strict=True))


def file_sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits, read a few MB at a time.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp(), "a.txt")
        >>> _ = file.write_bytes(b"abc")
        >>> file_sha256(file)[:8]
        'ba7816bf'
    """
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _stored_hash(path: Path, stored: Stored) -> str:
    return bytes_hash(stored.dtype, stored.shape, _pieces(path, stored))


def _pieces(path: Path, stored: Stored) -> Iterator[bytes]:
    with open(path, "rb") as file:
        file.seek(stored.start)
        left = stored.end - stored.start
        while left:
            piece = file.read(min(left, CHUNK))
            left -= len(piece)
            yield piece
