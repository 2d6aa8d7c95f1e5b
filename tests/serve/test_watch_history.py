"""The history of a watch: what it keeps, what is no history or cannot be written, and what readers then see."""

from __future__ import annotations

import socket
import sqlite3
import struct
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loraover.common.errors import OutputError
from loraover.common.reporter import SILENT
from loraover_serve.watch.history import DAY_S, Check, History
from loraover_serve.watch.run import serving

NOW = 1_700_000_000.0
CHECK = Check("prod", "shop", NOW, "failed", None, "a reason", 0.1, 0.2, 1.0, 0.1, 8)


def test_a_history_of_another_program_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("a text, and no database" * 100)
    with pytest.raises(OutputError, match="cannot be used as a history"):
        History(tmp_path / "text")
    with sqlite3.connect(tmp_path / "later") as later:
        later.execute("PRAGMA user_version = 7")
    with pytest.raises(OutputError, match="a history of version 7"):
        History(tmp_path / "later")


def test_a_history_that_another_program_holds_is_told(tmp_path: Path) -> None:
    history = History(tmp_path / "h.sqlite", wait_s=0.1)
    with sqlite3.connect(tmp_path / "h.sqlite") as other:
        other.execute("BEGIN EXCLUSIVE")
        message = r"h\.sqlite: cannot be used as a history: database is locked; see whether"
        with pytest.raises(OutputError, match=message):
            history.add(CHECK)
        with pytest.raises(OutputError, match=message):
            history.forget_before(NOW)
    history.add(CHECK)
    assert history.last(CHECK.key) == CHECK


def test_the_last_change_is_kept_however_old_it_is(tmp_path: Path) -> None:
    history = History(tmp_path / "h.sqlite")
    changes = [replace(CHECK, at=NOW + day * DAY_S, changed=day in (0, 2)) for day in range(9)]
    for each in changes:
        history.add(each)
    history.forget_before(NOW + 7 * DAY_S)
    assert history.last_change(CHECK.key) == changes[2]
    assert history.since(CHECK.key, 0, 99) == [changes[2], *changes[7:]]


def test_a_reader_is_told_of_a_held_history_and_may_hang_up(capfd: pytest.CaptureFixture[str]) -> None:
    def held() -> Any:
        raise OutputError("h.sqlite: database is locked")

    watched = SimpleNamespace(config=SimpleNamespace(host="127.0.0.1", port=0))
    canary, metrics = SimpleNamespace(watched=watched, targets=list), SimpleNamespace(text=held)
    watch: Any = SimpleNamespace(page=held, metrics=metrics, canary=canary)
    with serving(watch, SILENT) as url:
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as reader:
            reader.sendall(b"GET /heal")
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # it is cut off
        for path in ("/", "/metrics"):
            with pytest.raises(urllib.error.HTTPError, match="503") as caught:
                urllib.request.urlopen(f"{url}{path}")
            assert caught.value.read() == b"h.sqlite: database is locked\n"
    assert "Traceback" not in capfd.readouterr().err
