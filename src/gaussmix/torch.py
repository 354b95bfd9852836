"""Fitted mixtures and clusterings as torch modules, and Gaussians on torch tensors. Importing it needs torch.

The modules have PyCave's names, buffers and outputs, and the functions are those of its `pycave.bayes.core`. The
mathematics is that of the rest of the library.
"""

import copy
import io
import json
import math
import os
import pickletools
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeAlias

import torch
from safetensors.torch import save as serialize
from torch import Tensor, nn

from gaussmix._arrays import floating_dtype
from gaussmix._checks import check_covariance_type, check_integer, check_mixture, validate_array
from gaussmix._covariance import COVARIANCES
from gaussmix._density import Density, log_offsets
from gaussmix._files import (
    SAVE_AGAIN,
    UNREADABLE,
    as_path,
    damaged,
    make_folder,
    read_arrays,
    read_json,
    replace,
    with_arrays,
)
from gaussmix._parameters import singular_covariance
from gaussmix.backends import _array_api
from gaussmix.rows._gpu import as_tensor

__all__ = [
    "CovarianceType",
    "GaussianMixtureModel",
    "GaussianMixtureModelConfig",
    "KMeansModel",
    "KMeansModelConfig",
    "cholesky_precision",
    "covariance",
    "covariance_dim",
    "covariance_shape",
    "log_normal",
    "sample_normal",
]

CONFIG, PARAMETERS, PROGRAM = "config.json", "parameters.safetensors", "model.pt2"
# PyCave's and torchgmm's name; read, never written.
OLD_PARAMETERS = "parameters.pt"
# What the pickle in it may name: that of a dict of dense tensors names nothing else.
OLD_NAMES = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    *(f"torch {kind}Storage" for kind in ("Float", "Double", "Half", "BFloat16")),
}
NAMING = {"GLOBAL", "INST", "STACK_GLOBAL"}  # pickle's operations that do
# Bytes of it beside those of the tensors: names, and zeros that align them.
OLD_OVERHEAD = 2**16

# What a config or buffers of another kind raise.
INVALID = (TypeError, ValueError, AttributeError, OverflowError, RecursionError)

CovarianceType: TypeAlias = Literal["full", "tied", "diag", "tied_diag", "spherical"]


def covariance_shape(num_components: int, num_features: int, covariance_type: str) -> torch.Size:
    """Shape of the covariances of some components.

    Parameters
    ----------
    num_components, num_features : int
        k and d.
    covariance_type : {"full", "tied", "diag", "tied_diag", "spherical"}
        What the covariances are.

    Returns
    -------
    shape : torch.Size
        (k, d, d) for "full", (d, d) for "tied", (k, d) for "diag", (k,) for "spherical".

    Raises
    ------
    ValueError
        For an unknown covariance type, as all functions here.

    Examples
    --------
    >>> covariance_shape(3, 2, "full")
    torch.Size([3, 2, 2])
    """
    return torch.Size(check_covariance_type(covariance_type).shape(num_components, num_features))


def covariance_dim(covariance_type: str) -> int:
    """Number of dimensions of the covariances of some components.

    Parameters
    ----------
    covariance_type : {"full", "tied", "diag", "tied_diag", "spherical"}
        What the covariances are.

    Returns
    -------
    ndim : int

    Examples
    --------
    >>> covariance_dim("tied")
    2
    """
    return len(covariance_shape(1, 1, covariance_type))


def cholesky_precision(covariances: Tensor, covariance_type: str) -> Tensor:
    """Factors of the precisions.

    Parameters
    ----------
    covariances : torch.Tensor
        Of the shape that `covariance_shape` says.
    covariance_type : {"full", "tied", "diag", "tied_diag", "spherical"}
        What the covariances are.

    Returns
    -------
    precisions_cholesky : torch.Tensor
        Upper triangular U with U U^T = Sigma^-1 (1 / sigma for variances), in the shape, dtype and on the device of
        `covariances`.

    Raises
    ------
    torch.linalg.LinAlgError
        If a covariance is not positive definite; also a `numpy.linalg.LinAlgError` and a ValueError.

    Examples
    --------
    >>> cholesky_precision(torch.tensor([4.0, 0.25]), "spherical")
    tensor([0.5000, 2.0000])
    """
    of_type = check_covariance_type(covariance_type)
    factors = of_type.precision_cholesky(covariances)
    if not bool(torch.isfinite(factors).all()):
        error = singular_covariance(of_type.first_singular(factors), 0, 0.0)
        # The message goes on about the rows and the regularisation of a fit.
        error.args = (f"{str(error).partition(' (')[0]}; add a small positive value to its diagonal",)
        raise error
    return factors


