"""EM, inference and k-means on the CPU, for NumPy arrays and torch tensors in host memory (shared, not copied).

The log-density of every covariance type is linear in features of x, phi = [1, x, quadratic], and the statistics
are weighted sums of the same features: an EM iteration is two matrix products around a softmax. Rows are taken in
blocks that stay in the cache, with points on the contiguous axis: phi (F, b), logits (k, b). Blocks form slabs, fixed
by shape, which run on a pool of threads with one BLAS thread each and are added in order, in float64: the result does
not depend on the number of threads.

About a point s, features lose digits where components lie far from s compared with their width, or are ill-conditioned.
`Covariance.kappa` and the ratio of variance + offset^2 to variance bound the loss; where they exceed the tolerance, the
step is repeated in the next form: expanded in the data's precision, expanded in float64, centred in float64
(`_array_api`). Full covariances of separated components skip all that: `_pruning` computes few components of each row.
"""

import logging
import math
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import numpy as np
from array_api_compat import is_numpy_array, is_torch_array
from scipy.sparse import csc_array
from threadpoolctl import ThreadpoolController

from gaussmix import _array_api, _engine, _pruning
from gaussmix._arrays import to_numpy
from gaussmix._covariance import Covariance
from gaussmix._data import Rows, slices
from gaussmix._engine import Progress
from gaussmix._parameters import Parameters, SufficientStatistics
from gaussmix._typing import Array

logger = logging.getLogger("gaussmix")

# A block's features, logits and responsibilities take about this many bytes: what a core's share of the cache holds.
# Its rows are at least and at most so many: enough for the matrix products, and for threads to wait seldom for Python.
BLOCK_BYTES = 2_200_000
BLOCK_ROWS = (256, 8192)
# Features of a small data set are kept from one iteration to the next, up to this many bytes.
KEPT_BYTES = 2**26
# A slab is worth a thread from this many floating-point operations on; there are at most so many of them.
SLAB_FLOPS = 10**8
MOST_SLABS = 16
# Pruning pays where this many times fewer components than there are matter to a row, as a sample of rows tells.
PRUNING_GAIN = 6
PRUNING_SAMPLE = 256
# Rows of a slab for each component, at least and enough: threads with shorter calls wait for Python.
PRUNING_ROWS = (1024, 2048)
# Largest tolerable error of a log-density, in nats, for float32 and float64 data.
TOLERANCE = {np.dtype(np.float32): 1e-3, np.dtype(np.float64): 1e-10}
# Rows that are summed in float32 before the sum is added in float64.
SUMMED_ROWS = 256
# Largest tolerable eps (variance + offset^2) / variance: the relative error of a variance comes out as up to twice
# that, as BLAS sums (AVX-512 kernels lose half as much as those of AVX2), and 1e-4 and 1e-9 are owed. kappa alone lets
# a single feature lose more.
VARIANCE_TOLERANCE = {np.dtype(np.float32): 5e-5, np.dtype(np.float64): 1e-9}
# exp below it is subnormal, or about to be; such responsibilities are exactly zero.
FLOOR = {np.dtype(np.float32): -80.0, np.dtype(np.float64): -690.0}
# The logarithm of a weight of zero: finite, so that products with it are, and below every floor.
LOG_ZERO = -1e30

T = TypeVar("T")


def why_not(x: Array) -> str | None:
    """The reason why rows of `x` can not be computed here; None if they can."""
    if is_numpy_array(x):
        return None
    if is_torch_array(x):
        return None if x.device.type == "cpu" else f"the tensor is on {x.device}, not in host memory"
    return f"{type(x).__module__}.{type(x).__qualname__} is neither a NumPy array nor a torch tensor"


@dataclass(frozen=True)
class Form:
    """How the E-step is computed: from features in `dtype`, or centred."""

    precision: str
    dtype: np.dtype[Any]
    expanded: bool


