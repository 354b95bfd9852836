"""Scripts written for PyCave, torchgmm and scikit-learn on gaussmix, unchanged: `python -m gaussmix.accel script.py`.

`install` makes `pycave.bayes`, `pycave.clustering` and `pycave.bayes.core`, their namesakes in torchgmm, and
`sklearn.mixture.GaussianMixture` resolve to gaussmix, whether PyCave and torchgmm are installed or not. Under PyCave's
and torchgmm's names outputs are CPU torch tensors, whatever the data, as theirs are.
"""

import argparse
import runpy
import sys
from collections.abc import Callable
from functools import wraps
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import sklearn.mixture

import gaussmix
import gaussmix.sklearn
from gaussmix._arrays import to_numpy

__all__ = ["install", "uninstall"]

C = TypeVar("C")

FAMILIES = ("pycave", "torchgmm")
# What stood in the place of what `install` puts there: modules by name, None where there was none.
_modules: dict[str, ModuleType | None] = {}
_installed = False
_SKLEARN_MIXTURE = sklearn.mixture.GaussianMixture


def install() -> None:
    """Put gaussmix in the place of PyCave, torchgmm and scikit-learn's GaussianMixture, and say so on stderr, once.

    What scripts have imported before stays as it is. Without torch, only scikit-learn's class is replaced. Modules of
    an installed torchgmm or PyCave that are not replaced, such as `torchgmm.base`, are still found.

    Examples
    --------
    >>> from gaussmix import accel
    >>> accel.install()
    >>> from sklearn.mixture import GaussianMixture
    >>> GaussianMixture.__module__
    'gaussmix.sklearn'
    >>> accel.uninstall()
    """
    global _installed
    if _installed:
        return
    _installed = True
    sklearn.mixture.GaussianMixture = gaussmix.sklearn.GaussianMixture
    replaced = ["sklearn.mixture.GaussianMixture"]
    if find_spec("torch") is not None:
        for family in FAMILIES:
            for module in _stand_ins(family):
                _modules[module.__name__] = sys.modules.get(module.__name__)
                sys.modules[module.__name__] = module
            replaced += [f"{family}.bayes", f"{family}.clustering"]
    print(f"gaussmix.accel: gaussmix {gaussmix.__version__} replaces {', '.join(replaced)}", file=sys.stderr)


def uninstall() -> None:
    """Undo `install`: imports from now on find what was there before."""
    global _installed
    if not _installed:
        return
    _installed = False
    sklearn.mixture.GaussianMixture = _SKLEARN_MIXTURE
    for name, module in _modules.items():
        if module is None:
            del sys.modules[name]
        else:
            sys.modules[name] = module
    _modules.clear()


def main(arguments: list[str] | None = None) -> None:
    """Run a script, or a module with -m, after `install`."""
    parser = argparse.ArgumentParser(prog="python -m gaussmix.accel", description=__doc__, add_help=True)
    parser.add_argument("-m", dest="module", action="store_true", help="SCRIPT is the name of a module")
    parser.add_argument("script", metavar="SCRIPT", help="the script to run")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments")
    options = parser.parse_args(arguments)
    if not options.module and not Path(options.script).is_file():
        parser.error(f"there is no file {options.script!r}; pass the path of a Python script")
    install()
    sys.argv = [options.script, *options.arguments]
    if options.module:
        sys.path[0] = ""
        runpy.run_module(options.script, run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(options.script).resolve().parent)
        runpy.run_path(options.script, run_name="__main__")


def _stand_ins(family: str) -> list[ModuleType]:
    """The modules of PyCave or torchgmm that gaussmix replaces, packages before what is in them."""
    from gaussmix import torch

    core = {name: getattr(torch, name) for name in CORE}
    mixture = {"GaussianMixture": GaussianMixture, **{name: getattr(torch, name) for name in MIXTURE_MODELS}}
    clustering = {"KMeans": KMeans, **{name: getattr(torch, name) for name in KMEANS_MODELS}}
    contents: dict[str, dict[str, Any]] = {
        family: {"set_logging_level": gaussmix.set_logging_level},
        f"{family}.bayes": {"GaussianMixture": GaussianMixture},
        f"{family}.bayes.core": core,
        f"{family}.bayes.gmm": mixture,
        f"{family}.clustering": {"KMeans": KMeans},
        f"{family}.clustering.kmeans": clustering,
    }
    modules = {name: _module(name, content) for name, content in contents.items()}
    for name, module in modules.items():
        package, _, short = name.rpartition(".")
        if package:
            setattr(modules[package], short, module)
    return list(modules.values())


def _module(name: str, content: dict[str, Any]) -> ModuleType:
    """A package of this content; what else is asked of it is looked for where the real one lies."""
    family, *inner = name.split(".")
    real = sys.modules.get(family)
    spec = find_spec(family) if real is None else real.__spec__
    places = (spec.submodule_search_locations or []) if spec is not None else []
    own = ModuleSpec(name, loader=None, is_package=True)
    own.submodule_search_locations = [str(Path(place, *inner)) for place in places]
    module = module_from_spec(own)
    module.__doc__ = f"gaussmix in the place of {name}."
    vars(module).update(content, __all__=list(content))
    return module


CORE = (
    "CovarianceType",
    "cholesky_precision",
    "covariance",
    "covariance_dim",
    "covariance_shape",
    "log_normal",
    "sample_normal",
)
MIXTURE_MODELS = ("GaussianMixtureModel", "GaussianMixtureModelConfig")
KMEANS_MODELS = ("KMeansModel", "KMeansModelConfig")


def _returns_tensors(*methods: str) -> Callable[[type[C]], type[C]]:
    """Makes these methods of a class return CPU torch tensors."""

    def converted(method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            import torch

            return torch.as_tensor(to_numpy(method(self, *args, **kwargs)))

        return call

    def decorate(cls: type[C]) -> type[C]:
        for name in methods:
            setattr(cls, name, converted(getattr(cls, name)))
        return cls

    return decorate


@_returns_tensors("predict", "predict_proba", "fit_predict", "score_samples", "sample")
class GaussianMixture(gaussmix.GaussianMixture):
    """`gaussmix.GaussianMixture` with PyCave's array convention: CPU torch tensors, whatever the data."""

    # What its files say: they are those of the class that it stands for.
    _stands_for = gaussmix.GaussianMixture

    @property
    def model_(self) -> Any:
        """The fitted mixture as a `GaussianMixtureModel` in host memory."""
        return super().model_.cpu()


@_returns_tensors("predict", "fit_predict", "transform", "fit_transform", "score_samples")
class KMeans(gaussmix.KMeans):
    """`gaussmix.KMeans` with PyCave's array convention: CPU torch tensors, whatever the data."""

    _stands_for = gaussmix.KMeans

    @property
    def model_(self) -> Any:
        """The centroids as a `KMeansModel` in host memory."""
        return super().model_.cpu()


if __name__ == "__main__":
    # As the module that scripts import, not as a second copy of it.
    from gaussmix.accel import main

    main()
