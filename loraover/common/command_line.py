"""Behaviour that all commands share: help, lazy imports, error messages and exit codes.

The exit code is 0 if the work is done, 1 if a check failed, 2 if the request is unusable, and 130 after Ctrl-C. Checks
that can be inconclusive also have 3: those of `loraover export fold`, `onnx` and `gguf`, and of `loraover verify`
and `parity`.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from pkgutil import resolve_name as imported
from types import FrameType
from typing import Any, NoReturn

import click

from loraover.common.errors import DataError, EngineError, LoraOverError, printable
from loraover.common.extras import missing_package
from loraover.common.quiet import ignore_idle_warnings

# Keeps it private which models a user trains; huggingface_hub reads this when it is imported.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

# OpenBLAS, by which NumPy multiplies matrices, starts threads when it is imported. They wait actively for work, which
# takes each command 0.05 s of processor time. With the least value that OpenBLAS takes, they sleep at once.
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")

INTERRUPTED = "Interrupted. No incomplete file was left."
INTERRUPTED_CODE = 130


class Command(click.Command):
    """A command that shows complete command lines under "Examples" below its help.

    Args:
        examples: These command lines.
    """

    def __init__(self, *args: Any, examples: Sequence[str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.examples = tuple(examples)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Examples"):
            for line in self.examples:
                formatter.write(f"{'':{formatter.current_indent}}{line}\n")
        super().format_epilog(ctx, formatter)


class LazyGroup(Command, click.Group):
    """A group of commands, each of which is imported only when it is needed.

    Args:
        examples: Complete command lines.
        commands_at: Place of each command, as "module:name", or a function that makes it, by the command's name.
        plugins: Group of entry points that add commands of packages that depend on this one.
        shortcuts: Group of each command that can be called without the group's name too, by the command's name.
        tree: Place of the group of all commands, from which a mistyped or misplaced name is corrected; None: this
            group.
    """

    def __init__(
        self,
        *args: Any,
        commands_at: Mapping[str, str | Callable[[], click.Command]],
        plugins: str | None = None,
        shortcuts: Mapping[str, str] | None = None,
        tree: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._commands_at = dict(commands_at)
        self._plugins = plugins
        self._shortcuts = dict(shortcuts or {})
        self._tree = tree

    def list_commands(self, ctx: click.Context) -> list[str]:
        short = (name for name, group in self._shortcuts.items() if group in self._found)
        return [*self._commands_at, *short, *sorted(self._found)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in self._commands_at:
            place = self._commands_at[cmd_name]
            command: click.Command = imported(place) if isinstance(place, str) else place()
            return command
        plugin = self._found.get(self._shortcuts.get(cmd_name, cmd_name))
        loaded: click.Command | None = None if plugin is None else plugin.load()
        if cmd_name in self._shortcuts and isinstance(loaded, click.Group):
            return loaded.get_command(ctx, cmd_name)
        return loaded

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        name = args[0]
        if name not in self.list_commands(ctx) and name[:1] != "-" and not ctx.resilient_parsing:
            from difflib import get_close_matches

            tree: LazyGroup = self if self._tree is None else imported(self._tree)
            places: dict[str, str] = {}  # the shortest command line that ends with each word
            for words in sorted(tree._places(ctx), key=len):
                places.setdefault(words[-1], " ".join((str(tree.name), *words)))
            meant = next((f" Did you mean `{places[one]}`?" for one in get_close_matches(name, places, n=1)), "")
            ctx.fail(f"No such command {name!r}.{meant}")
        return super().resolve_command(ctx, args)

    def _places(self, ctx: click.Context) -> Iterator[tuple[str, ...]]:
        """Yield the words of each command of this group and of the groups in it, which are imported."""
        for name in self.list_commands(ctx):
            yield (name,)
            group = self.get_command(ctx, name) if name in self._found else None
            if isinstance(group, LazyGroup):
                yield from ((name, *words) for words in group._places(ctx))

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands with the full first sentence of each one's help, on several lines if needed."""
        commands = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl(
                [(name, command.get_short_help_str(limit=sys.maxsize)) for name, command in commands if command]
            )

    @cached_property
    def _found(self) -> dict[str, EntryPoint]:
        return {} if self._plugins is None else {point.name: point for point in entry_points(group=self._plugins)}


def run(command: click.Command, arguments: Sequence[str] | None = None) -> int:
    """Run a click command, by default with the process's own arguments, and show each error as one message.

    Returns:
        The exit code; a command's function returns it, or None for 0.
    """
    with _noticing_interrupts() as interrupted:
        try:
            result = command.main(args=None if arguments is None else list(arguments), standalone_mode=False)
        except BaseException as error:
            if interrupted or isinstance(error, click.Abort | KeyboardInterrupt):
                print(INTERRUPTED, file=sys.stderr)
                return INTERRUPTED_CODE
            if isinstance(error, click.ClickException):
                error.show()
            elif isinstance(error, LoraOverError):
                has_lines = isinstance(error, DataError | EngineError)  # of its rows, or of an engine's log
                lines = str(error).splitlines() if has_lines else [str(error)]
                if not error.is_told:
                    print("error: " + "\n".join(map(printable, lines)), file=sys.stderr)
            elif missing := missing_package(error):
                print(f"error: {missing}", file=sys.stderr)
            else:
                raise
            return 2
    return result if isinstance(result, int) else 0


@contextmanager
def _noticing_interrupts() -> Iterator[list[int]]:
    """Collect the signals of Ctrl-C: compiled libraries may turn KeyboardInterrupt into another exception."""
    signals: list[int] = []

    def notice(number: int, frame: FrameType | None) -> None:
        signals.append(number)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    previous = signal.signal(signal.SIGINT, notice)
    try:
        yield signals
    finally:
        signal.signal(signal.SIGINT, previous)


def entry_point(command: click.Command) -> Callable[[], Any]:
    """Return the function that a console script calls."""

    def main() -> None:
        code = run(command)
        if code == INTERRUPTED_CODE:
            end_at_once(code)
        sys.exit(code)

    return main


def end_at_once(code: int) -> NoReturn:
    """End the process without the interpreter's cleanup, for which a user of PyTorch would wait seconds."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # the reader has gone
            stream.flush()
    os._exit(code)


def quiet_libraries() -> None:
    """Hide the warnings and progress bars of libraries in a command's output; their errors still show."""
    import logging

    if not sys.stderr.isatty():  # both are read when the library is imported
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")
    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)  # warns on import that it found no GPU kernels
    logging.getLogger("accelerate").setLevel(logging.ERROR)  # warns of weights that stay in their files
    logging.getLogger("DeepSpeed").disabled = True  # sets its own level on import, and writes to stdout
    # transformers reads both when it is imported, which takes seconds that some commands do not need
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if "transformers" in sys.modules:
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
    ignore_idle_warnings()
