"""Names for what the array API standard leaves without a static type."""

from typing import Any, TypeAlias

Array: TypeAlias = Any
DType: TypeAlias = Any
