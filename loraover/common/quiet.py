"""Keep the chatter of other libraries out of our own functions."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

IDLE_WARNINGS = (
    "Unable to fetch remote file",  # PEFT looks for the base model's config on the hub at every save
    "Could not find a config file",
    "'pin_memory' argument is set as true",
    "`past_key_values` is deprecated",  # a cache's old name, which older transformers know
)
"""Beginnings of warnings that a user can do nothing about."""

LOGGERS = ("transformers", "trl", "peft", "accelerate", "datasets", "huggingface_hub", "lm_eval", "bitsandbytes")


def ignore_idle_warnings() -> None:
    """Add filters for warnings that a user can do nothing about."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|trl|accelerate)\b.*")
    for message in IDLE_WARNINGS:
        warnings.filterwarnings("ignore", message=f".*{message}")


@contextmanager
def quiet_libraries_within(*, bars: bool) -> Iterator[None]:
    """Silence log lines, idle warnings and progress bars of other libraries during a block.

    Settings are put back afterwards. They belong to the process, so other threads are silenced as well.

    Args:
        bars: Whether the libraries' progress bars may show.
    """
    levels = {name: logging.getLogger(name).level for name in LOGGERS}
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.CRITICAL)  # lm_eval's errors show a request with its key
    deepspeed = logging.getLogger("DeepSpeed")  # sets its own level when Accelerate imports it, and writes to stdout
    was_disabled, deepspeed.disabled = deepspeed.disabled, True
    try:
        with ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            ignore_idle_warnings()
            if not bars:
                stack.enter_context(_no_bars())
            yield
    finally:
        deepspeed.disabled = was_disabled
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


@contextmanager
def _no_bars() -> Iterator[None]:
    """Disable every bar that tqdm makes; some of lm-evaluation-harness have no switch."""
    from tqdm.std import tqdm

    make = tqdm.__init__

    def make_disabled(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **{**kwargs, "disable": True})

    tqdm.__init__ = make_disabled
    try:
        yield
    finally:
        tqdm.__init__ = make
