"""How functions of this library report their progress."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Reporter:
    """Receiver of progress, which shows nothing.

    Functions of this library print nothing. They take a reporter, to which they report what they are doing. Derive a
    class and override both methods to show the progress elsewhere.

    Example:
        ```python
        import logging

        from loraover import Reporter


        class Log(Reporter):
            def line(self, text):
                logging.info(text)
        ```
    """

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    @property
    def shows_bars(self) -> bool:
        """Whether progress bars of other libraries may be shown too."""
        return False

    def line(self, text: str) -> None:
        """Receive one line of text about the work."""

    @contextmanager
    def task(self, label: str, total: int) -> Iterator[Callable[[int], None]]:
        """Follow one piece of work, done in the `with` block, of `total` units such as steps or files.

        Yields:
            A function to call with the amount done so far.
        """
        yield lambda done: None


SILENT = Reporter()
