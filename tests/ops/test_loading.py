"""Where the operators come from: compiled when possible, PyTorch otherwise, never a difference."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from commvq_core import ops
from commvq_core.doctor import diagnose
from commvq_core.ops import load
from commvq_core.ops.load import load_native
from tests.ops.cases import (
    attention,
    exact,
    gaussian,
    integers,
    one_step,
    product,
    published,
    rounds,
)

REPOSITORY = Path(__file__).parents[2]
REPORT = """
import json
from commvq_core import ops
from tests.ops.test_loading import exact_digest, rounded_digest
info = ops.native_info()
print(json.dumps([info.available, info.simd, info.reason, exact_digest(), rounded_digest()]))
"""


@dataclass(frozen=True)
class Report:
    """What a fresh Python says of its operators."""

    available: bool
    simd: str | None
    reason: str | None
    exact: str
    rounded: str


def exact_digest() -> str:
    """Of codes whose scores are exact, so that every implementation must agree."""
    found = hashlib.sha256()
    for codewords in (8, 100):
        for beam in (1, 5, 8, 17):
            x, books = integers(tokens=100, codewords=codewords)
            codes = ops.additive_encode(x, books, beam)
            found.update(codes.numpy().tobytes())
            found.update(ops.pack_codes(codes, 7).numpy().tobytes())
    codes = ops.published_encode(*rounds(2, 100, 6, 3, whole=True))
    found.update(codes.numpy().tobytes())
    return found.hexdigest()


# Whose keys are scored token by token, or decoded first; whose stages share bytes in ones, twos and
# fours; whose rows share bins in fours, eights and sixteens.
ATTENTION = (
    {"dim": 40},
    {"dim": 40, "queries": 50},
    {"dim": 128, "subs": 2, "stages": 8, "rotary": 128},
    {"dim": 64, "stages": 5, "rotary": 64, "group": 1, "queries": 7},
    {"dim": 128, "subs": 2, "stages": 7, "group": 4, "queries": 14},
    {"dim": 64, "stages": 5, "group": 4},
)


def rounded_digest() -> str:
    """Of codes that depend on every rounding on the way."""
    found = hashlib.sha256()
    for tokens in (3, 500):
        x, books = gaussian(2, tokens, 2, 4, 256, 33)
        # Multiples of the same few values, so that nearly equal scores abound.
        codes = ops.additive_encode(x.round(decimals=1), books.round(decimals=1), 8)
        found.update(codes.numpy().tobytes())
        for part in ops.product_estep(*product(tokens, 20), 0.3):
            found.update(part.numpy().tobytes())
        for case in ATTENTION:
            arguments = attention(tokens=tokens, **case)
            for part in ops.additive_attend(*arguments, tokens, 3.0):
                found.update(part.numpy().tobytes())
        for dtype in (torch.float32, torch.bfloat16):
            ended = ops.exact_attend(*exact(tokens=tokens, dim=40, dtype=dtype), 3.0)
            found.update(ended.numpy().tobytes())
            ended = ops.additive_step(*one_step(tokens=tokens, dtype=dtype, dim=40, rotary=30))
            found.update(ended.view(torch.uint8).numpy().tobytes())
        found.update(ops.published_encode(*rounds(2, tokens, 20, 3)).numpy().tobytes())
        for part in ops.published_attend(*published(tokens=tokens, dim=40), tokens, 3.0):
            found.update(part.numpy().tobytes())
    return found.hexdigest()


def report(**environment: str) -> Report:
    """Run a fresh Python with these variables."""
    result = subprocess.run(
        [sys.executable, "-c", REPORT],
        env={**os.environ, **environment},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    return Report(*json.loads(result.stdout))


def test_kernels_are_native_where_a_compiler_exists() -> None:
    wanted = os.environ.get("COMMVQ_NO_NATIVE") != "1"
    compiler = shutil.which(os.environ.get("CXX", "c++")) is not None
    assert ops.native_available() == (wanted and compiler), ops.native_info().reason
    assert not ops.native_available() or "cpu" in ops.native_info().backends


def test_no_native_leaves_pytorch_with_the_same_codes() -> None:
    found = report(COMMVQ_NO_NATIVE="1")
    assert (found.available, found.simd, found.reason) == (False, None, "COMMVQ_NO_NATIVE=1")
    assert found.exact == exact_digest()


@pytest.mark.parametrize("level", ["portable", "avx2", "avx512"])
def test_every_simd_level_gives_the_same_bits(level: str) -> None:
    found = report(COMMVQ_SIMD=level)
    best = ops.native_info().simd
    assert found.available == ops.native_available()
    assert found.simd in (level, best, "portable")  # without the level, the best that there is
    assert (found.exact, found.rounded) == (exact_digest(), rounded_digest())


def test_a_missing_extension_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COMMVQ_NO_NATIVE", raising=False)
    info = load_native(tmp_path)
    assert not info.available
    assert "no compiled extension" in info.summary


def test_a_broken_extension_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COMMVQ_NO_NATIVE", raising=False)
    (tmp_path / "_C.abi3.so").write_bytes(b"\x7fELF cut short")
    info = load_native(tmp_path)
    assert not info.available
    assert "_C.abi3.so does not load" in info.summary
    assert "\n" not in info.summary


def test_an_extension_from_older_sources_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ops.native_info().missing == ()
    info = load.NativeInfo(True, "_C.abi3.so", "avx2", (), ("additive_attend",))
    if ops.native_available():
        has_kernel = load._has_kernel
        monkeypatch.setattr(
            load, "_has_kernel", lambda name, key: name != info.missing[0] and has_kernel(name, key)
        )
        found = load_native(REPOSITORY / "commvq_core")
        assert (found.missing, found.backends) == (info.missing, info.backends)
    assert info.summary.endswith("without additive_attend")
    monkeypatch.setattr(ops, "native_info", lambda: info)
    (check,) = [check for check in diagnose()["checks"] if check["name"] == "native kernels"]
    assert not check["ok"]
    assert "older sources" in check["mend"]


def test_importing_touches_no_cuda() -> None:
    code = "import commvq_core.ops, torch; print(torch.cuda.is_initialized())"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "False"


def test_operators_pass_opcheck() -> None:
    x, books = gaussian(2, 9, 2, 3, 16, 8)
    codes = ops.additive_encode(x, books, 3)
    packed = ops.pack_codes(codes, 4)
    calls = [
        (torch.ops.commvq.additive_attend, (*attention(), 90, 0.0)),
        (torch.ops.commvq.additive_attend, (*attention(rotary=0), 0, 5.0)),
        (torch.ops.commvq.additive_attend, (*attention(queries=40), 100, 0.0)),
        (torch.ops.commvq.additive_step, one_step()),
        (torch.ops.commvq.additive_step, one_step(dtype=torch.bfloat16, sinks=0, tokens=5)),
        (torch.ops.commvq.additive_encode, (x, books, 3)),
        (torch.ops.commvq.additive_encode, (x[:, :0], books, 1)),
        (torch.ops.commvq.additive_encode, (x, books.mT.contiguous().mT, 8)),
        (torch.ops.commvq.exact_attend, (*exact(), 0.0)),
        (torch.ops.commvq.exact_attend, (*exact(tokens=0, dtype=torch.bfloat16), 2.0)),
        (torch.ops.commvq.pack_codes, (codes, 4)),
        (torch.ops.commvq.pack_codes, (codes, 8)),
        (torch.ops.commvq.unpack_codes, (packed, 4, codes.shape[-1])),
        (torch.ops.commvq.unpack_codes, (packed, 4, 0)),
        (torch.ops.commvq.product_estep, (*product(9, 5), 0.1, False)),
        (torch.ops.commvq.published_encode, rounds(2, 9, 16, 3)),
        (torch.ops.commvq.published_attend, (*published(), 90, 0.0)),
        (torch.ops.commvq.published_attend, (*published(rotary=0), 0, 5.0)),
        (torch.ops.commvq.product_estep, (*product(0, 5), 0.1, True)),
    ]
    for operator, arguments in calls:
        torch.library.opcheck(operator, arguments)
