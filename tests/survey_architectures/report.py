"""The survey as a table, and the summary that a test holds."""

import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from tests.survey_architectures.judge import Record
from tl_callbacks import group_layers
from tl_callbacks.tables import table

FOLDER = Path(__file__).parent
ENOUGH = 0.9  # the share of the parameters that a pass must have used for its order to be judged
LARGE = {
    "albert": "all layers share it",
    "blt_local_encoder": "the model has one layer and one of cross-attention",
    "glm_image_vqmodel": "no blocks; it is the codebook",
    "idefics": "the model itself freezes its language and vision layers; what never trains joins the group above it",
    "inkling_audio": "the model is one embedding",
    "mobilevitv2": "the last stage is one layer",
    "molmo2_adapter": "no blocks; it is a projector",
    "sam3_lite_text_mask_decoder": "no blocks; it is a feature pyramid",
    "sam3_mask_decoder": "no blocks; it is a feature pyramid",
    "swiftformer": "the last stage is one module",
}
KINDS = ("text", "text to text", "vision", "audio", "several inputs", "time series", "other")


def reads(model: nn.Module) -> str:
    """Return what a model reads, by its config and its main input."""
    config = getattr(model, "config", None)
    parts = [name for name in ("text_config", "vision_config", "audio_config") if getattr(config, name, None)]
    if len(parts) > 1:
        return "several inputs"
    name = str(getattr(model, "main_input_name", ""))
    if getattr(config, "is_encoder_decoder", False) and name == "input_ids":
        return "text to text"
    kinds = {"input_ids": "text", "pixel_values": "vision", "input_values": "audio", "input_features": "audio"}
    return kinds.get(name, "time series" if name.startswith("past_") else "other")


