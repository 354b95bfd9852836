"""The one place of a covariance type: Full, Tied, Diag, TiedDiag and Spherical.

Everything that depends on how a covariance is stored is a method here; the rest of the library calls the method and
never asks for the type. Shapes are written with n rows, k components and d features. `covariances` stands for the
stored form (`shape`), `precision_cholesky` for U = L^-T with L L^T = Sigma, in the same form.

`centred` is x_i - mu_k for every component: (k, n, d). Components lead, so that each is one matrix product.

Mathematics only: how the quadratic features that `quadratic` names lie in memory is for `_features` and the kernels to
know.
"""

from abc import ABC, abstractmethod

import numpy as np
from scipy.linalg import get_lapack_funcs

from gaussmix._arrays import array_namespace, device
from gaussmix._typing import Array


class Covariance(ABC):
    """How the covariances of k components over d features are stored, estimated and used."""

    name: str
    # Which quadratic features of x the log-density is linear in, beside 1 and x: "products" x_i x_j, "squares" x_i^2,
    # their "norm"; "none" where the quadratic term is the same for all components.
    quadratic: str
    # Whether all components have one covariance, whose second moments are one sum over all of them.
    shares_moments = False
    # Whether what is stored are matrices, which have to be symmetric.
    has_matrices = False

    @abstractmethod
    def shape(self, k: int, d: int) -> tuple[int, ...]:
        """Shape of the stored covariances."""

    def moments_shape(self, k: int, d: int) -> tuple[int, ...]:
        """Shape of the second moments."""
        return self.shape(k, d)

    @abstractmethod
    def n_parameters(self, k: int, d: int) -> int:
        """Number of free parameters, as AIC and BIC count them."""

    @abstractmethod
    def second_moments(self, weighted: Array, centred: Array) -> Array:
        """Sum over the rows of weighted * centred^T, where weighted = r_ik (x_i - mu_k): (k, n, d)."""

    @abstractmethod
    def recentre(self, second_moments: Array, counts: Array, shifts: Array) -> Array:
        """Second moments about means that lie `shifts` (k, d) away from their origin."""

    @abstractmethod
    def estimate(self, second_moments: Array, counts: Array, d: int) -> Array:
        """Covariances of largest likelihood, from second moments about the components' means.

        A component without rows says nothing about its own spread: it gets the pooled one.
        """

    @abstractmethod
    def scatter(self, covariances: Array, counts: Array, d: int) -> Array:
        """Second moments about the components' means that `estimate` would give these covariances for."""

    @abstractmethod
    def regularize(self, covariances: Array, reg_covar: float) -> Array:
        """Add `reg_covar` to each variance."""

    @abstractmethod
    def precision_cholesky(self, covariances: Array) -> Array:
        """U with U U^T = Sigma^-1; NaN for each component whose covariance is not positive definite."""

    @abstractmethod
    def covariances(self, precision_cholesky: Array) -> Array:
        """Sigma from U, in the stored form."""

    @abstractmethod
    def is_factor(self, precision_cholesky: Array) -> Array:
        """Whether each is upper triangular with a positive diagonal: a scalar."""

    @abstractmethod
    def square(self, factor: Array) -> Array:
        """U U^T: the precisions, if U factors them."""

    @abstractmethod
    def log_det(self, precision_cholesky: Array, d: int) -> Array:
        """Log det U: (k,), or a scalar where all components share it."""

    @abstractmethod
    def whiten(self, centred: Array, precision_cholesky: Array) -> Array:
        """(x_i - mu_k) U_k: (k, n, d)."""

    @abstractmethod
    def colorize(self, noise: Array, precision_cholesky: Array, component: int) -> Array:
        """Standard normal rows (n, d) to rows with the component's covariance."""

    @abstractmethod
    def precision_times(self, vectors: Array, precision_cholesky: Array) -> Array:
        """Sigma_k^-1 v_k: (k, d)."""

    @abstractmethod
    def kappa(self, covariances: Array, precision_cholesky: Array, offsets: Array) -> Array:
        """Sum_ij |A_ij| sqrt(m_i m_j) with m = diag Sigma_k + offset_k^2 and A = Sigma_k^-1: (k,).

        The rounding unit times this is the error of a log-density from features about a point that lies `offsets`
        (k, d) away from the means: the terms of the expanded square are that much larger than the square.
        """

    @abstractmethod
    def variances(self, covariances: Array) -> Array:
        """Variance of each feature: (k, d), or what broadcasts to it."""

    @abstractmethod
    def norm(self, covariances: Array) -> Array:
        """An upper bound on the largest eigenvalue of each covariance: (k,), or a scalar where all share it."""

    def mahalanobis(self, centred: Array, precision_cholesky: Array) -> Array:
        """Squared Mahalanobis distances: (k, n)."""
        xp = array_namespace(centred)
        whitened = self.whiten(centred, precision_cholesky)
        return xp.sum(whitened * whitened, axis=-1)

    def validate(self, covariances: Array, k: int, d: int, name: str) -> None:
        """Raise ValueError unless `covariances` has this type's shape, is symmetric and positive definite."""
        xp = array_namespace(covariances)
        expected = self.shape(k, d)
        if tuple(covariances.shape) != expected:
            raise ValueError(
                f"{name} has shape {tuple(covariances.shape)}; covariance_type={self.name!r} with {k} components and "
                f"{d} features takes {expected}"
            )
        if not bool(xp.all(xp.isfinite(covariances))):
            raise ValueError(f"{name} contains NaN or infinity; pass finite values")
        if not bool(self._is_symmetric(covariances)):
            raise ValueError(f"{name} should be symmetric; pass (M + M^T) / 2 if the difference is rounding")
        factors = self.precision_cholesky(covariances)
        if not bool(xp.all(xp.isfinite(factors))):
            component = self.first_singular(factors)
            where = "" if component is None else f" of component {component}"
            raise ValueError(f"{name}{where} should be positive definite; add a small positive value to its diagonal")

    def first_singular(self, precision_cholesky: Array) -> int | None:
        """The first component whose factor is not finite; None where all components share one factor."""
        if self.shares_moments:
            return None
        xp = array_namespace(precision_cholesky)
        finite = xp.all(xp.reshape(xp.isfinite(precision_cholesky), (precision_cholesky.shape[0], -1)), axis=1)
        return int(xp.argmin(xp.astype(finite, xp.uint8)))

    @property
    def sklearn_name(self) -> str:
        """What scikit-learn calls the type, or one that has it as a special case."""
        return self.name

    def for_sklearn(self, values: Array, k: int) -> Array:
        """Covariances or factors of k components as scikit-learn stores them for `sklearn_name`."""
        return values

    def _is_symmetric(self, covariances: Array) -> Array:
        return True


