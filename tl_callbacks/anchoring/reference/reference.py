"""The reference: the pretrained weights that an anchor pulls toward, and where they live."""

import hashlib
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tl_callbacks.anchoring.reference.copies import given, moved, snapshot
from tl_callbacks.anchoring.reference.mapped import MappedFiles, checkpoint_files
from tl_callbacks.dtensors import local, placed_like, shard_like
from tl_callbacks.errors import NoEffectWarning
from tl_callbacks.fingerprints import base_model, tensor_hash
from tl_callbacks.parameters import parameters_by_name

Source = Literal["checkpoint"] | Mapping[str, Tensor] | None


class Reference:
    """The weights that an anchor pulls toward, by normalised name, wherever they live.

    Make it with `Reference.take`, before anything is loaded or trained.

    Attributes:
        mapped: name to the name in the files, of those that are mapped.
        copied: name to why it is copied, where mapping was asked for.
    """

    def __init__(self, source: Source, dtype: torch.dtype | None, device: str | torch.device | None) -> None:
        self.kind: Literal["memory", "given", "checkpoint"]
        self.kind = "memory" if source is None else "checkpoint" if source == "checkpoint" else "given"
        self._tensors: dict[str, Tensor] = {}
        self.mapped: dict[str, str] = {}
        self.copied: dict[str, str] = {}
        self._files: MappedFiles | None = None
        self._dtype, self._device = dtype, device
        self._dtypes: dict[str, torch.dtype] = {}  # the parameters', when the reference was taken
        self._hashes: dict[str, str] = {}  # of the values in these dtypes
        self._differing: set[str] | None = None  # the names whose values are not the same on all ranks

    @classmethod
    @torch.no_grad()
    def take(
        cls,
        model: nn.Module,
        names: Iterable[str],
        *,
        source: Source = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
    ) -> "Reference":
        """Return the reference of a model as it is now.

        Args:
            model: the model, before training and before it is sharded.
            names: normalised names of the parameters that are anchored.
            source: None: copies of the parameters. "checkpoint": the safetensors files that the model was loaded from,
                mapped into memory, so that the reference takes none; each tensor is compared bit by bit with the
                parameter, and what the files do not hold is copied (`summary` says why). Tensors by parameter name,
                such as a `state_dict()`: copies of these.
            dtype: of the copies, such as torch.bfloat16, which takes half the memory of float32 and pulls toward
                rounded weights; None: the parameters'.
            device: of the copies, such as "cpu"; None: the parameters'.

        Raises:
            ValueError: a given tensor is missing or has another shape; there is no checkpoint to map; or `dtype` or
                `device` are given with source="checkpoint".

        Example:
            >>> reference = Reference.take(nn.Linear(2, 2), ["weight", "bias"], dtype=torch.bfloat16)
            >>> reference.summary()
            'the reference: 2 tensors in memory, in bfloat16 on the cpu'
        """
        if isinstance(source, str) and source != "checkpoint":
            raise ValueError(
                f'the reference is {source!r}; expected None, "checkpoint" or a mapping of names to tensors.'
            )
        if source == "checkpoint" and not (dtype is None and device is None):
            raise ValueError(
                'the reference "checkpoint" with a dtype or a device; expected neither, as the weights stay in the '
                'file as they are. Leave them out, or leave "checkpoint" out for copies.'
            )
        taken, names = cls(source, dtype, device), list(names)
        parameters = parameters_by_name(model)
        taken._dtypes = {name: parameters[name].dtype for name in names}
        if source is None:
            taken._hashes = _hashes({name: parameters[name] for name in names})
            taken._tensors = snapshot(model, names, dtype=dtype, device=device)
        elif isinstance(source, str):
            taken._map(model, {name: parameters[name].detach() for name in names})
            if not taken.mapped and not any(tensor.is_meta for tensor in taken._tensors.values()):
                warnings.warn(f"{taken.summary()}. Nothing is mapped.", NoEffectWarning, stacklevel=2)
        else:
            tensors = given(model, names, source)
            taken._hashes = _hashes(tensors)
            taken._tensors = {name: moved(tensor, dtype, device) for name, tensor in tensors.items()}
        return taken

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Name to whole tensor: copies, or mapped from the files, which are checked first. Do not write to them."""
        self.check()
        return self._tensors

    @property
    def fingerprint(self) -> str | None:
        """16 hexadecimal digits of the values in the parameters' dtypes, wherever they live.

        After `agree` it is the same on all ranks; until then None on a rank that has no weights yet (accelerate's
        cpu_ram_efficient_loading). None where there are no tensors, too.
        """
        if not self._hashes:
            return None
        lines = "".join(f"{name} {self._hashes[name]}\n" for name in sorted(self._hashes))
        return hashlib.sha256(lines.encode()).hexdigest()[:16]

    def vouch(self, tensors: Mapping[str, Tensor]) -> None:
        """Count tensors in the fingerprint that belong to the reference and are held elsewhere.

        Args:
            tensors: by a name that no parameter has.
        """
        self._hashes |= _hashes(tensors)

    def summary(self) -> str:
        """Return where the reference lives, in words, and why where not all of it is where it was asked for."""
        held = list(self._tensors.values())
        text = f"the reference: {len(held)} tensors"
        if self._files is None:
            kinds = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in held})
            places = sorted({tensor.device.type for tensor in held})
            return f"{text} in memory, in {', '.join(kinds)} on the {', '.join(places)}"
        folders = sorted({str(file.parent) for file in self._files.files})
        text += f", {len(self.mapped)} mapped from {', '.join(folders) or 'no file'}"
        for why, count in Counter(self.copied.values()).items():
            first = next(name for name in self.copied if self.copied[name] == why)
            text += f"; {count} of {len(held)} are copied, as they {why}: `{first}`{' and others' * (count > 1)}"
        for file, why in self._files.left_out.items():
            text += f"; `{file}` is left out, as it cannot be read ({why})"
        return text

    def facts(self) -> dict[str, Any]:
        """Return kind, fingerprint and number of tensors, and of mapped ones the files and why others are copied."""
        facts: dict[str, Any] = {
            "kind": self.kind, "fingerprint": self.fingerprint, "tensors": len(self._tensors),
            "dtype": self._dtype and str(self._dtype).removeprefix("torch."),
            "device": self._device and str(self._device),
        }  # fmt: skip
        if self._files is not None:
            facts |= {"files": [file.name for file in self._files.files], "mapped": len(self.mapped)}
            facts["left_out"] = {file.name: why for file, why in self._files.left_out.items()}
            facts["copied"] = {f"they {why}": count for why, count in Counter(self.copied.values()).items()}
        return facts

    def check(self) -> None:
        """Refuse a checkpoint's file that was written to since it was mapped and holds other values.

        Takes microseconds; of a file that was only touched, once as long as reading it.

        Raises:
            RuntimeError: one was.
        """
        if self._files is not None:
            self._files.check(self._unchanged)

    def agree(self) -> set[str]:
        """Take the first rank's values for all, once; return the names whose values differed. Call it on all ranks."""
        if self._differing is None:
            self._differing = self._agree()
        return self._differing

    def leave_out(self, names: Iterable[str]) -> None:
        """Forget tensors that are no part of the reference after all. Give all ranks the same."""
        for name in names:
            for held in (self._tensors, self.mapped, self.copied, self._dtypes, self._hashes):
                held.pop(name, None)

    @torch.no_grad()
    def placed(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the reference as the operations take it beside this model's parameters. Call it on all ranks.

        Copies in the parameters' dtypes follow the parameters, into their shards too; all else stays where it is, and
        of a sharded parameter it is this rank's part, without a copy. All ranks have the reference of the first one, as
        DDP and FSDP2 give them its weights: ranks that made new weights under other seeds would be pulled apart. Where
        the fingerprints differ, they get copies.

        Args:
            model: the model as it trains.

        Raises:
            RuntimeError: a checkpoint's file was written to since it was mapped.
        """
        self.check()
        parameters, differing = parameters_by_name(model), self.agree()
        result = {}
        for name in self._tensors:
            like, differs = parameters[name], name in differing
            follows = name not in self.mapped and self._dtype is None and self._device is None
            if differs and not isinstance(like, DTensor):
                self._tensors[name] = self._from_first(name, like)
            tensor = self._tensors[name]
            if follows:
                result[name] = placed_like(tensor, like)  # the first rank's
            elif differs and isinstance(like, DTensor):
                result[name] = moved(local(placed_like(tensor, like)), self._dtype, self._device)
            else:
                result[name] = self._exact(name, shard_like(tensor, like), like)
        return result

    def _exact(self, name: str, tensor: Tensor, like: Tensor) -> Tensor:
        """Return a tensor that has the values of the parameter's first dtype, which a mapped one has after a cast."""
        was = self._dtypes[name]
        if name in self.mapped and tensor.dtype != was and like.dtype != was:
            return tensor.to(was)  # loaded in a low precision, and trained in a higher one
        return tensor

    def _unchanged(self, key: str) -> bool:
        """Return whether what is mapped from a tensor of the files has the values it had."""
        assert self._files is not None
        stored = self._files.tensors[key]
        names = [name for name, mapped in self.mapped.items() if mapped == key]
        return all(tensor_hash(stored.to(self._dtypes[name])) == self._hashes[name] for name in names)

    def _map(self, model: nn.Module, parameters: Mapping[str, Tensor]) -> None:
        """Take the parameters from the files where they are there, and copy the others."""
        self._files = MappedFiles(checkpoint_files(model))
        plain = {name: tensor for name, tensor in parameters.items() if _readable(tensor)}
        self._hashes = _hashes(plain)
        self.mapped = self._files.find(plain)
        prefix = str(getattr(base_model(model), "base_model_prefix", ""))
        for name, parameter in parameters.items():
            if name in self.mapped:
                self._tensors[name] = self._files.tensors[self.mapped[name]]
            else:
                self._tensors[name] = parameter.clone()
                if not parameter.is_meta:
                    self.copied[name] = self._files.why_not(name, parameter, prefix)
        if not any(parameter.is_meta for parameter in parameters.values()):
            self._files.keep(self.mapped.values())

    def _agree(self) -> set[str]:
        """Return the names whose values are not the same on all ranks; all take the first one's hashes."""
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return set()
        shared: list[Any] = [(self._hashes, self.mapped, self.copied)]
        dist.broadcast_object_list(shared, src=0)
        hashes, mapped, copied = shared[0]
        for name, key in mapped.items():
            if self._files is not None and self._tensors[name].is_meta:
                self._map_meta(name, key, hashes[name])
        mine = {name for name, value in hashes.items() if self._hashes.get(name) != value}
        mine |= {name for name in hashes if (name in self.mapped) != (name in mapped)}
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, mine)
        self._hashes, self.copied = hashes, dict(copied)
        differing = set().union(*gathered)
        self.copied |= {name: "differ between the ranks" for name in differing if name in mapped}
        for name in differing & self.mapped.keys():  # the first rank's will be written over them
            self._tensors[name] = self._tensors[name].to(self._dtypes[name], copy=True)
            del self.mapped[name]
        return differing

    def _map_meta(self, name: str, key: str, expected: str) -> None:
        """Map what the first rank has mapped, on a rank that has no weights to compare with, if it is the same."""
        assert self._files is not None
        stored = self._files.tensors.get(key)
        if stored is not None and stored.shape == self._tensors[name].shape:
            found = tensor_hash(stored.to(self._dtypes[name]))
            if found == expected:
                self._tensors[name], self.mapped[name], self._hashes[name] = stored, key, found

    def _from_first(self, name: str, like: Tensor) -> Tensor:
        """Return the first rank's tensor as a copy on all ranks."""
        copy = self._tensors[name].to(like.device, self._dtypes[name], copy=True)
        dist.broadcast(copy, src=0)
        return moved(copy, self._dtype, self._device)


def _readable(tensor: Tensor) -> bool:
    """Return whether a tensor is plain and has values to read."""
    special = isinstance(tensor, DTensor) or hasattr(tensor, "__tensor_flatten__") or tensor.is_quantized
    return not (special or tensor.is_meta or tensor.layout != torch.strided)


def _hashes(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the hashes of those tensors that can be read."""
    readable = {name: tensor for name, tensor in tensors.items() if _readable(tensor)}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(readable, pool.map(tensor_hash, readable.values()), strict=True))
