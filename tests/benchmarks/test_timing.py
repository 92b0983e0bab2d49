"""The arithmetic of the timed benchmarks, and that the one on two ranks runs. No times are asserted."""

import pytest
import torch

from tests.benchmarks.frozen_prefix import WAYS, compared, frozen_prefix
from tests.benchmarks.similarity import WIDTHS, loop, similarity
from tests.benchmarks.timing import interval, mean_and_interval, ratios_in_short
from tl_callbacks.probing.similarity import cka_matrix


def test_the_interval_holds_the_mean_and_shrinks_with_more_values() -> None:
    few, many = [1.0, 1.2, 0.9, 1.1], [1.0, 1.2, 0.9, 1.1] * 25
    low, high = interval(few)
    assert low < 1.05 < high
    assert interval(many)[1] - interval(many)[0] < (high - low) / 3
    assert interval([2.0, 2.0]) == [2.0, 2.0]
    assert mean_and_interval(few) == {"mean": pytest.approx(1.05), "95 % interval": [low, high]}


def test_the_geometric_mean_is_the_same_both_ways_round() -> None:
    found = ratios_in_short([4.0, 0.25])
    assert found["geometric mean"] == pytest.approx(1)
    assert found["mean"] == pytest.approx(2.125), "the control: the mean of ratios is not"
    assert ratios_in_short([2.0] * 3)["its 95 % interval"] == pytest.approx([2, 2])


def test_each_way_is_compared_with_the_first_in_the_same_round() -> None:
    first, ours, later = WAYS
    found = compared([{first: 1.0, ours: 1.5, later: 2.0}, {first: 4.0, ours: 6.0}])
    assert found["median, in seconds"] == {first: 2.5, ours: 3.75, later: 2.0}
    assert found[f"{ours}, over {first}"]["mean"] == 1.5
    assert found[f"{later}, over {first}"]["mean"] == 2.0


@pytest.mark.slow
@pytest.mark.distributed
def test_the_frozen_prefix_is_timed_in_all_ways() -> None:
    found = frozen_prefix(2)
    for clock in ("step time", "processor time of a step"):
        assert set(found[clock]["median, in seconds"]) == set(WAYS)
        for way in WAYS[1:]:
            assert found[clock][f"{way}, over {WAYS[0]}"]["geometric mean"] > 0


def test_the_loop_over_pairs_of_layers_computes_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    layers = [torch.randn(40, width, generator=generator) for width in (3, 50, 7)]
    assert torch.allclose(loop(layers, layers[:2]).double(), cka_matrix(layers, layers[:2]), atol=1e-4)


def test_the_ways_to_compare_all_pairs_of_layers_are_timed() -> None:
    found = similarity(2)
    assert set(found) == {f"width {width}" for width in WIDTHS}
    for ways in found.values():
        assert len(ways["the loop's time over ours"]) == 5
        for ratio in ways["the loop's time over ours"].values():
            assert ratio["geometric mean"] > 0
