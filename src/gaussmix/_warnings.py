"""Warnings that name the user's line."""

import sys
import warnings


def warn_user(message: str, category: type[Warning]) -> None:
    """A warning that names the line outside of the library which led to it: deprecations are shown there only."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("gaussmix"):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)