def covariance(cholesky_precisions: Tensor, covariance_type: str) -> Tensor:
    """Covariances from factors of their precisions: the inverse of `cholesky_precision`.

    Parameters
    ----------
    cholesky_precisions : torch.Tensor
        Of the shape that `covariance_shape` says.
    covariance_type : {"full", "tied", "diag", "tied_diag", "spherical"}
        What the covariances are.

    Returns
    -------
    covariances : torch.Tensor
        In the shape, dtype and on the device of the factors.

    Examples
    --------
    >>> covariance(torch.tensor([0.5, 2.0]), "spherical")
    tensor([4.0000, 0.2500])
    """
    return check_covariance_type(covariance_type).covariances(cholesky_precisions)


def log_normal(x: Tensor, means: Tensor, precisions_cholesky: Tensor, covariance_type: str) -> Tensor:
    """Log-densities of rows under Gaussians.

    Parameters
    ----------
    x : torch.Tensor of shape (n, d)
        The rows. Memory for n k d numbers is needed.
    means : torch.Tensor of shape (k, d)
        In the dtype and on the device of `x`, as the factors.
    precisions_cholesky : torch.Tensor
        As `cholesky_precision` returns them.
    covariance_type : {"full", "tied", "diag", "tied_diag", "spherical"}
        What the covariances are.

    Returns
    -------
    log_prob : torch.Tensor of shape (n, k)
        In nats; differentiable in all three tensors.

    Examples
    --------
    >>> log_normal(torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1), "spherical")  # -log(2 pi) / 2
    tensor([[-0.9189]])
    """
    # Densities of single components: neither weights nor covariances play a part.
    of_type = check_covariance_type(covariance_type)
    offsets = log_offsets(torch.ones_like(means[:, 0]), precisions_cholesky, of_type, means.shape[1])
    density = Density(offsets, means, None, precisions_cholesky, of_type)
    return _array_api.weighted_log_prob(x, density).T


def sample_normal(num: int, mean: Tensor, cholesky_precisions: Tensor, covariance_type: str) -> Tensor:
    """Rows drawn from one Gaussian.

    Parameters
    ----------
    num : int
        Number of rows, n.
    mean : torch.Tensor of shape (d,)
        Its mean.
    cholesky_precisions : torch.Tensor
        Its factor, as `cholesky_precision` returns it: shape (d, d) for "full" and "tied", (d,) for "diag", (1,) or ()
        for "spherical".
    covariance_type : {"full", "tied", "diag", "tied_diag", "spherical"}
        What the factor is.

    Returns
    -------
    rows : torch.Tensor of shape (n, d)
        In the dtype and on the device of `mean`, drawn with torch's global generator.

    Examples
    --------
    >>> sample_normal(5, torch.zeros(2), torch.eye(2), "full").shape
    torch.Size([5, 2])
    """
    of_type = check_covariance_type(covariance_type)
    (d,) = mean.shape
    factors = torch.reshape(cholesky_precisions, of_type.shape(1, d))
    return mean + of_type.colorize(torch.randn(num, d, dtype=mean.dtype, device=mean.device), factors, 0)


