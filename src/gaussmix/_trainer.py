"""PyCave's `trainer_params`: what of Lightning's settings means something here."""

from typing import Any

from gaussmix._validation import check_integer

# Logging, checkpoints and summaries of Lightning's Trainer, which does not run here.
IGNORED = {
    "callbacks",
    "default_root_dir",
    "enable_checkpointing",
    "enable_model_summary",
    "enable_progress_bar",
    "log_every_n_steps",
    "logger",
}
# Where a single process on the data's own device is what was asked for.
SINGLE_DEVICE = {"accelerator": ("auto", "cpu"), "devices": (1, "1", "auto"), "num_nodes": (1,)}


def max_epochs(trainer_params: dict[str, Any] | None, default: int = 100) -> int:
    """The largest number of iterations; raises for settings that would change the run and are not supported."""
    params = dict(trainer_params or {})
    value = params.pop("max_epochs", default)
    check_integer("trainer_params['max_epochs']", value, 0)
    for name in IGNORED & params.keys():
        del params[name]
    for name, supported in SINGLE_DEVICE.items():
        setting = params.pop(name, supported[0])
        if setting not in supported:
            raise ValueError(
                f"trainer_params[{name!r}]={setting!r} is not supported; pass one of {supported} and put the data on "
                "the device that is to compute"
            )
    if params:
        raise TypeError(
            f"trainer_params has unknown settings {sorted(params)}; known are max_epochs, "
            f"{', '.join(sorted(IGNORED | SINGLE_DEVICE.keys()))}"
        )
    return int(value)
