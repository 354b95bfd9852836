"""EM and inference on one data set: which kernels run, in which order."""

import math
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

import torch

from gaussmix_kernels import _centred, _features
from gaussmix_kernels._features import Operands
from gaussmix_kernels._parameters import (
    CONVERGED,
    LOG_2,
    RUNNING,
    Density,
    Natural,
    Parameters,
    Settings,
    decide,
    fill_operands,
    room_for_operands,
)
from gaussmix_kernels._prepass import Data

# Iterations between two looks at the flag that stops them.
ITERATIONS = 8


def type_of(covariance_type: str) -> ModuleType:
    """The kernels of a covariance type: the module of its name."""
    return import_module(f"gaussmix_kernels.{covariance_type}")


@dataclass(frozen=True)
class Progress:
    """Where iterations ended: the last parameters that count, the lower bound of each, and why."""

    parameters: Parameters
    bounds: tuple[float, ...]
    reason: int


class EM:
    """EM and inference for one covariance type, in one kind of features."""

    def __init__(self, data: Data, covariance_type: str, kind: str) -> None:
        self.data, self.kind = data, kind
        self.type = type_of(covariance_type)
        self.step: _centred.Step | _features.Step
        self.step = _centred.Step.of(data) if kind == "centred" else _features.Step.of(data, kind)
        # Logits are in units of log 2; those of centred rows are squares, of which half counts.
        gain = math.sqrt(0.5 / LOG_2) if kind == "centred" else 1 / LOG_2
        self._gain = torch.tensor([gain], dtype=torch.float64, device=data.hi.device)

    def advance(
        self, start: Parameters, density: Density, *, at_most: int, previous: float, settings: Settings
    ) -> Progress:
        """Up to `at_most` iterations, looked at from the host every few of them; `settings` say what ends them."""
        buffers = [Parameters(*(value.clone() for value in vars(start).values())), start.empty_like()]
        natural, operands = self._start(density)
        bounds: list[float] = []
        reason = RUNNING
        while reason == RUNNING and len(bounds) < at_most:
            m = min(ITERATIONS, at_most - len(bounds))
            stop = torch.zeros(m + 1, dtype=torch.int32, device=self.data.hi.device)
            found = torch.full((m + 1,), previous, dtype=torch.float64, device=self.data.hi.device)
            for i in range(m):
                old, new = buffers[i % 2], buffers[(i + 1) % 2]
                self.iterate(old, new, natural, operands, settings, stop, found, i)
            codes, values = torch.stack([stop.to(torch.float64), found]).tolist()
            reason = int(codes[-1])
            # What stops an iteration stands in all later places; the one that converges counts.
            n = codes[1:].count(RUNNING) + (reason == CONVERGED)
            bounds.extend(values[1 : 1 + n])
            previous = bounds[-1] if bounds else previous
            if n % 2:
                buffers.reverse()
        return Progress(buffers[0], tuple(bounds), reason)

    def iterate(
        self,
        old: Parameters,
        new: Parameters,
        natural: Natural,
        operands: Operands,
        settings: Settings,
        stop: torch.Tensor,
        bounds: torch.Tensor,
        i: int,
    ) -> None:
        """Iteration i, from `old` to `new`, which fills in stop and bounds [i + 1]; nothing where stop[i] is set."""
        running = stop[i : i + 1]
        statistics, evidence = self.step.expect(operands, running)
        shared = natural.shared.clone()
        self.type.maximize(statistics, old, new, natural, self.data, settings, running)
        decide(stop, bounds, settings, evidence, shared, old, new, natural, i)
        fill_operands(operands, natural, self._gain, self.data.exact, stop[i + 1 : i + 2])

    def expect(self, density: Density) -> tuple[torch.Tensor, float]:
        """Statistics as the kernels keep them, and the log-likelihood of all rows."""
        natural, operands = self._start(density)
        statistics, evidence = self.step.expect(operands)
        total = float(evidence.sum()) * LOG_2 + float(natural.shared.sum()) * self.data.total
        return statistics, total * self.data.gain

    def assign(self, labels: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
        """Statistics of rows that wholly belong to the component of their label (n,), int32.

        Centred rows are about `means` (k, d), offsets from the shift.
        """
        k, d = means.shape
        if isinstance(self.step, _features.Step):
            return self.step.assign(labels, k)
        natural = Natural.of(k, self.data, self.kind)
        natural.centres[:, :d] = means * self.data.scale
        return self.step.assign(labels, natural.centres.to(self.data.dtype))

    def moments(self, statistics: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Counts, first and second moments about the shift (centred rows: about the means), from statistics."""
        found: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = self.type.moments(statistics, self.data)
        return found

    def log_evidence(self, density: Density) -> torch.Tensor:
        """Log-density of each row under the mixture: (n,), float64."""
        normalizer, _ = self.step.normalize(self._start(density)[1])
        shared: torch.Tensor | float = self.type.shared_log_density(density, self.data)
        return normalizer.to(torch.float64) * LOG_2 + shared

    def labels(self, density: Density) -> torch.Tensor:
        """The likeliest component of each row: (n,), int32."""
        return self.step.labels(self._start(density)[1])

    def responsibilities(self, density: Density) -> torch.Tensor:
        """Posterior probability of each component given the row: (n, k)."""
        return self.step.responsibilities(self._start(density)[1])

    def _start(self, density: Density) -> tuple[Natural, Operands]:
        natural = Natural.of(density.means.shape[0], self.data, self.kind)
        self.type.fill(natural, density, self.data)
        operands = room_for_operands(natural, self.data)
        fill_operands(operands, natural, self._gain, self.data.exact, self.step.never)
        return natural, operands
