"""What an EM iteration costs on a GPU, computed without one: `estimate`.

The counts are those of `gaussmix_kernels`, whose sizes they follow from.
"""

from dataclasses import dataclass
from math import ceil, prod

from gaussmix._checks import check_covariance_type, check_integer, check_option
from gaussmix.backends._dispatch import without_kernels
from gaussmix_kernels import _sizes


@dataclass(frozen=True)
class Device:
    """Rates that programs reach, which are below those of the data sheet."""

    bandwidth: float  # bytes of device memory per second
    tensor: float  # operations per second of the tensor cores, float16 with float32 sums
    double: float  # operations per second of Triton's float64 products

    @property
    def rates(self) -> dict[str, float]:
        """Operations per second by dtype of the data."""
        return {"float32": self.tensor, "float64": self.double}


# H200, H100: what copies and large 16-bit products in PyTorch reach; float64 is Triton's, as its pull request 10313
# reports it for an H100. A100 (80 GB): the data sheet's 2.0 TB/s, 312 and 19.5 TFLOP/s, times the shares that an H100
# reaches of its own. They are planning figures, not results of this library.
DEVICES = {
    "h200": Device(4.3e12, 790e12, 31e12),
    "h100": Device(3.0e12, 790e12, 31e12),
    "a100": Device(1.8e12, 250e12, 9e12),
}
# Seconds between two launches from Python: an assumption.
LAUNCH = 12e-6

# Rows of a tile, which slabs are rounded to; the kernels' own have 16 to 64.
SLAB_TILE = 32
# Matrices of more than MOST_FEATURES are factored by torch's functions: about as many launches and temporary matrices.
LARGE_LAUNCHES, LARGE_MATRICES = 18, 4


@dataclass(frozen=True)
class Estimate:
    """Cost of an EM iteration, as `estimate` computes it.

    Attributes
    ----------
    flops : int
        Floating-point operations of the matrix products, the padding of tiles and what is computed twice included.
    bytes : int
        Device memory read and written.
    launches : int
        Kernels that are started.
    time : float
        Seconds, at least.
    limit : {"compute", "memory", "launches"}
        What that time is for.
    memory : int
        Bytes on the device beyond the data: the copy that the kernels read, sums, logits and parameters.
    """

    flops: int
    bytes: int
    launches: int
    time: float
    limit: str
    memory: int


@dataclass(frozen=True)
class _Work:
    """The E-step's and the statistics' share of an iteration."""

    flops: int  # of the products, each counted once
    tensor_flops: int  # the same as the tensor cores see them: 3 products of halves for one
    bytes: int
    launches: int
    scratch: int  # bytes of partial sums, log-normalisers and logits
    columns: int  # statistics of a component
    width: int  # natural parameters of a component


