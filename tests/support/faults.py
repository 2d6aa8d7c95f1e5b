"""Faults of this program, and of what it stands on, that several tests plant: a fixture for each.

Arrange them through a fixture here where no file, variable or argument can bring them about, and several tests need
the same one. `tests/conftest.py` makes them known to all tests.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
import pytest
from torch import Tensor

from loraover.checkpoint.adapter_config import AdapterConfig
from loraover.common.arrays import as_array, as_tensor

Fold = Callable[[Callable[[Path], object]], None]
Rounding = Callable[..., None]
Scaling = Callable[[float], None]
Failure = Callable[[BaseException, Literal["loaded", "adapted", "run"]], None]


@pytest.fixture
def wrong_fold(monkeypatch: pytest.MonkeyPatch) -> Fold:
    """Function that makes every fold edit the adapter that it has written and certified."""
    from loraover_export.fold import run

    right = run.write_folded

    def plant(edit: Callable[[Path], object]) -> None:
        def write(checkpoint: Any, folder: Path, *rest: Any) -> Any:
            certificates = right(checkpoint, folder, *rest)
            edit(folder)
            return certificates

        monkeypatch.setattr(run, "write_folded", write)

    return plant


@pytest.fixture
def wrong_rounding(monkeypatch: pytest.MonkeyPatch) -> Rounding:
    """Function that changes what a module of ours stores, after the rounding to its type.

    Its arguments are the change; modules with the names of the functions that round there, by default the one by which
    adapters are written; and the key of the only tensor to change.
    """
    from loraover.adapters.numerics import rounding

    def plant(change: Callable[[Tensor], Tensor], *places: tuple[Any, str], only: str | None = None) -> None:
        for module, name in places or ((rounding, "round_tensor"),):
            right = getattr(module, name)

            def wrong(first: Any, *rest: Any, right: Callable[..., Any] = right) -> Any:
                stored = right(first, *rest)
                if only is not None and first != only:
                    return stored
                return as_array(change(as_tensor(stored))) if isinstance(stored, np.ndarray) else change(stored)

            monkeypatch.setattr(module, name, wrong)

    return plant


@pytest.fixture
def wrong_scaling(monkeypatch: pytest.MonkeyPatch) -> Scaling:
    """Function that makes this program, but not PEFT, read every scaling as so many times what it is."""
    right = AdapterConfig.scaling

    def plant(factor: float) -> None:
        monkeypatch.setattr(AdapterConfig, "scaling", lambda config, module: factor * right(config, module))

    return plant


@pytest.fixture
def failing_model(monkeypatch: pytest.MonkeyPatch) -> Failure:
    """Function that makes a Llama fail in transformers or in PEFT, when it is loaded, adapted or run."""
    import transformers
    from peft import PeftModel

    places = {
        "loaded": (transformers.AutoModelForCausalLM, "from_pretrained"),
        "adapted": (PeftModel, "from_pretrained"),
        "run": (transformers.LlamaForCausalLM, "forward"),
    }

    def plant(error: BaseException, when: Literal["loaded", "adapted", "run"]) -> None:
        def fail(*_: object, **__: object) -> NoReturn:
            raise error

        monkeypatch.setattr(*places[when], fail)

    return plant


@pytest.fixture
def no_model(failing_model: Failure) -> None:
    """No model can be loaded: what is refused all the same is refused before one is."""
    failing_model(AssertionError("a model is loaded"), "loaded")


@pytest.fixture
def full_disk_of_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full as soon as a page is written, and has room for other files."""
    from loraover.reporting.html_page import Page

    def fill(page: Page, path: Path) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(Page, "write", fill)