class _Matrices(Covariance):
    """What full and tied share: (..., d, d) matrices, one for each component or one for all."""

    has_matrices = True

    def regularize(self, covariances: Array, reg_covar: float) -> Array:
        xp = array_namespace(covariances)
        d = covariances.shape[-1]
        return covariances + reg_covar * xp.eye(d, dtype=covariances.dtype, device=device(covariances))

    def precision_cholesky(self, covariances: Array) -> Array:
        return _inverse(array_namespace(covariances).matrix_transpose(_cholesky_or_nan(covariances)))

    def covariances(self, precision_cholesky: Array) -> Array:
        xp = array_namespace(precision_cholesky)
        # Below the diagonal there may be rounding, of a size that an inverse has not.
        inverse = _inverse(xp.triu(precision_cholesky))
        return _symmetrized(xp.matmul(xp.matrix_transpose(inverse), inverse))

    def is_factor(self, precision_cholesky: Array) -> Array:
        xp = array_namespace(precision_cholesky)
        diagonal = xp.linalg.diagonal(precision_cholesky)
        whole, below = (
            xp.max(xp.abs(matrices), axis=(-2, -1))
            for matrices in (precision_cholesky, xp.tril(precision_cholesky, k=-1))
        )
        # Inverses of other libraries leave rounding below.
        return xp.all(diagonal > 0) & xp.all(below <= 1e-5 * whole)

    def square(self, factor: Array) -> Array:
        xp = array_namespace(factor)
        return xp.matmul(factor, xp.matrix_transpose(factor))

    def log_det(self, precision_cholesky: Array, d: int) -> Array:
        xp = array_namespace(precision_cholesky)
        return xp.sum(xp.log(xp.linalg.diagonal(precision_cholesky)), axis=-1)

    def whiten(self, centred: Array, precision_cholesky: Array) -> Array:
        return array_namespace(centred).matmul(centred, precision_cholesky)

    def precision_times(self, vectors: Array, precision_cholesky: Array) -> Array:
        return array_namespace(vectors).matmul(self.square(precision_cholesky), vectors[..., None])[..., 0]

    def variances(self, covariances: Array) -> Array:
        return array_namespace(covariances).linalg.diagonal(covariances)

    def norm(self, covariances: Array) -> Array:
        xp = array_namespace(covariances)
        largest_row = xp.max(xp.sum(xp.abs(covariances), axis=-1), axis=-1)
        return xp.minimum(largest_row, xp.linalg.vector_norm(covariances, axis=(-2, -1)))

    def kappa(self, covariances: Array, precision_cholesky: Array, offsets: Array) -> Array:
        xp = array_namespace(offsets)
        root = xp.sqrt(self.variances(covariances) + offsets * offsets)
        return xp.sum(root * xp.matmul(xp.abs(self.square(precision_cholesky)), root[..., None])[..., 0], axis=-1)

    def _is_symmetric(self, covariances: Array) -> Array:
        xp = array_namespace(covariances)
        transposed = xp.matrix_transpose(covariances)
        scale = xp.max(xp.abs(covariances))
        tolerance = 1e-5 if covariances.dtype == xp.float32 else 1e-9
        return xp.all(xp.abs(covariances - transposed) <= tolerance * scale)


