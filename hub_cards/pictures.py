"""Pictures of a run, drawn from its facts: opaque, so that they can be read on a light and on a dark page."""

import io
import math
import re
from collections.abc import Callable, Mapping

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hub_cards.facts import RunFacts
from hub_cards.history import Series
from hub_cards.markdown import one_line

FOLDER = "figures"
_COLOURS = "viridis"


def pictures(facts: RunFacts) -> dict[str, bytes]:
    """Return PNG files by name: of all that the run logged, and nothing where it logged nothing. Opaque backgrounds.

    Example:
        >>> facts = RunFacts(10, 10, "BertForSequenceClassification", curves={"loss": ((5, 1.0), (10, 0.5))})
        >>> {name: picture[1:4] for name, picture in pictures(facts).items()}
        {'curve.png': b'PNG'}
    """
    drawn: dict[str, Callable[[Axes], None]] = {}
    if any(key != "grad_norm" for key in facts.curves):
        drawn["curve.png"] = lambda axes: _curve(axes, facts)
    if facts.rates:
        drawn["rates.png"] = lambda axes: _rates(axes, facts)
    if facts.comparison:
        drawn["comparison.png"] = lambda axes: _comparison(axes, facts)
    found = {name: _png(draw) for name, draw in drawn.items()}
    return found | {
        f"{slug(method)}.png": _png(lambda axes, series=series, method=method: _measure(axes, method, series))  # type: ignore[misc]
        for method, series in facts.measures.items()
    }


def slug(name: str) -> str:
    """Return a name as part of a file's name.

    Example:
        >>> slug("../probe accuracy")
        'probe-accuracy'
    """
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-") or "measure"


def _curve(axes: Axes, facts: RunFacts) -> None:
    side = None
    for key, series in facts.curves.items():
        if key == "grad_norm":
            continue
        loss = key.endswith("loss")
        side = axes.twinx() if not loss and side is None else side
        target = axes if loss else side
        assert target is not None
        line = "-" if key == "loss" else "--o"
        target.plot(*_points(series), line, markersize=3, label=_plain(key), color=None if loss else "tab:green")
    axes.set(xlabel="optimizer step", ylabel="loss")
    for number, phase in enumerate(facts.phases[1:]):
        axes.axvline(
            phase.first_step, color="0.6", linewidth=0.8, linestyle=":", label="_" if number else "groups open"
        )
    handles = [handle for part in (axes, side) if part is not None for handle in part.get_lines()]
    axes.legend(handles=[h for h in handles if not str(h.get_label()).startswith("_")], loc="best", fontsize=8)
    if side is not None:
        side.set_ylabel("metric")


def _rates(axes: Axes, facts: RunFacts) -> None:
    colours = _colours(len(facts.rates))
    for colour, (name, series) in zip(colours, facts.rates.items(), strict=True):
        steps, values = _points(series)
        axes.plot(steps, [value or math.nan for value in values], "-o", markersize=3, color=colour, label=_plain(name))
    axes.set(xlabel="optimizer step", ylabel="learning rate")
    if any(value > 0 for series in facts.rates.values() for _, value in series):
        axes.set_yscale("log")
    if len(facts.rates) <= 30:
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5), title="input to head", title_fontsize=7)


def _comparison(axes: Axes, facts: RunFacts) -> None:
    assert facts.comparison is not None
    rows = list(facts.comparison["rows"])[::-1]
    for place, row in enumerate(rows):
        value, own = row["value"], row["row"] == facts.comparison["row"]
        reach = [[value["mean"] - value["low"]], [value["high"] - value["mean"]]]
        axes.errorbar(value["mean"], place, xerr=reach, fmt="o", capsize=3, color="tab:orange" if own else "tab:blue")
    axes.set_yticks(range(len(rows)), [_plain(row["label"]) for row in rows])
    axes.set_xlabel(_plain(f"{facts.comparison['metric']} on {facts.comparison['split']} (this run's row in orange)"))


def _measure(axes: Axes, method: str, series: Mapping[str, Series]) -> None:
    steps = sorted({step for points in series.values() for step, _ in points})
    values = [[dict(points).get(step, math.nan) for step in steps] for points in series.values()]
    image = axes.imshow(values, aspect="auto", cmap=_COLOURS, interpolation="nearest")
    axes.set_yticks(range(len(series)), [_plain(what) for what in series], fontsize=7)
    shown = range(0, len(steps), max(1, len(steps) // 8))
    axes.set_xticks(list(shown), [str(steps[place]) for place in shown])
    axes.set(xlabel="optimizer step", title=_plain(method))
    assert axes.figure is not None
    axes.figure.colorbar(image, ax=axes)


def _points(series: Series) -> tuple[list[int], list[float]]:
    return [step for step, _ in series], [value if math.isfinite(value) else math.nan for _, value in series]


def _colours(count: int) -> list[tuple[float, float, float, float]]:
    return [colormaps[_COLOURS](0.05 + 0.85 * place / max(1, count - 1)) for place in range(count)]


def _plain(text: str) -> str:
    """Return text for a picture: no formula, and no longer than a line."""
    return one_line(text).replace("$", r"\$").lstrip("_")[:60] or "?"


def _png(draw: Callable[[Axes], None]) -> bytes:
    figure = Figure(figsize=(8, 4), layout="constrained")
    draw(figure.subplots())
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()
