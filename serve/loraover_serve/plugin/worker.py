"""The process beside a server that prepares adapters: requests and answers are lines of JSON on its pipes.

It runs in the server's environment, or in that of LORAOVER_PYTHON. It ends when the server closes the pipe.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

NICENESS = 10
"""Niceness of the worker, since the server's requests come first."""

CHARACTERS = 2000
"""Longest reason or note in characters: an answer must fit in a line, and the texts of adapters may be long."""


def main() -> None:
    """Answer requests until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server, which closes the pipe
    os.nice(NICENESS)
    with os.fdopen(os.dup(1), "wb") as answers:
        os.dup2(2, 1)  # what libraries print goes to the server's log
        import loraover_export.prepare.run  # noqa: F401  (before there are threads, which must not import it at once)
        from loraover.common.command_line import quiet_libraries

        quiet_libraries()
        lock, pool = Lock(), ThreadPoolExecutor(int(sys.argv[1]))

        def work(line: bytes) -> None:
            request = json.loads(line)
            answer = json.dumps({"id": request.pop("id"), **answer_to(request)}).encode() + b"\n"
            with lock:
                answers.write(answer)
                answers.flush()

        for line in sys.stdin.buffer:
            pool.submit(work, line)
        pool.shutdown(wait=False, cancel_futures=True)
    os._exit(0)  # without waiting for adapters that nobody asks for any more


def answer_to(request: dict[str, Any]) -> dict[str, Any]:
    """Prepare one adapter, and say how it went.

    The request has `source`, or `hub` with a name of the hub, and the other arguments of `prepare_adapter`. The answer
    has `prepared`, with the fields of `PreparedAdapter` and the file `record`; or `refused`, with the reason. An
    adapter of the hub is called by its name there, not by its folder.
    """
    from loraover.common.errors import LoraOverError
    from loraover_export import prepare_adapter
    from loraover_export.prepare.cache import RECORD_FILE

    name, source = request.pop("hub", None), request.pop("source", None)
    try:
        if name is not None:
            from loraover.sources.fetch import ADAPTER_FILES
            from loraover.sources.hub import fetch_repository

            repository, _, revision = name.partition("@")
            source = str(fetch_repository(repository, revision or None, "model", ADAPTER_FILES))
        found = prepare_adapter(source, **request)
    except LoraOverError as error:
        reason = str(error) if None in (name, source) else str(error).replace(source, name)
        return {"refused": _shortened(reason)}
    except Exception as error:  # a fault of ours: the answer has its kind, the log the rest
        traceback.print_exc()
        return {"refused": f"preparing it failed with {type(error).__name__}; the server's log has more."}
    record = Path(request["cache"]) / found.digest / RECORD_FILE
    texts = {"path": str(found.path), "certificate": str(found.certificate), "record": str(record)}
    return {"prepared": vars(found) | texts | {"notes": [_shortened(note) for note in found.notes]}}


def _shortened(text: str) -> str:
    left = len(text) - CHARACTERS
    return text if left <= 0 else f"{text[:CHARACTERS]} ... ({left} characters are left out)"


if __name__ == "__main__":
    main()