class Full(_Matrices):
    """One matrix for each component."""

    name = "full"
    quadratic = "products"

    def shape(self, k: int, d: int) -> tuple[int, ...]:
        return (k, d, d)

    def n_parameters(self, k: int, d: int) -> int:
        return k * d * (d + 1) // 2

    def second_moments(self, weighted: Array, centred: Array) -> Array:
        xp = array_namespace(centred)
        return _symmetrized(xp.matmul(xp.matrix_transpose(weighted), centred))

    def recentre(self, second_moments: Array, counts: Array, shifts: Array) -> Array:
        return second_moments - counts[:, None, None] * shifts[:, :, None] * shifts[:, None, :]

    def estimate(self, second_moments: Array, counts: Array, d: int) -> Array:
        return _mean_or_pooled(second_moments, counts)

    def scatter(self, covariances: Array, counts: Array, d: int) -> Array:
        return counts[:, None, None] * covariances

    def colorize(self, noise: Array, precision_cholesky: Array, component: int) -> Array:
        return _solve_rows(noise, precision_cholesky[component, :, :])


class Tied(_Matrices):
    """One matrix for all components."""

    name = "tied"
    quadratic = "none"
    shares_moments = True

    def shape(self, k: int, d: int) -> tuple[int, ...]:
        return (d, d)

    def n_parameters(self, k: int, d: int) -> int:
        return d * (d + 1) // 2

    def second_moments(self, weighted: Array, centred: Array) -> Array:
        xp = array_namespace(centred)
        d = centred.shape[-1]
        return _symmetrized(xp.matmul(xp.matrix_transpose(xp.reshape(weighted, (-1, d))), xp.reshape(centred, (-1, d))))

    def recentre(self, second_moments: Array, counts: Array, shifts: Array) -> Array:
        xp = array_namespace(shifts)
        return second_moments - _symmetrized(xp.matmul(xp.matrix_transpose(counts[:, None] * shifts), shifts))

    def estimate(self, second_moments: Array, counts: Array, d: int) -> Array:
        return second_moments / array_namespace(counts).sum(counts)

    def scatter(self, covariances: Array, counts: Array, d: int) -> Array:
        return covariances * array_namespace(counts).sum(counts)

    def colorize(self, noise: Array, precision_cholesky: Array, component: int) -> Array:
        return _solve_rows(noise, precision_cholesky)


class _Variances(Covariance):
    """What diag, tied_diag and spherical share: variances, whose factors are elementwise."""

    def regularize(self, covariances: Array, reg_covar: float) -> Array:
        return covariances + reg_covar

    def precision_cholesky(self, covariances: Array) -> Array:
        xp = array_namespace(covariances)
        positive = covariances > 0
        return xp.where(positive, 1 / xp.sqrt(xp.where(positive, covariances, 1)), xp.nan)

    def covariances(self, precision_cholesky: Array) -> Array:
        return 1 / self.square(precision_cholesky)

    def is_factor(self, precision_cholesky: Array) -> Array:
        return array_namespace(precision_cholesky).all(precision_cholesky > 0)

    def square(self, factor: Array) -> Array:
        return factor * factor


