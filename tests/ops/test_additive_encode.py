"""additive_encode against the definition: native kernel and PyTorch reference alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from commvq_core import ops
from commvq_core.ops import reference
from tests import reference as naive
from tests.ops.cases import gaussian, integers

Encode = Callable[[Tensor, Tensor, int], Tensor]
IMPLEMENTATIONS = {"op": ops.additive_encode, "pytorch": reference.additive_encode}
SHAPES = [
    # groups, tokens, subs, stages, codewords, sub_dim
    (1, 20, 1, 4, 16, 8),
    (2, 7, 2, 3, 64, 32),
    (1, 5, 1, 4, 256, 32),
    (1, 70, 1, 2, 256, 64),  # enough tokens for the table of all pairs
    (3, 4, 2, 1, 256, 8),
    (1, 9, 1, 5, 10, 3),  # nothing is a multiple of anything
    (1, 3, 1, 6, 2, 1),
    (2, 40, 1, 3, 1, 8),
    (1, 30, 1, 12, 16, 32),  # sums that part late, and early
    (1, 300, 1, 3, 100, 20),  # a table, of codewords that do not fill it
]
ROUNDING = 2e-5  # of float32 sums of up to 64 products of order one


def exact(*shape: int) -> tuple[Tensor, Tensor]:
    """Multiples of 1/256, which the CPU kernel's int16 hold as they are."""
    x, books = gaussian(*shape)
    return (x * 256).round() / 256, (books * 256).round() / 256


@pytest.fixture(params=IMPLEMENTATIONS)
def encode(request: pytest.FixtureRequest) -> Encode:
    return IMPLEMENTATIONS[request.param]


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("beam", [1, 3, 8, 20])
@pytest.mark.parametrize("shape", SHAPES)
def test_codes_are_those_of_the_definition(
    encode: Encode, shape: tuple[int, ...], beam: int
) -> None:
    x, books = exact(*shape)
    codes = encode(x, books, beam).numpy()
    expected, margins = naive.additive_encode(x.numpy(), books.numpy(), beam)
    clear = np.repeat(margins > ROUNDING, books.shape[2], axis=2)
    assert clear.mean() > 0.9 or books.shape[3] <= 2
    np.testing.assert_array_equal(codes[clear], expected[clear])


@pytest.mark.parametrize("beam", [1, 3, 8])
@pytest.mark.parametrize("codewords", [16, 64, 256])
@pytest.mark.parametrize("sub_dim", [8, 32, 64])
def test_native_answer_is_as_near_as_the_reference(codewords: int, sub_dim: int, beam: int) -> None:
    x, books = exact(2, 300, 2, 4, codewords, sub_dim)
    native = ops.additive_encode(x, books, beam)
    pytorch = reference.additive_encode(x, books, beam)
    errors = [
        ((naive.additive_decode(codes.numpy(), books.numpy()) - x.numpy()) ** 2).sum(-1)
        for codes in (native, pytorch)
    ]
    np.testing.assert_allclose(errors[0], errors[1], rtol=ROUNDING)


@pytest.mark.parametrize("beam", [1, 3, 8])
@pytest.mark.parametrize("codewords", [16, 64, 256])
@pytest.mark.parametrize("sub_dim", [8, 32, 64])
def test_native_answer_is_nearer_than_bfloat16s(codewords: int, sub_dim: int, beam: int) -> None:
    x, books = gaussian(2, 300, 2, 4, codewords, sub_dim)
    wanted, _ = naive.additive_encode(x.numpy(), books.numpy(), beam)
    native = ops.additive_encode(x, books, beam).numpy()
    low = [tensor.bfloat16().float() for tensor in (x, books)]
    others = reference.additive_encode(*low, beam).numpy()
    differ, low_differ = ((codes != wanted).sum() for codes in (native, others))
    assert differ <= max(low_differ / 3, 8)
    errors = [
        ((naive.additive_decode(codes, books.numpy()) - x.numpy()) ** 2).mean()
        for codes in (native, wanted)
    ]
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)


@pytest.mark.parametrize("stages", [24, 90])
def test_sums_of_many_stages_are_as_near_as_the_reference(stages: int) -> None:
    """The last codewords are a thousandth as long as the first."""
    x, books = gaussian(1, 60, 1, stages, 8, 16)
    books *= ((0.93 / 0.75) ** torch.arange(stages))[:, None, None]  # all of them matter
    native, pytorch = (encode(x, books, 24) for encode in IMPLEMENTATIONS.values())
    same = (native == pytorch)[..., :24].all(dim=-1)
    assert same.float().mean() > 0.8  # near ties part the others, and all in the end
    errors = [
        ((naive.additive_decode(codes.numpy(), books.numpy()) - x.numpy()) ** 2).mean()
        for codes in (native, pytorch)
    ]
    assert errors[0] < 1.01 * errors[1]


