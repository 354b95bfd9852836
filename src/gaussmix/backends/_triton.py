"""EM, inference and k-means on a GPU, by the kernels of `gaussmix_kernels`, for torch tensors and CuPy arrays.

The kernels read a copy of the data that is shifted, scaled and split into pairs of float16 numbers, or in float64 (the
exact tier). Arrays of n rows stay on their device; CuPy's are exchanged without a copy, on CuPy's current stream.

Forms, the fastest first: features or centred rows in float16 pairs, then float64, and last the centred float64 code of
`_array_api`. As on the CPU, a bound on the parameters decides (`Covariance.kappa`), here on the device, each iteration.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import wraps
from typing import Any

import numpy as np
import torch
from array_api_compat import is_cupy_array

import gaussmix_kernels as kernels
from gaussmix._arrays import array_namespace, asarray_like, to_numpy
from gaussmix._covariance import Covariance
from gaussmix._density import Density
from gaussmix._guard import CENTRED, FLOAT32, FLOAT64, TOLERANCE, Form, Forms, choose
from gaussmix._parameters import Parameters, SufficientStatistics
from gaussmix._typing import Array
from gaussmix.backends import _array_api
from gaussmix.backends._engine import Progress
from gaussmix.rows._data import Rows
from gaussmix.rows._passes import Draw

# Responsibilities below 1e-11 are zero in float16 pairs: a component of less weight than this could live on such alone.
LEAST_WEIGHT = 1e-6
# Largest tolerable error of a centred variance, relative to it; rounded rows are off by eps times their offset.
CENTRED_TOLERANCE = 5e-5
EXACT_EPS = 2.0**-52


def forms(covariance: Covariance, d: int, dtype: np.dtype[Any]) -> Forms:
    """The forms for data of this dtype, the fastest first; last the code of `_array_api`, or what is as exact."""
    kinds = kernels.kinds(covariance.quadratic, d)
    found = []
    if dtype == np.float32:
        found = [_halves(kind, d) for kind in kinds]
        if "centred" in kinds:
            kinds = ("centred",)
    for kind in kinds:
        if kind == "centred":
            return (*found, replace(CENTRED, has_kernels=True))
        found.append(Form.expanded("expanded-float64", kind, EXACT_EPS, dtype, has_kernels=True))
    return (*found, CENTRED)


def _halves(kind: str, d: int) -> Form:
    """Pairs of float16 numbers, for float32 data."""
    eps, more = kernels.HALVES_EPS, dict[str, Any](has_kernels=True, least_weight=LEAST_WEIGHT)
    if kind != "centred":
        return Form.expanded("expanded-float16x3", kind, eps, FLOAT32, **more)
    most_kappa, most_ratio = (TOLERANCE[FLOAT32] / (2 * eps)) ** 2 / d, (CENTRED_TOLERANCE / eps) ** 2
    return Form("centred-float16x3", kind, False, most_kappa, most_ratio, **more)


def _on_stream(method: Callable[..., Any]) -> Callable[..., Any]:
    """Runs a method on the device and the current stream of the library that owns the rows."""

    @wraps(method)
    def run(self: "Block", *args: Any, **kwargs: Any) -> Any:
        with _stream_of(self.rows.array):
            return method(self, *args, **kwargs)

    return run


@contextmanager
def _stream_of(x: Array) -> Iterator[None]:
    if not is_cupy_array(x):
        device = x.device
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            yield
        return
    import cupy

    stream = _stream_at(cupy.cuda.get_current_stream().ptr, x.device.id)
    with torch.cuda.device(x.device.id), torch.cuda.stream(stream):
        yield


def _stream_at(pointer: int, device: int) -> torch.cuda.Stream:
    """The stream that CUDA knows by this pointer."""
    # The default stream's pointer is 0, for which ExternalStream takes some stream of torch's own pool.
    return torch.cuda.ExternalStream(pointer, device=device) if pointer else torch.cuda.default_stream(device)


class Block:
    """Rows as tensors, and as the kernels read them."""

    backend = "triton"
    hints: Array | None = None

    def __init__(self, rows: Rows, middle: Array | None = None) -> None:
        self.rows, self._middle = rows, middle
        self._x = _tensor(rows.array)
        self._weight = None if rows.sample_weight is None else _tensor(rows.sample_weight)
        narrow = self._x.dtype.is_floating_point and self._x.dtype != torch.float64
        self._dtype = FLOAT32 if narrow else FLOAT64
        self._data: kernels.Data | None = None
        self._shift = None if middle is None else self._there(middle)

    @property
    @_on_stream
    def shift(self) -> Array:
        """The point that features are about: (d,)."""
        return self._back(self._any_data.shift if self._shift is None else self._shift)

    @_on_stream
    def floor(self) -> Array:
        """The square of x - shift that pairs of halves tell from zero: (d,)."""
        return self._back(kernels.HALVES_LEAST / self._any_data.scale**2)

    def forms(self, covariance: Covariance) -> Forms:
        """The forms of the E-step, the fastest first, the most exact last."""
        return forms(covariance, self.rows.shape[1], self._dtype)

    @_on_stream
    def assign(self, means: Array, origin: Array, covariance: Covariance, form: Form) -> SufficientStatistics:
        """Statistics about `origin` (k, d) of the rows that are nearest to each of `means` (k, d)."""
        if not form.has_kernels:
            means, origin = (asarray_like(value, self.rows.array, self.rows.dtype) for value in (means, origin))
            return self._plain.assign(means, origin, covariance, form)
        em = self._em(covariance, form)
        offsets, centres = (self._there(value) - em.data.shift for value in (means, origin))
        statistics = em.assign(kernels.nearest(em.data, offsets), centres)
        return self._statistics(em, statistics, centres, 0.0, form)

    @_on_stream
    def spread(self, draw: Draw, k: int, covariance: Covariance) -> SufficientStatistics:
        """Statistics for the responsibilities that `draw` gives."""
        return self._plain.spread(draw, k, covariance)

    @_on_stream
    def advance(
        self,
        parameters: Parameters,
        density: Density,
        form: Form,
        regularization: float,
        at_most: int,
        previous: float,
        tolerance: float,
    ) -> Progress:
        """Up to `at_most` EM iterations on the device, looked at every few of them, which end as the loop's do."""
        em = self._em(density.covariance, form)
        settings = kernels.Settings.of(
            em.data,
            tolerance=tolerance,
            most_kappa=form.most_kappa,
            most_ratio=form.most_ratio,
            least_weight=form.least_weight,
            regularization=regularization,
        )
        there = parameters.mapped(self._there)
        start = kernels.Parameters(
            there.weights, there.means - em.data.shift, there.covariances, there.precision_cholesky
        )
        found = em.advance(start, self._local(density, em), at_most=at_most, previous=previous, settings=settings)
        weights, means, covariances, factors = vars(found.parameters).values()
        reached = Parameters(weights, means + em.data.shift, covariances, factors).mapped(self._back)
        return Progress(reached, found.bounds, REASONS.get(found.reason, ""))

    @_on_stream
    def expect(self, density: Density, form: Form) -> SufficientStatistics:
        """The E-step: statistics of all rows."""
        if not form.has_kernels:
            return self._plain.expect(density, form)
        em = self._em(density.covariance, form)
        if not form.exact and self._middle is not None and self._choose((form, CENTRED), density)[0] != form:
            # A block whose rows reach further than those that the form was chosen by.
            nothing = SufficientStatistics.of_nothing(density.means, density.covariance)
            return nothing.summed((*nothing.sums[:3], nothing.log_likelihood + math.nan))
        local = self._local(density, em)
        statistics, log_likelihood = em.expect(local)
        return self._statistics(em, statistics, local.means, log_likelihood, form)

    def _statistics(
        self, em: kernels.EM, statistics: torch.Tensor, offsets: torch.Tensor, log_likelihood: float, form: Form
    ) -> SufficientStatistics:
        counts, first_moments, second_moments = em.moments(statistics)
        origin = em.data.shift + offsets if em.kind == "centred" else em.data.shift
        total = torch.tensor(log_likelihood, dtype=torch.float64, device=counts.device)
        origin, counts, first_moments, second_moments, total = map(
            self._back, (origin, counts, first_moments, second_moments, total)
        )
        return SufficientStatistics(origin, counts, first_moments, second_moments, total, form.precision)

    @_on_stream
    def log_evidence(self, density: Density) -> Array:
        """Log-density of each row under the mixture: (n,)."""
        em = self._for_inference(density)
        if em is None:
            return self._plain.log_evidence(density)
        return self._back(em.log_evidence(self._local(density, em)))

    @_on_stream
    def responsibilities(self, density: Density) -> Array:
        """Posterior probability of each component given the row: (n, k)."""
        em = self._for_inference(density)
        if em is None:
            return self._plain.responsibilities(density)
        return self._back(em.responsibilities(self._local(density, em)))

    @_on_stream
    def labels(self, density: Density) -> Array:
        """The component of largest responsibility for each row: (n,)."""
        em = self._for_inference(density)
        if em is None:
            return self._plain.labels(density)
        return self._back(em.labels(self._local(density, em)).to(torch.int64))

    def _for_inference(self, density: Density) -> kernels.EM | None:
        """The kernels, about the mean of the mixture; None where no form of theirs is exact enough."""
        if self._shift is None:
            self._shift = self._there(density.middle).to(self._x.dtype).to(torch.float64)
        form = self._choose(self.forms(density.covariance), density)[0]
        return self._em(density.covariance, form) if form.has_kernels else None

    def _choose(self, left: Forms, density: Density) -> Forms:
        return choose(left, density, self.shift, self.floor())[0]

    # k-means is in float64 as on the CPU: centroids may lie close together in wide data.

    @_on_stream
    def nearest(self, centroids: Array) -> Array:
        """The centroid nearest to each row, the first of equals: (n,)."""
        return self._back(self._nearest(centroids).to(torch.int64))

    @_on_stream
    def squared_distances(self, centroids: Array) -> Array:
        """Squared distance of each row, of weight 0 or not, to the nearest centroid: (n,)."""
        return self._back(kernels.squared_distances(self._x, self._there(centroids), self._nearest(centroids)))

    @_on_stream
    def sums(self, centroids: Array, origin: Array) -> Array:
        """Sums of x - origin over the rows nearest to each centroid, with their weight as last column: (k, d + 1)."""
        data = self._prepared(exact=True)
        counts, sums = kernels.sums(data, self._nearest(centroids), centroids.shape[0])
        sums = sums + counts[:, None] * (data.shift - self._there(origin))
        return self._back(torch.cat([sums, counts[:, None]], dim=1))

    def _nearest(self, centroids: Array) -> torch.Tensor:
        data = self._prepared(exact=True)
        return kernels.nearest(data, self._there(centroids) - data.shift)

    @property
    def _plain(self) -> _array_api.Block:
        return _array_api.Block(self.rows, self._middle)

    def _em(self, covariance: Covariance, form: Form) -> kernels.EM:
        return kernels.EM(self._prepared(form.exact), covariance.name, form.features)

    def _local(self, density: Density, em: kernels.EM) -> kernels.Density:
        there = density.mapped(self._there)
        return kernels.Density(there.log_offsets, there.means - em.data.shift, there.precision_cholesky)

    def _prepared(self, exact: bool) -> kernels.Data:
        """The data for a tier; about the shift of the first time."""
        if self._data is None or self._data.exact != exact:
            self._data = kernels.prepare(self._x, self._weight, self._shift, exact=exact)
            self._shift = self._data.shift
        return self._data

    @property
    def _any_data(self) -> kernels.Data:
        """The data for either tier: they have one shift and one scale."""
        return self._data or self._prepared(self._dtype == FLOAT64)

    def _there(self, value: Array) -> torch.Tensor:
        """A small array as a float64 tensor on the device of the rows."""
        if isinstance(value, torch.Tensor):
            return value.to(device=self._x.device, dtype=torch.float64)
        return torch.asarray(to_numpy(value), dtype=torch.float64, device=self._x.device)

    def _back(self, value: torch.Tensor) -> Array:
        """A tensor as an array of the library of the rows, without a copy."""
        if isinstance(self.rows.array, torch.Tensor):
            return value
        return array_namespace(self.rows.array).from_dlpack(value)


REASONS = {
    kernels.INEXACT: "its rounding errors would have exceeded the tolerance",
    kernels.SINGULAR: "a covariance came out singular",
    kernels.NOT_FINITE: "the log-likelihood was not finite",
}


def _tensor(x: Array) -> torch.Tensor:
    """The same memory as a tensor."""
    if isinstance(x, torch.Tensor):
        return x.detach()
    return torch.utils.dlpack.from_dlpack(x)
