"""The history of a watch: what it keeps, and what is no history or cannot be written."""

from __future__ import annotations

import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest

from loraover.common.errors import OutputError
from loraover_serve.watch.history import DAY_S, Check, History

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


def test_a_history_that_another_program_holds_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loraover_serve.watch.history.WAIT_S", 0.1)
    history = History(tmp_path / "h.sqlite")
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
