"""Weights that stay in the safetensors files they came from, mapped into memory: they take no memory of the process.

A parameter is found in the files by its values, not by its name: whatever renaming its loading went through, the tensor
that holds the same bits is the reference.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from tl_callbacks.anchoring.operations.pulls import pieces

_SUFFIX = ".safetensors"
_START = 64  # elements by which tensors of one shape are told apart before all of their bits are compared

_Start = tuple[tuple[int, ...], bytes]


def checkpoint_files(model: nn.Module) -> list[Path]:
    """Return the safetensors files that a model may have been loaded from: local folders, or the Hub's cache.

    Each pretrained part of the model names where it came from. transformers does not keep which commit it loaded
    (5.23), so those of all commits in the cache are returned, each file once. Nothing asks the network.

    Args:
        model: the model, with or without adapters.

    Raises:
        ValueError: no part names a place, or no safetensors file is there.

    Example:
        >>> import tempfile
        >>> from transformers import BertConfig, BertModel
        >>> folder = tempfile.mkdtemp()
        >>> config = BertConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=1, intermediate_size=8)
        >>> BertModel(config).save_pretrained(folder)
        >>> [file.name for file in checkpoint_files(BertModel.from_pretrained(folder))]
        ['model.safetensors']
    """
    parts = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    names = list(dict.fromkeys(str(name) for part in parts if (name := getattr(part.config, "_name_or_path", None))))
    if not names:
        raise ValueError(
            f'the reference is "checkpoint", and the {type(model).__name__} names none; expected a model that '
            "from_pretrained loaded. Load it so, or keep the reference in memory."
        )
    found = {file.resolve(): file for name in names for folder in _folders(name) for file in _files(folder)}
    if not found:
        raise ValueError(
            f"no {_SUFFIX} file of `{', '.join(names)}` is in a local folder or in the cache {constants.HF_HUB_CACHE}; "
            "expected the files that the model was loaded from. Save it as safetensors with save_pretrained and load "
            "that, or keep the reference in memory."
        )
    return list(found.values())


def _folders(name: str) -> list[Path]:
    """Return the folder of a local checkpoint, or those of a Hub repository's commits in the cache."""
    if os.path.isfile(name):
        return [Path(name).parent]
    if os.path.isdir(name):
        return [Path(name)]
    try:
        snapshots = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type="model"), "snapshots")
    except ValueError:  # no name of a repository
        return []
    return sorted(snapshots.iterdir()) if snapshots.is_dir() else []


def _files(folder: Path) -> list[Path]:
    """Return the files at the top of a folder, or below where it has none at its top (`subfolder`)."""
    return sorted(folder.glob(f"*{_SUFFIX}")) or sorted(folder.rglob(f"*{_SUFFIX}"))


class ReferenceWrittenError(RuntimeError):
    """A file that holds the reference was written to, and is no longer what it was."""