def estimate(n: int, d: int, k: int, covariance_type: str, dtype: str = "float32", device: str = "h200") -> Estimate:
    """Cost of an EM iteration by the GPU kernels, from the sizes alone.

    Neither a GPU nor torch is needed. The time is a floor: the largest of what arithmetic, memory and launches (12
    microseconds each, an assumption) would take at rates that programs reach on such a device. Nothing here has been
    fitted to measurements of this library; expect kernels to take up to twice as long.

    Parameters
    ----------
    n, d, k : int
        Numbers of rows, features and components.
    covariance_type : {"full", "tied", "diag", "spherical"}
        As the estimators take it.
    dtype : {"float32", "float64"}, default "float32"
        Of the data: float32 takes pairs of float16 numbers and the tensor cores, float64 takes float64.
    device : {"h200", "h100", "a100"}, default "h200"
        Whose rates count.

    Returns
    -------
    Estimate
        Its `flops`, `bytes`, `launches`, `time`, `limit` and `memory`.

    Raises
    ------
    ValueError
        Where a size is not positive, or a name is none of those listed: "tied_diag" has no kernels,
        nor have more than 256 features.

    Notes
    -----
    Left out: exponentials, the factorisation of covariances (k d^3 operations), sample weights, how EM starts, and
    reading results back. A float32 fit that the guard moves to float64 costs what float64 data cost.

    Examples
    --------
    >>> import gaussmix
    >>> cost = gaussmix.estimate(10_000_000, 32, 64, "diag")
    >>> f"{cost.flops / 1e9:.0f} GFLOP, {cost.bytes / 1e9:.1f} GB, at least {1e3 * cost.time:.1f} ms: {cost.limit}"
    '164 GFLOP, 1.4 GB, at least 0.6 ms: compute'
    >>> f"{cost.memory / 1e9:.1f} GB of device memory beside the data"
    '1.4 GB of device memory beside the data'
    """
    for name, value in (("n", n), ("d", d), ("k", k)):
        check_integer(name, value, 1)
    n, d, k = int(n), int(d), int(k)
    covariance = check_covariance_type(covariance_type)
    check_option("device", device, DEVICES)
    check_option("dtype", dtype, DEVICES[device].rates)
    exact = dtype == "float64"
    item = 8 if exact else 4
    reason = without_kernels(d, covariance_type)
    if reason is not None:
        raise ValueError(f"{reason}; it runs on array_api")
    kind = _sizes.kinds(covariance.quadratic, d)[0]
    work = _centred(n, d, k, exact) if kind == "centred" else _features(n, d, k, exact, kind)

    matrices = kind in ("none", "products", "centred")
    large = matrices and d > _sizes.MOST_FEATURES
    m_step = 2 + (LARGE_LAUNCHES if large else 1) if matrices else 1
    launches = work.launches + m_step + 3  # the bound, the operands, and a copy of what the bound needs
    small = k * (8 * work.columns + (8 + item) * work.width)
    times = {
        "compute": (work.flops if exact else work.tensor_flops) / DEVICES[device].rates[dtype],
        "memory": (work.bytes + 2 * small) / DEVICES[device].bandwidth,
        "launches": launches * LAUNCH,
    }
    limit = max(times, key=times.__getitem__)

    memory = n * (_sizes.multiple(d, 16) + 1) * item + work.scratch + small
    memory += 3 * 8 * (k * (d + 1) + 2 * prod(covariance.shape(k, d)))  # the start, and two that take turns
    if kind == "none":
        memory += 16 * min(n, _sizes.SCATTER_ROWS) * d
    if large:
        memory += LARGE_MATRICES * 8 * prod(covariance.shape(k, d))
    return Estimate(work.flops, work.bytes + 2 * small, launches, times[limit], limit, memory)


def _features(n: int, d: int, k: int, exact: bool, kind: str) -> _Work:
    """Products with features: logits and sums in one read where the components fit, with the logits twice else."""
    features, item = _sizes.Features(kind, d), 8 if exact else 4
    block = features.tiles("accumulate", exact, k)["BLOCK_K"]
    fused = block >= k
    partial = ceil(n / _sizes.slab_rows(n, SLAB_TILE)) * k * (features.width + 2) * item
    row = (features.ld + (kind == "norm")) * item
    flops = (2 if fused else 3) * 2 * n * _sizes.multiple(k, block) * features.sums
    # Unfused: log-normalisers are written and read.
    moved = n * row + 2 * partial + (0 if fused else n * (row + 2 * item))
    scratch = partial + (0 if fused else n * item)
    return _Work(flops, 3 * flops, moved, 2 if fused else 3, scratch, features.width + 2, features.width)


def centred_flops(kernel: str, n: int, d: int, k: int, exact: bool) -> int:
    """Operations of the products of "logits" or "scatter", each counted once: a triangle of the blocks of a matrix."""
    tiles = _sizes.centred_tiles(kernel, exact, d)
    blocks = tiles["D"] // tiles["BLOCK_D"]
    one = n * tiles["D"] * tiles["BLOCK_D"] * (blocks + 1)  # 2 n D^2, of which (blocks + 1) / (2 blocks)
    # Components side by side in a tile are multiplied with each other as well.
    together = tiles["BLOCK_K"] if kernel == "scatter" else 1
    return one * _sizes.multiple(k, together) * together


def _centred(n: int, d: int, k: int, exact: bool) -> _Work:
    """Centred rows, in chunks whose logits stay in the cache; a triangle of the blocks of each matrix is computed."""
    item, ld = (8 if exact else 4), _sizes.multiple(d, 16)
    flops = sum(centred_flops(kernel, n, d, k, exact) for kernel in ("logits", "scatter"))
    chunk = min(_sizes.chunk_rows(k, item), n)
    chunks = ceil(n / chunk)
    slab = _sizes.slab_rows(chunk, SLAB_TILE, max(1, _sizes.PROGRAMS // k))
    columns = ld * ld + ld + 1
    partial = ceil(chunk / slab) * k * columns * item
    # Rows are read twice; of each chunk, partial sums are written and read, and their total read and written.
    moved = n * (2 * ld * item + 2 * item) + chunks * (2 * partial + 16 * k * columns)
    scratch = partial + min(chunks, 2) * k * chunk * item + n * item
    return _Work(flops, 3 * flops, moved, 4 * chunks + 1, scratch, columns, ld * ld)
