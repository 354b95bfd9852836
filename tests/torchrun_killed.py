"""A user's script for torchrun, whose second process dies: `torchrun ... torchrun_killed.py FOLDER [checkpoint]`.

With a checkpoint, the processes that torchrun starts in their place go on from it, and write what they found.
"""

import json
import os
import signal
import sys
from pathlib import Path

from gaussmix import GaussianMixture
from torchrun_fits import X, outcome

ITERATIONS = 12


def mixture():
    params = dict(convergence_tolerance=0, random_state=0, trainer_params={"max_epochs": ITERATIONS})
    return GaussianMixture(3, covariance_type="full", **params)


def main(folder, checkpoint=None):
    folder, rank = Path(folder), int(os.environ["RANK"])
    restarts = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    seen = []

    def callback(iteration, bound, parameters):
        seen.append(iteration)
        if rank == 1 and iteration == 5 and restarts == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    arguments = {} if checkpoint is None else dict(checkpoint=checkpoint, checkpoint_every=2, resume=True)
    own = slice(0, 150) if rank == 0 else slice(150, len(X))
    found = outcome(mixture(), X[own], None, callback=callback, distributed="torch", **arguments)
    if isinstance(found, list):
        raise RuntimeError(found[1])
    (folder / f"{rank}.json").write_text(json.dumps({"found": found, "first": seen[0], "restarts": restarts}))


if __name__ == "__main__":
    main(*sys.argv[1:])
