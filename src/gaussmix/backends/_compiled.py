"""The E-step of features as one compiled call for many rows, where Numba is installed.

The arithmetic is that of `_numpy`: features of 256 rows, their product with the natural parameters, softmax, and sums
in the same dtype that are added in float64. Threads inside the call do not wait for each other, as those do that come
back to Python after each operation, and so few rows with their features stay in the nearest caches.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numba import njit

from gaussmix._typing import Array

# Rows that are summed in their own dtype.
ROWS = 256
# log 2 in two parts, as n times the first one is exact; their sum has more digits than float64.
LOG_2 = (0.693359375, -2.121944400546905827679e-4)
QUADRATIC = {name: number for number, name in enumerate(("none", "norm", "squares", "products"))}
NORM, SQUARES, PRODUCTS = QUADRATIC["norm"], QUADRATIC["squares"], QUADRATIC["products"]


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, compiled when it is first called; kept on disk, where there is a place for that."""
    options: dict[str, Any] = dict(nogil=True, error_model="numpy", fastmath={"contract"})
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # no folder that it may write to
        return njit(**options)(function)


class _Exp(NamedTuple):
    """What exp(x) = 2^n exp(x - n log 2) takes in a dtype, where n is the integer nearest to x / log 2."""

    per_log_2: Any
    high: Any
    low: Any
    magic: Any  # added to a small number, it leaves the nearest integer in the last bits
    series: tuple[Any, ...]  # coefficients, the last first: as many as change exp(log(2) / 2)
    n_digits: Any
    one: Any  # the bits of 1.0


def _exp_in(dtype: type[Any], integer: type[Any], n_terms: int) -> _Exp:
    digits = np.finfo(dtype).nmant
    return _Exp(
        per_log_2=dtype(1 / math.log(2)),
        high=dtype(LOG_2[0]),
        low=dtype(LOG_2[1]),
        magic=dtype(1.5 * 2.0**digits),
        series=tuple(dtype(1 / math.factorial(i)) for i in reversed(range(n_terms))),
        n_digits=integer(digits),
        one=dtype(1).view(integer),
    )


_EXP = {
    np.dtype(np.float32): _exp_in(np.float32, np.int32, 8),
    np.dtype(np.float64): _exp_in(np.float64, np.int64, 14),
}


def expect(linear: Array, natural: Array, weight: Array | None, quadratic: str, floor: float, sums: Array) -> float:
    """Adds the features of rows, weighted by responsibilities, to `sums` (F, k); the sum of log-evidences.

    `linear` (1 + d, n) are 1 and the rows as columns, `natural` (k, F) the natural parameters, both of one dtype.
    Responsibilities of exp(floor) or less, where the largest counts as 1, are exactly zero.
    """
    exp = _EXP[linear.dtype]
    # Of one kind each, since another one would be compiled anew: a copy can be written to.
    weight = np.empty(0) if weight is None else weight.copy()
    bits = np.empty((len(natural), ROWS), dtype=exp.one.dtype)
    return _expect(linear, natural, weight, QUADRATIC[quadratic], linear.dtype.type(floor), exp, bits, sums)


def predict(linear: Array, natural: Array, quadratic: str, floor: float, name: str, out: Array) -> bool:
    """The "labels" (n,), "log_evidence" (n,) or "responsibilities" (n, k) of rows, into `out`.

    Whether all logits were finite: where they were not, `out` is not to be used.
    """
    exp = _EXP[linear.dtype]
    bits = np.empty((len(natural), ROWS), dtype=exp.one.dtype)
    arguments = (linear, natural, QUADRATIC[quadratic], linear.dtype.type(floor), exp, bits)
    if name == "labels":
        return _labels(*arguments, out)
    if name == "log_evidence":
        return _probabilities(*arguments, out, np.empty((0, 0), linear.dtype))
    return _probabilities(*arguments, np.empty(0), out)


@compiled
def _expect(linear, natural, weight, quadratic, floor, exp, bits, sums):
    n, (k, width), dtype = linear.shape[1], natural.shape, linear.dtype
    phi = np.zeros((width, ROWS), dtype)
    logits, product = np.empty((k, ROWS), dtype), np.empty((width, k), dtype)
    largest, total, factor = np.empty(ROWS, dtype), np.empty(ROWS, dtype), np.empty(ROWS, dtype)
    log_likelihood = 0.0
    for start in range(0, n, ROWS):
        b = min(ROWS, n - start)
        _write(linear[:, start : start + b], quadratic, phi)
        np.dot(natural, phi, logits)
        _soften(logits, floor, exp, bits, largest, total)
        factor[:b] = 1
        factor[b:] = 0
        if len(weight) > 0:
            factor[:b] = weight[start : start + b]
        for i in range(b):
            log_likelihood += factor[i] * (np.float64(largest[i]) + math.log(np.float64(total[i])))
        for i in range(ROWS):
            factor[i] /= total[i]
        for row in logits:
            for i in range(ROWS):
                row[i] *= factor[i]
        np.dot(phi, logits.T, product)
        for i in range(width):
            for j in range(k):
                sums[i, j] += product[i, j]
    return log_likelihood


