"""`estimate` against sums done by hand, and against what the kernels' launchers ask for."""

from math import prod

import pytest

import gaussmix
from gaussmix import _estimate, estimate
from gaussmix._covariance import COVARIANCES
from gaussmix_kernels import _sizes

TYPES = ("diag", "full", "spherical", "tied")
SHAPES = [(600, 1, 1), (10_000, 8, 4), (100_000, 32, 16), (5000, 17, 70), (1_000_000, 64, 64), (300_000, 100, 300)]


def small(k, columns, width, item):
    """Statistics, natural parameters and operands, written and read."""
    return 2 * k * (8 * columns + (8 + item) * width)


@pytest.mark.parametrize(
    ("covariance_type", "shape", "flops", "moved"),
    [
        # Fused: two products of n k F. 521 slabs of 1920 rows; 64 + 2 or 128 + 2 sums.
        (
            "spherical",
            (1_000_000, 64, 64),
            4 * 10**6 * 64 * 64,
            10**6 * 65 * 4 + 2 * 521 * 64 * 66 * 4 + small(64, 66, 64, 4),
        ),
        (
            "tied",
            (1_000_000, 64, 64),
            4 * 10**6 * 64 * 64,
            10**6 * 64 * 4 + 2 * 521 * 64 * 66 * 4 + small(64, 66, 64, 4),
        ),
        (
            "diag",
            (1_000_000, 64, 64),
            4 * 10**6 * 64 * 128,
            10**6 * 64 * 4 + 2 * 521 * 64 * 130 * 4 + small(64, 130, 128, 4),
        ),
        # Logits twice: three products, rows read twice, log-normalisers written and read.
        (
            "spherical",
            (1_000_000, 128, 1024),
            6 * 10**6 * 1024 * 128,
            10**6 * (2 * 129 * 4 + 8) + 2 * 521 * 1024 * 130 * 4 + small(1024, 130, 128, 4),
        ),
        (
            "tied",
            (1_000_000, 128, 1024),
            6 * 10**6 * 1024 * 128,
            10**6 * (2 * 128 * 4 + 8) + 2 * 521 * 1024 * 130 * 4 + small(1024, 130, 128, 4),
        ),
        (
            "diag",
            (1_000_000, 128, 1024),
            6 * 10**6 * 1024 * 256,
            10**6 * (2 * 128 * 4 + 8) + 2 * 521 * 1024 * 258 * 4 + small(1024, 258, 256, 4),
        ),
        # 8 features and 36 products in tiles of 16 and 64, 4 components in one of 16; 40 slabs of 256 rows.
        (
            "full",
            (10_000, 8, 4),
            4 * 10_000 * 16 * (16 + 64),
            10_000 * 16 * 4 + 2 * 40 * 4 * 66 * 4 + small(4, 66, 64, 4),
        ),
        # Centred: 11 chunks of 98,304 rows in 24 slabs of 4096.
        (
            "full",
            (1_000_000, 64, 64),
            4 * 10**6 * 64 * 64 * 64,
            10**6 * (2 * 64 * 4 + 8)
            + 11 * 64 * (64 * 64 + 65) * (2 * 24 * 4 + 16)
            + small(64, 64 * 64 + 65, 64 * 64, 4),
        ),
    ],
)
def test_sums_done_by_hand(covariance_type, shape, flops, moved):
    cost = estimate(*shape, covariance_type)
    assert cost.flops == flops
    assert cost.bytes == moved


def test_memory_done_by_hand():
    # The copy and the squares, partial sums, statistics and natural parameters, three sets of parameters.
    expected = 10**6 * 65 * 4 + 521 * 64 * 130 * 4 + 64 * (8 * 130 + 12 * 128) + 24 * (64 * 65 + 2 * 64 * 64)
    assert estimate(1_000_000, 64, 64, "diag").memory == expected
    # A matrix of a whole feature more for each component, and rows in float64 for the total scatter.
    tied = estimate(1_000_000, 64, 64, "tied").memory
    assert tied == (
        10**6 * 65 * 4 + 521 * 64 * 66 * 4 + 64 * (8 * 66 + 12 * 64) + 24 * (64 * 65 + 2 * 64 * 64) + 2**18 * 64 * 16
    )


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("covariance_type", TYPES)
def test_more_rows_never_cost_less(covariance_type, dtype):
    costs = [estimate(n, 24, 40, covariance_type, dtype) for n in (1, 10, 10**3, 10**5, 10**6, 10**7, 10**8)]
    for name in ("flops", "bytes", "launches", "time", "memory"):
        values = [getattr(cost, name) for cost in costs]
        assert values == sorted(values), name


@pytest.mark.parametrize("covariance_type", TYPES)
def test_float64_is_slower_and_larger(covariance_type):
    single, double = (estimate(10**6, 64, 64, covariance_type, dtype) for dtype in ("float32", "float64"))
    assert double.time > 3 * single.time
    assert double.memory > single.memory


def test_what_limits():
    assert estimate(10_000, 8, 4, "spherical").limit == "launches"
    assert estimate(10**7, 16, 8, "spherical").limit == "memory"
    assert estimate(10**7, 32, 64, "diag").limit == "compute"
    assert estimate(10**6, 64, 64, "full").limit == "compute"


