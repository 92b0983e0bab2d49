"""The survey of architectures that is checked in: it is what its records say, and it holds what we promise."""

import importlib.metadata
import json
from typing import Any

import pytest

from tests.survey_architectures import report

SURVEY: dict[str, Any] = json.loads((report.FOLDER / "survey.json").read_text())
AT_LEAST = {
    "made": 97.0,
    "cover": 100.0,
    "two or more blocks": 99.5,
    "blocks in order": 100.0,
    "parts on the right side": 98.0,
    "task classes cover": 100.0,
    "own parameters above the last block": 99.5,
    "timm families": 60,
    "timm cover": 100.0,
    "timm order": 98.0,
}
AT_MOST = {"crashed (number)": 0, "seconds to group 7 billion parameters": 1.0, "minutes": 30.0}


def test_the_page_is_what_the_records_say() -> None:
    assert (report.FOLDER / "survey.md").read_text() == report.page(SURVEY)


@pytest.mark.parametrize("figure", AT_LEAST)
def test_figures_that_must_be_high(figure: str) -> None:
    assert report.summary(SURVEY)[figure] >= AT_LEAST[figure]


@pytest.mark.parametrize("figure", AT_MOST)
def test_figures_that_must_be_low(figure: str) -> None:
    assert report.summary(SURVEY)[figure] <= AT_MOST[figure]


def test_most_models_are_judged_by_a_pass() -> None:
    figures = report.summary(SURVEY)
    assert figures["judged by a pass (number)"] >= 0.7 * figures["model types"]
    assert len({record["type"] for record in SURVEY["backbones"]}) == figures["model types"] >= 770
    assert figures["task classes"] >= 800


def test_each_group_above_half_the_parameters_has_its_reason() -> None:
    assert {record["type"] for record in SURVEY["backbones"] if record.get("large")} <= set(report.LARGE)


def test_a_fault_would_lower_the_figures() -> None:
    worse = json.loads(json.dumps(SURVEY))
    record = next(record for record in report.judged(worse["backbones"]) if not record["order"])
    record |= {"order": [["a", "b"]], "misplaced": ["a"], "covers": False}
    before, after = report.summary(SURVEY), report.summary(worse)
    for figure in ("cover", "blocks in order", "parts on the right side"):
        assert after[figure] < before[figure]
    assert len(report.exceptions(worse)) > len(report.exceptions(SURVEY))


@pytest.mark.slow
def test_records_are_made_again() -> None:
    records = pytest.importorskip("tests.survey_architectures.records")
    if importlib.metadata.version("transformers") != SURVEY["versions"]["transformers"]:
        pytest.skip("the survey is of another version of transformers")
    stored = {record["type"]: record for record in SURVEY["backbones"]}
    for model_type in ("bert", "t5", "clip", "swin", "mamba", "whisper", "segformer", "qwen2_vl", "mixtral"):
        again = json.loads(json.dumps(report.short(records.backbone(model_type))))
        assert again == stored[model_type]
