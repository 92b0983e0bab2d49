"""The folder that is published: a run's files that are allowed, and nothing else, in a fresh place.

What is scanned and checked there is what is uploaded. Texts are copied, so that nobody changes them in between; weights
are hard links where the file system has them, and their hash is compared once more before the commit.
"""

import errno
import os
import re
import shutil
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from hub_cards.card import read_card
from hub_cards.facts import RunFacts
from hub_cards.sections import front_and_body, is_stock

ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
INDEX = "model.safetensors.index.json"
MODEL = ("config.json", "generation_config.json", "model.safetensors", INDEX, "model-[0-9]*-of-[0-9]*.safetensors")
_PROCESSOR = """
    tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json vocab.txt vocab-src.json
    vocab-tgt.json target_vocab.json entity_vocab.json dict.txt merges.txt bpe.codes normalizer.json emoji.json
    byte_maps.json word_shape.json word_pronunciation.json *.model *.spm *.tiktoken chat_template.jinja
    chat_template.json additional_chat_templates/*.jinja preprocessor_config.json processor_config.json
    image_processor_config.json video_preprocessor_config.json feature_extractor_config.json audio_tokenizer_config.json
    """
_BESIDE = ("README.md", "figures/*.png", ".eval_results/*.yaml", "LICENSE", "NOTICE")
OWN = ("recipe.json", "trainer_state.json", "training_args.json")  # written anew, never copied
_FOLDERS = ("figures", ".eval_results", "additional_chat_templates")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
_LINKED = ".safetensors"
STAGING = ".publishing-"  # how the names of staging folders begin


@dataclass(frozen=True)
class Staged:
    """A staging folder, and the names in the run's folder that did not come along."""

    folder: Path
    left_out: tuple[str, ...]

    @property
    def files(self) -> dict[str, Path]:
        """The files of the folder by their names in the repository, sorted."""
        found = {path.relative_to(self.folder).as_posix(): path for path in self.folder.rglob("*") if path.is_file()}
        return dict(sorted(found.items()))


def is_allowed(name: str, *, adapter: bool | None = None) -> bool:
    """Return whether a file of this name may be published.

    Args:
        name: in the repository, parts joined by `/`.
        adapter: of an adapter, which has no files of a whole model, or of a model; None: of either.

    Example:
        >>> [is_allowed(name) for name in ("model.safetensors", "figures/a.png", ".env", "a/tokenizer.json")]
        [True, True, False, False]
    """
    kinds = {True: ADAPTER, False: MODEL, None: (*ADAPTER, *MODEL)}[adapter]
    patterns = (*kinds, *_PROCESSOR.split(), *_BESIDE, *OWN)
    return any(name.count("/") == pattern.count("/") and fnmatchcase(name, pattern) for pattern in patterns)


def is_unwritten(card: str) -> bool:
    r"""Return whether a card is one that a library made and nobody completed: there is nothing to keep of it.

    Example:
        >>> is_unwritten("---\nlicense: mit\n---\n# My model\n")
        False
    """
    return is_stock(front_and_body(card)[1])


def stage(run_dir: str | Path, target: str | Path, facts: RunFacts, *, merged: str | Path | None = None) -> Staged:
    """Fill an empty folder with the files of a run that may be published; return it and what was left out.

    Args:
        run_dir: the run's folder.
        target: the folder to fill; it is made if it is missing.
        facts: of the run; they say whether it is an adapter.
        merged: the folder with the whole model that the adapter was merged into; weights, configuration and tokenizer
            come from there, all else from the run.

    Raises:
        FileNotFoundError: there are no weights; where they were saved in another form, the remedy is named.
        ValueError: a file is a link that leads out of the run's folder.

    Example:
        >>> import tempfile
        >>> run, target = Path(tempfile.mkdtemp()), Path(tempfile.mkdtemp())
        >>> for name in ("model.safetensors", "config.json", ".env"):
        ...     _ = (run / name).write_text("{}")
        >>> staged = stage(run, target, RunFacts(10, 10, "BertForSequenceClassification"))
        >>> list(staged.files), staged.left_out
        (['config.json', 'model.safetensors'], ('.env',))
    """
    run, folder = Path(run_dir), Path(target)
    adapter = facts.is_adapter and merged is None
    sources, left_out = _sources(run, adapter=adapter)
    if merged is not None:
        whole, _ = _sources(Path(merged), adapter=False)
        sources = {name: path for name, path in sources.items() if name not in MODEL} | {
            name: path for name, path in whole.items() if name not in _BESIDE
        }
        _check_weights(Path(merged), sources, adapter=False)
    else:
        _check_weights(run, sources, adapter=adapter)
    if facts.is_adapter and merged is None and len(facts.adapters) > 1:
        raise ValueError(
            f"`{run}` holds the adapters {', '.join(sorted(facts.adapters))}; a repository holds one. Save the one to "
            "publish alone: model.save_pretrained(folder, selected_adapters=[name])."
        )
    for name, path in sources.items():
        if name not in OWN and not (name == "README.md" and is_unwritten(read_card(path))):
            _place(path, folder / name)
    return Staged(folder, tuple(left_out))


def _sources(run: Path, *, adapter: bool) -> tuple[dict[str, Path], list[str]]:
    """Return the allowed files of a folder, and the names of the others, folders with a slash at the end."""
    found: dict[str, Path] = {}
    left_out: list[str] = []
    for path in sorted(run.iterdir()):
        if path.is_dir() and path.name in _FOLDERS:
            inside = [(f"{path.name}/{below.name}", below) for below in sorted(path.iterdir())]
        else:
            inside = [(path.name + ("/" if path.is_dir() else ""), path)]
        for name, file in inside:
            if name.startswith(STAGING):
                continue
            if file.is_file() and is_allowed(name, adapter=adapter):
                _check_inside(run, name, file)
                found[name] = file
            else:
                left_out.append(name)
    return found, left_out


def _check_inside(run: Path, name: str, file: Path) -> None:
    if not file.resolve().is_relative_to(run.resolve()):
        raise ValueError(
            f"`{name}` is a link that leads out of the run's folder; only files of the run are published. Put a copy "
            "in its place, or remove it."
        )


def _check_weights(run: Path, sources: dict[str, Path], *, adapter: bool) -> None:
    wanted = ADAPTER[1] if adapter else "model.safetensors"
    shards = [name for name in sources if re.fullmatch(r"model-\d+-of-\d+\.safetensors", name)]
    if wanted in sources or (not adapter and INDEX in sources and shards):
        return
    pickles = sorted(p.name for p in run.iterdir() if any(fnmatchcase(p.name, kind) for kind in _PICKLES))
    pickles = [name for name in pickles if name not in ("training_args.bin", "optimizer.pt", "scheduler.pt")]
    below = sorted(p.parent.name for p in run.glob(f"*/{wanted}") if not p.parent.name.startswith("checkpoint-"))
    if pickles:
        found = f"its weights are the pickle `{pickles[0]}`, which runs code when it is loaded"
    elif below:
        found = f"`{wanted}` lies in its folder `{below[0]}`"
    else:
        found = "no weights were saved there"
    saver = "model.save_pretrained(run_dir), which writes safetensors" if pickles else "trainer.save_model()"
    raise FileNotFoundError(f"`{run}` holds no {wanted}: {found}. Call {saver}, and publish again.")


def _place(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.suffix == _LINKED:
        try:
            os.link(source.resolve(), target)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise
        else:
            return
    shutil.copyfile(source, target)
