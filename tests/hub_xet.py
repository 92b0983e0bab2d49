"""Reads hf_xet's content store in a local folder: which files it holds, and their bytes.

A client that is told `casUrl: local:///folder` writes there what it would upload. Only the store's shards know which
sha256 belongs to which xet hash, and a commit names its files by sha256.
"""

import shutil
import struct
import tempfile
from pathlib import Path

import hf_xet

ENTRY = 48  # bytes: a shard is a header, then per file a header, its segments and what the flags announce
VERIFIED, DESCRIBED = 1 << 31, 1 << 30


def _hex(raw: bytes) -> str:
    """Xet's hashes are written as four little-endian 64-bit numbers."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", raw))


def hashes(folder: Path) -> dict[str, tuple[str, int]]:
    """(xet hash, size in bytes) of every stored file by its sha256."""
    found = {}
    for shard in folder.rglob("shards/*.mdb"):
        data, at = shard.read_bytes(), ENTRY
        while data[at : at + 32] != b"\xff" * 32:
            flags, segments = struct.unpack_from("<II", data, at + 32)
            size = sum(struct.unpack_from("<I", data, at + ENTRY * n + 36)[0] for n in range(1, segments + 1))
            name = data[at : at + 32]
            at += ENTRY * (1 + segments * (2 if flags & VERIFIED else 1))
            if flags & DESCRIBED:
                found[_hex(data[at : at + 32])] = (_hex(name), size)
                at += ENTRY
    return found


def read(folder: Path, xet_hash: str, size: int) -> bytes:
    """The bytes of a stored file. Read from a copy: the client that wrote the store may still hold its lock."""
    with tempfile.TemporaryDirectory() as copy:
        shutil.copytree(folder, copy, dirs_exist_ok=True)
        session = hf_xet.XetSession()  # held by a name: a stream whose session is gone ends at once, without an error
        group = session.new_download_stream_group(endpoint=f"local://{copy}")
        data = b"".join(group.download_stream(hf_xet.XetFileInfo(xet_hash, size)))
    assert len(data) == size, f"{xet_hash}: {len(data)} bytes of {size}"
    return data
