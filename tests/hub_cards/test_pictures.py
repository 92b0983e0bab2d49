"""Pictures: the same bytes for the same facts, opaque, and nothing in them that a label could break."""

import dataclasses
import io
from pathlib import Path

import pytest
from PIL import Image

from hub_cards import read_facts
from hub_cards.pictures import pictures
from tests.hub_cards import runs

NAMES = ["curve.png", "rates.png", "comparison.png", "probe.png"]


def test_pictures_are_opaque_png_of_the_same_bytes(tmp_path: Path) -> None:
    log = [*runs.STATE["log_history"], *({f"tl/probe/{name}": 0.5, "step": 5} for name in ("head", "embeddings"))]
    facts = read_facts(runs.write(tmp_path, runs.recipe(comparison=runs.COMPARISON), runs.state(log_history=log)))
    found = pictures(facts)
    assert list(found) == NAMES
    assert pictures(facts) == found
    for name, content in found.items():
        picture = Image.open(io.BytesIO(content))
        alpha = picture.convert("RGBA").getchannel("A").getextrema()
        assert alpha == (255, 255), name
        assert picture.convert("L").getextrema()[0] < 80, name  # something dark is drawn
        assert b"matplotlib" not in content


@pytest.mark.parametrize("name", ["$x^{$", "_hidden", "", "a\nb", "x" * 500, "\u202e", "%s", r"\frac"])
def test_hostile_names_are_drawn(tmp_path: Path, name: str) -> None:
    facts = read_facts(runs.write(tmp_path))
    series = {name: ((0, 1.0), (5, float("nan")))}
    hostile = dataclasses.replace(facts, rates=series, curves={"eval_" + name: series[name]}, measures={name: series})
    assert len(pictures(hostile)) == 3


def test_nothing_logged_draws_nothing(tmp_path: Path) -> None:
    assert pictures(read_facts(runs.write(tmp_path, None, runs.state(log_history=[])))) == {}
