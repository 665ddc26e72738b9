"""The CUDA kernels of LoRA's products, those that dropout is in and those of dy, against float64."""

from __future__ import annotations

import pytest
import torch
from oracle import assert_as_accurate

from fastrl.constants import dropout_threshold
from fastrl.ops import native
from fastrl.ops.native import DTYPE_CODES, launch_cuda
from fastrl.reference.lora_linear import dropout_keep

DROPOUT = 0.3
# rows, cols, rank: around a lane, a tile, a block; more rows than one part of lora_da sums over.
SHAPES = [(1, 4, 1), (33, 68, 5), (17, 64, 16), (70, 132, 40), (8, 516, 17), (0, 8, 3)]


@pytest.fixture
def cuda(gpu_backend):
    if gpu_backend != "cuda":
        pytest.skip("kernels of the cuda backend")


def case(rows, cols, rank, dtype, device, dropout=DROPOUT):
    """x with NaN where it is dropped, lora_a, ddown, the seed and x as it is after dropout."""
    g = torch.Generator().manual_seed(0)
    tensors = (
        torch.randn(rows, cols, generator=g),
        torch.randn(rank, cols, generator=g),
        torch.randn(rows, rank, generator=g),
    )
    x, lora_a, ddown = (t.to(dtype).to(device) for t in tensors)
    seed = torch.tensor([0x1234567890ABCDE], device=device) if dropout else None
    keep = dropout_keep(rows, cols, dropout, seed) if dropout else torch.ones_like(x, dtype=torch.bool)
    return torch.where(keep, x, torch.nan), lora_a, ddown, seed, keep, torch.where(keep, x, 0)


def down(x, lora_a, seed, dropout=DROPOUT):
    out = x.new_full((len(x), len(lora_a)), torch.nan)
    launch_cuda(
        "lora_down", x, x, x.stride(0), lora_a, DTYPE_CODES[x.dtype], *x.shape, len(lora_a),
        seed, dropout_threshold(dropout), out,
    )  # fmt: skip
    return out


def da(x, ddown, seed, dropout=DROPOUT):
    rank = ddown.shape[1]
    out = x.new_full((rank, x.shape[1]), torch.nan)
    workspace = x.new_full((native.cuda.lora_da_workspace(*x.shape, rank),), torch.nan, dtype=torch.float32)
    launch_cuda(
        "lora_da", x, x, x.stride(0), ddown, DTYPE_CODES[x.dtype], *x.shape, rank, seed,
        dropout_threshold(dropout), workspace, out,
    )  # fmt: skip
    return out


def dx(ddown, lora_a, seed, dropout=DROPOUT):
    out = ddown.new_full((len(ddown), lora_a.shape[1]), torch.nan)
    launch_cuda(
        "lora_dx", ddown, ddown, lora_a, DTYPE_CODES[ddown.dtype], *out.shape, len(lora_a),
        seed, dropout_threshold(dropout), out,
    )  # fmt: skip
    return out


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dropout", [DROPOUT, 0.0])
def test_products(device, dtype, shape, dropout):
    """T20, T23: the mask is the reference's in every product; dropped elements are not multiplied."""
    x, lora_a, ddown, seed, keep, dropped = case(*shape, dtype, device, dropout)
    a64, ddown64, x64 = lora_a.double(), ddown.double(), dropped.double()
    assert_as_accurate(down(x, lora_a, seed, dropout), dropped @ lora_a.t(), x64 @ a64.t(), "down")
    assert_as_accurate(da(x, ddown, seed, dropout), ddown.t() @ dropped, ddown64.t() @ x64, "da")
    eager, truth = (torch.where(keep, product, 0) for product in (ddown @ lora_a, ddown64 @ a64))
    assert_as_accurate(dx(ddown, lora_a, seed, dropout), eager, truth, "dx")


@pytest.mark.usefixtures("cuda")
def test_many_rows(device):
    """The gradient of lora_a over several parts of the rows; the same bits again."""
    x, _, ddown, seed, _, dropped = case(2100, 8, 3, torch.float16, device)
    got = da(x, ddown, seed)
    assert_as_accurate(got, ddown.t() @ dropped, ddown.double().t() @ dropped.double(), "da")
    assert torch.equal(got, da(x, ddown, seed))


@pytest.mark.usefixtures("cuda")
def test_rows_do_not_depend_on_the_batch(device):
    """T15: the same bits for 40 rows as for the first 8 of them."""
    x, lora_a, ddown, seed, *_ = case(40, 132, 9, torch.float16, device)
    assert torch.equal(down(x, lora_a, seed)[:8], down(x[:8], lora_a, seed))
    assert torch.equal(dx(ddown, lora_a, seed)[:8], dx(ddown[:8], lora_a, seed))


@pytest.mark.usefixtures("cuda")
def test_rows_with_a_stride(device):
    """T21: x may be a slice of wider rows."""
    x, lora_a, ddown, seed, *_ = case(19, 64, 4, torch.float16, device)
    wide = torch.full((19, 72), torch.nan, dtype=x.dtype, device=device)
    wide[:, 4:68] = x
    assert torch.equal(down(wide[:, 4:68], lora_a, seed), down(x, lora_a, seed))
    assert torch.equal(da(wide[:, 4:68], ddown, seed), da(x, ddown, seed))


def up_backward(dy, down, lora_b, scaling=0.5):
    (rows, cols), rank = dy.shape, down.shape[1]
    ddown = dy.new_full((rows, rank + 3), torch.nan)[:, 1 : rank + 1]
    db = torch.full_like(lora_b, torch.nan)
    floats = native.cuda.lora_up_backward_workspace(rows, cols, rank)
    workspace = dy.new_full((floats,), torch.nan, dtype=torch.float32)
    launch_cuda(
        "lora_up_backward", dy, dy, down, down.stride(0), lora_b, DTYPE_CODES[dy.dtype],
        rows, cols, rank, scaling, workspace, ddown, ddown.stride(0), db,
    )  # fmt: skip
    return ddown, db


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 4, 2), (33, 68, 6), (150, 516, 16), (17, 1040, 18), (20, 64, 70), (0, 8, 4)], ids=str
)
def test_one_reading_of_dy(device, dtype, shape):
    """Both products of dy, in several parts of rows and columns, with `down` and `ddown` among their siblings'."""
    rows, cols, rank = shape
    g = torch.Generator().manual_seed(0)
    sizes = ((rows, cols), (rows, rank + 4), (cols, rank))
    dy, downs, lora_b = (torch.randn(*size, generator=g).to(dtype).to(device) for size in sizes)
    down = downs[:, 2 : rank + 2]
    ddown, db = up_backward(dy, down, lora_b)
    assert_as_accurate(ddown, (dy @ lora_b) * 0.5, dy.double() @ lora_b.double() * 0.5, "ddown")
    assert_as_accurate(db, (dy.t() @ down) * 0.5, dy.double().t() @ down.double() * 0.5, "db")
    again = up_backward(dy, down, lora_b)
    assert torch.equal(ddown, again[0]) and torch.equal(db, again[1])
    assert torch.equal(ddown[:5], up_backward(dy[:5], down[:5], lora_b)[0])


@pytest.mark.usefixtures("cuda")
def test_what_the_kernels_cannot_take(device):
    x, lora_a, *_, seed, _, _ = case(5, 66, 4, torch.float16, device)
    with pytest.raises(ValueError, match="multiples of 8 bytes"):
        down(x, lora_a, seed)
    with pytest.raises(ValueError, match="bfloat16 or float16"):
        down(x[:, :64].float(), lora_a[:, :64].float(), seed)
