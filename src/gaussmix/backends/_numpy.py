"""EM, inference and k-means on the CPU, for arrays of any library in host memory (shared, not copied).

An EM iteration is two matrix products with features (`_features`) around a softmax. Rows are taken in blocks that stay
in the cache, with points on the contiguous axis: phi (F, b), logits (k, b). Blocks form slabs, fixed by shape, which
run on threads (`_threads`) and are added in order, in float64: the result does not depend on the number of threads.

The forms are features in float32, features in float64, and centred rows in float64 (`_centred`). Full covariances of
separated components skip all that where it takes longer: `_pruning` computes few components of each row. Where Numba is
installed, `_compiled` has the forms in features as one call for many rows.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
from array_api_compat import is_torch_array
from scipy.sparse import csc_array

from gaussmix import _guard
from gaussmix._arrays import asarray_like, is_on_host, to_numpy
from gaussmix._covariance import Covariance
from gaussmix._density import Density
from gaussmix._guard import CENTRED, Form, Forms
from gaussmix._parameters import SufficientStatistics
from gaussmix._threads import one_blas_thread, run
from gaussmix._typing import Array
from gaussmix.backends import _array_api, _centred, _pruning
from gaussmix.backends._engine import Engine
from gaussmix.backends._features import QUADRATIC, Quadratic, natural_parameters
from gaussmix.rows._data import Rows, slices
from gaussmix.rows._passes import Draw, InMemory

# A block's features, logits and responsibilities take about this many bytes: what a core's share of the cache holds.
# Its rows are at least and at most so many: enough for the matrix products, and for threads to wait seldom for Python.
BLOCK_BYTES = 2_200_000
BLOCK_ROWS = (256, 8192)
# Features of a small data set are kept from one iteration to the next, up to this many bytes.
KEPT_BYTES = 2**26
# Rows and products of a block of k-means take about this many bytes.
KMEANS_BYTES = 1_000_000
# A slab is worth a thread from this many floating-point operations on; there are at most so many of them.
SLAB_FLOPS = 10**8
MOST_SLABS = 16
# What pruning takes for a row, in operations that a float32 product does in the same time: for a component that is
# left, more for each of its d^2, and for any other one. A sample tells how many are left: so many rows at most, and at
# most one of so many, to cost little.
PRUNED_FLOPS = (8000, 20, 500)
PRUNING_SAMPLE = (256, 64)
# A component takes this part of that where all are centred, none pruned.
CENTRED_PART = 0.6
# Rows of a slab for each component, at least and enough: threads with shorter calls wait for Python.
PRUNING_ROWS = (1024, 2048)
# A prediction with so few rows x elements of the factors is centred: choosing a form would take longer.
SMALL_PREDICTION = 2**12
# With more products than this a form in this dtype takes longer than the centred one: writing them does for few
# components, and multiplying them in float64 for many.
MOST_PRODUCTS = {_guard.FLOAT32: 2**15, _guard.FLOAT64: 2**13}
# Rows that are summed in float32 before the sum is added in float64.
SUMMED_ROWS = 256
# An E-step of so many floating-point operations is compiled, where Numba is installed: loading it takes 0.4 s, and
# compiling it some seconds, once.
COMPILED_FLOPS = 10**8
# exp below it is subnormal, or about to be; such responsibilities are exactly zero.
FLOOR = {np.dtype(np.float32): -80.0, np.dtype(np.float64): -690.0}

T = TypeVar("T")


def why_not(x: Array) -> str | None:
    """The reason why rows of `x` can not be computed here; None if they can."""
    if is_on_host(x):
        return None
    if is_torch_array(x):
        return f"the tensor is on {x.device}, not in host memory"
    return f"{type(x).__module__}.{type(x).__qualname__} is no array in host memory, or does not support DLPack"


@cache
def forms_for(data: np.dtype[Any]) -> Forms:
    """The forms for data of this dtype, the fastest first."""
    dtypes = [dtype for dtype in (_guard.FLOAT32, _guard.FLOAT64) if dtype.itemsize >= data.itemsize]
    expanded = (
        Form.expanded(
            f"expanded-{dtype.name}",
            "expanded",
            float(np.finfo(dtype).eps),
            data,
            largest=_guard.ROOM * float(np.finfo(dtype).max),
        )
        for dtype in dtypes
    )
    return (*expanded, CENTRED)


def in_memory(rows: Rows, covariance: Covariance) -> Engine:
    """The engine for rows in host memory."""
    block = Block(rows)
    return Engine(block.rows, InMemory(block), block, covariance)


class Block:
    """Rows in host memory, and threads that take them slab by slab."""

    backend = "numpy"
    during_steps = staticmethod(one_blas_thread)
    hints: Array | None = None  # the component nearest to each row, as far as it is known

    def __init__(self, rows: Rows, middle: Array | None = None) -> None:
        array, weight = to_numpy(rows.array), rows.sample_weight
        weight = None if weight is None else asarray_like(weight, array, np.float64)
        self.rows = Rows(array, weight, rows.batch_size)
        self._dtype = np.dtype(np.float32 if self.rows.array.dtype == np.float32 else np.float64)
        # With a middle that is given, it is a block of a data set, which is not seen again.
        self._middle = middle
        self._kept_shift: Array | None = None
        self._kept_scatter: dict[str, Array] = {}  # by covariance type
        # Features of the blocks that begin in these rows, of one kind and in one dtype.
        self._kept: dict[int, Array] = {}
        self._kept_for: tuple[np.dtype[Any], Quadratic] | None = None
        # Rows about a point, by the block that they are of.
        self._kept_centred: dict[tuple[int, int], Array] = {}
        self._kept_origin: Array | None = None

    def forms(self, covariance: Covariance) -> Forms:
        """The forms of the E-step, the fastest first, the most exact last."""
        forms = forms_for(self._dtype)
        if covariance.quadratic != "products":
            return forms
        n_products = QUADRATIC[covariance.quadratic].number(self.rows.shape[1])
        return tuple(form for form in forms if form == CENTRED or n_products <= MOST_PRODUCTS[form.dtype])

    def floor(self) -> None:
        """Rows have all the digits of their dtype."""

    # Not functools.cached_property, which in Python 3.11 has a lock: a fork can leave it locked for ever.
    @property
    def shift(self) -> Array:
        """The mean of the data set, in float64 but with no more digits than the data: x - shift is rounded once."""
        if self._kept_shift is None:
            mean = self.rows.mean(BLOCK_ROWS[1]) if self._middle is None else to_numpy(self._middle)
            dtype = self.rows.array.dtype
            floating = np.issubdtype(dtype, np.floating)
            self._kept_shift = mean.astype(dtype).astype(np.float64) if floating else mean
        return self._kept_shift

    def assign(self, means: Array, origin: Array, covariance: Covariance, form: Form) -> SufficientStatistics:
        """Statistics about `origin` (k, d) of the rows nearest to each of `means` (k, d), exact in any form."""
        labels = np.empty(self.rows.shape[0], dtype=np.min_scalar_type(-len(means)))

        def statistics(slab: slice) -> SufficientStatistics:
            for block, _, nearest in self._nearest(slab, means, means.mean(axis=0)):
                labels[block] = nearest
            rows = np.asarray(self.rows.array[slab])
            return _pruning.assign(rows, self._weight(slab), labels[slab], origin, covariance)

        total = self._total(statistics, len(means), covariance)
        self.hints = labels
        return total

    def spread(self, draw: Draw, k: int, covariance: Covariance) -> SufficientStatistics:
        """Statistics for the responsibilities that `draw` gives."""
        # All means are about the middle of the data, so that nothing cancels here; rows are drawn for in order.
        middle = None if self._middle is None else self.shift
        return _array_api.Block(self.rows, middle).spread(draw, k, covariance)

    # Between slabs as well: threads that a call of BLAS wakes there go on spinning beside ours.
    @one_blas_thread()
    def expect(self, density: Density, form: Form) -> SufficientStatistics:
        """The E-step: statistics of all rows; pruned, and exact in any form, where that pays."""
        pruned = self._pruned(density, form)
        if pruned is not None:
            return pruned
        k, covariance = len(density.means), density.covariance
        if form.features == "centred":
            return self._total(
                lambda slab: _centred.expect(self.rows.array[slab], self._weight(slab), density), k, covariance
            )
        shift = self.shift
        natural = natural_parameters(density, shift).astype(form.dtype)
        compiled = self._compiled(k, self._n_features(covariance))
        given, size = self._given(k, covariance, form.dtype, bool(compiled))
        if self._kept_for != (form.dtype, given):
            self._kept, self._kept_for = {}, (form.dtype, given)

        def statistics(slab: slice) -> SufficientStatistics:
            sums, most = _Sums(covariance, self.rows.shape[1], k, form), min(size, slab.stop - slab.start)
            buffer = np.empty(self._width(given) * most, dtype=form.dtype)
            logits = np.empty(0 if compiled else k * most, dtype=form.dtype)
            for block in _within(slab, size):
                phi, weight = self._kept_features(block, buffer, given), self._weight(block)
                if compiled:
                    sums.log_likelihood += compiled.expect(
                        phi, natural, weight, covariance.quadratic, FLOOR[form.dtype], sums.sums
                    )
                else:
                    sums.soften(phi, natural, weight, logits)
            return sums.statistics(shift)

        total = self._total(statistics, k, covariance)
        if not covariance.shares_moments:
            return total
        # The quadratic term that all components share cancels in the responsibilities; its sum is that of a trace.
        scatter = self._scatter(covariance)
        trace = np.sum(covariance.square(density.precision_cholesky) * scatter)
        return total.summed((total.counts, total.first_moments, scatter, total.log_likelihood - 0.5 * trace))

    def _bounds(self, density: Density, shift: Array, form: Form) -> _pruning.Bounds | None:
        """The bounds that leave few components of a row to compute; None where this form takes less time for all."""
        n, k = self.rows.shape[0], len(density.means)
        most = self._most_left(k, density.covariance, form)
        if most < 1 or not np.issubdtype(self.rows.array.dtype, np.floating):
            return None
        bounds = _pruning.Bounds.of_density(density, shift)
        most_rows, spacing = PRUNING_SAMPLE
        sample = np.asarray(self.rows.array[:: max(spacing, n // most_rows)][:most_rows])
        largest = _centred.logits(sample.astype(np.float64), density).max(axis=0)
        left = np.sum(bounds.of(sample) >= largest - _pruning.MARGIN, axis=0)
        return bounds if left.mean() <= most else None

    def _most_left(self, k: int, covariance: Covariance, form: Form) -> float:
        """How many of a row's components pruning may leave and take no longer than this form does for all k."""
        d = self.rows.shape[1]
        if k == 1 or QUADRATIC[covariance.quadratic].number(d) <= d:
            return 0
        least, square, other = PRUNED_FLOPS
        component = least + square * d * d
        if form == CENTRED:
            flops = CENTRED_PART * k * component
        else:
            # Products with few components are slow, and half as fast in float64.
            flops = 4 * (k + 8) * self._n_features(covariance) * form.dtype.itemsize / 4
        return (flops - other * k) / component

    def _pruned(self, density: Density, form: Form) -> SufficientStatistics | None:
        """Statistics of all rows, computed for few components of each; None where this form takes less time."""
        bounds = self._bounds(density, self.shift, form)
        if bounds is None:
            return None
        k = len(density.means)
        guess = self.hints is None or len(self.hints) != self.rows.shape[0]
        labels: Array = np.empty(self.rows.shape[0], dtype=np.min_scalar_type(-k)) if guess else self.hints
        self.hints = labels

        def statistics(slab: slice) -> SufficientStatistics:
            rows = np.asarray(self.rows.array[slab])
            if guess:
                labels[slab] = bounds.guess(rows)
            return _pruning.expect(rows, self._weight(slab), labels[slab], density, bounds)

        total = self._total(statistics, k, density.covariance, self._grouped_rows(k))
        return total if np.all(total.counts[density.is_alive] >= _pruning.SMALLEST_COUNT) else None

    def log_evidence(self, density: Density) -> Array:
        """Log-density of each row under the mixture: (n,)."""
        return self._infer(density, _LOG_EVIDENCE, (), np.float64)

    def responsibilities(self, density: Density) -> Array:
        """Posterior probability of each component given the row: (n, k)."""
        return self._infer(density, _RESPONSIBILITIES, density.log_offsets.shape, self._dtype)

    def labels(self, density: Density) -> Array:
        """The component of largest responsibility for each row: (n,)."""
        return self._infer(density, _LABELS, (), np.int64)

    def _infer(self, density: Density, prediction: "_Prediction", shape: tuple[int, ...], dtype: Any) -> Array:
        pruned, centred = prediction.pruned, prediction.centred
        if self.rows.shape[0] * max(density.means.size, density.precision_cholesky.size) <= SMALL_PREDICTION:
            with np.errstate(over="ignore", invalid="ignore"):
                return np.ascontiguousarray(centred(self.rows.array, density), dtype=dtype)
        k, covariance = len(density.means), density.covariance
        width = self._n_features(covariance)
        # With no more digits than the data.
        shift = density.middle.astype(self._dtype).astype(np.float64)
        out = np.empty((self.rows.shape[0], *shape), dtype=dtype)
        with one_blas_thread():
            form = _guard.choose(self.forms(covariance), density, shift)[0][0]
            bounds = self._bounds(density, shift, form)
            if bounds is not None:

                def prune(slab: slice) -> None:
                    pruned(np.asarray(self.rows.array[slab]), density, bounds, out[slab])

                self._run(prune, k, width, self._grouped_rows(k))
                return out

            def centre(rows: slice) -> None:
                for part in _within(rows, _centred.block_rows(density)):
                    out[part] = centred(self.rows.array[part], density)

            if form.features == "centred":
                self._run(centre, k, width)
                return out
            natural = natural_parameters(density, shift).astype(form.dtype)
            compiled = None if covariance.shares_moments else self._compiled(k, width)
            given, size = self._given(k, covariance, form.dtype, bool(compiled))

            def infer(slab: slice) -> None:
                most = min(size, slab.stop - slab.start)
                buffer = np.empty(self._width(given) * most, dtype=form.dtype)
                logits = np.empty(0 if compiled else k * most, dtype=form.dtype)
                for block in _within(slab, size):
                    phi = _shaped(buffer, self._width(given), block.stop - block.start)
                    self._features(block, shift, phi, given)
                    if compiled:
                        is_finite = compiled.predict(
                            phi, natural, covariance.quadratic, FLOOR[form.dtype], prediction.name, out[block]
                        )
                    else:
                        product = np.matmul(natural, phi, out=_shaped(logits, k, phi.shape[1]))
                        is_finite = np.isfinite(product.sum())
                        if is_finite:
                            out[block] = prediction.expanded(product, phi[1 : 1 + self.rows.shape[1]], density)
                    if not is_finite:  # values that are too large to square in the dtype of the form
                        centre(block)

            self._run(infer, k, width)
            return out

    def _scatter(self, covariance: Covariance) -> Array:
        """Weighted second moments of x - shift over all rows, for components that share one covariance."""

        def scatter(slab: slice) -> Array:
            total = np.zeros(covariance.moments_shape(1, self.rows.shape[1]))
            for block in _within(slab, BLOCK_ROWS[1]):
                x = self._read(block, np.dtype(np.float64)) - self.shift[:, None]
                weight = self._weight(block)
                total += covariance.second_moments((x if weight is None else x * weight).T[None], x.T[None])
            return total

        if covariance.name not in self._kept_scatter:
            d, width, most = self.rows.shape[1], self._n_features(covariance), self._most_slabs(1, covariance)
            parts = self._run(scatter, d, width, most_slabs=most)
            self._kept_scatter[covariance.name] = sum(parts)
        return self._kept_scatter[covariance.name]

    def _kept_features(self, block: slice, buffer: Array, quadratic: Quadratic) -> Array:
        """Features of a block about the shift (F, b), in `buffer` where those of the last iteration are not kept."""
        d, kept, n_features = self.rows.shape[1], self._kept.get(block.start), self._width(quadratic)
        if kept is not None and len(kept) == n_features:
            return kept
        phi = _shaped(buffer, n_features, block.stop - block.start)
        if kept is not None:
            phi[: 1 + d] = kept
            quadratic.write(phi[1 : 1 + d], phi[1 + d :])
            return phi
        self._features(block, self.shift, phi, quadratic)
        # All of them, or those that the others are made of, or none.
        n_bytes = self.rows.shape[0] * phi.itemsize
        n_kept = next((n for n in (n_features, 1 + d) if n * n_bytes <= KEPT_BYTES), 0)
        if n_kept and self._middle is None:
            self._kept[block.start] = phi[:n_kept].copy()
        return phi

    def _features(self, block: slice, shift: Array, phi: Array, quadratic: Quadratic) -> Array:
        """Features of a block about `shift`, into `phi` (F, b)."""
        d = self.rows.shape[1]
        x = phi[1 : 1 + d]
        phi[0] = 1
        np.subtract(self._read(block, phi.dtype), shift[:, None].astype(phi.dtype), out=x)
        quadratic.write(x, phi[1 + d :])
        return phi

    def _compiled(self, k: int, width: int) -> ModuleType | None:
        """What computes k logits from so many features of each row, where that is worth loading it."""
        return _compiled() if 4 * self.rows.shape[0] * k * width >= COMPILED_FLOPS else None

    def _given(self, k: int, covariance: Covariance, dtype: np.dtype[Any], compiled: bool) -> tuple[Quadratic, int]:
        """The quadratic features that an E-step is given, and of how many rows at a time."""
        # The compiled one makes them itself.
        if compiled:
            return QUADRATIC["none"], BLOCK_ROWS[1]
        return QUADRATIC[covariance.quadratic], self._block_rows(k, covariance, dtype)

    def _width(self, quadratic: Quadratic) -> int:
        """Number of features of a row, with these quadratic ones."""
        d = self.rows.shape[1]
        return 1 + d + quadratic.number(d)

    def _n_features(self, covariance: Covariance) -> int:
        """Number of features of a row, F."""
        return self._width(QUADRATIC[covariance.quadratic])

    def _block_rows(self, k: int, covariance: Covariance, dtype: np.dtype[Any]) -> int:
        """Rows of a block."""
        rows = BLOCK_BYTES // ((self._n_features(covariance) + 2 * k) * dtype.itemsize)
        return min(max(rows // 64 * 64, BLOCK_ROWS[0]), BLOCK_ROWS[1])

    def nearest(self, centroids: Array) -> Array:
        """The centroid nearest to each row, the first of equals: (n,)."""
        return self._map_nearest(lambda block, nearest: nearest, centroids, np.int64)

    def squared_distances(self, centroids: Array) -> Array:
        """Squared distance of each row to the nearest centroid: (n,)."""

        def squared(block: slice, nearest: Array) -> Array:
            offset = self.rows.array[block] - centroids.take(nearest, axis=0)
            return np.einsum("bd,bd->b", offset, offset)

        return self._map_nearest(squared, centroids, np.float64)

    def sums(self, centroids: Array, origin: Array) -> Array:
        """Sums of x - origin over the rows nearest to each centroid, with their weight as last column: (k, d + 1)."""
        k, d = centroids.shape
        # About the same point once more: what is the same in each iteration is kept.
        if origin is not self._kept_origin:
            self._kept_origin, self._kept_centred = origin, {}
        keeps = self._middle is None and self.rows.shape[0] * (d + 1) * 8 <= KEPT_BYTES
        kept = self._kept_centred if keeps else None

        def sums(slab: slice) -> Array:
            total = np.zeros((k, d + 1))
            for block, x, nearest in self._nearest(slab, centroids, origin, kept):
                weight = self._weight(block)
                weight = np.ones(len(x)) if weight is None else weight
                total += csc_array((weight, nearest, np.arange(len(x) + 1)), shape=(k, len(x))) @ x
            return total

        return sum(self._run(sums, k, 1 + d))

    def _map_nearest(self, function: Callable[[slice, Array], Array], centroids: Array, dtype: Any) -> Array:
        out = np.empty(self.rows.shape[0], dtype=dtype)

        def fill(slab: slice) -> None:
            for block, _, nearest in self._nearest(slab, centroids, centroids.mean(axis=0)):
                out[block] = function(block, nearest)

        self._run(fill, len(centroids), 1 + self.rows.shape[1])
        return out

    def _nearest(
        self, slab: slice, centroids: Array, origin: Array, kept: dict[tuple[int, int], Array] | None = None
    ) -> Iterator[tuple[slice, Array, Array]]:
        """Blocks of a slab: where they are, [x - origin, 1] (b, d + 1), the nearest of `centroids` to each row (b,).

        The nearest is the first of equals. Products lose least about an `origin` in the middle of the centroids. Rows
        about it are looked up in `kept`, where it is given, and left there.
        """
        k, d = centroids.shape
        c = centroids - origin
        # |x|^2 is the same for every centroid.
        factor = np.concatenate([2 * c.T, -np.sum(c * c, axis=1)[None]])
        size = int(np.clip(KMEANS_BYTES // (8 * (k + d)), *BLOCK_ROWS))
        size = min(size, self.rows.batch_size or size)
        buffer, products = np.ones((size, d + 1)), np.empty(size * k)
        for block in _within(slab, size):
            at = (block.start, block.stop)
            x = None if kept is None else kept.get(at)
            if x is None:
                x = buffer[: at[1] - at[0]] if kept is None else np.ones((at[1] - at[0], d + 1))
                np.subtract(self.rows.array[block], origin, out=x[:, :d])
                if kept is not None:
                    kept[at] = x
            yield block, x, _argmax(np.matmul(factor.T, x.T, out=_shaped(products, k, len(x))))

    def _weight(self, block: slice) -> Array | None:
        return None if self.rows.sample_weight is None else self.rows.sample_weight[block]

    def _read(self, block: slice, dtype: np.dtype[Any]) -> Array:
        """Rows of a block as columns: (d, b)."""
        return np.asarray(self.rows.array[block]).astype(dtype, copy=False).T

    def _run(
        self,
        function: Callable[[slice], T],
        k: int,
        width: int,
        least_rows: int = BLOCK_ROWS[0],
        most_slabs: int = MOST_SLABS,
    ) -> list[T]:
        """`function` of each slab, in order; slabs are as many as k x `width` products of each row are worth."""
        n = self.rows.shape[0]
        work = 4 * n * (k + 8) * width
        n_slabs = max(1, min(most_slabs, work // SLAB_FLOPS, n // least_rows))
        return run(function, list(slices(n, -(-n // n_slabs))))

    def _total(
        self,
        function: Callable[[slice], SufficientStatistics],
        k: int,
        covariance: Covariance,
        least_rows: int = BLOCK_ROWS[0],
    ) -> SufficientStatistics:
        """The sum of `function` over slabs."""
        width, most = self._n_features(covariance), self._most_slabs(k, covariance)
        total, *others = self._run(function, k, width, least_rows, most)
        for other in others:
            for mine, its in zip(total.sums, other.sums, strict=True):
                mine += its
        return total

    def _most_slabs(self, k: int, covariance: Covariance) -> int:
        """As many as leave the second moments of each no larger than the rows; two at least."""
        n, d = self.rows.shape
        return min(MOST_SLABS, max(2, n * d // math.prod(covariance.moments_shape(k, d))))

    def _grouped_rows(self, k: int) -> int:
        """Rows of slabs that are long enough for matrix products of a component's rows; four where that is so."""
        least, enough = (rows * k for rows in PRUNING_ROWS)
        return max(least, min(enough, -(-self.rows.shape[0] // 4)))


class _Sums:
    """Weighted sums of features over the rows of a slab, block by block, in float64."""

    def __init__(self, covariance: Covariance, d: int, k: int, form: Form) -> None:
        self.covariance, self.d, self.form = covariance, d, form
        width = 1 + d + QUADRATIC[covariance.quadratic].number(d)
        self.sums = np.zeros((width, k))
        self.log_likelihood = 0.0
        self._product = np.empty_like(self.sums, dtype=form.dtype)

    def soften(self, phi: Array, natural: Array, weight: Array | None, buffer: Array) -> None:
        """E-step and sums of a block with these features (F, b); `buffer` has room for its logits."""
        logits = np.matmul(natural, phi, out=_shaped(buffer, len(natural), phi.shape[1]))
        evidence, total = _softmax(logits)
        evidence = evidence.astype(np.float64)
        if weight is None:
            logits *= 1 / total
            self.log_likelihood += float(evidence.sum())
        else:
            logits *= (weight / total).astype(logits.dtype)
            self.log_likelihood += float(evidence @ weight)
        if self.form.exact:
            self.sums += np.matmul(phi, logits.T, out=self._product)
            return
        # Short sums in float32, all of them in one call.
        whole = phi.shape[1] // SUMMED_ROWS * SUMMED_ROWS
        left, right = (_in_parts(values[:, :whole], SUMMED_ROWS) for values in (phi, logits))
        self.sums += np.matmul(left, right.swapaxes(1, 2)).sum(axis=0, dtype=np.float64)
        if whole < phi.shape[1]:
            self.sums += np.matmul(phi[:, whole:], logits[:, whole:].T, out=self._product)

    def statistics(self, origin: Array) -> SufficientStatistics:
        """The sums by their names; second moments only of a covariance type that has quadratic features."""
        d, sums, covariance = self.d, self.sums.T, self.covariance
        if covariance.shares_moments:
            second_moments = np.zeros(covariance.moments_shape(len(sums), d))
        else:
            second_moments = QUADRATIC[covariance.quadratic].moments(np.ascontiguousarray(sums[:, 1 + d :]), d)
        counts, first_moments = sums[:, 0].copy(), sums[:, 1 : 1 + d].copy()
        log_likelihood = np.asarray(self.log_likelihood)
        return SufficientStatistics(origin, counts, first_moments, second_moments, log_likelihood, self.form.precision)


def _argmax(values: Array) -> Array:
    """The first of the largest of each column (k, b), any where one is NaN; in the smallest dtype with room for k."""
    # NumPy's argmax takes up to four times as long for short columns. Few calls, as threads wait for each other there.
    k = len(values)
    is_largest = values == values.max(axis=0)
    from_last = np.arange(k, 0, -1, dtype=np.min_scalar_type(k))
    return k - (is_largest.view(np.uint8) * from_last[:, None]).max(axis=0, initial=1)


def _likeliest(logits: Array, x: Array, density: Density) -> Array:
    return _argmax(logits)


def _log_evidence(logits: Array, x: Array, density: Density) -> Array:
    largest = logits.max(axis=0)
    logits -= largest
    evidence = largest + np.log(np.exp(logits, out=logits).sum(axis=0))
    if not density.covariance.shares_moments:
        return evidence
    # What was left out of the logits, as all components share it.
    factor = density.precision_cholesky.astype(x.dtype)
    return evidence - 0.5 * density.covariance.mahalanobis(x.T[None], factor)[0]


def _responsibilities(logits: Array, x: Array, density: Density) -> Array:
    _, total = _softmax(logits)
    logits /= total
    return logits.T


@dataclass(frozen=True)
class _Prediction:
    """What is computed of each row, and what computes it."""

    name: str
    pruned: Callable[[Array, Density, _pruning.Bounds, Array], None]
    centred: Callable[[Array, Density], Array]
    expanded: Callable[[Array, Array, Density], Array]


_LOG_EVIDENCE = _Prediction("log_evidence", _pruning.log_evidence, _centred.log_evidence, _log_evidence)
_RESPONSIBILITIES = _Prediction(
    "responsibilities", _pruning.responsibilities, _centred.responsibilities, _responsibilities
)
_LABELS = _Prediction("labels", _pruning.labels, _centred.labels, _likeliest)


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
def _compiled() -> ModuleType | None:
    """The compiled E-step; None where Numba is not installed, or not for this NumPy."""
    try:
        from gaussmix.backends import _compiled as module
    except ImportError:
        return None
    return module


@cache
def _exp_of_floor(dtype: np.dtype[Any]) -> Any:
    """exp(floor) as the vectorised loop rounds it, which is not always as a scalar exp does."""
    return np.exp(np.full(BLOCK_ROWS[0], FLOOR[dtype], dtype=dtype))[0]


def _in_parts(values: Array, size: int) -> Array:
    """Columns (m, p size) as p groups of as many: (p, m, size), without a copy."""
    return values.reshape(len(values), -1, size).swapaxes(0, 1)


def _shaped(buffer: Array, *shape: int) -> Array:
    """The beginning of a flat buffer, contiguous in this shape."""
    return buffer[: math.prod(shape)].reshape(shape)


def _within(slab: slice, size: int) -> Iterator[slice]:
    for part in slices(slab.stop - slab.start, size):
        yield slice(slab.start + part.start, slab.start + part.stop)
