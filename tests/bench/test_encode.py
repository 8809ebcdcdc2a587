"""The encoding benchmark: what it reports, on cases that take no time."""

from __future__ import annotations

from commvq_core.bench.encode import EncodeCase, bench_encode


def test_every_case_is_timed_with_every_implementation() -> None:
    cases = (
        EncodeCase("tiny", groups=1, tokens=3, subs=1, stages=2, codewords=16, sub_dim=8),
        EncodeCase("greedy", groups=2, tokens=1, subs=2, codewords=16, sub_dim=8, beam=1),
    )
    result = bench_encode(cases, seconds=0.01)
    assert [(row["name"], row["impl"]) for row in result["rows"]] == [
        (case.name, impl) for case in cases for impl in ("op", "pytorch")
    ]
    for row in result["rows"]:
        assert 0 < row["ms_min"] <= row["ms_median"]
    assert result["threads"] >= 1