FORMS = (
    Form("expanded-float32", np.dtype(np.float32), expanded=True),
    Form("expanded-float64", np.dtype(np.float64), expanded=True),
    Form("centred-float64", np.dtype(np.float64), expanded=False),
)


@contextmanager
def one_blas_thread() -> Iterator[int]:
    """Within it, BLAS runs on the calling thread alone; gives the number of threads that it would have used.

    That is 1 within `on_one_thread`. The setting belongs to the process: where several threads are inside at once, the
    last to leave restores it.
    """
    own = _blas.of_this_thread
    with _blas.lock:
        if _blas.inside == 0:
            _blas.before = [library.num_threads for library in _controller().lib_controllers]
            _set_blas_threads([1] * len(_blas.before))
        _blas.inside += 1
        own.inside += 1
        threads = max(_blas.before, default=1)
    try:
        yield 1 if own.is_one_of_many else threads
    finally:
        with _blas.lock:
            own.inside -= 1
            _blas.inside -= 1
            if _blas.inside == 0:
                _set_blas_threads(_blas.before)


def _set_blas_threads(numbers: list[int]) -> None:
    for library, number in zip(_controller().lib_controllers, numbers, strict=True):
        # In threadpoolctl 3.8 the first thread that sets it keeps all others from doing so. Of ours, one sets it and
        # another one restores it.
        release = getattr(library, "clear_controlling_thread", None)
        if release is not None:
            release(force=True)
        library.set_num_threads(number)
        if release is not None:
            release(force=True)


@contextmanager
def on_one_thread() -> Iterator[None]:
    """Within it, the calling thread starts no others: it is one of many already."""
    before = _blas.of_this_thread.is_one_of_many
    _blas.of_this_thread.is_one_of_many = True
    try:
        with one_blas_thread():
            yield
    finally:
        _blas.of_this_thread.is_one_of_many = before


class _OfThread(threading.local):
    inside = 0
    is_one_of_many = False


class _Blas:
    """Who is inside `one_blas_thread`."""

    def __init__(self) -> None:
        self.lock, self.inside = threading.RLock(), 0
        self.before: list[int] = []  # threads of each library before that
        self.of_this_thread = _OfThread()

    def forked(self) -> None:
        """In the child of a fork, which has none of the other threads: they are not inside, and do not leave."""
        were_inside, self.inside = self.inside, self.of_this_thread.inside
        self.lock = threading.RLock()
        if were_inside and not self.inside:
            _set_blas_threads(self.before)


_blas = _Blas()
if hasattr(os, "register_at_fork"):
    # With the lock, no other thread is about to change the setting or the numbers.
    os.register_at_fork(
        before=lambda: _blas.lock.acquire(),
        after_in_parent=lambda: _blas.lock.release(),
        after_in_child=_blas.forked,
    )


@cache
def _controller() -> Any:
    return ThreadpoolController().select(user_api="blas")


