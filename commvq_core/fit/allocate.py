"""Spend a budget of bits where they lower the cost most."""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

from commvq_core.errors import InputError

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Item:
    """Something that stages are spent on, such as the keys of a layer.

    `costs[m]` is its cost with m + 1 stages; a stage takes `stage_bits` bits a token.
    """

    costs: tuple[float, ...]
    stage_bits: int


def allocate(items: Mapping[Key, Item], budget: float) -> dict[Key, int]:
    """Stages of every item, at least one each, within `budget` bits a token in all.

    Greedy by gain a bit on the convex hull of each item's costs: the optimum for costs that add up,
    but for the last stage or so that the budget has no room for. Ties go to the item that comes
    first. Raises InputError when one stage each is already too much.
    """
    stages = dict.fromkeys(items, 1)
    spent = sum(item.stage_bits for item in items.values())
    if spent > budget:
        raise InputError(
            f"a budget of {budget:g} bits a token is less than one stage for everything ({spent})",
            "ask for more bits",
        )
    hulls = {key: convex(item.costs) for key, item in items.items()}
    order = {key: place for place, key in enumerate(items)}

    def offer(key: Key) -> tuple[float, int, Key] | None:
        costs, at = hulls[key], stages[key]
        if at == len(costs):
            return None
        gain = (costs[at - 1] - costs[at]) / items[key].stage_bits
        return -gain, order[key], key

    heap = [entry for key in items if (entry := offer(key)) is not None]
    heapq.heapify(heap)
    while heap:
        _, _, key = heapq.heappop(heap)
        if spent + items[key].stage_bits > budget:
            continue  # something smaller may still fit
        stages[key] += 1
        spent += items[key].stage_bits
        if (entry := offer(key)) is not None:
            heapq.heappush(heap, entry)
    return stages


def convex(costs: Sequence[float]) -> list[float]:
    """The greatest convex sequence that is nowhere above `costs`, and never rises."""
    falling = [min(costs[: index + 1]) for index in range(len(costs))]
    corners: list[int] = []
    for index in range(len(falling)):
        while len(corners) > 1 and _above(falling, corners[-2], corners[-1], index):
            corners.pop()
        corners.append(index)
    result = list(falling)
    for left, right in pairwise(corners):
        for index in range(left, right):
            share = (index - left) / (right - left)
            result[index] = falling[left] * (1 - share) + falling[right] * share
    return result


def _above(costs: Sequence[float], left: int, middle: int, right: int) -> bool:
    """Whether the middle point lies on or above the line between its neighbours."""
    slope = (costs[right] - costs[left]) / (right - left)
    return costs[middle] >= costs[left] + slope * (middle - left)