def test_the_time_is_that_of_the_limit():
    assert estimate(10_000, 8, 4, "diag").time == pytest.approx(6 * 12e-6)
    cost = estimate(10**7, 16, 8, "spherical")
    assert cost.time == pytest.approx(cost.bytes / 4.3e12)
    # Three products of halves for one.
    cost = estimate(10**6, 64, 64, "full")
    assert cost.time == pytest.approx(3 * cost.flops / 790e12)
    cost = estimate(10**6, 64, 64, "full", "float64")
    assert cost.time == pytest.approx(cost.flops / 31e12)


def test_a_slower_device_takes_longer():
    times = [estimate(10**7, 32, 64, "spherical", device=device).time for device in ("h200", "h100", "a100")]
    assert times == sorted(times)
    assert times[0] < times[2]


def test_it_is_a_value():
    assert estimate(1000, 2, 3, "full") == estimate(1000, 2, 3, "full")
    assert isinstance(estimate(1000, 2, 3, "full"), gaussmix.Estimate)
    with pytest.raises(AttributeError):
        estimate(1000, 2, 3, "full").time = 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": 0}, "n must be at least 1, got 0"),
        ({"d": -3}, "d must be at least 1, got -3"),
        ({"k": 0}, "k must be at least 1, got 0"),
        (
            {"covariance_type": "tied_diag"},
            "there are no kernels for covariance_type='tied_diag'; it runs on array_api",
        ),
        ({"d": 257}, "there are no kernels for 257 features, only for up to 256; it runs on array_api"),
        ({"covariance_type": "fulll"}, "covariance_type must be one of .*'diag', 'full'.*, got 'fulll'"),
        ({"dtype": "float16"}, "dtype must be one of .*'float32', 'float64'.*, got 'float16'"),
        ({"device": "abacus"}, "device must be one of .*'a100', 'h100', 'h200'.*, got 'abacus'"),
    ],
)
def test_what_it_refuses(change, message):
    arguments = dict(n=1000, d=4, k=3, covariance_type="full") | change
    with pytest.raises(ValueError, match=message):
        estimate(**arguments)


def test_sizes_are_integers():
    with pytest.raises(TypeError, match=r"n must be an integer, got 10\.0"):
        estimate(10.0, 4, 3, "full")


@pytest.fixture
def launched(monkeypatch):
    """The launches of an iteration: kernel names and arguments by name. Nothing runs, on tensors without storage."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("triton")
    from gaussmix_kernels import _centred, _features, _parameters, _prepass, _sums, diag, full, spherical, tied
    from gaussmix_kernels._em import EM

    calls = []

    def record(kernel, grid, *arguments, **meta):
        calls.append((kernel.__name__, dict(zip(kernel.arg_names, arguments, strict=False))))

    for module in (_centred, _features, _parameters, _sums, diag, full, spherical, tied):
        monkeypatch.setattr(module, "launch", record)

    def room(*shape, dtype=torch.float64):
        return torch.empty(shape, dtype=dtype, device="meta")

    def iterate(n, d, k, covariance_type, exact):
        calls.clear()
        ld, half = _sizes.multiple(d, 16), torch.float64 if exact else torch.float16
        hi = room(n, ld, dtype=half)
        lo = hi if exact else room(n, ld, dtype=half)
        squares = room(n, dtype=torch.float64 if exact else torch.float32)
        data = _prepass.Data(hi, lo, squares, room(d), room(d), None, float(n), 1.0)
        em = EM(data, covariance_type, _sizes.kinds(COVARIANCES[covariance_type].quadratic, d)[0])
        shape = em.type.shape(k, d)
        parameters = _parameters.Parameters(room(k), room(k, d), room(*shape), room(*shape))
        natural = _parameters.Natural.of(k, data, em.kind)
        operands = _parameters.room_for_operands(natural, data)
        flags = room(2, dtype=torch.int32)
        settings = _parameters.Settings(room(7))
        em.iterate(parameters, parameters, natural, operands, settings, flags, room(2), 0)
        return list(calls), natural

    return iterate


@pytest.mark.parametrize("exact", [False, True], ids=["default", "exact"])
@pytest.mark.parametrize("covariance_type", TYPES)
def test_it_counts_what_the_kernels_do(covariance_type, exact, launched):
    for n, d, k in SHAPES:
        cost = estimate(n, d, k, covariance_type, "float64" if exact else "float32")
        kind = _sizes.kinds(COVARIANCES[covariance_type].quadratic, d)[0]
        calls, natural = launched(n, d, k, covariance_type, exact)
        work = _estimate._centred(n, d, k, exact) if kind == "centred" else _estimate._features(n, d, k, exact, kind)
        # Launches of torch: a copy, the joined evidence of chunks, and the factors of large matrices.
        by_torch = (
            1
            + (kind == "centred")
            + (_estimate.LARGE_LAUNCHES if d > 64 and covariance_type in ("full", "tied") else 0)
        )
        assert cost.launches == len(calls) + by_torch, (n, d, k)
        assert work.width == natural.products.shape[1]
        sums = [arguments["parts"] for name, arguments in calls if name == "_add_up_kernel"]
        assert work.columns == prod(sums[0].shape[2:])
        scratch = nbytes(sums[0])
        for name, arguments in calls:
            if name == "_normalize_kernel":
                logits = [arguments["logits"]] if "logits" in arguments else []
                assert arguments["labels"] is None  # which predictions ask for, and EM does not
                scratch += sum(map(nbytes, [arguments["normalizer"], *logits]))
                break
        if kind == "centred" and len(sums) > 1:
            scratch += nbytes(logits[0])
        assert work.scratch == pytest.approx(scratch, rel=0.05), (n, d, k)  # slabs are rounded to tiles


def nbytes(tensor):
    return tensor.numel() * tensor.element_size()
