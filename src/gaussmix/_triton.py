"""EM, inference and k-means on a GPU, by the kernels of `gaussmix_kernels`, for torch tensors and CuPy arrays.

The kernels read a copy of the data that is shifted, scaled and split into pairs of float16 numbers, or in float64 (the
exact tier). Arrays of n rows stay on their device; CuPy's are exchanged without a copy, on CuPy's current stream.

Forms, the fastest first: features or centred rows in float16 pairs, then float64, and last the centred float64 code of
`_array_api`. As on the CPU, a bound on the parameters decides (`Covariance.kappa`), here on the device, each iteration.
"""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import wraps
from typing import Any

import numpy as np
import torch
from array_api_compat import is_cupy_array

import gaussmix_kernels as kernels
from gaussmix import _array_api
from gaussmix._arrays import array_namespace, asarray_like, to_numpy
from gaussmix._covariance import Covariance
from gaussmix._data import Rows
from gaussmix._engine import Progress
from gaussmix._numpy import TOLERANCE, VARIANCE_TOLERANCE
from gaussmix._parameters import Parameters, SingularCovarianceError, SufficientStatistics, maximize
from gaussmix._typing import Array

logger = logging.getLogger("gaussmix")

# Responsibilities below 1e-11 are zero in float16 pairs: a component of less weight than this could live on such alone.
LEAST_WEIGHT = 1e-6
# Largest tolerable error of a centred variance, relative to it; rounded rows are off by eps times their offset.
CENTRED_TOLERANCE = 5e-5
EXACT_EPS = 2.0**-52
# The arithmetic of `_array_api`, and of kernels that are as exact.
EXACT = "centred-float64"


@dataclass(frozen=True)
class Form:
    """How the E-step is computed: from which features, and in which tier."""

    precision: str
    kind: str
    exact: bool

    def limits(self, dtype: np.dtype[Any], d: int) -> tuple[float, float]:
        """Largest kappa, and largest (variance + offset^2) / variance, that data of this dtype may have."""
        if self.kind == "centred":
            if self.exact:
                return math.inf, math.inf
            eps = kernels.HALVES_EPS
            return (TOLERANCE[dtype] / (2 * eps)) ** 2 / d, (CENTRED_TOLERANCE / eps) ** 2
        eps = EXACT_EPS if self.exact else kernels.HALVES_EPS
        return TOLERANCE[dtype] / eps, VARIANCE_TOLERANCE[dtype] / eps


def forms(covariance: Covariance, d: int, dtype: np.dtype[Any]) -> list[Form]:
    """The forms for data of this dtype, the fastest first. After them comes the code of `_array_api`."""
    kinds = kernels.TYPES[covariance.name].kinds(d)
    found = []
    if dtype == np.float32:
        found = [Form(f"{_word(kind)}-float16x3", kind, exact=False) for kind in kinds]
        if "centred" in kinds:
            kinds = ("centred",)
    return found + [Form(f"{_word(kind)}-float64", kind, exact=True) for kind in kinds]


def _word(kind: str) -> str:
    return "centred" if kind == "centred" else "expanded"


def _on_stream(method: Callable[..., Any]) -> Callable[..., Any]:
    """Runs a method on the device and the current stream of the library that owns the rows."""

    @wraps(method)
    def run(self: "_Rows", *args: Any, **kwargs: Any) -> Any:
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

    with torch.cuda.device(x.device.id):
        stream = torch.cuda.ExternalStream(cupy.cuda.get_current_stream().ptr, device=x.device.id)
        with torch.cuda.stream(stream):
            yield