@pytest.mark.parametrize("beam", [1, 2, 5, 8, 30])
@pytest.mark.parametrize("tokens", [3, 40])
def test_ties_go_to_the_earlier_beam_and_then_the_lower_codeword(
    encode: Encode, tokens: int, beam: int
) -> None:
    x, books = integers(tokens)
    expected, margins = naive.additive_encode(x.numpy(), books.numpy(), beam)
    assert (margins == 0).any()
    np.testing.assert_array_equal(encode(x, books, beam).numpy(), expected)


def test_equal_codewords_all_give_the_first(encode: Encode) -> None:
    x, books = gaussian(tokens=200, codewords=256)
    books[...] = books[..., :1, :]
    assert encode(x, books, 8).max() == 0


@pytest.mark.parametrize("beam", [1, 8])
def test_sums_of_codewords_are_found_again(encode: Encode, beam: int) -> None:
    _, books = gaussian(2, 1, 2, 3, 64, 32)
    books *= torch.tensor([1.0, 0.1, 0.01])[:, None, None]  # so that even greedy search succeeds
    codes = torch.randint(0, 64, (2, 50, 6), generator=torch.Generator().manual_seed(1)).byte()
    x = torch.from_numpy(naive.additive_decode(codes.numpy(), books.numpy())).float()
    assert torch.equal(encode(x, books, beam), codes)


def test_a_wider_beam_is_nearer_on_average(encode: Encode) -> None:
    x, books = gaussian(1, 400, 1, 4, 64, 16)
    errors = []
    for beam in (1, 2, 8, 32):
        decoded = naive.additive_decode(encode(x, books, beam).numpy(), books.numpy())
        errors.append(((decoded - x.numpy()) ** 2).mean())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.95 * errors[0]


@pytest.mark.parametrize("shape", [(1, 0, 1, 3, 16, 8), (0, 5, 1, 3, 16, 8), (2, 0, 2, 1, 256, 32)])
def test_no_tokens_give_no_codes(encode: Encode, shape: tuple[int, ...]) -> None:
    x, books = gaussian(*shape)
    codes = encode(x, books, 8)
    assert codes.shape == (shape[0], shape[1], shape[2] * shape[3])
    assert codes.dtype == torch.uint8


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("tokens", [4, 100])
def test_codes_of_a_broken_token_are_valid_and_leave_the_others_alone(
    encode: Encode, tokens: int, value: float
) -> None:
    x, books = gaussian(1, tokens, 1, 3, 10, 8)
    clean = encode(x, books, 8)
    x[0, 1, 3] = value
    codes = encode(x, books, 8)
    assert codes.max() < 10
    keep = torch.arange(tokens) != 1
    assert torch.equal(codes[:, keep], clean[:, keep])


@pytest.mark.parametrize("tokens", [4, 100])
def test_codes_of_a_broken_codebook_are_valid_and_leave_other_groups_alone(
    encode: Encode, tokens: int
) -> None:
    x, books = gaussian(2, tokens, 1, 3, 10, 8)
    clean = encode(x, books, 8)
    books[0, 0, 1, 4, 2] = float("nan")
    codes = encode(x, books, 8)
    assert codes.max() < 10
    assert torch.equal(codes[1], clean[1])


def test_strides_do_not_matter(encode: Encode) -> None:
    x, books = gaussian(3, 50, 2, 3, 64, 8)
    expected = encode(x, books, 4)
    tokens_first = x.transpose(0, 1).contiguous().transpose(0, 1)
    dims_first = x.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    stages_first = books.permute(2, 4, 0, 3, 1).contiguous().permute(2, 4, 0, 3, 1)
    laid_out = books.mT.contiguous().mT
    for other in (tokens_first, dims_first, x.repeat(1, 1, 2)[..., : x.shape[2]]):
        assert torch.equal(encode(other, books, 4), expected)
    for other in (stages_first, laid_out):
        assert torch.equal(other, books)
        assert torch.equal(encode(x, other, 4), expected)


def test_a_code_does_not_depend_on_its_neighbours_nor_on_threads(threads: None) -> None:
    x, books = gaussian(2, 1000, 2, 4, 256, 32)
    torch.set_num_threads(1)
    expected = ops.additive_encode(x, books, 8)
    for count in (2, 3, 5):
        torch.set_num_threads(count)
        assert torch.equal(ops.additive_encode(x, books, 8), expected)
    if ops.native_available():  # the reference's matrix products round by shape
        for part in (1, 7, 100):
            codes = [ops.additive_encode(piece, books, 8) for piece in x.split(part, dim=1)]
            assert torch.equal(torch.cat(codes, dim=1), expected)


