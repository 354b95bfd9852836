"""The prepass: mean, range, scale, halves, weights, any dtype and stride."""

import numpy as np
import pytest
import torch

from cases import assert_close
from gaussmix._arrays import to_numpy
from gaussmix_kernels import _prepass
from kernels.common import DEVICE, LAYOUTS, prepare, rows, tensor

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int8,
    torch.uint8,
]


def check(data, x, weight=None, shift=None):
    """Everything in `data` against NumPy."""
    n, d = x.shape
    weight = np.ones(n) if weight is None else weight / weight.max()
    if not data.exact:
        weight = weight.astype(np.float32).astype(np.float64)
    spread = np.abs(x).max() or 1
    mean = np.average(x, axis=0, weights=weight)
    assert_close(data.shift, mean if shift is None else shift, 1e-14 * spread)
    shift, scale = to_numpy(data.shift), to_numpy(data.scale)
    offsets = x - shift
    largest = np.abs(offsets).max(axis=0)
    assert np.array_equal(np.exp2(np.round(np.log2(scale))), scale)
    assert np.all(np.where(largest > 0, largest * scale <= 128, scale == 1))
    assert np.all(np.where(largest > 0, largest * scale > 64 - 1e-6, True))
    expected = offsets * scale
    hi, lo = (to_numpy(half).astype(np.float64) for half in (data.hi, data.lo))
    assert hi.shape == (n, -(-d // 16) * 16)
    assert np.all(hi[:, d:] == 0)
    if data.exact:
        assert data.lo is data.hi
        assert np.array_equal(hi[:, :d], expected)
    else:
        assert np.all(lo[:, d:] == 0)
        found = hi[:, :d] + lo[:, :d]
        # 22 bits, down to the smallest half number.
        assert np.all(np.abs(found - expected) <= np.maximum(2.0**-22 * np.abs(expected), 2.0**-25))
    squares = (offsets**2).sum(axis=1)
    assert np.all(np.abs(to_numpy(data.squares) - squares) <= (1e-14 if data.exact else 1e-7) * squares)
    assert data.total == pytest.approx(weight.sum(), rel=1e-14)
    assert_close(data.scatter, (offsets * weight[:, None]).T @ offsets, 1e-12 if data.exact else 1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_any_dtype_and_stride(dtype, layout, exact):
    values = np.clip(20 * np.random.RandomState(0).normal(size=(45, 5)), -120, 120)
    x = tensor(np.abs(values) if dtype == torch.uint8 else values, layout, dtype)
    check(_prepass.prepare(x, exact=exact), to_numpy(x.to(torch.float64)))


@pytest.mark.parametrize(("n", "d"), [(1, 1), (2, 1), (33, 2), (31, 16), (64, 17), (45, 33), (20, 70), (7, 130)])
def test_odd_sizes(n, d, exact):
    x, weight = rows(n, d, weighted=True)
    check(prepare(x, weight, exact=exact), x, weight)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_several_slabs(layout, exact, short_slabs):
    x, weight = rows(150, 3, weighted=True)
    check(prepare(x, weight, exact=exact, layout=layout), x, weight)


def test_a_given_shift(exact):
    x, weight = rows(40, 3, weighted=True)
    shift = np.array([1.0, -20.0, 0.5])
    check(prepare(x, weight, exact=exact, shift=shift), x, weight, shift)


def test_data_far_from_zero_keep_their_digits(exact):
    x = 2.0**30 + rows(70, 2)[0]
    check(prepare(x, exact=exact), x)


def test_features_of_very_different_size(exact):
    x = rows(70, 3)[0] * np.array([2.0**-40, 1.0, 2.0**40])
    data = prepare(x, exact=exact)
    scaled = to_numpy(data.rows(slice(None)))
    assert np.all(np.abs(scaled).max(axis=0) > 60)
    assert_close(scaled, (x - to_numpy(data.shift)) * to_numpy(data.scale), 1e-14 if exact else 3e-7)


def test_a_constant_feature(exact):
    x = rows(20, 2)[0]
    x[:, 1] = 1e6 / 7
    data = prepare(x, exact=exact)
    assert float(data.scale[1]) == 1
    assert np.all(to_numpy(data.hi)[:, 1] == 0)


def test_weights_are_at_most_one_and_rounded_once(exact):
    x, weight = rows(50, 2, weighted=True)
    data = prepare(x, weight, exact=exact)
    assert data.gain == weight.max()
    assert data.weight.dtype == (torch.float64 if exact else torch.float32)
    assert float(data.weight.max()) == 1
    assert data.total == float(data.weight.sum(dtype=torch.float64))


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # the interpreter's
@pytest.mark.parametrize("shift", [None, [1.0, 2.0, 3.0]], ids=["mean", "given shift"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e200])
@pytest.mark.parametrize("row", [0, 17, 39])
def test_what_is_not_finite_is_refused(value, row, shift, exact):
    x, weight = rows(40, 3, weighted=True)
    x[row, 1] = value
    weight[row] = 0
    with np.errstate(invalid="ignore", over="ignore"), pytest.raises(ValueError, match="NaN, infinity or values"):
        prepare(x, weight, exact=exact, shift=shift)


def test_offsets_of_more_than_31_bits(exact, monkeypatch):
    n, d = 35, 3
    stride = 2**31 // (n - 2)
    # Pages that nobody touches take no memory; the interpreter would copy the storage onto itself.
    copy = torch.UntypedStorage.copy_
    monkeypatch.setattr(
        torch.UntypedStorage, "copy_", lambda to, of, *_: to if to.data_ptr() == of.data_ptr() else copy(to, of)
    )
    size = (n - 1) * stride + d
    memory = torch.as_tensor(np.empty(size, dtype=np.int8)) if DEVICE == "cpu" else torch.zeros(size, dtype=torch.int8)
    x = memory.to(DEVICE).as_strided((n, d), (stride, 1))
    values = np.random.RandomState(0).randint(-100, 100, size=(n, d))
    x.copy_(torch.as_tensor(values))
    assert (n - 1) * stride > 2**31
    check(_prepass.prepare(x, exact=exact), values.astype(np.float64))
    transposed = memory.to(DEVICE).as_strided((d, n), (1, stride))
    check(_prepass.prepare(transposed, exact=exact), values.T.astype(np.float64))
