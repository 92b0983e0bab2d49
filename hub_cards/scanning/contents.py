"""What can be read of a file: its text, a safetensors header, the text chunks of a PNG; and a pickle recognised.

Nothing is unpickled and no tensor is read.
"""

import io
import json
import pickletools
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

PICKLE, UNREADABLE, HEADER = "pickle", "unreadable text", "unreadable safetensors header"
_BOMS = (
    (b"\xef\xbb\xbf", "utf-8-sig"),
    (b"\xff\xfe\x00\x00", "utf-32"),
    (b"\x00\x00\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)
_CONTROL = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f]")
_PRINTABLE = re.compile(rb"[\t\x20-\x7e]{6,}")
_PNG = b"\x89PNG\r\n\x1a\n"
_PIXELS = frozenset(
    {b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"gAMA", b"cHRM", b"sRGB", b"pHYs", b"bKGD", b"tIME", b"sBIT"}
)
# SentencePiece models are binary by their nature; of pictures that are not PNG the readable runs are looked at.
_BINARY = frozenset({".model", ".spm", ".jpg", ".jpeg", ".gif", ".webp"})
_MAX_HEADER = 100_000_000  # bytes; the safetensors library refuses more
_MAX_CHUNK = 16_000_000  # bytes of one decompressed text chunk


class Content(NamedTuple):
    r"""One text of a file; `lines` is False where its lines are not the file's, as in a picture.

    Example:
        >>> Content("a\nb", lines=True).text
        'a\nb'
    """

    text: str
    lines: bool


class Problem(NamedTuple):
    """A file that must not be published whatever it says: `kind`, and what was seen.

    Example:
        >>> Problem(PICKLE, "protocol 4").kind
        'pickle'
    """

    kind: str
    seen: str


def contents(name: str, source: Path | bytes) -> Iterator[Content | Problem]:
    r"""Yields the texts of one file, or what is wrong with it.

    Args:
        name: the file's name in the repository; the suffix tells a safetensors file and a binary vocabulary.
        source: the file, or its bytes.

    Raises:
        OSError: the file cannot be read.

    Example:
        >>> list(contents("README.md", "é".encode("latin-1")))
        [Content(text='é', lines=True)]
        >>> [problem.kind for problem in contents("README.md", b"\x80\x04N.")]
        ['pickle']
    """
    if PurePosixPath(name).suffix.lower() == ".safetensors":
        yield _header(source)
        return
    data = source if isinstance(source, bytes) else source.read_bytes()
    if (problem := _pickle(data)) is not None:
        yield problem
    elif data.startswith(_PNG):
        yield from _png(data)
    elif PurePosixPath(name).suffix.lower() in _BINARY:
        yield Content(b"\n".join(_PRINTABLE.findall(data)).decode("ascii"), lines=False)
    elif (text := decode(data)) is not None:
        yield Content(text, lines=True)
    else:
        yield Problem(UNREADABLE, f"{len(data)} bytes that are neither UTF-8 nor UTF-16 nor Latin-1 text")


def decode(data: bytes) -> str | None:
    r"""Returns the text of `data` in UTF-8, UTF-16, UTF-32 or Latin-1, or None when it is no text.

    Example:
        >>> decode("abc".encode("utf-16-be")), decode(b"\x00\x01\x02")
        ('abc', None)
    """
    for bom, codec in _BOMS:
        if data.startswith(bom):
            return _strict(data, codec)
    if 0 in data:
        even, odd = data[0::2].count(0), data[1::2].count(0)
        if len(data) % 4 == 0 and min(even, odd) > len(data) // 8:
            return _strict(data, "utf-32-be" if data[0] == 0 else "utf-32-le")
        if min(even, odd) or max(even, odd) < len(data) // 16:
            return None
        return _strict(data, "utf-16-be" if even else "utf-16-le")
    text = _strict(data, "utf-8")
    if text is None and not _CONTROL.search(data):
        text = data.decode("latin-1")
    return text if text is not None and not _CONTROL.search(data) else None


def _strict(data: bytes, codec: str) -> str | None:
    try:
        text = data.decode(codec)
    except UnicodeDecodeError:
        return None
    return None if "\0" in text else text


def _pickle(data: bytes) -> Problem | None:
    if len(data) > 1 and data[0] == 0x80 and data[1] <= 5:
        return Problem(PICKLE, f"begins with the opcode of pickle protocol {data[1]}")
    if data[257:262] == b"ustar" and b"pickle" in data[:1024]:
        return Problem(PICKLE, "a tar archive of torch's oldest format")
    if data.startswith(b"PK\x03\x04") or b"PK\x05\x06" in data[-65_600:]:
        try:
            names = zipfile.ZipFile(io.BytesIO(data)).namelist()
        except zipfile.BadZipFile:
            return None
        pickles = [name for name in names if name.endswith((".pkl", ".pickle", ".pt", ".bin"))]
        return Problem(PICKLE, f"a zip archive with {pickles[0]}") if pickles else Problem(UNREADABLE, "a zip archive")
    if data[:1] in b"(c]}IVL" and data.rstrip().endswith(b".") and b"\n" in data:
        try:
            opcodes = [opcode.name for opcode, _, _ in pickletools.genops(data)]
        except (ValueError, UnicodeDecodeError):
            return None
        if {"GLOBAL", "INST", "PUT", "APPEND", "SETITEM", "REDUCE", "BUILD"} & set(opcodes):
            return Problem(PICKLE, "reads as pickle protocol 0")
    return None


def _header(source: Path | bytes) -> Content | Problem:
    stream = io.BytesIO(source) if isinstance(source, bytes) else source.open("rb")
    with stream:
        size = stream.seek(0, io.SEEK_END)
        stream.seek(0)
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
        if not 2 <= length <= min(size - 8, _MAX_HEADER):
            stream.seek(0)
            head = stream.read(1024)
            return _pickle(head) or Problem(HEADER, f"its length is given as {length} in a file of {size} bytes")
        raw = stream.read(length)
    try:
        text = raw.decode("utf-8")
        header = json.loads(text)
        tensors = [entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"]
        end = max((int(stop) for _, stop in tensors), default=0)
    except (UnicodeDecodeError, ValueError, AttributeError, KeyError, TypeError) as error:
        return Problem(HEADER, f"{type(error).__name__} while reading it")
    if 8 + length + end != size:
        return Problem(HEADER, f"it describes {8 + length + end} bytes, the file has {size}")
    return Content(text, lines=False)


def _png(data: bytes) -> Iterator[Content | Problem]:
    at = len(_PNG)
    while at + 12 <= len(data):
        length, kind = struct.unpack(">I4s", data[at : at + 8])
        body = data[at + 8 : at + 8 + length]
        at += 12 + length
        if kind == b"IEND":
            break
        if kind in (b"tEXt", b"zTXt", b"iTXt"):
            try:
                yield Content(_chunk_text(kind, body), lines=False)
            except (ValueError, zlib.error) as error:
                yield Problem(UNREADABLE, f"a {kind.decode()} chunk: {error}")
        elif kind not in _PIXELS:
            yield Content(b"\n".join(_PRINTABLE.findall(body)).decode("ascii"), lines=False)
    if at < len(data):
        yield Problem(UNREADABLE, f"{len(data) - at} bytes after the end of the picture")
    elif at > len(data):
        yield Problem(UNREADABLE, "a picture that ends in the middle of a chunk")


def _chunk_text(kind: bytes, body: bytes) -> str:
    keyword, _, rest = body.partition(b"\0")
    if kind == b"tEXt":
        text, codec = rest, "latin-1"
    elif kind == b"zTXt":
        text, codec = _inflate(rest[1:]), "latin-1"
    else:
        is_compressed, tail = rest[:1] == b"\1", rest[2:]
        language, _, tail = tail.partition(b"\0")
        translated, _, tail = tail.partition(b"\0")
        text, codec = language + b"\n" + translated + b"\n" + (_inflate(tail) if is_compressed else tail), "utf-8"
    return f"{keyword.decode('latin-1')}: {text.decode(codec)}"


def _inflate(data: bytes) -> bytes:
    stream = zlib.decompressobj()
    text = stream.decompress(data, _MAX_CHUNK)
    if stream.unconsumed_tail:
        raise ValueError(f"more than {_MAX_CHUNK} bytes when decompressed")
    return text