def seconds_to_group_7b() -> float:
    """Return how long it takes to group a model of 7 billion parameters on the meta device."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig())
    start = time.perf_counter()
    group_layers(model)
    return round(time.perf_counter() - start, 2)


def share(part: int, whole: int) -> float:
    """Return a percentage, 100 of nothing."""
    return 100.0 * part / whole if whole else 100.0


def judged(backbones: Sequence[Record]) -> list[Record]:
    """Return the records of models of which a whole pass used nearly all parameters."""
    return [record for record in backbones if record.get("trace") and record["seen"] >= ENOUGH]


def summary(survey: Record) -> dict[str, float]:
    """Return the figures of the survey, in percent unless the name says otherwise."""
    made = [record for record in survey["backbones"] if "groups" in record]
    seen = judged(made)
    heads = [record for record in survey["heads"] if "covers" in record]
    own = [record for record in heads if record["own"]]
    timm = [record for record in survey["timm"] if "covers" in record]
    return {
        "model types": len(survey["backbones"]),
        "made": share(len(made), len(survey["backbones"])),
        "crashed (number)": sum("crashed" in r for kind in ("backbones", "heads", "timm") for r in survey[kind]),
        "cover": share(sum(r["covers"] for r in made), len(made)),
        "two or more blocks": share(sum(r["blocks"] > 1 for r in made), len(made)),
        "no block above half the parameters": share(sum(not r["large"] for r in made), len(made)),
        "judged by a pass (number)": len(seen),
        "blocks in order": share(sum(not r["order"] for r in seen), len(seen)),
        "parts on the right side": share(sum(not r["misplaced"] for r in seen), len(seen)),
        "parts on a side at all": share(sum(not (r["misplaced"] or r["between"]) for r in seen), len(seen)),
        "no false warning": share(sum(not r["would_warn"] for r in seen), len(seen)),
        "task classes": len(survey["heads"]),
        "task classes made": share(len(heads), len(survey["heads"])),
        "task classes cover": share(sum(r["covers"] for r in heads), len(heads)),
        "task classes with own parameters (number)": len(own),
        "own parameters above the last block": share(sum(not r["below"] for r in own), len(own)),
        "timm families": len(survey["timm"]),
        "timm cover": share(sum(r["covers"] for r in timm), len(survey["timm"])),
        "timm order": share(sum(not r["order"] for r in timm), len(survey["timm"])),
        "seconds to group 7 billion parameters": survey["seconds_7b"],
        "minutes": survey["minutes"],
    }


def by_kind(survey: Record) -> str:
    """Return the table of model types by what they read."""
    rows = [["reads", "types", "cover", "2+ blocks", "judged", "in order", "right side", "on a side"]]
    for kind in KINDS:
        made = [record for record in survey["backbones"] if record.get("reads") == kind]
        seen = judged(made)
        rows.append(
            [
                kind,
                str(len(made)),
                str(sum(r["covers"] for r in made)),
                str(sum(r["blocks"] > 1 for r in made)),
                str(len(seen)),
                str(sum(not r["order"] for r in seen)),
                str(sum(not r["misplaced"] for r in seen)),
                str(sum(not (r["misplaced"] or r["between"]) for r in seen)),
            ]
        )
    return table(rows)


def exceptions(survey: Record) -> list[str]:
    """Return one line for each model that falls short, with what it is."""
    lines = []
    for record in survey["backbones"]:
        name = record["type"]
        lines += [f"{name}: {key.replace('_', ' ')}: {record[key]}" for key in ("not_made", "crashed") if key in record]
        if record.get("blocks", 2) < 2:
            lines.append(f"{name}: {record['blocks']} block")
        if record.get("large"):
            lines.append(f"{name}: one group holds more than half: {record['large']}: {LARGE.get(name, 'unknown')}")
        if record in judged([record]):
            lines += [f"{name}: order: {' before '.join(pair)}" for pair in record["order"]]
            if record["misplaced"]:
                lines.append(f"{name}: wrong side: {', '.join(record['misplaced'])}")
    for record in survey["heads"]:
        for key in ("not_made", "crashed", "below"):
            if record.get(key):
                lines.append(f"{record['type']} {record['class']}: {key.replace('_', ' ')}: {str(record[key])[:200]}")
    for record in survey["timm"]:
        for key in ("not_made", "crashed", "order"):
            if record.get(key):
                lines.append(f"timm {record['family']}: {key.replace('_', ' ')}: {record[key]}")
    return lines


def write(survey: Record, folder: Path = FOLDER) -> None:
    """Write the records and the table beside this file, and print the summary."""
    survey = {k: [short(r) for r in v] if k in ("backbones", "heads", "timm") else v for k, v in survey.items()}
    lines = ["{"]
    for key, value in survey.items():
        end = "" if key == list(survey)[-1] else ","
        if isinstance(value, list) and value and isinstance(value[0], dict):
            rows = ",\n".join(json.dumps(row) for row in value)
            lines.append(f"{json.dumps(key)}: [\n{rows}\n]{end}")
        else:
            lines.append(f"{json.dumps(key)}: {json.dumps(value)}{end}")
    (folder / "survey.json").write_text("\n".join([*lines, "}"]) + "\n")
    (folder / "survey.md").write_text(page(survey))
    print(page(survey).partition("## Exceptions")[0])


def short(record: Record) -> Record:
    """Return a record without timings, and with the first of a long list only, and how many more there are."""
    kept = {key: value for key, value in record.items() if key not in ("seconds", "warned")}
    for key in ("misplaced", "between", "below"):
        if len(kept.get(key) or ()) > 2:
            kept[key] = [kept[key][0], f"and {len(kept[key]) - 1} more"]
    return kept


def page(survey: Record) -> str:
    """Return the survey as a page: summary, table by what models read, exceptions."""
    versions = ", ".join(f"{name} {version}" for name, version in survey["versions"].items())
    figures = [["figure", "value"], *([k, f"{v:.2f}" if v % 1 else f"{v:.0f}"] for k, v in summary(survey).items())]
    return (
        f"# Layer groups of every architecture\n\n`python -m tests.survey_architectures`, {versions}.\n\n"
        f"```\n{table(figures)}\n```\n\n## By what the models read\n\n```\n{by_kind(survey)}\n```\n\n## Exceptions\n\n"
        + "\n".join(f"- {line}" for line in exceptions(survey))
        + "\n"
    )
