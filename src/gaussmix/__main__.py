"""`python -m gaussmix`: versions, devices, the implementation that would run, and a short check."""

import platform
import sys
import time
from importlib.metadata import PackageNotFoundError, version

import numpy as np

import gaussmix
from gaussmix._arrays import to_numpy
from gaussmix._covariance import COVARIANCES
from gaussmix._typing import Array
from gaussmix.backends._dispatch import choose

PACKAGES = (
    "numpy",
    "scikit-learn",
    "array-api-compat",
    "safetensors",
    "torch",
    "triton",
    "numba",
    "cupy",
    "cupy-cuda12x",
    "cupy-cuda13x",
    "jax",
    "array-api-strict",
)


def main() -> int:
    """Print the report; 1 if the check failed."""
    print(f"gaussmix {gaussmix.__version__} on Python {platform.python_version()}, {platform.platform()}")
    for name in PACKAGES:
        try:
            print(f"  {name} {version(name)}")
        except PackageNotFoundError:
            continue
    rng = np.random.RandomState(0)
    centres = 10 * rng.normal(size=(3, 4))
    rows = np.concatenate([centre + rng.normal(size=(2000, 4)) for centre in centres])
    arrays = {"numpy on cpu": rows} | _torch_arrays(rows)
    ok = True
    for name, x in arrays.items():
        print(f"{name}: {' because '.join(choose(x))}")
        for covariance in COVARIANCES.values():
            began = time.perf_counter()
            mixture = gaussmix.GaussianMixture(3, covariance_type=covariance.name, random_state=0).fit(x)
            error = _distance(to_numpy(mixture.means_), centres)
            ok &= error < 0.2
            print(
                f"  {covariance.name}: {mixture.backend_}, {mixture.precision_}; means within {error:.3f} of truth"
                f" in {time.perf_counter() - began:.2f} s{'' if error < 0.2 else '  <- FAILED'}"
            )
    print("All checks passed." if ok else "A check failed: please report this output.")
    return 0 if ok else 1


def _torch_arrays(rows: Array) -> dict[str, Array]:
    """The rows as torch tensors, on the CPU and on a GPU where there is one."""
    try:
        import torch
    except ImportError:
        return {}
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    return {f"torch on {device}": torch.as_tensor(rows, device=device) for device in devices}


def _distance(found: Array, truth: Array) -> float:
    """Largest distance of a true mean to the nearest found one."""
    return float(np.linalg.norm(truth[:, None] - found[None], axis=2).min(axis=1).max())


if __name__ == "__main__":
    sys.exit(main())
