"""EM, inference and k-means as passes over a data set, wherever its rows are and whatever computes them."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from gaussmix import _guard
from gaussmix._arrays import array_namespace, asarray_like
from gaussmix._covariance import Covariance
from gaussmix._density import Density
from gaussmix._guard import Form, Forms
from gaussmix._parameters import Parameters, SufficientStatistics
from gaussmix._typing import Array
from gaussmix.rows._passes import Block, Draw, Passes

logger = logging.getLogger("gaussmix")


@dataclass(frozen=True)
class Progress:
    """How far iterations on a device went."""

    parameters: Parameters
    lower_bounds: tuple[float, ...]  # of each iteration's E-step
    reason: str  # why the form is to be left; empty where it is not


class Engine:
    """EM, inference and k-means on a data set."""

    def __init__(
        self, rows: Any, passes: Passes, block: Block, covariance: Covariance, *, is_whole: bool = True
    ) -> None:
        self.rows = rows  # as `Described` has it, in the library that computes
        self._is_whole = is_whole  # whether the block has all the rows: in parts, statistics need one origin to add
        self.covariance, self.backend = covariance, block.backend
        self.forms = block.forms(covariance)
        # `block` has the rows, or some like them.
        self._passes, self._block = passes, block

    def choose(self, forms: Forms, density: Density, weights: tuple[Array, Array] | None = None) -> Forms:
        """The forms that are left for this density: `_guard.choose`."""
        if len(forms) == 1:
            return forms
        left, reason = _guard.choose(forms, density, self._block.shift, self._block.floor(), weights)
        if left is not forms and left != forms:
            _log(forms, left, reason)
        return left

    def next_form(self, forms: Forms, reason: str) -> Forms:
        """The forms after the one in use."""
        _log(forms, forms[1:], reason)
        return forms[1:]

    def during_steps(self) -> AbstractContextManager[Any]:
        """What E-steps and M-steps are to run within."""
        during: Callable[[], AbstractContextManager[Any]] = getattr(self._block, "during_steps", nullcontext)
        return during() if self._is_whole else nullcontext()

    @property
    def advance(self) -> Callable[..., Progress] | None:
        """Several iterations without the host, where the implementation has them."""
        return getattr(self._block, "advance", None) if self._is_whole else None

    def expect(self, density: Density, form: Form) -> SufficientStatistics:
        """The E-step: statistics of all rows."""
        return self._sum(partial(_expect, density=density, form=form), density.means)

    def assign(self, means: Array, origin: Array, form: Form) -> SufficientStatistics:
        """Statistics about `origin` (k, d) of the rows that are nearest to each of `means` (k, d)."""
        step = partial(_assign, means=means, origin=origin, covariance=self.covariance, form=form)
        return self._sum(step, origin)

    def spread(self, k: int, draw: Draw) -> SufficientStatistics:
        """Statistics for the responsibilities (b, k), on the host, that `draw(b)` gives for the next b rows."""
        step = partial(_spread, k=k, covariance=self.covariance)
        if self._is_whole:
            return step(self._block, draw)
        middle = self.rows.middle
        return self._sum(step, array_namespace(middle).broadcast_to(middle, (k, self.rows.shape[1])), draw)

    def log_evidence(self, density: Density) -> Array:
        """Log-density of each row under the mixture: (n,)."""
        return self._passes.map(partial(_log_evidence, density=density))

    def mean_log_evidence(self, density: Density) -> float:
        """Mean log-density of a row under the mixture; none of them is kept."""
        return self._passes.reduce(partial(_total_log_evidence, density=density), float) / self.rows.shape[0]

    def responsibilities(self, density: Density) -> Array:
        """Posterior probability of each component given the row: (n, k)."""
        return self._passes.map(partial(_responsibilities, density=density))

    def labels(self, density: Density) -> Array:
        """The component of largest responsibility for each row: (n,)."""
        return self._passes.map(partial(_labels, density=density))

    def nearest(self, centroids: Array) -> Array:
        """The centroid nearest to each row, the first of equals: (n,)."""
        return self._passes.map(partial(_nearest, centroids=centroids))

    def squared_distances(self, centroids: Array) -> Array:
        """Squared distance of each row, of weight 0 or not, to the nearest centroid: (n,)."""
        return self._passes.map(partial(_squared_distances, centroids=centroids))

    def sums(self, centroids: Array, origin: Array) -> tuple[Array, Array]:
        """Weight of the rows that are nearest to each centroid (k,), and the sums of their x - origin (k, d)."""
        k, d = centroids.shape
        step = partial(_sums, centroids=centroids, origin=origin)
        nothing = partial(asarray_like, np.zeros((k, d + 1)), centroids)
        total = self._passes.reduce(step, nothing)
        return total[:, d], total[:, :d]

    def _sum(
        self, step: Callable[..., SufficientStatistics], origin: Array, draw: Draw | None = None
    ) -> SufficientStatistics:
        nothing = partial(SufficientStatistics.of_nothing, origin, self.covariance)
        if not self._is_whole:
            step = partial(_about, step, origin, self.covariance)
        return self._passes.reduce(step, nothing, draw)


def _log(forms: Forms, left: Forms, reason: str) -> None:
    logger.info("%s left for %s: %s", forms[0].precision, left[0].precision, reason)


def _about(
    step: Callable[..., SufficientStatistics], origin: Array, covariance: Covariance, block: Block, *draw: Draw
) -> SufficientStatistics:
    return step(block, *draw).about(origin, covariance)


def _expect(block: Block, density: Density, form: Form) -> SufficientStatistics:
    return block.expect(density, form)


def _assign(block: Block, means: Array, origin: Array, covariance: Covariance, form: Form) -> SufficientStatistics:
    return block.assign(means, origin, covariance, form)


def _spread(block: Block, draw: Draw, k: int, covariance: Covariance) -> SufficientStatistics:
    return block.spread(draw, k, covariance)


def _log_evidence(block: Block, density: Density) -> Array:
    return block.log_evidence(density)


def _total_log_evidence(block: Block, density: Density) -> float:
    evidence = block.log_evidence(density)
    return float(array_namespace(evidence).sum(evidence))


def _responsibilities(block: Block, density: Density) -> Array:
    return block.responsibilities(density)


def _labels(block: Block, density: Density) -> Array:
    return block.labels(density)


def _nearest(block: Block, centroids: Array) -> Array:
    return block.nearest(centroids)


def _squared_distances(block: Block, centroids: Array) -> Array:
    return block.squared_distances(centroids)


def _sums(block: Block, centroids: Array, origin: Array) -> Array:
    return block.sums(centroids, origin)
