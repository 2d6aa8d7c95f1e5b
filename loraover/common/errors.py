"""Every error that this project raises on purpose.

    LoraOverError
    ├── ConfigError      (ValueError)    an option, a recipe or an optimizer that cannot be used
    ├── ShapeError       (ValueError)    a tensor whose shape contradicts what it must fit
    ├── CheckpointError  (ValueError)    a LoRA-Over checkpoint or adapter that cannot be trusted
    ├── FoldError        (ArithmeticError) a fold whose result would be wrong or lossy
    ├── ExportError      (ValueError)    an adapter, a base model or a graph that cannot be exported as asked
    ├── DivergedError    (ArithmeticError) training whose weights or cores are no longer finite numbers
    ├── DataError        (ValueError)    training or evaluation data that cannot be read
    ├── EngineError      (RuntimeError)  an inference engine that does not start, or refuses a request
    │   └── UnscoredError                a server that answers without logprobs
    ├── ParityError      (ValueError)    measurements that cannot answer what was asked
    ├── ProcessError     (RuntimeError)  a process of a run that has failed or does not answer
    └── OutputError      (OSError)       a destination that cannot be written
        └── UnwrittenReportError         a finished measurement whose report could not be written

Commands turn each of them into one message on standard error and exit code 2.
"""

from __future__ import annotations

from typing import Any


class LoraOverError(Exception):
    """Base of this project's errors: what was found, what was expected, what to do.

    Attributes:
        is_told: Whether another process of the run shows the message to the user.
    """

    is_told = False


class ConfigError(LoraOverError, ValueError):
    """An option, a recipe or an optimizer that cannot be used."""


class ShapeError(LoraOverError, ValueError):
    """A tensor whose shape contradicts what it must fit."""


class CheckpointError(LoraOverError, ValueError):
    """A LoRA-Over checkpoint or adapter that cannot be trusted."""


class FoldError(LoraOverError, ArithmeticError):
    """A fold whose result would be wrong or lossy."""


class ExportError(LoraOverError, ValueError):
    """An adapter, a base model or a graph that cannot be exported as asked."""


class DivergedError(LoraOverError, ArithmeticError):
    """Training whose weights or cores are no longer finite numbers."""


class DataError(LoraOverError, ValueError):
    """Training or evaluation data that cannot be read."""


class EngineError(LoraOverError, RuntimeError):
    """An inference engine that does not start, or refuses a request."""


class UnscoredError(EngineError):
    """A server that answers without logprobs, so that nothing can be compared."""


class ParityError(LoraOverError, ValueError):
    """Measurements that cannot answer what was asked."""


class ProcessError(LoraOverError, RuntimeError):
    """A process of a run that has failed or does not answer."""


class OutputError(LoraOverError, OSError):
    """A destination that cannot be written."""


class UnwrittenReportError(OutputError):
    """A finished measurement or verification whose output could not be written.

    Args:
        message: Reason why the output could not be written.
        report: The `ParityReport` or `VerifyReport`. The folder `report.kept` holds it as a file, with engines' logs;
            None means that it could not be written there either.
    """

    def __init__(self, message: str, report: Any) -> None:
        super().__init__(message)
        self.report = report


def printable(text: str) -> str:
    """Escape characters by which a text could move the cursor or colour the terminal, or that XML cannot hold."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def own_kind(error: BaseException) -> type[BaseException]:
    """Return an error's class directly below LoraOverError, which another process raises by its name."""
    return next((kind for kind in type(error).__mro__ if kind in LoraOverError.__subclasses__()), type(error))


PHRASES = (
    "can't allocate memory",
    "not enough memory",
    "CUDA error: out of memory",
    "MPS backend out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
"""Words of PyTorch's RuntimeErrors. Nothing else distinguishes these errors from others."""


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one that it was raised from, says that memory could not be allocated."""
    import torch

    while error is not None:
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            return True
        is_torchs = isinstance(error, RuntimeError) and not isinstance(error, LoraOverError)
        if is_torchs and any(phrase in str(error) for phrase in PHRASES):
            return True
        error = error.__cause__
    return False
