"""What the templates print, worked out from the facts: names, rows of tables, sentences."""

import shlex
from collections.abc import Mapping
from typing import Any

from hub_cards.facts import RunFacts
from hub_cards.history import Phase, Series
from hub_cards.markdown import Markdown, code, number, one_line
from hub_cards.tasks import PURPOSES

_SHOWN = 12  # points of a curve in a table


def title(facts: RunFacts) -> str:
    """Return the card's title: the repository's name, or what was adapted and how.

    Example:
        >>> title(RunFacts(10, 10, "BertForSequenceClassification", repo_id="jo/bert-news"))
        'bert-news'
    """
    if facts.repo_id:
        return facts.repo_id.split("/")[-1]
    base = facts.base.name
    strategy = facts.methods.get("Strategy", {}).get("name")
    name = base.split("/")[-1] if base else facts.base_class or facts.model_class
    return one_line(f"{name}, {strategy}" if strategy else name)


def view(facts: RunFacts) -> dict[str, Any]:
    """Return the values beside the facts themselves that the templates print."""
    adapter = next(iter(facts.adapters.values()), None)
    kind = str((adapter or {}).get("peft_type", ""))
    return {
        "purpose": PURPOSES.get(facts.task or ""),
        "labels": labels(facts),
        "where": facts.repo_id or "path/to/this/folder",
        "groups": _groups(facts),
        "phases": [_phase(phase) for phase in facts.phases],
        "anchor": facts.methods.get("WeightAnchoring"),
        "optimizer": facts.methods.get("LayerwiseOptimizer"),
        "strategy": facts.methods.get("Strategy"),
        "share": _share(facts),
        "comparison": _comparison(facts),
        "retention": _retention(facts),
        "measures": {method: _measure(series) for method, series in facts.measures.items()},
        "curve": _curve(facts.curves),
        "command": _command(facts),
        "verify_command": _verify_command(facts),
        "adapter_size": sum(facts.weights.values()) or None,
        "missing": _missing(facts),
        "adapter": adapter,
        "kind": {"LORA": "LoRA"}.get(kind, kind),
    }


def labels(facts: RunFacts) -> tuple[str, ...]:
    """Return the names of the classes in the order of their ids.

    Example:
        >>> labels(RunFacts(1, 1, "X", id2label={"1": "spam", "0": "ham"}))
        ('ham', 'spam')
    """
    if facts.id2label:
        return tuple(facts.id2label[key] for key in sorted(facts.id2label, key=lambda k: (len(k), k)))
    return facts.data.labels if facts.data else ()


def _groups(facts: RunFacts) -> list[dict[str, Any]]:
    opened = {name: phase.first_step for phase in facts.phases for name in phase.opened}
    rows = []
    for group in facts.groups:
        logged = [rate for _, rate in facts.rates.get(group.name, ())]
        rows.append(
            {
                "name": group.name,
                "parameters": f"{group.num_parameters:,}",
                "dtype": group.dtype,
                "opened": f"step {opened[group.name]:,}" if group.name in opened else "never",
                "highest": number(max(logged) if logged else None, ".3g"),
                "last": number(logged[-1] if logged else None, ".3g"),
            }
        )
    return rows


def _phase(phase: Phase) -> dict[str, Any]:
    return {
        "steps": f"{phase.first_step + 1:,}–{phase.last_step:,}" if phase.last_step > phase.first_step else "none",
        "opened": phase.opened,
        "open": phase.open,
        "parameters": f"{phase.trainable_parameters:,}",
    }


def _share(facts: RunFacts) -> float | None:
    counts = [phase.trainable_parameters for phase in facts.phases if phase.last_step > phase.first_step]
    return max(counts) / facts.num_parameters if counts and facts.num_parameters else None


def _comparison(facts: RunFacts) -> dict[str, Any] | None:
    found = facts.comparison
    if found is None:
        return None
    scale, unit = (100, " %") if found["metric"] in ("accuracy", "f1") else (1, "")

    def interval(value: Mapping[str, float] | None, sign: str = "") -> str:
        return _interval(value, scale, f"{sign}.{2 if scale == 100 else 4}f")

    rows = [
        {
            "label": row["label"] + (" (did not converge)" if row.get("converged") is False else ""),
            "own": row["row"] == found["row"],
            "value": interval(row["value"]),
            "gain": interval(row.get("gain"), "+"),
            "retention": _interval(row.get("retention"), 100, ".2f"),
            "seeds": ", ".join(
                format(scale * value, ".1f" if scale == 100 else ".4g") for value in row.get("values", ())
            ),
            "share": number(100 * row["trainable_share"], ".3g") if row.get("trainable_share") is not None else "–",
            "seconds": number(row["cpu_seconds"], ",.1f") if row.get("cpu_seconds") is not None else "–",
        }
        for row in found["rows"]
    ]
    optional = dict.fromkeys(("note", "transfer", "adaptation", "front"))
    retained = any(row.get("retention") is not None for row in found["rows"])
    level = number(100 * found["level"], "g")
    return {**optional, **found, "rows": rows, "unit": unit, "percent": level, "retained": retained}


