"""Segment a photograph into 12 regions of like colour and place, and race scikit-learn from the same start."""

import platform
import time
import warnings
from typing import Any

import numpy as np
import sklearn
from PIL import Image
from sklearn.datasets import load_sample_image
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture as ScikitLearnGaussianMixture

import gaussmix
from gaussmix.sklearn import GaussianMixture

COMPONENTS = 12
OUTPUT = "segmentation.png"


def main() -> None:
    """Fit both, print what they did, and write photograph and segmentation side by side."""
    photograph = load_sample_image("china.jpg")
    pixels = features(photograph)
    print(
        f"china.jpg: {len(pixels):,} pixels, {pixels.shape[1]} features (colour and position), {COMPONENTS} components"
    )
    print(
        f"gaussmix {gaussmix.__version__}, scikit-learn {sklearn.__version__}, NumPy {np.__version__}, "
        f"Python {platform.python_version()}, {platform.machine()}"
    )
    # The start: k-means once, outside the race, for both the same.
    start = GaussianMixture(COMPONENTS, max_iter=0, random_state=0).fit(pixels)
    given = {
        "n_components": COMPONENTS,
        "weights_init": start.weights_,
        "means_init": start.means_,
        "precisions_init": start.precisions_,
    }
    ours = race("gaussmix", GaussianMixture(**given), pixels)
    race("scikit-learn", ScikitLearnGaussianMixture(**given), pixels)
    print(f"  gaussmix ran on {ours.backend_}, {ours.precision_}")

    labels = ours.predict(pixels).reshape(photograph.shape[:2])
    colours = np.array([photograph[labels == k].mean(axis=0) if (labels == k).any() else 0 for k in range(COMPONENTS)])
    picture = np.concatenate([photograph, colours[labels].astype(np.uint8)], axis=1)
    Image.fromarray(picture).save(OUTPUT)
    print(f"photograph and segmentation side by side: {OUTPUT}")


def features(photograph: Any) -> Any:
    """Red, green, blue and the position of each pixel, each scaled to variance 1: (n, 5)."""
    height, width, _ = photograph.shape
    row, column = np.mgrid[:height, :width]
    stacked = np.column_stack([photograph.reshape(-1, 3), row.ravel(), column.ravel()]).astype(np.float64)
    return (stacked - stacked.mean(axis=0)) / stacked.std(axis=0)


def race(name: str, mixture: Any, pixels: Any) -> Any:
    """Fit, and print likelihood, iterations and time."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        began = time.perf_counter()
        mixture.fit(pixels)
        seconds = time.perf_counter() - began
    outcome = "converged" if mixture.converged_ else "not converged"
    print(
        f"  {name:12}  mean log-likelihood {mixture.score(pixels):.6f}  {mixture.n_iter_} iterations ({outcome})  "
        f"{seconds:.1f} s"
    )
    return mixture


if __name__ == "__main__":
    main()