class _Model(nn.Module):
    """Buffers whose shapes a config determines, saved to a directory and loaded from it."""

    config_class: ClassVar[type[Any]]
    config: Any

    def __init__(self, config: Any, **buffers: Tensor) -> None:
        super().__init__()
        self.config = config
        expected = self._shapes(config)
        found = {name: tuple(buffer.shape) for name, buffer in buffers.items()}
        if buffers and found != expected:
            raise ValueError(f"the parameters have the shapes {found}; {config} takes {expected}")
        for name, shape in expected.items():
            self.register_buffer(name, buffers[name] if buffers else torch.empty(shape))
        if not buffers:
            self.reset_parameters()

    @staticmethod
    def _shapes(config: Any) -> dict[str, tuple[int, ...]]:
        """Shapes of the buffers by name; raises for a config that can not be."""
        raise NotImplementedError

    def _check_buffers(self) -> None:
        """Raise ValueError for values that no model has."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Draw new values for the buffers."""
        raise NotImplementedError

    def save(self, path: str | os.PathLike[str], compile_model: bool = False) -> None:
        """Write the model to a directory, as `config.json` and `parameters.safetensors`.

        Files are written aside and renamed: an interrupted save leaves a whole model, the old or the new one. Nothing
        in these two files is code.

        Parameters
        ----------
        path : str or os.PathLike
            The directory; made where it does not exist.
        compile_model : bool, default False
            Also write `model.pt2`, a program for any number of rows that `torch.export.load` reads where gaussmix is
            not installed.

        Raises
        ------
        NotADirectoryError
            If `path` is a file.
        ValueError
            If a buffer holds values that `load` would refuse: NaN, weights or factors that are none.
        """
        self._check_buffers()
        config = asdict(self.config)
        # Copies: safetensors takes contiguous tensors that share no memory.
        buffers = {
            name: b.detach().cpu().clone(memory_format=torch.contiguous_format) for name, b in self.named_buffers()
        }
        program = self._program() if compile_model else None
        folder = make_folder(path)
        # One of other parameters would be a trap.
        (folder / PROGRAM).unlink(missing_ok=True)
        replace(folder / PARAMETERS, with_arrays(buffers, config, serialize))
        replace(folder / CONFIG, json.dumps(config, indent=2).encode())
        if program is not None:
            replace(folder / PROGRAM, program)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a model that `save` wrote, or PyCave or torchgmm (`config.json` and `parameters.pt`).

        Parameters
        ----------
        path : str or os.PathLike
            The directory.

        Returns
        -------
        model
            On the CPU, in the dtype that it was saved in.

        Raises
        ------
        FileNotFoundError
            If there is nothing to load at `path`.
        ValueError
            If a file is damaged or belongs to another model.
        """
        folder = as_path(path)
        buffers: dict[str, Tensor] | None = None
        if os.path.lexists(folder / PARAMETERS):
            buffers, config = read_arrays(folder / PARAMETERS, framework="pt")
        elif (folder / CONFIG).is_file() and (folder / OLD_PARAMETERS).is_file():
            config = read_json(folder / CONFIG)
        else:
            raise FileNotFoundError(
                f"{folder} holds no saved model: neither {PARAMETERS} nor {CONFIG} with {OLD_PARAMETERS} is there; "
                "pass the directory that a model was saved to"
            )
        try:
            config = cls.config_class(**config)
            shapes = cls._shapes(config)
        except INVALID as error:
            raise damaged(folder, f"it holds no {cls.__name__} ({error})") from error
        if buffers is None:
            buffers = _read_old_parameters(folder / OLD_PARAMETERS, sum(map(math.prod, shapes.values())))
        try:
            if missing := sorted(shapes.keys() - buffers.keys()):
                raise ValueError(f"{missing} are not there")
            if other := sorted(name for name, buffer in buffers.items() if not buffer.is_floating_point()):
                raise ValueError(f"{other} are no floating-point numbers")
            model = cls(config, **buffers)
            model._check_buffers()
        except INVALID as error:
            remedy = f"{SAVE_AGAIN}, or fit again where the fit had failed"
            raise damaged(folder, f"it holds no {cls.__name__} ({error})", remedy) from error
        return model

    def clone(self, copy_parameters: bool = True) -> Self:
        """Another model with this one's config, dtype and device.

        Parameters
        ----------
        copy_parameters : bool, default True
            Whether to copy the buffers, or to draw new ones as `reset_parameters` does.

        Returns
        -------
        model
            Shares no memory with this one.
        """
        clone = copy.deepcopy(self)
        if not copy_parameters:
            clone.reset_parameters()
        return clone

    def _program(self) -> bytes:
        """The forward pass for any number of rows, as the bytes of a file."""
        buffer = next(self.buffers())
        # Not one row: a size of 1 would be taken for a constant.
        example = buffer.new_zeros((2, self.config.num_features))
        program = torch.export.export(self, (example,), dynamic_shapes=({0: torch.export.Dim("n")},), strict=False)
        file = io.BytesIO()
        torch.export.save(program, file)
        return file.getvalue()

    def _check(self, data: Tensor, dtype: torch.dtype) -> None:
        d = self.config.num_features
        if data.ndim != 2 or data.shape[1] != d:
            raise ValueError(f"data has shape {tuple(data.shape)}; this model takes (n, {d})")
        if data.dtype != dtype:
            raise TypeError(f"data has dtype {data.dtype} and the model {dtype}; convert one with .to(dtype)")


@dataclass(frozen=True)
class GaussianMixtureModelConfig:
    """What determines the shapes of a `GaussianMixtureModel`.

    Parameters
    ----------
    num_components, num_features : int
        k and d.
    covariance_type : {"full", "tied", "diag", "tied_diag", "spherical"}
        What the covariances are.
    """

    num_components: int
    num_features: int
    covariance_type: str


class GaussianMixtureModel(_Model):
    """A mixture of Gaussians as a torch module.

    It has no trainable parameters, only buffers; what it computes is differentiable in the data. It can be compiled
    (`torch.compile`, without graph breaks) and exported (`torch.export`, with a dynamic number of rows).

    Parameters
    ----------
    config : GaussianMixtureModelConfig
        What determines the shapes of the buffers.
    **buffers : torch.Tensor, optional
        The buffers by name, all of them; not copied. Without them they are drawn at random, as `reset_parameters` does.

    Attributes
    ----------
    component_probs : torch.Tensor of shape (k,)
        The weights.
    means : torch.Tensor of shape (k, d)
    precisions_cholesky : torch.Tensor
        Upper triangular U with U U^T = Sigma^-1: shape (k, d, d) for "full", (d, d) for "tied", (k, d) for "diag", (k,)
        for "spherical".
    config : GaussianMixtureModelConfig

    Raises
    ------
    ValueError, TypeError
        For a config that no mixture has.

    Examples
    --------
    >>> import torch
    >>> from gaussmix.torch import GaussianMixtureModel
    >>> model = GaussianMixtureModel.of([0.5, 0.5], [[-1.0], [1.0]], [1.0, 1.0], "spherical").float()
    >>> log_responsibilities, log_prob = model(torch.zeros(3, 1))
    >>> log_responsibilities.exp()[0]
    tensor([0.5000, 0.5000])
    >>> log_prob.shape
    torch.Size([3])
    """

    config_class = GaussianMixtureModelConfig
    config: GaussianMixtureModelConfig
    component_probs: Tensor
    means: Tensor
    precisions_cholesky: Tensor

    @staticmethod
    def _shapes(config: GaussianMixtureModelConfig) -> dict[str, tuple[int, ...]]:
        k, d = config.num_components, config.num_features
        check_integer("num_components", k, 1)
        check_integer("num_features", d, 1)
        factors = check_covariance_type(config.covariance_type).shape(k, d)
        return {"component_probs": (k,), "means": (k, d), "precisions_cholesky": factors}

    def _check_buffers(self) -> None:
        of_type = COVARIANCES[self.config.covariance_type]
        check_mixture(self.component_probs, self.means, self.precisions_cholesky, of_type)

    @classmethod
    def of(cls, weights: Any, means: Any, precisions_cholesky: Any, covariance_type: str) -> Self:
        """The model with these parameters.

        Parameters
        ----------
        weights : array-like of shape (k,)
            Not negative, with sum 1.
        means : array-like of shape (k, d)
        precisions_cholesky : array-like
            Upper triangular factors of the precisions, of the shape that `covariance_shape` says.
        covariance_type : {"full", "tied", "diag", "tied_diag", "spherical"}
            What they factor.

        Returns
        -------
        model : GaussianMixtureModel
            In the dtype of the arrays (float32 for half precision, float64 for integers) and on their device. NumPy,
            CuPy and torch arrays of float32 or float64 are not copied: the buffers share their memory.

        Raises
        ------
        ValueError
            If a shape does not fit.
        """
        means = _as_floats(means)
        return cls(
            GaussianMixtureModelConfig(*_shape_of("means", means), covariance_type),
            component_probs=_as_floats(weights),
            means=means,
            precisions_cholesky=_as_floats(precisions_cholesky),
        )

    @property
    def covariances(self) -> Tensor:
        """The covariances, in the shape, dtype and on the device of `precisions_cholesky`."""
        return covariance(self.precisions_cholesky, self.config.covariance_type)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw new parameters with torch's global generator.

        Weights are uniform and normalised, means standard normal, and precisions those of random covariances with
        eigenvalues of at least 1.
        """
        of_type = COVARIANCES[self.config.covariance_type]
        nn.init.uniform_(self.component_probs)
        self.component_probs /= self.component_probs.sum()
        nn.init.normal_(self.means)
        # Half precision has no Cholesky decomposition.
        factors = torch.rand_like(self.precisions_cholesky, dtype=torch.float32) / self.config.num_features**0.5
        covariances = of_type.regularize(of_type.square(factors), 1.0)
        self.precisions_cholesky.copy_(of_type.precision_cholesky(covariances))

    def forward(self, data: Tensor) -> tuple[Tensor, Tensor]:
        """Responsibilities and log-likelihoods of rows.

        Parameters
        ----------
        data : torch.Tensor of shape (n, d)
            In the dtype and on the device of the buffers. Memory for n k d numbers is needed; pass many rows in parts.

        Returns
        -------
        log_responsibilities : torch.Tensor of shape (n, k)
            Log-probability of each component given the row.
        log_prob : torch.Tensor of shape (n,)
            Log-density of each row under the mixture, in nats: positive is better.

        Raises
        ------
        ValueError, TypeError
            If the data has another shape or dtype than the model takes.
        """
        self._check(data, self.means.dtype)
        log_prob = log_normal(data, self.means, self.precisions_cholesky, self.config.covariance_type)
        weighted_log_prob = log_prob + self.component_probs.log()
        return weighted_log_prob.log_softmax(dim=1), weighted_log_prob.logsumexp(dim=1)

    def sample(self, num_datapoints: int, generator: torch.Generator | None = None) -> Tensor:
        """Rows drawn from the mixture.

        Parameters
        ----------
        num_datapoints : int
            Number of rows, n.
        generator : torch.Generator, optional
            Draws the random numbers, on its device; torch's global generator of the CPU if None.

        Returns
        -------
        rows : torch.Tensor of shape (n, d)
            Grouped by component, in the dtype and on the device of the buffers.

        Raises
        ------
        ValueError, TypeError
            If `num_datapoints` is not an integer of at least 1.

        Examples
        --------
        >>> model = GaussianMixtureModel(GaussianMixtureModelConfig(3, 2, "full"))
        >>> model.sample(5, torch.Generator().manual_seed(0)).shape
        torch.Size([5, 2])
        """
        check_integer("num_datapoints", num_datapoints, 1)
        k, d = self.means.shape
        device = torch.device("cpu") if generator is None else generator.device
        weights = self.component_probs.to(device, torch.float64)
        drawn = torch.multinomial(weights / weights.sum(), num_datapoints, replacement=True, generator=generator)
        counts = torch.bincount(drawn, minlength=k).tolist()
        noise = torch.randn(num_datapoints, d, generator=generator, device=device, dtype=self.means.dtype)
        of_type = COVARIANCES[self.config.covariance_type]
        grouped = torch.split(noise.to(self.means.device), counts)
        return torch.cat(
            [
                mean + of_type.colorize(rows, self.precisions_cholesky, component)
                for component, (rows, mean) in enumerate(zip(grouped, self.means, strict=True))
            ]
        )