class _Rows:
    """Rows as tensors, and as the kernels read them."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self._x = _tensor(rows.array)
        self._weight = None if rows.sample_weight is None else _tensor(rows.sample_weight)
        narrow = self._x.dtype.is_floating_point and self._x.dtype != torch.float64
        self._dtype = np.dtype(np.float32 if narrow else np.float64)
        self._data: kernels.Data | None = None
        self._shift: torch.Tensor | None = None

    def _prepared(self, exact: bool) -> kernels.Data:
        """The data for a tier; about the shift of the first time."""
        if self._data is None or self._data.exact != exact:
            self._data = kernels.prepare(self._x, self._weight, self._shift, exact=exact)
            self._shift = self._data.shift
        return self._data

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


class Engine(_Rows):
    """EM and inference on one data set for one covariance type."""

    backend = "triton"
    hints: Array | None = None

    def __init__(self, rows: Rows, covariance: Covariance, reg_covar: float, middle: Array | None = None) -> None:
        super().__init__(rows)
        self.covariance, self.reg_covar, self._middle = covariance, reg_covar, middle
        self._shift = None if middle is None else self._there(middle)
        self._forms: list[Form] = forms(covariance, rows.shape[1], self._dtype)

    @property
    def precision(self) -> str:
        """The arithmetic of the last E-step; before it, of the next."""
        return self._forms[0].precision if self._forms else EXACT

    def on(self, rows: Rows) -> "Engine":
        """The engine for other rows: about the same point, in the same form from now on."""
        other = Engine(rows, self.covariance, self.reg_covar, self._middle)
        other._forms = self._forms
        return other

    @_on_stream
    def assign(self, means: Array, origin: Array) -> SufficientStatistics:
        """Statistics about `origin` (k, d) of the rows that are nearest to each of `means` (k, d)."""
        while self._forms:
            em = self._em()
            offsets, centres = (self._there(value) - em.data.shift for value in (means, origin))
            statistics = self._statistics(em, em.assign(kernels.nearest(em.data, offsets), centres), centres, 0.0)
            try:
                new = maximize(statistics, asarray_like(means, statistics.counts), self.covariance, self.reg_covar)
            except SingularCovarianceError:
                if len(self.forms) == 1:
                    return statistics
                self.fall_back("a covariance came out singular")
                continue
            if self._is_exact_enough(new):
                return statistics
        return self._plain.assign(*(asarray_like(value, self.rows.array, self.rows.dtype) for value in (means, origin)))

    @_on_stream
    def spread(self, k: int, draw: Callable[[int], Array]) -> SufficientStatistics:
        """Statistics for the responsibilities (b, k), on the host, that `draw(b)` gives for the next b rows."""
        return self._plain.spread(k, draw)

    @_on_stream
    def advance(self, parameters: Parameters, *, at_most: int, previous: float, tolerance: float) -> Progress:
        """Up to `at_most` EM iterations; stops where a lower bound is within `tolerance` of the one before.

        Several iterations run on the device between two looks at it. Where a form is left, the iterations before count.
        """
        self._fall_back_for(parameters)
        while self._forms:
            em, last = self._em(), len(self.forms) == 1
            most_kappa, most_ratio = self._forms[0].limits(self._dtype, self.rows.shape[1])
            settings = kernels.Settings.of(
                em.data,
                tolerance=tolerance,
                most_kappa=most_kappa,
                most_ratio=most_ratio,
                least_weight=0.0 if em.data.exact else LEAST_WEIGHT,
                regularization=self.reg_covar,
            )
            found = em.advance(
                self._local(parameters, em),
                at_most=at_most,
                previous=previous,
                settings=settings,
            )
            parameters = self._global(found.parameters, em)
            if found.reason in (kernels.RUNNING, kernels.CONVERGED):
                return Progress(parameters, found.bounds, found.reason == kernels.CONVERGED)
            if last and found.reason == kernels.NOT_FINITE:
                return Progress(parameters, (*found.bounds, math.nan), converged=False)
            if last:
                # Names the component; where the host finds all of them regular, its step counts.
                statistics = self._expect(parameters, em)
                new = maximize(statistics, parameters.means, self.covariance, self.reg_covar)
                return Progress(new, (*found.bounds, statistics.lower_bound), converged=False)
            self.fall_back(REASONS[found.reason])
            if found.bounds:
                return Progress(parameters, found.bounds, converged=False)
        return self._plain.advance(parameters, at_most=at_most, previous=previous, tolerance=tolerance)

    @_on_stream
    def expect(self, parameters: Parameters) -> SufficientStatistics:
        """Statistics of all rows."""
        self._fall_back_for(parameters)
        return self._expect(parameters, self._em()) if self._forms else self._plain.expect(parameters)

    def _expect(self, parameters: Parameters, em: kernels.EM) -> SufficientStatistics:
        local = self._local(parameters, em)
        statistics, log_likelihood = em.expect(local)
        return self._statistics(em, statistics, local.means, log_likelihood)

    def _statistics(
        self, em: kernels.EM, statistics: torch.Tensor, offsets: torch.Tensor, log_likelihood: float
    ) -> SufficientStatistics:
        counts, first_moments, second_moments = em.moments(statistics)
        origin = em.data.shift + offsets if em.kind == "centred" else em.data.shift
        total = torch.tensor(log_likelihood, dtype=torch.float64, device=counts.device)
        return SufficientStatistics(
            *(self._back(value) for value in (origin, counts, first_moments, second_moments, total))
        )

    @_on_stream
    def log_evidence(self, parameters: Parameters) -> Array:
        """Log-density of each row under the mixture: (n,)."""
        em = self._for_inference(parameters)
        if em is None:
            return self._plain.log_evidence(parameters)
        return self._back(em.log_evidence(self._local(parameters, em)))

    @_on_stream
    def responsibilities(self, parameters: Parameters) -> Array:
        """Posterior probability of each component given the row: (n, k)."""
        em = self._for_inference(parameters)
        if em is None:
            return self._plain.responsibilities(parameters)
        return self._back(em.responsibilities(self._local(parameters, em)))

    @_on_stream
    def labels(self, parameters: Parameters) -> Array:
        """The component of largest responsibility for each row: (n,)."""
        em = self._for_inference(parameters)
        if em is None:
            return self._plain.labels(parameters)
        return self._back(em.labels(self._local(parameters, em)).to(torch.int64))

    def _for_inference(self, parameters: Parameters) -> kernels.EM | None:
        """The kernels, about the mean of the mixture; None where no form of theirs is exact enough."""
        if not self._forms:
            return None
        middle = (self._there(parameters.weights) @ self._there(parameters.means)).to(self._x.dtype)
        self._shift = middle.to(torch.float64) if self._shift is None else self._shift
        self._fall_back_for(parameters)
        return self._em() if self._forms else None

    @property
    def _plain(self) -> _array_api.Engine:
        return _array_api.Engine(self.rows, self.covariance, self.reg_covar, self._middle)

    @property
    def forms(self) -> tuple[str, ...]:
        """The forms of the E-step that are left, the one in use first, the most exact last."""
        names = [form.precision for form in self._forms]
        return tuple(names if names and names[-1] == EXACT else [*names, EXACT])

    @_on_stream
    def is_exact_for(self, parameters: Parameters) -> bool:
        """Whether statistics in the form in use are exact enough for these parameters; the form is left where not."""
        return not self._forms or self._is_exact_enough(parameters)

    def _em(self) -> kernels.EM:
        form = self._forms[0]
        return kernels.EM(self._prepared(form.exact), self.covariance.name, form.kind)

    def _local(self, parameters: Parameters, em: kernels.EM) -> kernels.Parameters:
        there = parameters.mapped(self._there)
        return kernels.Parameters(
            there.weights, there.means - em.data.shift, there.covariances, there.precision_cholesky
        )

    def _global(self, parameters: kernels.Parameters, em: kernels.EM) -> Parameters:
        moved = parameters.means + em.data.shift
        values = (parameters.weights, moved, parameters.covariances, parameters.precision_cholesky)
        return Parameters(*(self._back(value) for value in values))

    def _fall_back_for(self, parameters: Parameters) -> None:
        while self._forms and not self._is_exact_enough(parameters):
            pass

    def _is_exact_enough(self, parameters: Parameters) -> bool:
        """Whether the form is; it is left where not."""
        form = self._forms[0]
        data = self._prepared(form.exact)
        host = parameters.mapped(to_numpy)
        alive = host.weights > 0
        scale = to_numpy(data.scale)
        floor = 0.0 if form.exact else kernels.HALVES_LEAST / scale**2
        offsets = np.sqrt((host.means - to_numpy(data.shift)) ** 2 + floor)
        kappas = self.covariance.kappa(host.covariances, host.precision_cholesky, offsets)
        ratios = np.max(1 + offsets**2 / self.covariance.variances(host.covariances), axis=1)
        kappa, ratio = (float(np.max(np.where(alive, values, 0))) for values in (kappas, ratios))
        most_kappa, most_ratio = form.limits(self._dtype, self.rows.shape[1])
        if kappa <= most_kappa and ratio <= most_ratio:
            return True
        self.fall_back(f"kappa is {kappa:.3g}, (variance + offset^2) / variance {ratio:.3g}")
        return False

    def fall_back(self, reason: str) -> None:
        """Leave the form in use for the next one; after the last comes the code of `_array_api`."""
        left = self._forms.pop(0)
        logger.info("%s left for %s: %s", left.precision, self.precision, reason)


REASONS = {
    kernels.INEXACT: "its rounding errors would have exceeded the tolerance",
    kernels.SINGULAR: "a covariance came out singular",
    kernels.NOT_FINITE: "the log-likelihood was not finite",
}


class Clusters(_Rows):
    """k-means on one data set, in float64 as on the CPU: centroids may lie close together in wide data."""

    @_on_stream
    def labels(self, centroids: Array) -> Array:
        """The centroid nearest to each row, the first of equals: (n,)."""
        return self._back(self._nearest(centroids).to(torch.int64))

    @_on_stream
    def squared_distances(self, centroids: Array) -> Array:
        """Squared distance of each row, of weight 0 or not, to the nearest centroid: (n,)."""
        return self._back(kernels.squared_distances(self._x, self._there(centroids), self._nearest(centroids)))

    @_on_stream
    def sums(self, centroids: Array, origin: Array) -> tuple[Array, Array]:
        """Weight of the rows that are nearest to each centroid (k,), and the sums of their x - origin (k, d)."""
        data = self._prepared(exact=True)
        counts, sums = kernels.sums(data, self._nearest(centroids), centroids.shape[0])
        return self._back(counts), self._back(sums + counts[:, None] * (data.shift - self._there(origin)))

    def _nearest(self, centroids: Array) -> torch.Tensor:
        data = self._prepared(exact=True)
        return kernels.nearest(data, self._there(centroids) - data.shift)


def _tensor(x: Array) -> torch.Tensor:
    """The same memory as a tensor."""
    if isinstance(x, torch.Tensor):
        return x.detach()
    return torch.utils.dlpack.from_dlpack(x)