class Diag(_Variances):
    """One variance for each component and feature."""

    name = "diag"
    quadratic = "squares"

    def shape(self, k: int, d: int) -> tuple[int, ...]:
        return (k, d)

    def n_parameters(self, k: int, d: int) -> int:
        return k * d

    def second_moments(self, weighted: Array, centred: Array) -> Array:
        return array_namespace(centred).sum(weighted * centred, axis=1)

    def recentre(self, second_moments: Array, counts: Array, shifts: Array) -> Array:
        return second_moments - counts[:, None] * shifts * shifts

    def estimate(self, second_moments: Array, counts: Array, d: int) -> Array:
        return _mean_or_pooled(second_moments, counts)

    def scatter(self, covariances: Array, counts: Array, d: int) -> Array:
        return counts[:, None] * covariances

    def log_det(self, precision_cholesky: Array, d: int) -> Array:
        xp = array_namespace(precision_cholesky)
        return xp.sum(xp.log(precision_cholesky), axis=-1)

    def whiten(self, centred: Array, precision_cholesky: Array) -> Array:
        return centred * precision_cholesky[:, None, :]

    def colorize(self, noise: Array, precision_cholesky: Array, component: int) -> Array:
        return noise / precision_cholesky[component, :]

    def variances(self, covariances: Array) -> Array:
        return covariances

    def norm(self, covariances: Array) -> Array:
        return array_namespace(covariances).max(covariances, axis=-1)

    def precision_times(self, vectors: Array, precision_cholesky: Array) -> Array:
        return self.square(precision_cholesky) * vectors

    def kappa(self, covariances: Array, precision_cholesky: Array, offsets: Array) -> Array:
        xp = array_namespace(offsets)
        return xp.sum(self.square(precision_cholesky) * (covariances + offsets * offsets), axis=-1)


class TiedDiag(_Variances):
    """One variance for each feature, shared by all components: EEI in mclust."""

    name = "tied_diag"
    quadratic = "none"
    shares_moments = True

    def shape(self, k: int, d: int) -> tuple[int, ...]:
        return (d,)

    def n_parameters(self, k: int, d: int) -> int:
        return d

    def second_moments(self, weighted: Array, centred: Array) -> Array:
        return array_namespace(centred).sum(weighted * centred, axis=(0, 1))

    def recentre(self, second_moments: Array, counts: Array, shifts: Array) -> Array:
        return second_moments - array_namespace(shifts).sum(counts[:, None] * shifts * shifts, axis=0)

    def estimate(self, second_moments: Array, counts: Array, d: int) -> Array:
        return second_moments / array_namespace(counts).sum(counts)

    def scatter(self, covariances: Array, counts: Array, d: int) -> Array:
        return covariances * array_namespace(counts).sum(counts)

    def log_det(self, precision_cholesky: Array, d: int) -> Array:
        xp = array_namespace(precision_cholesky)
        return xp.sum(xp.log(precision_cholesky))

    def whiten(self, centred: Array, precision_cholesky: Array) -> Array:
        return centred * precision_cholesky

    def colorize(self, noise: Array, precision_cholesky: Array, component: int) -> Array:
        return noise / precision_cholesky

    def variances(self, covariances: Array) -> Array:
        return covariances

    def norm(self, covariances: Array) -> Array:
        return array_namespace(covariances).max(covariances)

    def precision_times(self, vectors: Array, precision_cholesky: Array) -> Array:
        return self.square(precision_cholesky) * vectors

    def kappa(self, covariances: Array, precision_cholesky: Array, offsets: Array) -> Array:
        xp = array_namespace(offsets)
        return xp.sum(self.square(precision_cholesky) * (covariances + offsets * offsets), axis=-1)

    @property
    def sklearn_name(self) -> str:
        return "diag"

    def for_sklearn(self, values: Array, k: int) -> Array:
        return array_namespace(values).broadcast_to(values, (k, values.shape[0]))


