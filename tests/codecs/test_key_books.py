"""Keys in whole numbers: what attention may rely on, and what rounding costs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from commvq_core import ops
from commvq_core.codecs.base import SideSpec
from commvq_core.codecs.key_books import KeyBooks
from commvq_core.fit.additive import fit_additive


def fitted(stages: int, tokens: int = 3000) -> tuple[Tensor, Tensor, Tensor]:
    """Keys [tokens, 32] with a mean and channels that stand out, as real ones; their codebooks
    [1, stages, 64, 32] and a forward transform."""
    generator = torch.Generator().manual_seed(stages)
    scale = torch.rand(16, generator=generator).square().add(0.05).repeat_interleave(2)
    mixing = torch.randn(32, 32, generator=generator) / 6
    rows = torch.randn(tokens, 32, generator=generator) @ mixing * scale
    rows[:, 4:6] += 4 * scale[4]
    books = fit_additive(
        rows,
        sub_dim=32,
        stages=stages,
        codewords=64,
        kmeans_iterations=3,
        rounds=1,
        beam=4,
        seed=0,
    )
    return rows, books, torch.ones(32)


@pytest.mark.parametrize("stages", [1, 2, 5, 8, 17])
def test_whatever_the_codes_no_sum_leaves_its_range(stages: int) -> None:
    _, codebooks, forward = fitted(stages, 400)
    books = KeyBooks.from_codebooks(codebooks, forward)
    words, gains = books.words[0, 0].int(), books.gains[0, 0].int()
    for start in range(0, stages, books.group):
        part = words[start : start + books.group]
        assert int(part.amax(dim=1).sum(dim=0).max()) <= 127
        assert int(part.amin(dim=1).sum(dim=0).min()) >= -127
        assert len(set(gains[start : start + books.group].tolist())) == 1
    means = books.means[0].int()
    high = means + (words.amax(dim=1) * gains[:, None]).sum(dim=0)
    low = means + (words.amin(dim=1) * gains[:, None]).sum(dim=0)
    assert int(high.max()) <= 23_000
    assert int(low.min()) >= -23_000


@pytest.mark.parametrize("stages", [1, 2, 4, 6])
def test_rounding_costs_little_and_stages_part_where_they_must(stages: int) -> None:
    rows, codebooks, forward = fitted(stages)

    def error(words: Tensor, of: Tensor) -> float:
        codes = ops.additive_encode(of[None].contiguous(), words, 8)[0].long()
        sums = sum(words[0, 0, stage, codes[:, stage]] for stage in range(stages))
        return float((sums - of).square().sum(dim=1).mean())

    exact = error(codebooks[None], rows)
    coarse = KeyBooks.from_codebooks(codebooks, forward)
    books = KeyBooks.from_codebooks(codebooks, forward, exact)
    rounded = error(books.codebooks, books.transformed(rows[None])[0])
    paired = error(coarse.codebooks, coarse.transformed(rows[None])[0])
    assert rounded != exact
    assert rounded < 1.02 * exact
    assert paired < 1.03 * exact
    assert books.group >= 2


def test_stages_part_where_sharing_a_byte_costs_too_much() -> None:
    _, codebooks, forward = fitted(8, 400)
    assert KeyBooks.from_codebooks(codebooks, forward, 100.0).group >= 2
    assert KeyBooks.from_codebooks(codebooks, forward, 1e-9).group == 1


def test_transforming_there_and_back_gives_the_keys() -> None:
    rows, codebooks, _ = fitted(2, 400)
    forward = torch.rand(16).add(0.5).repeat_interleave(2)
    books = KeyBooks.from_codebooks(codebooks, forward)
    back = books.restored(books.transformed(rows[None]))[0]
    assert (back - rows).abs().max() < 1e-4 * rows.abs().max()


def test_the_largest_group_that_is_true_is_found() -> None:
    _, codebooks, forward = fitted(8, 400)
    spec = SideSpec("key", 1, 32, 32)
    tensors = KeyBooks.from_codebooks(codebooks, forward).tensors()

    def group(**changes: Tensor) -> int:
        shape = tuple(tensors["codebooks"].shape)
        return KeyBooks.from_tensors(spec, shape, {**tensors, **changes}).group

    assert group() == 2
    small = torch.div(tensors["codebooks"], 2, rounding_mode="trunc").to(torch.int8)
    same = torch.full_like(tensors["gains"], 2)
    assert group(codebooks=small, gains=same) == 4
    uneven = tensors["gains"].clone()
    uneven[0, 0, 1] -= 1
    assert group(gains=uneven) == 1
