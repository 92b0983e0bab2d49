"""An adapter merged into its base: one model that loads without PEFT."""

from pathlib import Path

import torch
from peft.tuners.tuners_utils import BaseTuner

from hub_cards.facts import read_facts
from hub_cards.pulling.loading import adapter_name, load_adapter, load_base, shortened, undisturbed
from hub_cards.pulling.pull import find_base, load_processor
from hub_cards.pulling.snapshots import local_snapshot


def merge_adapter(
    run_dir: str | Path,
    target: str | Path,
    *,
    base: str | Path | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> None:
    """Write the model that an adapter and its base are together: configuration, safetensors, processor.

    The base is checked against its fingerprint first. The logits are those of the adapter up to the rounding of the
    sums: at most 1e-5 apart in float32. In bfloat16 the merged weights are rounded to eight bits, and differ more.

    Args:
        run_dir: folder of the run with the adapter.
        target: folder that is made, or is there and empty.
        base: a local folder or a repository with the base, instead of the recorded one.
        revision: of the base; the recorded one if None.
        token: for a base that is private or gated.

    Raises:
        ValueError: the run has no adapter, or one of a kind that cannot be merged, or the merged weights are not
            finite, or it is the wrong base.
        FileExistsError: `target` holds files.

    Example:
        >>> merge_adapter("tests", "merged")
        Traceback (most recent call last):
        FileNotFoundError: `tests` holds no recipe.json; expected the output_dir of a run: call ...
    """
    run, facts, target = local_snapshot(Path(run_dir)), read_facts(run_dir), Path(target)
    if not facts.is_adapter:
        raise ValueError(f"{run} holds a whole model, no adapter; expected a run with one. Publish it as it is.")
    if target.exists() and any(target.iterdir()):
        raise FileExistsError(f"`{target}` holds files; expected an empty folder. Choose another one.")
    found, pinned = find_base(facts, run, base, token, revision)
    model = load_adapter(load_base(facts, run, found, pinned=pinned), facts, run)
    kind = facts.adapters[adapter_name(facts)].get("peft_type")
    if not isinstance(model.base_model, BaseTuner):
        raise ValueError(
            f"the adapter in `{run_dir}` is of the kind {kind}, which adds inputs or layers and cannot be merged into "
            "weights; expected one such as LORA. Publish it as an adapter."
        )
    try:
        merged = model.merge_and_unload(safe_merge=True)
    except (NotImplementedError, ValueError) as error:
        raise ValueError(f"the adapter in `{run_dir}` ({kind}) cannot be merged: {error}") from error
    broken = [name for name, weight in merged.named_parameters() if not torch.isfinite(weight).all()]
    if broken:
        raise ValueError(f"the merged weights {shortened(broken)} are not finite; expected numbers. Train again.")
    processor = load_processor(run, merged.config)
    target.mkdir(parents=True, exist_ok=True)
    with undisturbed():
        merged.save_pretrained(target)
    if processor is not None:
        processor.save_pretrained(target)