@compiled
def _probabilities(linear, natural, quadratic, floor, exp, bits, log_evidence, responsibilities):
    n, (k, width), dtype = linear.shape[1], natural.shape, linear.dtype
    phi, logits = np.zeros((width, ROWS), dtype), np.empty((k, ROWS), dtype)
    largest, total, zero = np.empty(ROWS, dtype), np.empty(ROWS, dtype), np.zeros(ROWS, dtype)
    for start in range(0, n, ROWS):
        b = min(ROWS, n - start)
        _write(linear[:, start : start + b], quadratic, phi)
        np.dot(natural, phi, logits)
        _probe(logits, zero)
        _soften(logits, floor, exp, bits, largest, total)
        if len(log_evidence) > 0:
            for i in range(b):
                log_evidence[start + i] = np.float64(largest[i]) + math.log(np.float64(total[i]))
        else:
            for row in range(k):
                for i in range(b):
                    responsibilities[start + i, row] = logits[row, i] / total[i]
    return np.all(zero == 0)


@compiled
def _labels(linear, natural, quadratic, floor, exp, bits, labels):
    n, (k, width), dtype = linear.shape[1], natural.shape, linear.dtype
    phi, logits = np.zeros((width, ROWS), dtype), np.empty((k, ROWS), dtype)
    largest, zero, likeliest = np.empty(ROWS, dtype), np.zeros(ROWS, dtype), np.empty(ROWS, bits.dtype)
    for start in range(0, n, ROWS):
        b = min(ROWS, n - start)
        _write(linear[:, start : start + b], quadratic, phi)
        np.dot(natural, phi, logits)
        _probe(logits, zero)
        largest[:] = logits[0]
        likeliest[:] = 0
        for component in range(1, k):
            row = logits[component]
            for i in range(ROWS):
                likeliest[i] = component if row[i] > largest[i] else likeliest[i]
                largest[i] = row[i] if row[i] > largest[i] else largest[i]
        labels[start : start + b] = likeliest[:b]
    return np.all(zero == 0)


@compiled
def _probe(logits, zero):
    """Leaves NaN in zero (256,) where a row's logits are not finite."""
    for row in logits:
        for i in range(ROWS):
            zero[i] += 0 * row[i]


@compiled
def _soften(logits, floor, exp, bits, largest, total):
    """Turns logits (k, 256) into exp(logits - largest), whose sum is the total."""
    largest[:] = logits[0]
    for row in logits[1:]:
        for i in range(ROWS):
            largest[i] = row[i] if row[i] > largest[i] else largest[i]
    for row in logits:
        for i in range(ROWS):
            row[i] -= largest[i]
    _exponentiate(logits.reshape(-1), floor, exp, bits.reshape(-1))
    total[:] = logits[0]
    for row in logits[1:]:
        for i in range(ROWS):
            total[i] += row[i]


@compiled
def _write(linear, quadratic, phi):
    """Features of at most 256 rows into phi (F, 256), in the order of `_features`; zero for those that are missing."""
    first, b = linear.shape
    d = first - 1
    phi[:first, :b] = linear
    phi[:first, b:] = 0
    if quadratic == NORM:
        out = phi[first]
        out[:] = 0
        for i in range(1, first):
            x = phi[i]
            for j in range(ROWS):
                out[j] += x[j] * x[j]
    elif quadratic == SQUARES:
        for i in range(d):
            x, out = phi[1 + i], phi[first + i]
            for j in range(ROWS):
                out[j] = x[j] * x[j]
    elif quadratic == PRODUCTS:
        for place in range(len(phi) - first):
            i, shift = place % d, place // d
            other = 1 + (i + shift) % d
            for j in range(ROWS):
                phi[first + place, j] = phi[1 + i, j] * phi[other, j]


@compiled
def _exponentiate(x, floor, exp, bits):
    """Turns x, at most 0, into exp(x); exactly zero for what is no larger than the floor."""
    scale = bits.view(x.dtype)
    for i in range(len(x)):
        value = floor if x[i] < floor else x[i]  # which leaves NaN as it is
        shifted = value * exp.per_log_2 + exp.magic
        n = shifted - exp.magic
        rest = (value - n * exp.high) - n * exp.low
        result = exp.series[0]
        for j in range(1, len(exp.series)):
            result = result * rest + exp.series[j]
        scale[i] = shifted
        x[i] = 0 if value <= floor else result
    for i in range(len(x)):
        bits[i] = (bits[i] << exp.n_digits) + exp.one
    for i in range(len(x)):
        x[i] *= scale[i]
