"""Data that is no array but gives blocks of rows each time it is iterated over: loaders, data sets, any such object."""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from array_api_compat import is_array_api_obj, is_torch_array
from scipy.sparse import issparse

from gaussmix._arrays import array_namespace
from gaussmix._typing import Array, DType

# Rows of a block of a torch Dataset, which are fetched one by one.
BATCH_ROWS = 2**14
# What arrays, data frames and tables offer; they are converted whole.
WHOLE = ("__array__", "__array_interface__", "__dataframe__", "__arrow_c_stream__")


@dataclass(frozen=True)
class Blocks:
    """Blocks of rows, anew in each pass."""

    source: Iterable[Any]

    def raw(self) -> Iterator[Array]:
        """The blocks as the source gives them; the first part of those that are tuples."""
        for item in self.source:
            block = item[0] if isinstance(item, (tuple, list)) and len(item) else item
            if not is_array_api_obj(block):
                raise TypeError(
                    f"the data gives blocks of type {type(item).__name__}; pass an object that gives 2-d arrays, or "
                    "tuples that begin with one"
                )
            yield block.detach() if is_torch_array(block) else block

    def converted(self, dtype: DType) -> Iterator[Array]:
        """The blocks in this dtype."""
        for block in self.raw():
            yield array_namespace(block).astype(block, dtype, copy=False)


def readable(X: Any, batch_size: int | None, num_workers: int) -> Any:
    """X as an array or a table, or else as `Blocks`."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(X, torch.utils.data.Dataset):
        if isinstance(X, torch.utils.data.TensorDataset):
            return X.tensors[0]  # fetching its rows one by one would take most of the time
        X = torch.utils.data.DataLoader(X, batch_size=batch_size or BATCH_ROWS, num_workers=num_workers)
    is_whole = is_array_api_obj(X) or issparse(X) or any(hasattr(X, name) for name in WHOLE)
    if is_whole or isinstance(X, (list, tuple, str, bytes, dict, set)) or not hasattr(X, "__iter__"):
        return X
    return Blocks(X)
