"""The CUDA kernels' blocks, compiled once for all tests."""

from __future__ import annotations

import ctypes

import pytest

from tests.cuda.hosted import compiled


@pytest.fixture(scope="session")
def few_rows(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """Attention of a few rows of queries."""
    return compiled("host_attend.cpp", tmp_path_factory.mktemp("cuda"))


@pytest.fixture(scope="session")
def many_rows(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """Attention of many rows of queries."""
    return compiled("host_rows.cpp", tmp_path_factory.mktemp("cuda"))
