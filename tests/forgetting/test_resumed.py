"""A resumed run: the baseline that it began with, on the same rows."""

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from tests.forgetting.models import llama, sentences
from tests.forgetting.test_monitor import PAIRS, SAVING, logged, make, trained
from tl_callbacks import ForgettingMonitor, LanguageModelling, Retrieval, SourceTask, attach, events
from tl_callbacks.probing.rows import Source


def test_a_resumed_run_compares_with_the_recorded_baseline(tmp_path: Path) -> None:
    straight = trained(tmp_path, ForgettingMonitor(LanguageModelling(sentences())), **SAVING)
    for seed in (0, 1):
        again = make(tmp_path, ForgettingMonitor(LanguageModelling(sentences())), model=llama(seed=seed), **SAVING)
        attach(again)
        if seed:
            with pytest.warns(
                UserWarning, match=r"began with: `language` is \S+ here and \S+ there, their fingerprints differ"
            ):
                again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
        else:
            again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
            assert logged(again) == logged(straight)
        found, expected = logged(again)[6], logged(straight)[6]
        assert found["tl/forgetting/language"] == expected["tl/forgetting/language"], "the recorded one counts"
        assert len(events.read(again.state.log_history, "forgetting")) == 1


def test_a_resumed_run_reads_the_rows_that_it_began_with(tmp_path: Path) -> None:
    def made(texts: list[str], **options: Any) -> ForgettingMonitor:
        return ForgettingMonitor([LanguageModelling(texts, **options), Retrieval(PAIRS)])

    trained(tmp_path, made(sentences()), **SAVING)
    where = str(tmp_path / "checkpoint-4")
    for monitor in (made(sentences(seed=77)), made(sentences(), max_length=5), made(sentences()[::-1])):
        again = make(tmp_path, monitor, **SAVING)
        attach(again)
        with pytest.raises(ValueError, match="the rows of `language` are not those that the run began with"):
            again.train(resume_from_checkpoint=where)
    added = make(tmp_path, made(sentences(seed=77), name="other"), **SAVING)
    attach(added)
    added.train(resume_from_checkpoint=where)
    assert "tl/retention/other" in logged(added)[6]


def test_a_head_that_is_not_the_one_that_the_run_began_with(tmp_path: Path) -> None:
    trained(tmp_path, ForgettingMonitor(LanguageModelling(sentences())), **SAVING)
    other = llama()
    with torch.no_grad():
        other.lm_head.weight.mul_(1.1)
    again = make(tmp_path, ForgettingMonitor(LanguageModelling(sentences())), model=other, **SAVING)
    attach(again)
    with pytest.warns(UserWarning, match="here and .* there, below the head their weights are the same"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


ROWS: dict[str, Any] = {
    "lists": lambda n: {"x": [n, 1.0], "labels": n},
    "tensors": lambda n: {"x": torch.full((3,), float(n))},
    "arrays": lambda n: (numpy.full(3, n), numpy.array(["a", str(n)])),
}


@pytest.mark.parametrize("kind", ROWS)
def test_a_digest_changes_with_any_row(kind: str) -> None:
    def digest(numbers: list[int]) -> str:
        measure = SourceTask([ROWS[kind](n) for n in numbers])
        measure._source = Source(measure.given, torch.arange(len(numbers)), list, 2)
        return measure.digest()

    assert digest([1, 2, 3]) == digest([1, 2, 3])
    assert len({digest(numbers) for numbers in ([1, 2, 3], [1, 2, 4], [2, 1, 3], [1, 2])}) == 4
