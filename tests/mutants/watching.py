"""Faults of watches, of the search for crossed names, of references' sizes and memory, and of attestations."""

from __future__ import annotations

from mutants.mutant import Mutant, Selection

WATCHING = (
    Mutant(
        "watch-a-fault-of-a-cache-is-gone-with-the-next-check",
        'or last.caches not in ("as trained", "inconclusive", FAILED)',
        "or False",
        Selection("test_verify_caches.py", "each_nth_check"),
    ),
    Mutant(
        "watch-a-template-is-another-one-by-any-number-of-tokens",
        "without_tools == faults or _is_system_prompt(known)",
        "True",
        Selection("test_templates.py", "own_tokenizer"),
    ),
    Mutant(
        "watch-a-template-may-leave-tools-out",
        "is_read_as(each, known, each.asked.messages)",
        "is_read_as(each, (), each.asked.messages)",
        Selection("test_templates.py", "mistake and tools"),
    ),
    Mutant(
        "watch-a-running-check-takes-no-budget",
        "self._used += one.target.most",
        "self._used += 0",
        Selection("test_watch.py", "budget_holds"),
    ),
    Mutant(
        "watch-the-budget-of-an-hour-never-comes-back",
        "while self._spent and self._spent[0][0] <= now - HOUR_S:",
        "while self._spent and self._spent[0][0] <= now - 24 * HOUR_S:",
        Selection("test_watch.py", "budget_holds"),
    ),
    Mutant(
        "watch-a-restart-forgets-what-was-sent",
        "history.requests_since(now - HOUR_S)",
        "history.requests_since(now)",
        Selection("test_watch.py", "budget_holds"),
    ),
    Mutant(
        "watch-a-clock-that-is-set-back-silences-it",
        "one.due = min(one.due, now + one.target.interval_s * (1 + self.watched.config.jitter))",
        "one.due = max(one.due, now)",
        Selection("test_watch.py", "set_back"),
    ),
    Mutant(
        "watch-the-check-with-the-latest-time-is-the-last",
        "adapter = ? ORDER BY rowid DESC LIMIT 1",
        "adapter = ? ORDER BY at DESC LIMIT 1",
        Selection("test_watch.py", "set_back"),
    ),
    Mutant(
        "watch-a-search-keeps-its-budget",
        "check.requests - target.most - self._reserved.pop(target.key, 0)",
        "check.requests - target.most",
        Selection("test_verify_faults.py", "given_back"),
    ),
    Mutant(
        "watch-another-fault-is-no-change",
        "return self.verdict, self.fault",
        "return self.verdict, None",
        Selection("test_watch.py", "is_a_change"),
    ),
    Mutant(
        "watch-a-server-has-two-checks-at-once",
        "if one.due <= now and one.target.server.name not in running)",
        "if one.due <= now and not one.is_running)",
        Selection("test_watch.py", "is_a_change"),
    ),
    Mutant(
        "watch-every-verdict-is-shown-at-once",
        "float(verdict == last.verdict)",
        "1.0",
        Selection("test_watch_files.py", "name_figures"),
    ),
    Mutant(
        "watch-a-wrong-configuration-is-taken-for-read",
        "self._config_fault, self.metrics.is_config_read = str(error), False",
        "self._config_fault, self.metrics.is_config_read = str(error), True",
        Selection("test_watch.py", "process_shows"),
    ),
    Mutant(
        "watch-a-search-needs-no-room-in-the-budget",
        "target.others and reserve(target.search)",
        "target.others",
        Selection("test_verify_faults.py", "within_its_budget"),
    ),
    Mutant(
        "crossed-the-furthest-is-the-likeliest",
        "elif far < self._right:",
        "elif far > self._right:",
        Selection("test_verify_faults.py", "among_many"),
    ),
    Mutant(
        "crossed-the-nearest-needs-no-check",
        "if _answers_as(find_asker(read(), endpoint, mine.name, options), options):",
        "if True:",
        Selection("test_verify_faults.py", "no_other"),
    ),
    Mutant(
        "memory-more-than-there-is-is-tried",
        "limit = room if max_memory_gib is None else",
        "limit = None if max_memory_gib is None else",
        Selection("test_record.py", "memory_is_told"),
    ),
    Mutant(
        "attest-a-changed-file-is-as-attested",
        "elif sha256_of(files[name]) != digest:",
        "elif not files[name].exists():",
        Selection("test_attest.py", "change_is_named"),
    ),
    Mutant(
        "attest-a-further-file-is-as-attested",
        'is not attested" for name in files if name not in named]',
        'is not attested" for name in named if name not in named]',
        Selection("test_attest.py", "change_is_named"),
    ),
    Mutant(
        "attest-a-failed-certificate-is-a-warning",
        '"FAILED" if tests["failed"] else',
        '"WARNED" if tests["failed"] else',
        Selection("test_attest.py", "cannot_be_attested"),
    ),
    Mutant(
        "attest-a-reference-that-may-not-decide-passes",
        'power.get("decides") is True',
        'power.get("decides") is not False',
        Selection("test_attest.py", "unknown_power"),
    ),
    Mutant(
        "attest-takes-the-reference-of-another-adapter",
        "reason = misfit(path)",
        "reason = None",
        Selection("test_attest.py", "cannot_be_attested"),
    ),
    Mutant(
        "attest-an-earlier-signature-stays",
        "signed.unlink(missing_ok=True)",
        "(request.adapter / SIGNATURE_FILE).exists()",
        Selection("test_attest.py", "signature_holds"),
    ),
    Mutant(
        "attest-any-signature-holds",
        "faults += [] if fault is None else [fault]",
        "faults += []",
        Selection("test_attest.py", "signature_holds"),
    ),
    Mutant(
        "an old check shows what a server does now",
        "is_late = last is not None and now - last.at > LATE * target.interval_s",
        "is_late = False",
        Selection("test_watch_files.py", "long_ago"),
    ),
)
