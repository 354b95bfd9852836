"""What is measured: data, starts and the rows that a slower peer is given."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

TYPES = ("full", "tied", "diag", "spherical")
# PyCave's published shapes.
SHAPES = ((10_000, 8, 4), (100_000, 32, 16), (1_000_000, 64, 64))
# Floating-point operations of a peer's iteration that are still waited for; beyond, it gets fewer rows.
PEER_FLOPS = 2e10


@dataclass(frozen=True)
class Case:
    """A data set, k and a covariance type."""

    name: str
    x: Any
    means: Any  # (k, d): where EM starts
    covariance_type: str

    @property
    def k(self) -> int:
        """Number of components."""
        return len(self.means)

    @property
    def label(self) -> str:
        """How the case is called in a snapshot."""
        return f"{self.name} {self.covariance_type} {self.x.dtype.name}"

    @property
    def start(self) -> dict[str, Any]:
        """Weights, means and precisions to start from, in scikit-learn's names."""
        d = self.x.shape[1]
        precisions = {
            "full": np.stack([np.eye(d)] * self.k),
            "tied": np.eye(d),
            "diag": np.ones((self.k, d)),
            "spherical": np.ones(self.k),
        }[self.covariance_type]
        return {
            "weights_init": np.full(self.k, 1 / self.k),
            "means_init": self.means,
            "precisions_init": precisions,
        }

    @property
    def peer_rows(self) -> int:
        """How many rows a peer is given."""
        n, d = self.x.shape
        flops = 4.0 * self.k * d * (d if self.covariance_type in ("full", "tied") else 8)
        return int(min(n, max(10_000, PEER_FLOPS / flops // 1000 * 1000)))


def blobs(n: int, d: int, k: int, dtype: str) -> tuple[Any, Any]:
    """Separated Gaussian clusters of unit width, and means about half a width from their centres in each feature."""
    rng = np.random.RandomState(0)
    centres = 6 * rng.normal(size=(k, d))
    x = np.empty((n, d), dtype=dtype)
    for start in range(0, n, 100_000):
        block = slice(start, min(start + 100_000, n))
        size = block.stop - block.start
        x[block] = centres[rng.randint(k, size=size)] + rng.normal(size=(size, d))
    return x, centres + 0.5 * rng.normal(size=(k, d))


def photograph(dtype: str) -> Any:
    """Colour and position of the pixels of scikit-learn's china.jpg, each scaled to variance 1: clusters overlap."""
    from sklearn.datasets import load_sample_image

    picture = load_sample_image("china.jpg")
    height, width, _ = picture.shape
    row, column = np.mgrid[:height, :width]
    stacked = np.column_stack([picture.reshape(-1, 3), row.ravel(), column.ravel()]).astype(np.float64)
    return ((stacked - stacked.mean(axis=0)) / stacked.std(axis=0)).astype(dtype)


def correlated(dtype: str) -> Any:
    """Eight overlapping clusters in 16 features, each with a covariance of condition 1e4."""
    rng = np.random.RandomState(0)
    parts = []
    for _ in range(8):
        rotation = np.linalg.qr(rng.normal(size=(16, 16)))[0]
        noise = rng.normal(size=(12_500, 16)) * np.geomspace(1, 1e-2, 16)
        parts.append(0.5 * rng.normal(size=16) + noise @ rotation.T)
    return rng.permutation(np.concatenate(parts)).astype(dtype)


def cases(quick: bool) -> Iterator[Case]:
    """Every case; with `quick` only the smaller ones, in float32."""
    for n, d, k in SHAPES[: 2 if quick else 3]:
        for dtype in ("float32",) if quick else ("float32", "float64"):
            x, means = blobs(n, d, k, dtype)
            for covariance_type in TYPES:
                yield Case(f"[{n}, {d}, {k}]", x, means, covariance_type)
    if quick:
        return
    for name, x, k in (("photograph", photograph("float32"), 12), ("correlated", correlated("float64"), 8)):
        means = x[np.random.RandomState(1).choice(len(x), k, replace=False)].astype(np.float64)
        for covariance_type in TYPES:
            yield Case(name, x, means, covariance_type)