@pytest.mark.parametrize("tokens", [40, 700])  # both ways of finding candidates
def test_a_code_does_not_depend_on_how_long_the_other_tokens_are(tokens: int) -> None:
    """One is far longer than most, one far shorter, one nothing."""
    x, books = gaussian(1, tokens, 1, 6, 256, 32)
    plain = ops.additive_encode(x, books, 8)
    x[0, :3] *= torch.tensor([100.0, 0.01, 0.0])[:, None]
    codes = ops.additive_encode(x, books, 8)
    assert torch.equal(codes[:, 3:], plain[:, 3:])
    for index in range(3):
        alone = ops.additive_encode(x[:, index : index + 1], books, 8)
        assert torch.equal(codes[:, index : index + 1], alone)


@pytest.mark.parametrize("groups", [3, 5, 6])
def test_units_that_are_left_over_are_cut_into_parts_of_tokens(groups: int, threads: None) -> None:
    for tokens in (1, 2, 31, 33):
        x, books = gaussian(groups, tokens, 1, 4, 256, 32)
        torch.set_num_threads(1)
        expected = ops.additive_encode(x, books, 8)
        for count in (2, 3, 4):
            torch.set_num_threads(count)
            assert torch.equal(ops.additive_encode(x, books, 8), expected)


def test_reference_in_small_chunks_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x, books = integers()
    expected = reference.additive_encode(x, books, 4)
    monkeypatch.setattr(reference, "CANDIDATES_AT_ONCE", 1)
    assert torch.equal(reference.additive_encode(x, books, 4), expected)


def test_autocast_does_not_touch_the_scores(encode: Encode) -> None:
    x, books = gaussian(1, 300, 1, 4, 64, 32)
    expected = encode(x, books, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(encode(x, books, 4), expected)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"x": torch.zeros(1, 4, 8, dtype=torch.float64)}, TypeError, "x must be torch.float32"),
        ({"x": [[1.0]]}, TypeError, "x must be a tensor, not list"),
        (
            {"books": torch.zeros(1, 1, 2, 4, 8).half()},
            TypeError,
            "codebooks must be torch.float32",
        ),
        ({"beam": 1.0}, TypeError, "beam must be an int"),
        ({"beam": True}, TypeError, "beam must be an int"),
        ({"beam": 0}, ValueError, "beam must be at least 1"),
        ({"x": torch.zeros(4, 8)}, ValueError, r"x must be \[groups"),
        ({"books": torch.zeros(1, 2, 4, 8)}, ValueError, r"codebooks must be \[groups"),
        ({"books": torch.zeros(2, 1, 2, 4, 8)}, ValueError, "1 groups but codebooks has 2"),
        ({"x": torch.zeros(1, 4, 9)}, ValueError, "9 wide but codebooks encodes 1 sub-vectors"),
        ({"books": torch.zeros(1, 1, 2, 257, 8)}, ValueError, "1 to 256 codewords, not 257"),
        ({"books": torch.zeros(1, 1, 2, 0, 8)}, ValueError, "1 to 256 codewords, not 0"),
        ({"books": torch.zeros(1, 1, 0, 4, 8)}, ValueError, "no empty axis"),
        ({"x": torch.zeros(1, 4, 8, device="meta")}, ValueError, "x is on meta"),
    ],
)
def test_what_does_not_fit_is_refused(
    change: dict[str, object], error: type[Exception], says: str
) -> None:
    given = {"x": torch.zeros(1, 4, 8), "books": torch.zeros(1, 1, 2, 4, 8), "beam": 2, **change}
    with pytest.raises(error, match=says):
        ops.additive_encode(given["x"], given["books"], given["beam"])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("x", "books", "beam"),
    [
        (torch.zeros(1, 4, 9), torch.zeros(1, 1, 2, 4, 8), 2),
        (torch.zeros(1, 4, 8), torch.zeros(1, 1, 2, 257, 8), 2),
        (torch.zeros(1, 4, 8), torch.zeros(1, 1, 2, 4, 8), 0),
        (torch.zeros(1, 4, 8).double(), torch.zeros(1, 1, 2, 4, 8), 2),
    ],
)
def test_the_raw_operator_never_reads_out_of_bounds(x: Tensor, books: Tensor, beam: int) -> None:
    with pytest.raises((RuntimeError, ValueError)):
        torch.ops.commvq.additive_encode(x, books, beam)
