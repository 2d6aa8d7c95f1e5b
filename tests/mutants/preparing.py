"""Faults of what prepares any adapter for an engine: its sources, its fleets, and an installation without PyTorch."""

from __future__ import annotations

from mutants.mutant import Mutant, Selection

PREPARING = (
    # Any adapter for an engine
    Mutant(
        "prepared-key-without-the-chat-template",
        "source / REFERENCE_FILE, source / TEMPLATE_FILE]",
        "source / REFERENCE_FILE]",
        Selection("test_prepare.py", "new_chat_template"),
    ),
    Mutant(
        "prepare-key-without-weights",
        "    if reads_weights:\n",
        "    if False:\n",
        Selection("test_prepare.py", "key_is_of"),
    ),
    Mutant(
        "prepare-without-a-lock",
        "held.enter_context(hold_lock(locks / folder.name, wait=True))",
        "pass",
        Selection("test_prepare.py", "many_callers"),
    ),
    Mutant(
        "prepare-publishes-what-changed",
        "if file_states(source) != states:",
        "if False:",
        Selection("test_prepare.py", "change_meanwhile"),
    ),
    Mutant(
        "prefix-of-another-part",
        "if any(name.startswith(lists) for name in shapes):",
        "if any(name in layout.modules for name in shapes):",
        Selection("test_prefixes.py", "another_parts"),
    ),
    Mutant(
        "prefix-of-another-shape",
        "or (b[0], a[1]) == shapes[name]",
        "or True",
        Selection("test_prepare.py", "shapes_decide"),
    ),
    Mutant(
        "check-asks-all-engines",
        "(all if request.engines else any)(check.is_served",
        "all(check.is_served",
        Selection("test_check.py", "exit_code_and_json"),
    ),
    # Addresses and fleets
    Mutant(
        "sources-keep-what-changed",
        "if now.get(name) != found.get(name):",
        "if False:",
        Selection("test_sources.py", "changes_in_between"),
    ),
    Mutant(
        "sources-follow-other-hosts",
        "if urlsplit(url)[:2] != self._parts[:2]:",
        "if False:",
        Selection("test_sources.py", "another_host"),
    ),
    Mutant(
        "sources-take-any-name",
        'return name not in ("", ".", "..") and os.sep not in name',
        "return os.sep + os.sep not in name",
        Selection("test_sources.py", "leads_out"),
    ),
    Mutant(
        "fleet-loses-what-a-kill-takes",
        "lost += running.values()\n            return",
        "return",
        Selection("test_fleet.py", "killed_takes_nothing"),
    ),
    # A base installation, without PyTorch
    Mutant(
        "rounding-takes-ties-up",
        "even += 0x7FFF",
        "even[...] = 0x8000",
        Selection("test_rounding.py", "around_every_tie"),
    ),
    Mutant(
        "headers-of-other-layers-are-taken",
        "layers[str(index)]) != layers[str(index)]:",
        "layers[str(index)]).keys() != layers[str(index)].keys():",
        Selection("test_without_torch.py", "not_what_the_class"),
    ),
    Mutant(
        "headers-have-no-tied-head",
        "if is_tied and weight is not None:",
        "if weight is None:",
        Selection("test_without_torch.py", "headers_say"),
    ),
    Mutant(
        "gguf-every-family-has-a-head",
        "if family.has_head or path != HEAD else None",
        "",
        Selection("test_without_torch.py", "gguf_package"),
    ),
)
