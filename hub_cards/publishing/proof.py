"""Whether a checkpoint is the one that training started from: the recorded hashes against the files' tensors."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hub_cards.fingerprints import Stored, bytes_hash, file_hashes, read_header

_FLOATS = ("float32", "float16", "bfloat16")  # what loading converts into each other
_CHUNK = 1 << 24  # bytes converted at a time
# Buffers that a model makes for itself, the same each time; checkpoints may lack them.
_MADE = ("position_ids", "token_type_ids", "num_batches_tracked", "inv_freq")


@dataclass(frozen=True)
class Proof:
    """What the comparison of the recorded hashes with a checkpoint says.

    Args:
        recorded: tensors of the fingerprint.
        found: those that the checkpoint holds, bit for bit.
        different: names of those that it holds with other contents.
        absent: names of those that neither it nor the adapter holds, and that loading did not build from others: they
            were random when training began.
    """

    recorded: int
    found: int
    different: tuple[str, ...]
    absent: tuple[str, ...]

    @property
    def holds(self) -> bool:
        """Whether the checkpoint is the recorded one: nothing differs, and at least half is there."""
        return self.recorded > 0 and not self.different and 2 * self.found >= self.recorded


def prove(
    recorded: Mapping[str, str],
    checkpoint: Iterable[Path],
    *,
    brought: Collection[str] = (),
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> Proof:
    """Return how the fingerprint of a run's base fits a checkpoint.

    A name in the model may have a part in front that the checkpoint's lacks (`bert.`), or the other way round. A tensor
    that is nowhere by name counts as found if one of the checkpoint's has its contents: loading renames some. One whose
    type was changed on loading is found too.

    Args:
        recorded: name to hash, as in `recipe.json`.
        checkpoint: its safetensors files.
        brought: names of tensors that an adapter's file holds itself, or of a new head: the checkpoint need not have
            them, and may hold others.
        shapes: of a full model's own weights. A tensor with another shape than the checkpoint's was made anew: a head
            for other classes, an embedding for more tokens.

    Raises:
        ValueError: a file is no whole safetensors file.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> from safetensors.numpy import save_file
        >>> path = Path(tempfile.mkdtemp(), "model.safetensors")
        >>> save_file({"layer.weight": np.zeros((2, 3), np.float32)}, path)
        >>> hashes = {"bert.layer.weight": file_hashes([path])["layer.weight"], "head.weight": "0" * 16}
        >>> prove(hashes, [path])
        Proof(recorded=2, found=1, different=(), absent=('head.weight',))
    """
    files = {name: path for path in checkpoint for name in read_header(path)}
    tensors = {name: stored for path in {*files.values()} for name, stored in read_header(path).items()}
    places, hashes = _places(recorded, tensors), file_hashes({*files.values()})
    found, contents, different = set[str](), set(hashes.values()), list[str]()
    for name, place in places.items():
        stored = tensors[place]
        if recorded[name] == hashes[place] or recorded[name] in _converted_hashes(files[place], stored):
            found.add(name)
            contents.add(recorded[name])
        elif (
            name not in brought
            and (shapes or {}).get(name, stored.shape) == stored.shape
            and not _is_quantised(name, recorded)
        ):
            different.append(name)
    found |= {name for name, value in recorded.items() if name not in places and value in contents}  # renamed, or tied
    left = set(tensors) - set(places.values())
    absent = [
        name
        for name in recorded
        if not (name in found or name in places or name in brought or name.endswith(_MADE) or _is_built(name, left))
    ]
    return Proof(len(recorded), len(found), tuple(sorted(different)), tuple(sorted(absent)))


def _places(recorded: Iterable[str], tensors: Collection[str]) -> dict[str, str]:
    """Return the checkpoint's name of each recorded tensor that is there, as it is or with a part in front changed."""
    exact = {name: name for name in recorded if name in tensors}
    others = [name for name in recorded if name not in tensors]
    options: list[dict[str, str]] = [
        {name: name.removeprefix(front) for name in others if name.removeprefix(front) in tensors}
        for front in _fronts(others)
    ] + [{name: front + name for name in others if front + name in tensors} for front in _fronts(tensors)]
    best: dict[str, str] = max(options, key=len, default={})
    return {**best, **exact}


def _fronts(names: Iterable[str]) -> list[str]:
    """Return what names begin with: their first one, two and three parts."""
    return sorted(
        {"".join(f"{part}." for part in name.split(".")[:-1][:count]) for name in names for count in (1, 2, 3)}
    )


def _is_quantised(name: str, recorded: Iterable[str]) -> bool:
    """Return whether a weight was quantised on loading: its scales lie beside it."""
    module = name.rpartition(".")[0]
    return any(other.startswith(f"{name}.") or other == f"{module}.SCB" for other in recorded)


def _is_built(name: str, left: Iterable[str]) -> bool:
    """Return whether loading can have built a tensor from others: some that have no other use lie in its module."""
    module = name.rpartition(".")[0]
    modules = [f".{part}." for part in (module, module.partition(".")[2]) if part]
    return any(part in f".{other}" for other in left for part in modules)


def _converted_hashes(path: Path, stored: Stored) -> Iterator[str]:
    """Return the hashes that a tensor has when loading changes its floating-point type."""
    for dtype in _FLOATS if stored.dtype in _FLOATS else ():
        if dtype != stored.dtype:
            yield bytes_hash(dtype, stored.shape, _converted(path, stored, dtype))


def _converted(path: Path, stored: Stored, dtype: str) -> Iterator[bytes]:
    """Return a tensor's bytes in another type, rounded to nearest and ties to even, as torch does it."""
    with path.open("rb") as file:
        file.seek(stored.start)
        for start in range(stored.start, stored.end, _CHUNK):
            piece = file.read(min(_CHUNK, stored.end - start))
            if stored.dtype == "bfloat16":
                values = (np.frombuffer(piece, "<u2").astype("<u4") << 16).view("<f4")
            else:
                values = np.frombuffer(piece, {"float32": "<f4", "float16": "<f2"}[stored.dtype]).astype("<f4")
            if dtype == "bfloat16":
                bits = values.view("<u4")
                rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
                yield np.where(np.isnan(values), (bits >> 16) | 0x40, rounded).astype("<u2").tobytes()
            else:
                with np.errstate(over="ignore"):
                    yield values.astype({"float32": "<f4", "float16": "<f2"}[dtype]).tobytes()
