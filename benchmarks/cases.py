"""What is measured: data, starts, and the rows that a slower peer is given."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

TYPES = ("full", "tied", "diag", "spherical")
SHAPES = ((10_000, 8, 4), (100_000, 32, 16), (200_000, 64, 64), (1_000_000, 16, 32))
# Mean distance from a component's mean to the nearest other one, in standard deviations, of data that overlaps.
DISTANCE = 1.45
# Floating-point operations of a peer's iteration that are still waited for; beyond, it gets fewer rows.
PEER_FLOPS = 2e10
# Rows times components of all iterations that are timed in one fit.
TIMED = 3e7


@dataclass(frozen=True)
class Case:
    """A data set of n rows, d features and k components, its dtype and a covariance type."""

    group: str  # the table it belongs to
    name: str
    n: int
    d: int
    k: int
    covariance_type: str
    dtype: str

    @property
    def label(self) -> str:
        """How the case is called in a snapshot."""
        return f"{self.name} [{self.n}, {self.d}, {self.k}] {self.covariance_type} {self.dtype}"

    @property
    def x(self) -> Any:
        """The rows: (n, d)."""
        return _data(self.name, self.n, self.d, self.k, self.dtype)[0]

    @property
    def start(self) -> dict[str, Any]:
        """Weights, means and precisions to start from, in scikit-learn's names."""
        precisions = {
            "full": np.stack([np.eye(self.d)] * self.k),
            "tied": np.eye(self.d),
            "diag": np.ones((self.k, self.d)),
            "spherical": np.ones(self.k),
        }[self.covariance_type]
        return {
            "weights_init": np.full(self.k, 1 / self.k),
            "means_init": _data(self.name, self.n, self.d, self.k, self.dtype)[1],
            "precisions_init": precisions,
        }

    @property
    def more(self) -> int:
        """How many iterations the longer of two timed fits has more than the shorter one."""
        return int(min(100, max(4, TIMED // (self.n * self.k))))

    @property
    def peer_rows(self) -> int:
        """How many rows a peer is given that gets fewer where it takes long."""
        flops = 4.0 * self.k * self.d * (self.d if self.covariance_type in ("full", "tied") else 8)
        return int(min(self.n, max(10_000, PEER_FLOPS / flops // 1000 * 1000)))


def overlapping(n: int, d: int, k: int, dtype: str) -> tuple[Any, Any]:
    """Gaussian components that overlap, each with a covariance of its own, and means near theirs."""
    rng = np.random.RandomState(0)
    centres = rng.normal(size=(k, d))
    if k > 1:
        centres *= DISTANCE / nearest_distances(centres).mean()
    # The widths' mean square is 1.
    widths = rng.uniform(0.75, 1.25, size=(k, d)) / np.sqrt(1 + 0.25 / 12)
    roots = [width[:, None] * np.linalg.qr(rng.normal(size=(d, d)))[0] for width in widths]
    x = np.empty((n, d), dtype=dtype)
    for block in _blocks(n):
        component = rng.randint(k, size=block.stop - block.start)
        noise = rng.normal(size=(len(component), d))
        for i in range(k):
            mine = component == i
            noise[mine] = noise[mine] @ roots[i]
        x[block] = centres[component] + noise
    return x, centres + 0.1 * rng.normal(size=(k, d))


def separated(n: int, d: int, k: int, dtype: str) -> tuple[Any, Any]:
    """Separated Gaussian clusters of unit width, and means about half a width from their centres in each feature."""
    rng = np.random.RandomState(0)
    centres = 6 * rng.normal(size=(k, d))
    x = np.empty((n, d), dtype=dtype)
    for block in _blocks(n):
        size = block.stop - block.start
        x[block] = centres[rng.randint(k, size=size)] + rng.normal(size=(size, d))
    return x, centres + 0.5 * rng.normal(size=(k, d))


def photograph(n: int, d: int, k: int, dtype: str) -> tuple[Any, Any]:
    """Colour and position of the pixels of scikit-learn's china.jpg, each scaled to variance 1: clusters overlap."""
    from sklearn.datasets import load_sample_image

    picture = load_sample_image("china.jpg")
    height, width, _ = picture.shape
    row, column = np.mgrid[:height, :width]
    stacked = np.column_stack([picture.reshape(-1, 3), row.ravel(), column.ravel()]).astype(np.float64)
    x = ((stacked - stacked.mean(axis=0)) / stacked.std(axis=0)).astype(dtype)
    return x, _rows_of(x, k)


def correlated(n: int, d: int, k: int, dtype: str) -> tuple[Any, Any]:
    """Overlapping clusters, each with a covariance of condition 1e4."""
    rng = np.random.RandomState(0)
    parts = []
    for _ in range(k):
        rotation = np.linalg.qr(rng.normal(size=(d, d)))[0]
        noise = rng.normal(size=(n // k, d)) * np.geomspace(1, 1e-2, d)
        parts.append(0.5 * rng.normal(size=d) + noise @ rotation.T)
    x = rng.permutation(np.concatenate(parts)).astype(dtype)
    return x, _rows_of(x, k)


DATA: dict[str, Callable[[int, int, int, str], tuple[Any, Any]]] = {
    "overlapping": overlapping,
    "separated": separated,
    "photograph": photograph,
    "correlated": correlated,
    "small work": overlapping,
    "large d": overlapping,
}


def nearest_distances(means: Any) -> Any:
    """From each mean to the nearest other one: (k,)."""
    distances = np.linalg.norm(means[:, None] - means, axis=-1)
    np.fill_diagonal(distances, np.inf)
    return distances.min(axis=1)


def _rows_of(x: Any, k: int) -> Any:
    """Means that are rows of the data."""
    return x[np.random.RandomState(1).choice(len(x), k, replace=False)].astype(np.float64)


def _blocks(n: int) -> Iterator[slice]:
    for start in range(0, n, 100_000):
        yield slice(start, min(start + 100_000, n))


@lru_cache(maxsize=1)  # one data set is in memory at a time
def _data(name: str, n: int, d: int, k: int, dtype: str) -> tuple[Any, Any]:
    return DATA[name](n, d, k, dtype)


def cases(extent: str = "all") -> Iterator[Case]:
    """Every case; the smaller ones in float32 where the extent is "quick", tiny ones where it is "dry"."""
    if extent == "dry":
        yield Case("overlapping", "overlapping", 500, 3, 2, "full", "float32")
        yield Case("small work", "small work", 60, 2, 2, "full", "float64")
        yield Case("large d", "large d", 100, 20, 1, "full", "float64")
        return
    quick = extent == "quick"
    both = ("float32", "float64")
    for group in ("overlapping", "separated"):
        for n, d, k in SHAPES[: (2 if group == "overlapping" else 1) if quick else None]:
            for dtype in both[: 1 if quick else 2]:
                for covariance_type in TYPES:
                    yield Case(group, group, n, d, k, covariance_type, dtype)
        if group == "overlapping" and not quick:
            for name, n, d, k, dtypes in (
                ("photograph", 273_280, 5, 12, both),
                ("correlated", 100_000, 16, 8, ("float64",)),
            ):
                for dtype in dtypes:
                    for covariance_type in TYPES:
                        yield Case(group, name, n, d, k, covariance_type, dtype)
    for covariance_type in TYPES:
        yield Case("small work", "small work", 60, 2, 2, covariance_type, "float64")
    for d in () if quick else (300, 1000, 2000):
        for k in (1, 3):
            yield Case("large d", "large d", 5000, d, k, "full", "float64")
