"""PyCave's `trainer_params`: what Lightning's settings mean where no Trainer runs."""

import logging
from dataclasses import dataclass
from typing import Any

from gaussmix._checks import check_integer
from gaussmix._warnings import warn_user
from gaussmix.rows._placement import Placement, environment

# Logging, checkpoints and summaries of Lightning's Trainer: nothing here depends on them.
IGNORED = (
    "callbacks",
    "default_root_dir",
    "detect_anomaly",
    "deterministic",
    "enable_checkpointing",
    "enable_model_summary",
    "inference_mode",
    "log_every_n_steps",
    "logger",
    "num_sanity_val_steps",
    "profiler",
)
ACCELERATORS = ("auto", "cpu", "cuda", "gpu")
# Lightning's words for the precision of the data; half precision would lose what EM sums up.
PRECISIONS = {
    **dict.fromkeys((32, "32", "32-true"), "float32"),
    **dict.fromkeys((64, "64", "64-true"), "float64"),
}
KNOWN = ("accelerator", "devices", "enable_progress_bar", "max_epochs", "num_nodes", "plugins", "precision", "strategy")


@dataclass(frozen=True)
class Settings:
    """What a fit or a prediction takes from `trainer_params`."""

    max_epochs: int
    placement: Placement
    progress_bar: bool
    fabric: dict[str, Any] | None  # arguments of Lightning Fabric where several processes are asked for


def settings(trainer_params: dict[str, Any] | None, default_max_epochs: int = 100, *, warn: bool = True) -> Settings:
    """What these parameters mean; raises for those that mean nothing, and may warn of those that are old or ignored."""
    params = translated(trainer_params, warn=warn)
    unknown = sorted(params.keys() - {*IGNORED, *KNOWN}, key=str)
    if unknown:
        raise TypeError(
            f"trainer_params has unknown settings {unknown}; known are {', '.join(sorted((*IGNORED, *KNOWN)))}"
        )
    if warn and (ignored := sorted(name for name in IGNORED if params.get(name))):
        warn_user(
            f"trainer_params {ignored} are ignored: gaussmix runs no Lightning Trainer; leave them out", UserWarning
        )
    params = {name: value for name, value in params.items() if value is not None}
    max_epochs = params.get("max_epochs", default_max_epochs)
    check_integer("trainer_params['max_epochs']", max_epochs, 0)
    precision = params.get("precision")
    if precision is not None and precision not in PRECISIONS:
        raise ValueError(
            f"trainer_params['precision'] must be 32 or 64, got {precision!r}: sums of EM need at least float32"
        )
    bar = params.get("enable_progress_bar")
    return Settings(
        max_epochs=int(max_epochs),
        placement=Placement(_device(params), None if precision is None else PRECISIONS[precision]),
        progress_bar=logging.getLogger("gaussmix").getEffectiveLevel() <= logging.INFO if bar is None else bool(bar),
        fabric=_fabric(params),
    )


def translated(trainer_params: dict[str, Any] | None, *, warn: bool = True) -> dict[str, Any]:
    """The parameters with the names of Lightning 1.x replaced by those of today."""
    if not isinstance(trainer_params, (dict, type(None))):
        raise TypeError(f"trainer_params must be a dict of Lightning's settings, got {trainer_params!r}")
    params = dict(trainer_params or {})
    replaced = {}
    if "gpus" in params:
        gpus = params.pop("gpus")
        replaced["gpus"] = {"accelerator": "gpu", "devices": gpus} if gpus else {"accelerator": "cpu"}
    if "progress_bar_refresh_rate" in params:
        rate = params.pop("progress_bar_refresh_rate")
        replaced["progress_bar_refresh_rate"] = {"enable_progress_bar": rate != 0}
    for name, new in replaced.items():
        if warn:
            remedy = ", ".join(f"{key}={value!r}" for key, value in new.items())
            warn_user(f"trainer_params[{name!r}] is Lightning 1.x; pass {remedy}", DeprecationWarning)
        params = new | params
    return params


def trainer(trainer_params: dict[str, Any] | None, defaults: dict[str, Any], overrides: dict[str, Any]) -> Any:
    """A Lightning Trainer with these settings."""
    try:
        from pytorch_lightning import Trainer
    except ImportError as error:
        raise ImportError(
            "trainer() makes a pytorch_lightning.Trainer, which is not installed; install gaussmix[lightning]"
        ) from error
    level = logging.getLogger("gaussmix").getEffectiveLevel()
    quiet = {
        "logger": False,
        "log_every_n_steps": 1,
        "enable_progress_bar": level <= logging.INFO,
        "enable_checkpointing": level <= logging.DEBUG,
        "enable_model_summary": level <= logging.DEBUG,
    }
    return Trainer(**quiet | defaults | translated(trainer_params) | overrides)


def _device(params: dict[str, Any]) -> str | None:
    accelerator = params.get("accelerator", "auto")
    if accelerator not in ACCELERATORS:
        raise ValueError(f"trainer_params['accelerator'] must be one of {ACCELERATORS}, got {accelerator!r}")
    devices = params.get("devices")
    if isinstance(devices, (list, tuple)) and len(devices) == 1 and accelerator != "cpu":
        return f"cuda:{devices[0]}"
    if accelerator == "auto":
        return environment().device
    return "cpu" if accelerator == "cpu" else "cuda:0"


def _fabric(params: dict[str, Any]) -> dict[str, Any] | None:
    """Arguments of Fabric, where more than one process is asked for."""
    devices = params.get("devices", 1)
    n_devices = len(devices) if isinstance(devices, (list, tuple)) else devices
    many = n_devices not in (1, "1", "auto") or params.get("num_nodes", 1) != 1
    asked = many or any(params.get(name) not in (None, "auto") for name in ("strategy", "plugins"))
    names = ("accelerator", "devices", "num_nodes", "plugins", "strategy")
    return {name: params[name] for name in names if name in params} if asked else None
