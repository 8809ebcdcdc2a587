"""additive_step against one softmax over codes, window and sinks in float64."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from commvq_core import ops
from commvq_core.ops import reference
from commvq_core.rope import to_pairs
from tests.ops.cases import one_step, step
from tests.ops.test_additive_attend import keys_and_values

IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {
    "op": ops.additive_step,
    "pytorch": reference.additive_step,
}
CASES = {
    "SmolLM2": {"heads": 3, "dim": 64, "stages": 8, "rotary": 64, "tokens": 300, "batch": 1},
    "Llama 3.1 8B": {"dim": 128, "subs": 2, "stages": 8, "rotary": 128, "groups": 4},
    "several chunks": {"tokens": 9000, "batch": 1, "stages": 2},
    "two bits": {"dim": 64, "stages": 16, "rotary": 64},
    "neighbours are pairs": {"interleaved": True},
    "partial rotation": {"rotary": 6},
    "neighbours, partial": {"rotary": 6, "interleaved": True, "turned": 1.2},
    "no rotation": {"rotary": 0},
    "YaRN": {"turned": 1.3, "rotary": 12},
    "odd head": {"dim": 40, "subs": 5, "rotary": 40},
    "head of 80": {"dim": 80, "subs": 2, "rotary": 80, "stages": 5},
    "one query head": {"groups": 1},
    "as many heads as decode tokens": {"groups": 40, "dim": 64, "rotary": 64},
    "no sinks": {"sinks": 0},
    "no window": {"window": 0, "sinks": 0},
    "no codes but sinks'": {"tokens": 4},
    "one code": {"tokens": 5, "batch": 1, "window": 1},
    "large logits": {"spread": 40.0},
}


def by_definition(arguments: dict[str, Any], softcap: float, dtype: torch.dtype) -> Tensor:
    """[batch, 1, heads, dim], tokens and products of them in `dtype`, the softmax never below
    float32."""
    given = dict(arguments)
    names = "key_codes key_books key_gains key_means key_group value_codes value_books value_scales"
    coded = [given[name] for name in f"{names} turns steps first".split()]
    heads, (batch, all_heads, _, dim) = given["keys"].shape[1], given["query"].shape
    keys, values = (torch.from_numpy(x) for x in keys_and_values((None, *coded)))
    rotary = 2 * given["turns"].shape[3]
    factors = given["key_factors"].double()[:, None].clone()
    factors[..., :rotary] *= given["turned"]
    keys = (keys * factors).expand(batch, -1, -1, -1)
    values = values @ given["value_inverse"].double()
    query = given["query"].double().view(batch, heads, -1, dim) * given["scaling"]
    layout = "interleaved" if given["interleaved"] else "half"
    pairs = to_pairs(query, rotary_dim=rotary, layout=layout)
    scores = [pairs.to(dtype) @ keys.to(dtype).transpose(-1, -2)]
    begin = given["first"][:, None] + given["sink_keys"].shape[2]
    for name in ("keys", "sink_keys"):
        scores.append(query.to(dtype) @ given[name].to(dtype).transpose(-1, -2))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    every = torch.cat(scores, dim=-1).to(wide)
    if softcap:
        every = softcap * torch.tanh(every / softcap)
    places = torch.arange(every.shape[-1])  # codes of padding and sinks are not seen
    unseen = (places < begin) & (places < keys.shape[2])
    every = every.masked_fill(unseen[:, None, None], -torch.inf)
    weights = every.softmax(dim=-1).nan_to_num().to(dtype)
    found = weights @ torch.cat([values, given["values"], given["sink_values"]], dim=2).to(dtype)
    return found.double().reshape(batch, 1, all_heads, dim)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("case", CASES)
def test_it_is_one_softmax_over_all_tokens(name: str, case: str, softcap: float) -> None:
    arguments = step(**CASES[case])
    got = IMPLEMENTATIONS[name](**arguments, softcap=softcap)
    want = by_definition(arguments, softcap, torch.float64)
    low = by_definition(arguments, softcap, torch.bfloat16)
    share = 2.0 if name == "op" else 0.05  # PyTorch's is float32
    error = (got.double() - want).abs().max()
    assert error <= share * (low - want).abs().max() + 1e-6
    assert want.abs().max() > 0


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", ["SmolLM2", "partial rotation", "several chunks"])
def test_bfloat16_is_rounded_once(name: str, case: str) -> None:
    arguments = step(dtype=torch.bfloat16, **CASES[case])
    got = IMPLEMENTATIONS[name](**arguments, softcap=0.0)
    assert got.dtype == torch.bfloat16
    arguments["query"] = arguments["query"].float()
    want = IMPLEMENTATIONS[name](**arguments, softcap=0.0)
    assert torch.equal(got, want.bfloat16())


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_row_of_nothing_gives_zeros(name: str) -> None:
    arguments = step(window=0, sinks=0, tokens=20)
    arguments["first"] = torch.tensor([20, 3])
    got = IMPLEMENTATIONS[name](**arguments, softcap=0.0)
    assert bool((got[0] == 0).all())
    assert bool(got[1].any())


def test_views_of_larger_tensors_serve() -> None:
    arguments = step()
    want = ops.additive_step(**arguments, softcap=0.0)
    for name in ("keys", "values", "key_codes", "value_codes"):
        own = arguments[name]
        larger = torch.zeros(*own.shape[:2], own.shape[2] + 9, own.shape[3] + 3, dtype=own.dtype)
        view = larger[:, :, 5 : 5 + own.shape[2], : own.shape[3]]
        view.copy_(own)
        arguments[name] = view
    assert torch.equal(ops.additive_step(**arguments, softcap=0.0), want)


def test_threads_change_nothing() -> None:
    arguments, threads = step(tokens=9000, heads=4, stages=2), torch.get_num_threads()
    found = []
    try:
        for count in (1, 4, 7):
            torch.set_num_threads(count)
            found += [ops.additive_step(**arguments, softcap=0.0) for _ in range(3)]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, found[0]) for one in found)


WRONG = [
    ("query", torch.zeros(2, 6, 2, 16), ValueError),
    ("query", torch.zeros(2, 5, 1, 16), ValueError),
    ("query", torch.zeros(2, 6, 1, 16).half(), TypeError),
    ("query", torch.zeros(3, 6, 1, 16), ValueError),
    ("key_factors", torch.zeros(2, 8), ValueError),
    ("key_factors", torch.zeros(2, 16).double(), TypeError),
    ("value_inverse", torch.zeros(2, 16, 8), ValueError),
    ("keys", torch.zeros(2, 2, 9, 16), ValueError),
    ("keys", torch.zeros(2, 16), ValueError),
    ("values", torch.zeros(2, 2, 40, 16).half(), TypeError),
    ("sink_values", torch.zeros(2, 2, 3, 16), ValueError),
    ("key_codes", torch.zeros(2, 2, 99, 3, dtype=torch.uint8), ValueError),
    ("first", torch.zeros(3, dtype=torch.int64), ValueError),
    ("turns", torch.zeros(1, 1, 2, 8), ValueError),
]


@pytest.mark.parametrize(("name", "value", "error"), WRONG)
def test_wrong_arguments_are_named(name: str, value: Tensor, error: type[Exception]) -> None:
    with pytest.raises(error):
        ops.additive_step(**(step() | {name: value}), softcap=0.0)


def test_the_raw_operator_refuses_what_would_read_beyond_memory() -> None:
    places = list(inspect.signature(ops.additive_step).parameters)
    if ops.native_available():
        for name, value, _ in WRONG:
            arguments = list(one_step())
            arguments[places.index(name)] = value
            with pytest.raises(RuntimeError, match="additive_step"):
                torch.ops.commvq.additive_step(*arguments)


def test_numbers_add_up() -> None:
    """One window token and no codes: its value, whatever the rest."""
    arguments = step(tokens=4, window=1, sinks=0, batch=1)
    arguments["first"] = torch.tensor([4])
    got = ops.additive_step(**arguments, softcap=0.0)
    want = arguments["values"].repeat_interleave(3, dim=1).transpose(1, 2)
    assert np.allclose(got.numpy(), want.numpy(), atol=1e-6)
