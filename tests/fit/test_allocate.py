"""Bits go where they pay, and never beyond the budget."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from commvq_core.errors import InputError
from commvq_core.fit.allocate import Item, allocate, convex

COSTS = st.lists(st.floats(0, 100), min_size=1, max_size=6)
ITEMS = st.lists(st.tuples(COSTS, st.integers(1, 9)), min_size=1, max_size=4)


def spent(items: dict[int, Item], stages: dict[int, int]) -> int:
    return sum(items[key].stage_bits * count for key, count in stages.items())


@settings(max_examples=150, deadline=None)
@given(drawn=ITEMS, extra=st.floats(0, 60))
def test_the_budget_is_never_exceeded_and_nothing_that_helps_is_left(
    drawn: list[tuple[list[float], int]], extra: float
) -> None:
    items = {n: Item(tuple(costs), bits) for n, (costs, bits) in enumerate(drawn)}
    budget = sum(item.stage_bits for item in items.values()) + extra
    stages = allocate(items, budget)
    assert spent(items, stages) <= budget
    for key, item in items.items():
        assert 1 <= stages[key] <= len(item.costs)
        if stages[key] < len(item.costs):
            assert spent(items, stages) + item.stage_bits > budget


@settings(max_examples=60, deadline=None)
@given(
    falls=st.lists(st.lists(st.floats(0.01, 10), min_size=3, max_size=3), min_size=2, max_size=3),
    extra=st.integers(0, 8),
)
def test_it_is_the_optimum_for_convex_costs_and_equal_stages(
    falls: list[list[float]], extra: int
) -> None:
    items = {}
    for key, steps in enumerate(falls):
        ordered = sorted(steps, reverse=True)
        costs = [100 - sum(ordered[:count]) for count in range(4)]
        items[key] = Item(tuple(costs), 2)
    budget = 2 * len(items) + 2 * extra
    got = allocate(items, budget)

    def cost(stages: tuple[int, ...]) -> float:
        return sum(items[key].costs[count - 1] for key, count in enumerate(stages))

    best = min(
        cost(stages)
        for stages in product(range(1, 5), repeat=len(items))
        if 2 * sum(stages) <= budget
    )
    assert cost(tuple(got.values())) == pytest.approx(best)


def test_what_costs_more_gets_more() -> None:
    curve = (1.0, 0.5, 0.25, 0.125, 0.0625)
    items = {
        "calm": Item(curve, 8),
        "touchy": Item(tuple(16 * cost for cost in curve), 8),
    }
    assert allocate(items, 48) == {"calm": 1, "touchy": 5}
    assert allocate(items, 16) == {"calm": 1, "touchy": 1}


def test_a_step_that_only_pays_with_the_next_one_is_taken() -> None:
    items = {"late": Item((1.0, 1.0, 0.0), 1), "early": Item((1.0, 0.9, 0.85), 1)}
    assert allocate(items, 4) == {"late": 3, "early": 1}


def test_a_budget_below_one_stage_each_is_refused() -> None:
    with pytest.raises(InputError, match="ask for more bits"):
        allocate({0: Item((1.0,), 8), 1: Item((1.0,), 8)}, 15)


def test_the_hull_is_convex_and_touches_the_costs() -> None:
    assert convex([5, 5, 1, 2, 0]) == pytest.approx([5, 3, 1, 0.5, 0])
    assert convex([2.0]) == [2.0]