def _interval(value: Mapping[str, float] | None, scale: int, spec: str) -> str:
    if value is None:
        return "–"
    mean, low, high = (format(scale * value[key], spec) for key in ("mean", "low", "high"))
    return Markdown(f"{mean} [{low}, {high}]")


def _retention(facts: RunFacts) -> dict[str, Any] | None:
    """Return what was lost of what the base could do, one row a measure."""
    found = facts.methods.get("ForgettingMonitor")
    if found is None:
        return None
    rows = [
        {
            "name": name,
            "measures": one["measures"],
            **{
                key: number(one[key], ".4g") if one[key] is not None else "–"
                for key in ("before", "after", "retention")
            },
        }
        for name, one in found["measures"].items()
    ]
    least, now, broken = found["min_retention"], found["retention"], no_numbers(found)
    said = []
    if broken:
        said.append(f"{code(broken[0])} was measured and is no number: a weight of this model is NaN or infinite.")
    if least is not None and (broken or now is not None):
        kept = not broken and now >= least
        said.append(f"At least {number(least)} was asked for, which the run {'kept' if kept else 'did not keep'}.")
    return {"rows": rows, "verdict": Markdown(" ".join(said)) or None}


def no_numbers(monitor: Mapping[str, Any]) -> list[str]:
    """Return which values have a retention to lose, and are NaN in the model at the end of training.

    Args:
        monitor: the facts of a `ForgettingMonitor`.

    Example:
        >>> lost = {"measures": "accuracy", "before": 0.5, "after": None, "retention": None}
        >>> no_numbers({"weights_of_step": 6, "measures": {"source": lost}})
        ['source']
    """
    if monitor.get("weights_of_step") is None:
        return []
    return [
        name
        for name, one in monitor["measures"].items()
        if one["before"] and one["after"] is None and one["retention"] is None
    ]


def _measure(series: Mapping[str, Series]) -> list[dict[str, str]]:
    return [
        {"what": what, "first": number(points[0][1]), "last": number(points[-1][1]), "count": f"{len(points):,}"}
        for what, points in series.items()
    ]


def _curve(curves: Mapping[str, Series]) -> dict[str, Any] | None:
    """Return the rows of a table: the loss and what was evaluated, at some steps, the first and the last among them."""
    columns = [key for key in curves if key != "grad_norm"]
    steps = sorted({step for key in columns for step, _ in curves[key]})
    if not steps:
        return None
    if len(steps) > _SHOWN:
        steps = [steps[round(place * (len(steps) - 1) / (_SHOWN - 1))] for place in range(_SHOWN)]
    values = {key: dict(curves[key]) for key in columns}
    return {
        "columns": columns,
        "rows": [
            (f"{step:,}", [number(values[key][step]) if step in values[key] else "" for key in columns])
            for step in steps
        ],
    }


def _command(facts: RunFacts) -> str | None:
    """Return the command that repeats the run."""
    if not facts.command:
        return None
    processes = (facts.cost or {}).get("processes", 1)
    words = list(facts.command)
    if processes > 1 and words[0].startswith("python"):
        words[:1] = ["accelerate", "launch", "--num_processes", str(processes)]
    return shlex.join(words)


def _verify_command(facts: RunFacts) -> str | None:
    """Return the command that does the published evaluation again."""
    if facts.repo_id is None:
        return None
    words = ["python", "-m", "hub_cards", "pull", facts.repo_id, "--verify"]
    words += ["--base", "path/to/the/base"] if facts.is_adapter and facts.base.name is None else []
    words += ["--data", "path/to/the/rows.csv"] if facts.data and facts.data.local else []
    return shlex.join(words)


def _missing(facts: RunFacts) -> list[Markdown]:
    """Return what a reader should know was not measured or not recorded."""
    named = facts.base.name or facts.base.folder
    checks = {
        "a comparison with training from scratch (whether transfer helped at all)": facts.comparison,
        "retention of what the base could do before": facts.methods.get("ForgettingMonitor"),
        "what the layers know and how far they moved (probes, drift)": facts.measures.get("probe"),
        "the commit of the base": not facts.base.name or facts.base.revision,
        "the base's fingerprint": not named or facts.base.digest,
        "the commit of the data set": facts.data is None or facts.data.local or facts.data.revision,
        "any result": facts.results,
    }
    return [Markdown(text) for text, found in checks.items() if not found]


def strength(anchor: Mapping[str, Any]) -> Markdown:
    """Return an anchor's strength, one number or one a group."""
    found = anchor["strength"]
    if isinstance(found, dict):
        return Markdown(", ".join(f"{code(name)} {number(value)}" for name, value in found.items()))
    return Markdown(number(found))
