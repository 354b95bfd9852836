"""Sizes that follow from the shape of a fit: features, tiles, slabs, chunks. Without torch, for those who only plan."""

from dataclasses import dataclass

# Rows whose statistics are added on the chip in float32.
MOST_SLAB_ROWS = 4096
# Programs that fill a large GPU once: four for each of 132 processors.
PROGRAMS = 528
# Sums that four warps of the fused step keep in registers.
FUSED_SUMS = 8192
# Bytes of logits that stay in the L2 cache between the kernels of full covariances.
CHUNK_BYTES = 24 * 2**20
MOST_CHUNK_ROWS = 2**20
# The totals of all components are read and written once a chunk: with many components that costs more than logits that
# leave the cache.
LEAST_CHUNK_SLABS = 4
# Features whose tiles the compile gate checks; wider ones might not compile, or spill.
MOST_DIMENSIONS = 256
# Features that the kernels hold a covariance matrix of in registers.
MOST_FEATURES = 64
# Products of this many features fit in the registers that hold their sums.
MOST_PRODUCT_FEATURES = 16
# Rows at a time that are taken in float64 for what is no kernel.
SCATTER_ROWS = 2**18


def padded(size: int) -> int:
    """The smallest power of two that holds `size` and 16."""
    return max(16, 1 << (size - 1).bit_length())


def multiple(size: int, of: int) -> int:
    """`size` rounded up to a multiple."""
    return -(-size // of) * of


def slab_rows(n: int, block: int, programs: int = PROGRAMS) -> int:
    """Rows of a slab: fixed by the shape of the data alone, so that the same data gives the same bits."""
    return multiple(min(max(n // programs, 256), MOST_SLAB_ROWS), block)


def chunk_rows(k: int, itemsize: int) -> int:
    """Rows whose logits for k components stay in the cache."""
    slabs = CHUNK_BYTES // (k * itemsize) // MOST_SLAB_ROWS
    return min(max(slabs, LEAST_CHUNK_SLABS) * MOST_SLAB_ROWS, MOST_CHUNK_ROWS)


def kinds(quadratic: str, d: int) -> tuple[str, ...]:
    """The kinds of features to take where a log-density is linear in these quadratic ones, the fastest first."""
    if quadratic != "products":
        return (quadratic,)
    return ("products", "centred") if d <= MOST_PRODUCT_FEATURES else ("centred",)


@dataclass(frozen=True)
class Features:
    """Which features phi has beside x', for d features of the data; or that rows are centred, which need a matrix."""

    kind: str  # "none", "norm", "squares", "products"; "centred"
    d: int

    @property
    def ld(self) -> int:
        """Stored features of a row of the data."""
        return multiple(self.d, 16)

    @property
    def n_products(self) -> int:
        """Number of products x'_i x'_j."""
        return self.d * (self.d + 1) // 2 if self.kind == "products" else 0

    @property
    def width(self) -> int:
        """Stored natural parameters of a component that are multiplied with phi, or with centred rows."""
        if self.kind == "centred":
            return self.ld * self.ld
        return self.ld + {"squares": self.ld, "products": multiple(self.n_products, 16)}.get(self.kind, 0)

    @property
    def sums(self) -> int:
        """Sums of a component as tiles hold them."""
        return padded(self.ld) + (padded(self.width - self.ld) if self.width > self.ld else 0)

    def tiles(self, kernel: str, exact: bool, k: int) -> dict[str, int]:
        """Sizes of tiles, and warps: a function of the kernel, the tier and the shape without n.

        The compile gate checks each of its values, on every architecture, for registers that spill and for shared
        memory.
        """
        D, products = padded(self.ld), self.kind == "products"
        BLOCK_K, BLOCK_D = min(padded(k), 16 if exact else 64), 16 if products else min(D, 64)
        num_stages = 2
        if kernel == "accumulate":
            num_warps = 8 if products or D > 64 else 4
            most = FUSED_SUMS * (2 if D == 128 else 1)  # eight warps; wider tiles spill
            while BLOCK_K > 16 and BLOCK_K * self.sums > most:
                BLOCK_K //= 2
            BLOCK_N = 16 if exact or products else 64
            if (products and exact) or (self.kind == "squares" and BLOCK_K == D == 64):
                num_stages = 1
        elif D == 128 and not exact and self.kind != "squares":
            BLOCK_D, BLOCK_N, num_warps = 128, 64, 4
        else:
            BLOCK_N = 32 if exact else 128
            num_warps = 8 if BLOCK_K == 64 else 4
        blocks = dict(BLOCK_K=BLOCK_K, BLOCK_D=BLOCK_D, BLOCK_N=BLOCK_N)
        return dict(D=D, Q=padded(self.width - self.ld), **blocks, num_warps=num_warps, num_stages=num_stages)


def centred_tiles(kernel: str, exact: bool, d: int) -> dict[str, int]:
    """Sizes of tiles, and warps, where rows are centred. They compile on every architecture of the gate.

    `logits` keeps the factors of BLOCK_K components for BLOCKS blocks of rows, where they fit on the chip.
    """
    D, block = padded(d), 32 if exact else 64
    if kernel == "logits":
        resident = D <= 64 or (D == 128 and not exact)
        few = dict(BLOCK_K=4 if D <= 64 and not exact else 1, BLOCKS=8 if resident else 1)
        return dict(D=D, BLOCK_D=min(D, block), BLOCK_N=block, num_warps=4, num_stages=2 if resident else 1, **few)
    if D == 128 and not exact:
        return dict(D=D, BLOCK_D=128, BLOCK_N=64, BLOCK_K=1, num_warps=8)
    together = 1 if exact else max(1, 64 // D)  # as many columns as the tensor cores have tiles for
    return dict(D=D, BLOCK_D=min(D, block), BLOCK_N=block, BLOCK_K=together, num_warps=4)