class MappedFiles:
    """The tensors of safetensors files, mapped into memory: read from the disk's cache when they are used.

    What writes a file anew beside the old one (safetensors, the Hub's cache) leaves the mapped one as it was, even when
    it is deleted. What writes into the file itself changes the tensors: `check` tells.

    Args:
        files: the files; those that cannot be read are `left_out`, which says why by file.

    Example:
        >>> import tempfile
        >>> from safetensors.torch import save_file
        >>> path = Path(tempfile.mkdtemp(), "model.safetensors")
        >>> save_file({"weight": torch.ones(2)}, path)
        >>> MappedFiles([path]).find({"body.weight": torch.ones(2)})
        {'body.weight': 'weight'}
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self.files: list[Path] = []
        self.left_out: dict[Path, str] = {}
        self.tensors: dict[str, Tensor] = {}
        self._written: dict[Path, tuple[int, ...]] = {}
        self._file: dict[str, Path] = {}  # that a tensor is in
        self._starts: dict[torch.dtype, dict[_Start, list[str]]] = {}
        for file in files:
            written = _written(file)
            try:
                opened = safe_open(file, "pt")
            except (SafetensorError, OSError) as error:
                self.left_out[file] = str(error)
                continue
            self.files.append(file)
            self._written[file] = written
            with opened as stored:
                for key in stored.keys():  # noqa: SIM118
                    # A name that an earlier file has too, as of another commit, is told apart by its file.
                    unique = key if key not in self.tensors else f"{file}:{key}"
                    self.tensors[unique], self._file[unique] = stored.get_tensor(key), file

    def keep(self, names: Iterable[str]) -> None:
        """Let go of all tensors but these, and of the files that hold none of them.

        Args:
            names: in the files, as `find` returns them.
        """
        self.tensors = {name: self.tensors[name] for name in names}
        self.files = [file for file in self.files if file in {self._file[name] for name in self.tensors}]
        self._written = {file: self._written[file] for file in self.files}
        self._starts.clear()

    def check(self, unchanged: Callable[[str], bool]) -> None:
        """Refuse files that were written to since they were mapped and hold other values; takes microseconds.

        Args:
            unchanged: whether a tensor has the values that it had, by its name in the files. Asked of those of a file
                that was written to, which takes as long as reading it, once.

        Raises:
            ReferenceWrittenError: one holds other values, or has become shorter, so that reading it would end the
                process.
        """
        for file, then in self._written.items():
            now = _written(file)
            if now == then or now[:1] != then[:1]:  # as it was, or another in its place
                continue
            held = [name for name in self.tensors if self._file[name] == file]
            if now[1] < then[1] or not all(unchanged(name) for name in held):
                raise ReferenceWrittenError(
                    f"`{file}`, which holds the reference, was written to after the Trainer was made; expected a file "
                    "that stays as it is. Load the pretrained model again, and write to another folder."
                )
            self._written[file] = now

    def find(self, parameters: Mapping[str, Tensor]) -> dict[str, str]:
        """Return the name in the files of each parameter that is there bit for bit, in its dtype or before a cast.

        Args:
            parameters: name to plain tensor, of any device.
        """
        found = {}
        for name, parameter in parameters.items():
            same = self._index(parameter.dtype).get(_start(parameter, parameter.dtype), [])
            match = next((key for key in same if same_bits(parameter, self.tensors[key])), None)
            if match is not None:
                found[name] = match
        return found

    def why_not(self, name: str, parameter: Tensor, prefix: str) -> str:
        """Return why a parameter that `find` did not find cannot be mapped, as the end of "... are copied: they".

        Args:
            name: of the parameter.
            parameter: as the model has it.
            prefix: what the model puts before the names of its body, such as `bert`; "" if nothing.
        """
        parts = name.split(".")
        names = [".".join(parts[skipped:]) for skipped in range(len(parts))] + [f"{prefix}.{name}"]
        key = next((one for one in names if one in self.tensors), None)
        if key is None:
            return "are not in the file under their names (new, or converted when they were loaded)"
        if self.tensors[key].shape != parameter.shape:
            return "have another shape in the file"
        return "have other values in the file"

    def _index(self, dtype: torch.dtype) -> dict[_Start, list[str]]:
        """Return the names of the tensors by shape and first values, as they are after a cast to `dtype`."""
        if dtype not in self._starts:
            index: dict[_Start, list[str]] = {}
            for key, tensor in self.tensors.items():
                if tensor.dtype == dtype or (tensor.is_floating_point() and dtype.is_floating_point):
                    index.setdefault(_start(tensor, dtype), []).append(key)
            self._starts[dtype] = index
        return self._starts[dtype]


def same_bits(parameter: Tensor, stored: Tensor) -> bool:
    """Return whether a parameter has the bits of another tensor, after a cast to its dtype.

    Args:
        parameter: of any device.
        stored: the same shape, on the CPU.

    Example:
        >>> same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
        False
    """
    return all(
        torch.equal(_bits(one.detach().cpu()), _bits(other.to(one.dtype))) for one, other in pieces(parameter, stored)
    )


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _start(tensor: Tensor, dtype: torch.dtype) -> _Start:
    """Return a tensor's shape and the bits of its first values after a cast, which reads no more of it than these."""
    shape, first = tuple(tensor.shape), tensor.detach()
    while first.ndim > 1 and first[:1].numel() >= _START:
        first = first[0]
    return shape, bytes(_bits(first[:_START].cpu().to(dtype) if first.ndim else first.cpu().to(dtype)).numpy())


def _written(file: Path) -> tuple[int, ...]:
    """Return which file a path leads to, and what changes when it is written to; nothing if it is gone."""
    try:
        status = os.stat(file)
    except FileNotFoundError:
        return ()
    return status.st_ino, status.st_size, status.st_mtime_ns
