"""Fit one mixture to rows that lie in several processes, each with its own shard.

On a machine without GPU, in two processes, and on one with two GPUs, each of which takes a shard:

    torchrun --nproc-per-node 2 examples/distributed.py

With `--max-restarts 3`, torchrun starts the processes anew when one of them dies, and the fit goes on from its
checkpoint, which is written to the path that the script is given.
"""

import os
import sys
from typing import Any

import numpy as np
import torch

from gaussmix import GaussianMixture

ROWS, FEATURES, COMPONENTS = 100_000, 8, 5


def main(checkpoint: str) -> None:
    """Fit, and have the first process print what all of them found."""
    rank, n_processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    rows = shard(rank, n_processes)
    mixture = GaussianMixture(COMPONENTS, covariance_type="full", random_state=0)
    is_restarted = int(os.environ["TORCHELASTIC_RESTART_COUNT"]) > 0
    mixture.fit(rows, distributed="torch", checkpoint=checkpoint, resume=is_restarted)
    labels = mixture.predict(rows)  # of this process's rows
    if rank == 0:
        print(f"{n_processes} processes, {ROWS:,} rows: {mixture.num_iter_} iterations on {mixture.backend_}")
        print(f"weights {[round(weight, 4) for weight in mixture.weights_.tolist()]}, nll {mixture.nll_:.6f}")
        print(f"{len(labels):,} rows of this process labelled on {labels.device}")


def shard(rank: int, n_processes: int) -> Any:
    """The rows of this process, on its GPU where it has one; a real script reads its own file here."""
    own = range(ROWS * rank // n_processes, ROWS * (rank + 1) // n_processes)
    rng = np.random.default_rng(0)
    centres = 5 * rng.normal(size=(COMPONENTS, FEATURES))
    rows = centres[rng.integers(COMPONENTS, size=ROWS)] + rng.normal(size=(ROWS, FEATURES))
    if not torch.cuda.is_available():
        return torch.as_tensor(rows[own.start : own.stop])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return torch.as_tensor(rows[own.start : own.stop], device=device)


if __name__ == "__main__":
    main(*sys.argv[1:] or ["distributed.checkpoint"])