class Spherical(_Variances):
    """One variance for each component, the same for all features."""

    name = "spherical"
    quadratic = "norm"

    def shape(self, k: int, d: int) -> tuple[int, ...]:
        return (k,)

    def n_parameters(self, k: int, d: int) -> int:
        return k

    def second_moments(self, weighted: Array, centred: Array) -> Array:
        return array_namespace(centred).sum(weighted * centred, axis=(1, 2))

    def recentre(self, second_moments: Array, counts: Array, shifts: Array) -> Array:
        return second_moments - counts * array_namespace(shifts).sum(shifts * shifts, axis=-1)

    def estimate(self, second_moments: Array, counts: Array, d: int) -> Array:
        return _mean_or_pooled(second_moments, counts) / d

    def scatter(self, covariances: Array, counts: Array, d: int) -> Array:
        return d * counts * covariances

    def log_det(self, precision_cholesky: Array, d: int) -> Array:
        return d * array_namespace(precision_cholesky).log(precision_cholesky)

    def whiten(self, centred: Array, precision_cholesky: Array) -> Array:
        return centred * precision_cholesky[:, None, None]

    def colorize(self, noise: Array, precision_cholesky: Array, component: int) -> Array:
        return noise / precision_cholesky[component]

    def variances(self, covariances: Array) -> Array:
        return covariances[:, None]

    def norm(self, covariances: Array) -> Array:
        return covariances

    def precision_times(self, vectors: Array, precision_cholesky: Array) -> Array:
        return self.square(precision_cholesky)[:, None] * vectors

    def kappa(self, covariances: Array, precision_cholesky: Array, offsets: Array) -> Array:
        xp = array_namespace(offsets)
        return self.square(precision_cholesky) * xp.sum(covariances[:, None] + offsets * offsets, axis=-1)


COVARIANCES: dict[str, Covariance] = {c.name: c for c in (Full(), Tied(), Diag(), TiedDiag(), Spherical())}


def _cholesky_or_nan(matrices: Array) -> Array:
    """Lower Cholesky factors of (..., d, d) matrices, NaN for each that is not positive definite.

    Rounding leaves a singular matrix with pivots of about d eps times its diagonal: such a factor would be noise.
    """
    xp = array_namespace(matrices)
    try:
        cholesky = xp.linalg.cholesky(matrices)
    except (np.linalg.LinAlgError, RuntimeError):  # torch's LinAlgError is a RuntimeError
        if matrices.ndim == 2:
            return xp.full_like(matrices, xp.nan)
        return xp.stack([_cholesky_or_nan(matrices[i, ...]) for i in range(matrices.shape[0])])
    smallest = matrices.shape[-1] * float(xp.finfo(matrices.dtype).eps) * xp.linalg.diagonal(matrices)
    regular = xp.all(xp.linalg.diagonal(cholesky) ** 2 > smallest, axis=-1)
    if bool(xp.all(regular)):
        return cholesky
    return xp.where(regular[..., None, None], cholesky, xp.nan)


def _inverse(upper: Array) -> Array:
    """Inverses of (..., d, d) upper triangular matrices, with nothing below the diagonal."""
    xp, d = array_namespace(upper), upper.shape[-1]
    if isinstance(upper, np.ndarray):
        inverses = np.empty(upper.shape, upper.dtype)
        (trtri,) = get_lapack_funcs(("trtri",), (upper,))
        for matrix, inverse in zip(upper.reshape(-1, d, d), inverses.reshape(-1, d, d), strict=True):
            inverse[...], is_singular = trtri(matrix)
            if is_singular:
                inverse[...] = np.nan
        return inverses
    # The standard has no triangular solve.
    eye = xp.eye(d, dtype=upper.dtype, device=device(upper))
    return xp.triu(xp.linalg.solve(upper, xp.broadcast_to(eye, upper.shape)))


def _symmetrized(matrices: Array) -> Array:
    return 0.5 * (matrices + array_namespace(matrices).matrix_transpose(matrices))


def _mean_or_pooled(second_moments: Array, counts: Array) -> Array:
    """Second moments divided by the counts; the ratio of their sums where a count is zero."""
    xp = array_namespace(counts)
    counts = xp.reshape(counts, (-1, *(1,) * (second_moments.ndim - 1)))
    pooled = xp.sum(second_moments, axis=0) / xp.sum(counts)
    return xp.where(counts > 0, second_moments / xp.where(counts > 0, counts, 1), pooled)


def _solve_rows(noise: Array, precision_cholesky: Array) -> Array:
    """Rows z U^-1 = z L^T."""
    xp = array_namespace(noise)
    return xp.matrix_transpose(xp.linalg.solve(xp.matrix_transpose(precision_cholesky), xp.matrix_transpose(noise)))