class _Threaded:
    """Rows in host memory, and threads that take them slab by slab."""

    def __init__(self, rows: Rows) -> None:
        weight = rows.sample_weight
        self.rows = Rows(to_numpy(rows.array), None if weight is None else to_numpy(weight), rows.batch_size)

    @property
    def n_features(self) -> int:
        """Number of features of a row."""
        return 1 + self.rows.shape[1]

    def _nearest(self, slab: slice, centroids: Array, origin: Array) -> Iterator[tuple[slice, Array, Array]]:
        """Blocks of a slab: where they are, [x - origin, 1] (b, d + 1), the nearest of `centroids` to each row (b,).

        The nearest is the first of equals. Products lose least about an `origin` in the middle of the centroids.
        """
        k, d = centroids.shape
        c = centroids - origin
        # |x|^2 is the same for every centroid.
        factor = np.concatenate([-2 * c.T, np.sum(c * c, axis=1)[None]])
        size = int(np.clip(BLOCK_BYTES // (8 * (k + 2 * d)), *BLOCK_ROWS))
        size = min(size, self.rows.batch_size or size)
        buffer, products = np.ones((size, d + 1)), np.empty(size * k)
        for block in _within(slab, size):
            x = buffer[: block.stop - block.start]
            np.subtract(self.rows.array[block], origin, out=x[:, :d])
            yield block, x, np.matmul(x, factor, out=_shaped(products, len(x), k)).argmin(axis=1)

    def _weight(self, block: slice) -> Array | None:
        return None if self.rows.sample_weight is None else self.rows.sample_weight[block]

    def _run(self, function: Callable[[slice], T], k: int, least_rows: int = BLOCK_ROWS[0]) -> list[T]:
        """`function` of each slab, in order: on as many threads as BLAS may use, each with one thread of BLAS."""
        n = self.rows.shape[0]
        work = 4 * n * (k + 8) * self.n_features
        n_slabs = max(1, min(MOST_SLABS, work // SLAB_FLOPS, n // least_rows))
        parts = list(slices(n, -(-n // n_slabs)))

        def quietly(part: slice) -> T:
            # What overflows is not finite, and computed again in a form with more room.
            with np.errstate(over="ignore", invalid="ignore"):
                return function(part)

        with one_blas_thread() as threads:
            if min(threads, len(parts)) == 1:
                return [quietly(part) for part in parts]
            with ThreadPoolExecutor(min(threads, len(parts))) as pool:
                try:
                    found = pool.map(quietly, parts)
                except RuntimeError:  # no more threads: the interpreter shuts down, or the system has none left
                    pool.shutdown(cancel_futures=True)
                    found = map(quietly, parts)
                return list(found)


class Clusters(_Threaded):
    """k-means on one data set."""

    def labels(self, centroids: Array) -> Array:
        """The centroid nearest to each row, the first of equals: (n,)."""
        return self._map(lambda block, nearest: nearest, centroids, np.int64)

    def squared_distances(self, centroids: Array) -> Array:
        """Squared distance of each row to the nearest centroid: (n,)."""

        def squared(block: slice, nearest: Array) -> Array:
            offset = self.rows.array[block] - centroids.take(nearest, axis=0)
            return np.einsum("bd,bd->b", offset, offset)

        return self._map(squared, centroids, np.float64)

    def sums(self, centroids: Array, origin: Array) -> tuple[Array, Array]:
        """Weight of the rows that are nearest to each centroid (k,), and the sums of their x - origin (k, d)."""
        k, d = centroids.shape

        def sums(slab: slice) -> Array:
            total = np.zeros((k, d + 1))
            for block, x, nearest in self._nearest(slab, centroids, origin):
                weight = self._weight(block)
                weight = np.ones(len(x)) if weight is None else weight
                total += csc_array((weight, nearest, np.arange(len(x) + 1)), shape=(k, len(x))) @ x
            return total

        total = sum(self._run(sums, k))
        return total[:, d], total[:, :d]

    def _map(self, function: Callable[[slice, Array], Array], centroids: Array, dtype: Any) -> Array:
        out = np.empty(self.rows.shape[0], dtype=dtype)

        def fill(slab: slice) -> None:
            for block, _, nearest in self._nearest(slab, centroids, centroids.mean(axis=0)):
                out[block] = function(block, nearest)

        self._run(fill, len(centroids))
        return out


class Engine(_Threaded):
    """EM and inference on one data set for one covariance type."""

    backend = "numpy"

    def __init__(self, rows: Rows, covariance: Covariance, reg_covar: float, middle: Array | None = None) -> None:
        super().__init__(rows)
        self.covariance, self.reg_covar = covariance, reg_covar
        self._middle_of_rows = middle
        self._kept_shift: Array | None = None
        self._kept_scatter: Array | None = None
        self._dtype = np.dtype(np.float32 if self.rows.array.dtype == np.float32 else np.float64)
        self._forms = [form for form in FORMS if form.dtype.itemsize >= self._dtype.itemsize]
        self.hints: Array | None = None  # the component nearest to each row, as far as it is known
        self._was_pruned = False
        self._keeps = True
        self._kept: dict[tuple[np.dtype[Any], int], Array] = {}

    @property
    def precision(self) -> str:
        """The arithmetic of the last E-step; before it, of the next."""
        return FORMS[-1].precision if self._was_pruned else self._forms[0].precision

    @property
    def forms(self) -> tuple[str, ...]:
        """The forms of the E-step that are left, the one in use first, the most exact last."""
        return tuple(form.precision for form in self._forms)

    def on(self, rows: Rows) -> "Engine":
        """The engine for other rows: about the same point, in the same form from now on."""
        other = Engine(rows, self.covariance, self.reg_covar, self._shift)
        other._forms = self._forms
        other._keeps = False  # a block is not seen again
        return other

    def assign(self, means: Array, origin: Array) -> SufficientStatistics:
        """Statistics about `origin` (k, d) of the rows that are nearest to each of `means` (k, d)."""
        labels = np.empty(self.rows.shape[0], dtype=np.min_scalar_type(-len(means)))

        def statistics(slab: slice) -> SufficientStatistics:
            for block, _, nearest in self._nearest(slab, means, means.mean(axis=0)):
                labels[block] = nearest
            rows = np.asarray(self.rows.array[slab])
            return _pruning.assign(rows, self._weight(slab), labels[slab], origin, self.covariance)

        total = _total(self._run(statistics, len(means)))
        self.hints = labels
        return total

    def spread(self, k: int, draw: Callable[[int], Array]) -> SufficientStatistics:
        """Statistics for the responsibilities (b, k), on the host, that `draw(b)` gives for the next b rows."""
        # All means are about the middle of the data, so that nothing cancels here; rows are drawn for in order.
        return _array_api.Engine(self.rows, self.covariance, self.reg_covar, self._middle_of_rows).spread(k, draw)

    def advance(self, parameters: Parameters, *, at_most: int, previous: float, tolerance: float) -> Progress:
        """Up to `at_most` EM iterations; stops where a lower bound is within `tolerance` of the one before."""
        with one_blas_thread():
            self._fall_back_for(parameters, self._shift)
            return _engine.advance(self, parameters, at_most=at_most, previous=previous, tolerance=tolerance)

    def is_exact_for(self, parameters: Parameters) -> bool:
        """Whether statistics in the form in use are exact enough for these parameters; the form is left where not."""
        form = self._forms[0]
        # The moments cancel as far as the new parameters say; those of the pruned step do not.
        self._fall_back_for(parameters, self._shift)
        return form is self._forms[0] or self._was_pruned

    # Between slabs as well: threads that a call of BLAS wakes there go on spinning beside ours.
    @one_blas_thread()
    def expect(self, parameters: Parameters) -> SufficientStatistics:
        """Statistics of all rows."""
        pruned = self._pruned(parameters)
        self._was_pruned = pruned is not None
        if pruned is not None:
            return pruned
        shift = self._shift
        natural = self._natural(parameters, shift)
        form = self._forms[0]
        if not form.expanded:
            parts = self._run(lambda slab: self._centred_statistics(slab, parameters), len(natural))
            return _total([part for part in parts if part is not None])

        def statistics(slab: slice) -> SufficientStatistics:
            sums = _Sums(self, len(natural), form.dtype)
            for block in _within(slab, self._block_rows(len(natural), form.dtype)):
                sums.soften(self._kept_features(block, shift, sums.phi), natural, self._weight(block))
            return sums.statistics(shift)

        total = _total(self._run(statistics, len(natural)))
        if self.covariance.n_quadratic(self.rows.shape[1]):
            return total
        # The quadratic term that all components share cancels in the responsibilities; its sum is that of a trace.
        scatter = self._scatter()
        trace = np.sum(self.covariance.square(parameters.precision_cholesky) * scatter)
        return SufficientStatistics(
            shift, total.counts, total.first_moments, scatter, total.log_likelihood - 0.5 * trace
        )

    def _bounds(self, parameters: Parameters, shift: Array) -> _pruning.Bounds | None:
        """The bounds that leave few components of a row to compute; None where pruning would not pay."""
        (n, d), k = self.rows.shape, len(parameters.weights)
        # Worth it where the features are many more than the numbers they are made from.
        most = k / PRUNING_GAIN
        if self.covariance.n_quadratic(d) <= d or most < 1 or not np.issubdtype(self.rows.array.dtype, np.floating):
            return None
        bounds = _pruning.bounds_of(parameters, self.covariance, shift, _log_weights(parameters.weights))
        sample = np.asarray(self.rows.array[:: max(1, n // PRUNING_SAMPLE)][:PRUNING_SAMPLE])
        logits = _array_api.log_prob(sample.astype(np.float64), parameters, self.covariance).T
        largest = (logits + _log_weights(parameters.weights)[:, None]).max(axis=0)
        left = np.sum(bounds.of(sample) >= largest - _pruning.MARGIN, axis=0)
        return bounds if left.mean() <= most else None

    def _pruned(self, parameters: Parameters) -> SufficientStatistics | None:
        """Statistics of all rows, computed for few components of each; None where that would not pay."""
        bounds = self._bounds(parameters, self._shift)
        if bounds is None:
            return None
        k = len(parameters.weights)
        guess = self.hints is None or len(self.hints) != self.rows.shape[0]
        labels: Array = np.empty(self.rows.shape[0], dtype=np.min_scalar_type(-k)) if guess else self.hints
        self.hints = labels

        def statistics(slab: slice) -> SufficientStatistics:
            rows = np.asarray(self.rows.array[slab])
            if guess:
                labels[slab] = bounds.guess(rows)
            return _pruning.expect(rows, self._weight(slab), labels[slab], parameters, self.covariance, bounds)

        total = _total(self._run_grouped(statistics, k))
        alive = parameters.weights > 0
        return total if np.all(total.counts[alive] >= _pruning.SMALLEST_COUNT) else None

    def log_evidence(self, parameters: Parameters) -> Array:
        """Log-density of each row under the mixture: (n,)."""
        return self._infer(
            parameters, _pruning.log_evidence, _array_api.log_evidence, self._log_evidence, (), np.float64
        )

    def responsibilities(self, parameters: Parameters) -> Array:
        """Posterior probability of each component given the row: (n, k)."""
        return self._infer(
            parameters,
            _pruning.responsibilities,
            _array_api.responsibilities,
            self._responsibilities,
            parameters.weights.shape,
            self._dtype,
        )

    def labels(self, parameters: Parameters) -> Array:
        """The component of largest responsibility for each row: (n,)."""
        return self._infer(parameters, _pruning.labels, _array_api.labels, self._argmax, (), np.int64)

    def _argmax(self, logits: Array, x: Array, precision_cholesky: Array) -> Array:
        # NumPy's argmax along the first axis takes several times as long.
        k = len(logits)
        ranks = np.arange(k, 0, -1, dtype=np.min_scalar_type(k))[:, None]
        return k - ((logits == logits.max(axis=0)) * ranks).max(axis=0)

    def _log_evidence(self, logits: Array, x: Array, precision_cholesky: Array) -> Array:
        shared = self.covariance.shared_quadratic(x, precision_cholesky)
        largest = logits.max(axis=0)
        logits -= largest
        evidence = largest + np.log(np.exp(logits, out=logits).sum(axis=0))
        return evidence if shared is None else evidence + shared

    def _responsibilities(self, logits: Array, x: Array, precision_cholesky: Array) -> Array:
        _, total = _softmax(logits)
        logits /= total
        return logits.T

    @one_blas_thread()
    def _infer(
        self,
        parameters: Parameters,
        pruned: Callable[[Array, Parameters, Covariance, _pruning.Bounds, Array], None],
        centred: Callable[[Array, Parameters, Covariance], Array],
        expanded: Callable[[Array, Array, Array], Array],
        shape: tuple[int, ...],
        dtype: Any,
    ) -> Array:
        shift = self._middle(parameters)
        out = np.empty((self.rows.shape[0], *shape), dtype=dtype)
        bounds = self._bounds(parameters, shift)
        if bounds is not None:

            def prune(slab: slice) -> None:
                pruned(np.asarray(self.rows.array[slab]), parameters, self.covariance, bounds, out[slab])

            self._run_grouped(prune, len(parameters.weights))
            return out
        self._fall_back_for(parameters, shift)
        natural = self._natural(parameters, shift)
        form = self._forms[0]
        factor = parameters.precision_cholesky.astype(form.dtype)
        size = self._block_rows(len(natural), form.dtype)

        def infer(slab: slice) -> None:
            buffer = np.empty((self.n_features, size), dtype=form.dtype)
            logits = np.empty(len(natural) * size, dtype=form.dtype)
            for block in _within(slab, size):
                if form.expanded:
                    phi = self._features(block, shift, buffer[:, : block.stop - block.start])
                    product = np.matmul(natural, phi, out=_shaped(logits, len(natural), phi.shape[1]))
                    if np.isfinite(product.sum()):
                        out[block] = expanded(product, phi[1 : 1 + self.rows.shape[1]], factor)
                        continue
                # Centred, or values that are too large to square in the dtype of the form.
                for part in _within(block, max(1, _array_api.BLOCK_ELEMENTS // parameters.means.size)):
                    x = self._read(part, np.dtype(np.float64)).T
                    out[part] = centred(x, parameters, self.covariance)

        self._run(infer, len(natural))
        return out

    def _natural(self, parameters: Parameters, shift: Array) -> Array:
        """Natural parameters (k, F) in the dtype of a form that has room for them and for their products."""
        natural = natural_parameters(parameters, shift, self.covariance)
        largest = float(np.abs(natural).max())
        while self._forms[0].expanded and not largest <= 1e-6 * float(np.finfo(self._forms[0].dtype).max):
            self.fall_back(f"precisions reach {largest:.3g}")
        return natural.astype(self._forms[0].dtype)

    def _fall_back_for(self, parameters: Parameters, shift: Array) -> None:
        """Leave the forms that are not exact enough for these parameters."""
        alive = parameters.weights > 0
        offsets = parameters.means - shift
        kappas = self.covariance.kappa(parameters.covariances, parameters.precision_cholesky, offsets)
        kappa = float(np.max(np.where(alive, kappas, 0)))
        ratios = 1 + offsets * offsets / self.covariance.variances(parameters.covariances)
        ratio = float(np.max(np.where(alive[:, None], ratios, 0)))
        while self._forms[0].expanded:
            eps = float(np.finfo(self._forms[0].dtype).eps)
            if eps * kappa <= TOLERANCE[self._dtype] and eps * ratio <= VARIANCE_TOLERANCE[self._dtype]:
                return
            self.fall_back(f"kappa is {kappa:.3g}, (variance + offset^2) / variance {ratio:.3g}")

    def fall_back(self, reason: str) -> None:
        """Leave the form in use for the next one."""
        left = self._forms.pop(0)
        self._kept.clear()
        logger.info("%s left for %s: %s", left.precision, self.precision, reason)

    def _centred_statistics(self, slab: slice, parameters: Parameters) -> SufficientStatistics | None:
        """Statistics of a slab in the centred form; None where all its rows have weight 0."""
        weight = self._weight(slab)
        if weight is not None and not weight.any():
            return None
        rows = Rows(self.rows.array[slab], weight, self.rows.batch_size)
        return _array_api.Engine(rows, self.covariance, self.reg_covar).expect(parameters)

    def _middle(self, parameters: Parameters) -> Array:
        """The mean of the mixture, with no more digits than the data: what rows are shifted by for predictions."""
        return (parameters.weights @ parameters.means).astype(self._dtype).astype(np.float64)

    # Not functools.cached_property, which in Python 3.11 has a lock: a fork can leave it locked for ever.
    @property
    def _shift(self) -> Array:
        """The mean of the data set, in float64 but with no more digits than the data: x - shift is rounded once."""
        if self._kept_shift is None:
            given = self._middle_of_rows
            mean = self.rows.mean(BLOCK_ROWS[1]) if given is None else to_numpy(given)
            dtype = self.rows.array.dtype
            floating = np.issubdtype(dtype, np.floating)
            self._kept_shift = mean.astype(dtype).astype(np.float64) if floating else mean
        return self._kept_shift

    def _scatter(self) -> Array:
        """Weighted sum of (x - shift)(x - shift)^T over all rows, for components that share one covariance."""
        shift = self._shift

        def scatter(slab: slice) -> Array:
            total = np.zeros((self.rows.shape[1],) * 2)
            for block in _within(slab, BLOCK_ROWS[1]):
                x = self._read(block, np.dtype(np.float64)) - shift[:, None]
                weight = self._weight(block)
                total += (x if weight is None else x * weight) @ x.T
            return total

        if self._kept_scatter is None:
            self._kept_scatter = sum(self._run(scatter, self.rows.shape[1]))
        return self._kept_scatter

    def _kept_features(self, block: slice, shift: Array, buffer: Array) -> Array:
        """Features of a block about `shift` (F, b): those of the last iteration, or new ones in `buffer`."""
        key = (buffer.dtype, block.start)
        if key in self._kept:
            return self._kept[key]
        if not self._keeps or self.rows.shape[0] * self.n_features * buffer.itemsize > KEPT_BYTES:
            return self._features(block, shift, buffer[:, : block.stop - block.start])
        phi = np.empty((self.n_features, block.stop - block.start), dtype=buffer.dtype)
        return self._kept.setdefault(key, self._features(block, shift, phi))

    def _features(self, block: slice, shift: Array, phi: Array) -> Array:
        """Features of a block about `shift`, into `phi` (F, b)."""
        d = self.rows.shape[1]
        x = phi[1 : 1 + d]
        phi[0] = 1
        np.subtract(self._read(block, phi.dtype), shift[:, None].astype(phi.dtype), out=x)
        self.covariance.write_quadratic(x, phi[1 + d :])
        return phi

    def _block_rows(self, k: int, dtype: np.dtype[Any]) -> int:
        """Rows of a block."""
        rows = BLOCK_BYTES // ((self.n_features + 2 * k) * dtype.itemsize)
        return int(np.clip(rows // 64 * 64, *BLOCK_ROWS))

    @property
    def n_features(self) -> int:
        """Number of features of a row, F."""
        d = self.rows.shape[1]
        return 1 + d + self.covariance.n_quadratic(d)

    def _read(self, block: slice, dtype: np.dtype[Any]) -> Array:
        """Rows of a block as columns: (d, b)."""
        return np.asarray(self.rows.array[block]).astype(dtype, copy=False).T

    def _run_grouped(self, function: Callable[[slice], T], k: int) -> list[T]:
        """`_run` in slabs that are long enough for matrix products of a component's rows; four where that is so."""
        least, enough = (rows * k for rows in PRUNING_ROWS)
        return self._run(function, k, least_rows=max(least, min(enough, -(-self.rows.shape[0] // 4))))


class _Sums:
    """Weighted sums of features over the rows of a slab, block by block, in float64."""

    def __init__(self, engine: Engine, k: int, dtype: np.dtype[Any]) -> None:
        self.engine, self.dtype = engine, dtype
        size = engine._block_rows(k, dtype)
        self.sums = np.zeros((engine.n_features, k))
        self.log_likelihood = 0.0
        self.phi = np.empty((engine.n_features, size), dtype=dtype)
        self._logits = np.empty(k * size, dtype=dtype)
        self._product = np.empty_like(self.sums, dtype=dtype)

    def soften(self, phi: Array, natural: Array, weight: Array | None) -> None:
        """E-step and sums of a block with these features (F, b)."""
        logits = np.matmul(natural, phi, out=_shaped(self._logits, len(natural), phi.shape[1]))
        evidence, total = _softmax(logits)
        evidence = evidence.astype(np.float64)
        if weight is None:
            logits *= 1 / total
            self.log_likelihood += float(evidence.sum())
        else:
            logits *= (weight / total).astype(self.dtype)
            self.log_likelihood += float(evidence @ weight)
        size = SUMMED_ROWS if self.dtype == np.float32 else phi.shape[1]
        for part in slices(phi.shape[1], size):
            self.sums += np.matmul(phi[:, part], logits[:, part].T, out=self._product)

    def statistics(self, origin: Array) -> SufficientStatistics:
        """The sums by their names; second moments only of a covariance type that has quadratic features."""
        d = self.engine.rows.shape[1]
        sums = self.sums.T
        covariance = self.engine.covariance
        if covariance.n_quadratic(d):
            second_moments = covariance.unpack_quadratic(np.ascontiguousarray(sums[:, 1 + d :]), d)
        else:
            second_moments = np.zeros((d, d))
        return SufficientStatistics(
            origin, sums[:, 0].copy(), sums[:, 1 : 1 + d].copy(), second_moments, np.asarray(self.log_likelihood)
        )


def natural_parameters(parameters: Parameters, shift: Array, covariance: Covariance) -> Array:
    """What log pi_k + log N(x; mu_k, Sigma_k) multiplies the features of x - shift with: (k, F).

    Without the term -(x - shift)^T A (x - shift) / 2 where all components share it.
    """
    k, d = parameters.means.shape
    means, factor = parameters.means - shift, parameters.precision_cholesky
    linear = covariance.precision_times(means, factor)
    constant = (
        _log_weights(parameters.weights)
        + covariance.log_det(factor, d)
        - 0.5 * d * math.log(2 * math.pi)
        - 0.5 * np.sum(means * linear, axis=1)
    )
    quadratic = np.broadcast_to(covariance.quadratic_coefficients(factor, d), (k, covariance.n_quadratic(d)))
    return np.concatenate([constant[:, None], linear, quadratic], axis=1)


def _log_weights(weights: Array) -> Array:
    positive = weights > 0
    return np.where(positive, np.log(np.where(positive, weights, 1)), LOG_ZERO)


def _softmax(logits: Array) -> tuple[Array, Array]:
    """Turns logits (k, b) into exp(logits - largest), in place; log-sum-exp (b,) and the sum of what is left (b,)."""
    floor = FLOOR[logits.dtype]
    largest = logits.max(axis=0)
    logits -= largest
    np.maximum(logits, floor, out=logits)
    np.exp(logits, out=logits)
    # What was floored is exactly zero: a component far from all rows counts as empty and keeps its place.
    logits -= _exp_of_floor(logits.dtype)
    total = logits.sum(axis=0)
    return largest + np.log(total), total


@cache
def _exp_of_floor(dtype: np.dtype[Any]) -> Any:
    """exp(floor) as the vectorised loop rounds it, which is not always as a scalar exp does."""
    return np.exp(np.full(BLOCK_ROWS[0], FLOOR[dtype], dtype=dtype))[0]


def _shaped(buffer: Array, *shape: int) -> Array:
    """The beginning of a flat buffer, contiguous in this shape."""
    return buffer[: math.prod(shape)].reshape(shape)


def _within(slab: slice, size: int) -> Iterator[slice]:
    for part in slices(slab.stop - slab.start, size):
        yield slice(slab.start + part.start, slab.start + part.stop)


def _total(parts: list[SufficientStatistics]) -> SufficientStatistics:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