@dataclass(frozen=True)
class KMeansModelConfig:
    """What determines the shapes of a `KMeansModel`.

    Parameters
    ----------
    num_clusters, num_features : int
        k and d.
    """

    num_clusters: int
    num_features: int


class KMeansModel(_Model):
    """The centroids of a clustering as a torch module.

    Parameters
    ----------
    config : KMeansModelConfig
        What determines the shape of the centroids.
    **buffers : torch.Tensor, optional
        `centroids`; not copied. Without them they are drawn at random, as `reset_parameters` does.

    Attributes
    ----------
    centroids : torch.Tensor of shape (k, d)
        A buffer.
    config : KMeansModelConfig

    Raises
    ------
    ValueError, TypeError
        For a config that no clustering has.

    Examples
    --------
    >>> import torch
    >>> from gaussmix.torch import KMeansModel
    >>> model = KMeansModel.of([[0.0], [10.0]]).float()
    >>> distances, assignments, inertias = model(torch.tensor([[1.0], [8.0]]))
    >>> distances
    tensor([[1., 9.],
            [8., 2.]])
    >>> assignments, inertias
    (tensor([0, 1]), tensor([1., 4.]))
    """

    config_class = KMeansModelConfig
    config: KMeansModelConfig
    centroids: Tensor

    @staticmethod
    def _shapes(config: KMeansModelConfig) -> dict[str, tuple[int, ...]]:
        check_integer("num_clusters", config.num_clusters, 1)
        check_integer("num_features", config.num_features, 1)
        return {"centroids": (config.num_clusters, config.num_features)}

    def _check_buffers(self) -> None:
        validate_array("centroids", self.centroids, tuple(self.centroids.shape))

    @classmethod
    def of(cls, centroids: Any) -> Self:
        """The model with these centroids.

        Parameters
        ----------
        centroids : array-like of shape (k, d)
            Shared or converted as `GaussianMixtureModel.of` does.

        Returns
        -------
        model : KMeansModel

        Raises
        ------
        ValueError
            If the shape is another.
        """
        centroids = _as_floats(centroids)
        return cls(KMeansModelConfig(*_shape_of("centroids", centroids)), centroids=centroids)

    def reset_parameters(self) -> None:
        """Draw new centroids from a standard normal, with torch's global generator."""
        nn.init.normal_(self.centroids)

    def forward(self, data: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Distances to the centroids.

        Parameters
        ----------
        data : torch.Tensor of shape (n, d)
            In the dtype and on the device of the centroids.

        Returns
        -------
        distances : torch.Tensor of shape (n, k)
            Euclidean distance of each row to each centroid.
        assignments : torch.Tensor of shape (n,), int64
            The nearest centroid, the first of equals.
        inertias : torch.Tensor of shape (n,)
            Squared distance to it.

        Raises
        ------
        ValueError, TypeError
            If the data has another shape or dtype than the model takes.
        """
        self._check(data, self.centroids.dtype)
        # The products that cdist would take for many rows cancel where data lie far from the origin.
        distances = torch.cdist(data, self.centroids, compute_mode="donot_use_mm_for_euclid_dist")
        assignments = distances.argmin(dim=1)
        offsets = data - self.centroids[assignments]
        return distances, assignments, (offsets * offsets).sum(dim=1)


def _as_floats(value: Any) -> Tensor:
    """An array as a tensor of floating-point numbers, of the same memory where there can be one."""
    tensor = as_tensor(value)
    return tensor.to(floating_dtype(tensor))


def _shape_of(name: str, tensor: Tensor) -> tuple[int, int]:
    if tensor.ndim != 2:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected (number of components, number of features)")
    rows, columns = tensor.shape
    return rows, columns


def _read_old_parameters(path: Path, numel: int) -> Any:
    """The tensors of PyCave or torchgmm, which have so many numbers."""
    size, limit = path.stat().st_size, 8 * numel + OLD_OVERHEAD
    if size > limit:
        raise damaged(path, f"it has {size} bytes, and its tensors take {limit} at most")
    content = path.read_bytes()
    try:
        _check_archive(content)
        buffers = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (*UNREADABLE, zipfile.BadZipFile) as error:
        raise damaged(path, error) from error
    for name, tensor in buffers.items() if isinstance(buffers, dict) else ():
        # Strides of zero would let a few bytes stand for any number of elements.
        if not isinstance(tensor, Tensor) or tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
            raise damaged(path, f"{name} is no dense tensor")
    return buffers


def _check_archive(content: bytes) -> None:
    """Raise unless the archive unpacks to no more than it is, and names nothing but tensors."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = archive.infolist()
        # torch compresses nothing; and entries could share their bytes.
        declared = sum(entry.file_size for entry in entries)
        if declared > len(content) or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError(f"it is compressed: it unpacks to {declared} bytes")
        pickles = [archive.read(entry) for entry in entries if entry.filename.endswith("data.pkl")]
    for pickled in pickles:
        for operation, argument, _ in pickletools.genops(pickled):
            if operation.name in NAMING and argument not in OLD_NAMES:
                raise ValueError(f"it names {argument}, which no dense tensor of floating-point numbers does")
