"""Every command of `loraover`, those of export and serve included: its help, and examples that its parser takes."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.shell_completion import get_completion_class

from loraover.cli import SHORTCUTS, cli
from loraover.common.command_line import INTERRUPTED, Command, LazyGroup, run
from loraover_export.known_faults import known_faults

ROOT = Path(__file__).parents[1]
CODE = re.compile(r"^```(?:ba)?sh\n(.*?)^```|^((?: {4}.*\n)+)", re.MULTILINE | re.DOTALL)
"""Commands of a page: in blocks with a fence, or indented."""
FRAGMENTS = ("Of ", "That ", "For ", "Likewise")
"""Beginnings of a help text that says nothing alone."""


def commands(group: click.Group, *words: str) -> Iterator[tuple[str, click.Command]]:
    for name in group.list_commands(click.Context(group)):
        found = group.get_command(click.Context(group), name)
        assert found is not None
        yield " ".join((*words, name)), found
        if isinstance(found, click.Group):
            yield from commands(found, *words, name)


ALL = dict(commands(cli, "loraover"))
LEAVES = {name: found for name, found in ALL.items() if not isinstance(found, click.Group)}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_completes_commands_and_options(shell: str) -> None:
    """By click's own completion, which docs/how-to/install.md shows how to switch on."""
    kind = get_completion_class(shell)
    assert kind is not None
    complete = kind(cli, {}, "loraover", "_LORAOVER_COMPLETE")
    assert [item.value for item in complete.get_completions([], "tr")] == ["train"]
    assert "vllm" in [item.value for item in complete.get_completions(["export"], "v")]
    assert "--check-error" in [item.value for item in complete.get_completions(["export", "fold"], "--ch")]


def parse(line: str) -> None:
    """Parse a command line with its command's parser, and run nothing."""
    program, *words = shlex.split(line)
    found, context = ALL.get(program, cli), click.Context(cli, info_name=program)
    if program != "loraover":  # loraover-export and loraover-serve are groups of loraover as well
        found = ALL[program.replace("-", " ")]
    while isinstance(found, click.Group):
        name, inner, words = found.resolve_command(context, words)
        assert inner is not None
        found, context = inner, click.Context(inner, parent=context, info_name=name)
    found.parse_args(context, words)


def test_make_runs_command_lines_that_parse() -> None:
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    lines = re.findall(r"^\t@?\$\(BIN\)/(loraover(?:-\w+)? .*)", makefile, flags=re.MULTILINE)
    stages = ("loraover export fold ", "loraover record ", "loraover serve parity ")
    assert [stage for stage in stages if not any(line.startswith(stage) for line in lines)] == []
    for line in lines:
        parse(line.partition("||")[0])


def command_lines(page: Path) -> list[str]:
    """Lines of a page's blocks that call loraover."""
    blocks = "\n".join(fenced or textwrap.dedent(indented) for fenced, indented in CODE.findall(page.read_text()))
    lines = re.findall(r"^loraover .*", blocks.replace("\\\n", " "), flags=re.MULTILINE)
    return [re.split(r" #| [>|] ", line)[0] for line in lines]


PAGES = {str(page.relative_to(ROOT)): page for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))}
SHOWN = {name: lines for name, page in PAGES.items() if (lines := command_lines(page))}


@pytest.mark.parametrize("page", SHOWN)
def test_a_page_shows_command_lines_that_parse(page: str) -> None:
    for line in SHOWN[page]:
        parse(line)


def test_most_pages_show_commands() -> None:
    assert len(SHOWN) > 25
    assert sum(map(len, SHOWN.values())) > 80


@pytest.mark.parametrize("page", ["AGENTS.md", "docs/what-now.md"])
def test_commands_within_sentences_can_be_parsed(page: str) -> None:
    lines = re.findall(r"`(loraover [^`]*)`", (ROOT / page).read_text())
    assert len(lines) > 7
    for line in lines:
        parse(line)


def test_a_decision_ends_in_one_command() -> None:
    """Or in a link, where the command depends on what is found."""
    page = (ROOT / "docs" / "what-now.md").read_text()
    ends = re.findall(r"^ *- (?!\*\*.+\*\*\n).+", page, re.MULTILINE)
    assert len(ends) > 20
    assert [line for line in ends if not re.search(r"`(?:loraover|vllm) [^`]+`|\]\([\w-]+\.md", line)] == []
    assert [line for line in ends if len(re.findall(r"`(?:loraover|vllm) ", line)) > 1] == []


def test_known_faults_name_commands_that_can_be_parsed() -> None:
    lines = {fault.command for fault in known_faults().faults if fault.command and fault.command.startswith("loraover")}
    assert len(lines) > 7
    for line in lines:
        parse(line.replace("SECONDS", "60"))


def test_the_comparison_names_commands_and_options_that_there_are() -> None:
    text = (ROOT / "docs" / "comparison.md").read_text()
    lines = re.findall(r"`(loraover [^`]*)`", text)
    assert len(lines) > 8
    for line in lines:
        name = " ".join(word for word in line.split() if not word.startswith("--"))
        options = {spelling for option in LEAVES[name].params for spelling in option.opts}
        assert {word for word in line.split() if word.startswith("--")} <= options, line


def test_a_cell_of_the_comparison_is_a_command_or_a_source_or_says_no() -> None:
    table = [line for line in (ROOT / "docs" / "comparison.md").read_text().splitlines() if line.startswith("| ")]
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert len(head) == 8
    assert len(rows) > 12
    for name, ours, *others in rows:
        assert re.search(r"`|\]\(", ours), name
        for cell in others:
            said = cell in ("no", "not known", "-", "bytes are equal or not")
            assert said or re.search(r"\]\(|\]\[", cell), (name, cell)


def test_every_stage_has_its_commands() -> None:
    assert set(LEAVES) >= {
        *(f"loraover {name}" for name in ("train", "study", "compare", "eval", "inspect", "recipes", "doctor")),
        *(f"loraover {name}" for name in ("check", "record", "verify")),
        *(
            f"loraover export {name}"
            for name in (
                "check",
                "fold",
                "combine",
                "convert",
                "shrink",
                "merge",
                "inspect-merge",
                "diff",
                "vllm",
                "onnx",
                "gguf",
                "mlx",
                "attest",
            )
        ),
        *(f"loraover serve {name}" for name in ("up", "verify", "parity", "record", "watch")),
    }


@pytest.mark.parametrize("name", list(ALL))
def test_help_is_not_cut_off(name: str) -> None:
    found = ALL[name]
    shown = " ".join(found.get_help(click.Context(found, info_name=name)).split())
    assert found.help
    assert " ".join(found.help.partition("\f")[0].split()) in shown
    if isinstance(found, LazyGroup):
        for inner in (ALL[f"{name} {word}"] for word in found.list_commands(click.Context(found))):
            assert " ".join(inner.get_short_help_str(limit=sys.maxsize).split()) in shown


@pytest.mark.parametrize("name", list(LEAVES))
def test_each_option_has_a_help_text_that_reads_alone(name: str) -> None:
    options = [option for option in LEAVES[name].params if isinstance(option, click.Option)]
    for option in options:
        said = option.help or ""
        assert said[:1].isupper() or said.startswith("`"), f"{name} {option.opts[0]}: {said!r}"
        assert not said.startswith(FRAGMENTS), f"{name} {option.opts[0]}: {said!r}"
        assert said.endswith((".", ")")), f"{name} {option.opts[0]}: {said!r}"


@pytest.mark.parametrize("name", ["loraover", *ALL])
def test_each_command_has_examples_that_it_parses(name: str) -> None:
    found = ALL.get(name, cli)
    assert isinstance(found, Command | LazyGroup)
    assert found.examples
    group, _, verb = name.removeprefix("loraover ").rpartition(" ")
    start = f"loraover {verb}" if SHORTCUTS.get(verb) == group else name
    for line in found.examples:
        assert line.startswith(f"{start} ") or line == start, line
        parse(line.partition(" > ")[0])


@pytest.mark.parametrize("verb", SHORTCUTS)
def test_a_shortcut_is_the_command_of_its_group(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert ALL[f"loraover {verb}"].callback is not None
    for words in ([verb], [SHORTCUTS[verb], verb]):
        assert run(cli, [*words, "--help"]) == 0
    short, long = capsys.readouterr().out.split("Usage: ")[1:]
    assert short.partition("\n")[2] == long.partition("\n")[2]


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        ("chek a", "loraover check"),
        ("evaluate a", "loraover eval"),
        ("fold a -o b", "loraover export fold"),
        ("up", "loraover serve up"),
        ("serve fold a", "loraover export fold"),
        ("export verfy a", "loraover verify"),
        ("serve tarin", "loraover train"),
        ("frobnicate", None),
    ],
)
def test_a_mistyped_or_misplaced_verb_names_the_right_one(
    words: str, meant: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(cli, words.split()) == 2
    shown = capsys.readouterr().err
    assert "No such command" in shown
    assert shown.rstrip().endswith(f"Did you mean `{meant}`?" if meant else "'frobnicate'.")


def test_the_other_programs_name_commands_of_the_whole_tree(capsys: pytest.CaptureFixture[str]) -> None:
    for program, word in (("export", "verify"), ("serve", "chekc")):
        group = ALL[f"loraover {program}"]
        assert run(group, [word]) == 2
        assert "Did you mean `loraover " in capsys.readouterr().err


OPTIONS_OF_ONE_NAME = {
    "--max-lora-rank": {"export prepare", "serve up"},
    "--approximate-to-rank": {"export convert", "export prepare", "serve up"},
    "--new-tokens": {"eval", "record", "verify", "serve parity"},
    "--key-variable": {"eval", "verify"},
    "--cache": {"export prepare", "serve up"},
}
EARLIER_NAMES = {
    "--max-rank 8": "export prepare a --cache b",
    "-o b": "export prepare a",
    "--rank 8": "export convert a -o b",
    "--approximate 8": "serve up --adapters a",
    "--max-new-tokens 8": "eval a --task gsm8k",
    "--endpoint-key-variable KEY": "verify a",
}


@pytest.mark.parametrize("option", OPTIONS_OF_ONE_NAME)
def test_one_thing_is_one_option(option: str) -> None:
    for name in OPTIONS_OF_ONE_NAME[option]:
        assert option in [one.opts[-1] for one in LEAVES[f"loraover {name}"].params]


@pytest.mark.parametrize("option", EARLIER_NAMES)
def test_an_earlier_name_of_an_option_is_taken_and_not_shown(option: str) -> None:
    line = f"loraover {EARLIER_NAMES[option]}"
    parse(f"{line} {option}")
    name = next(name for name in LEAVES if line.startswith(f"{name} "))
    assert option.split()[0] not in [spelling for one in LEAVES[name].params for spelling in one.opts]


def test_help_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys\nfrom loraover.cli import cli\nfrom loraover.common.command_line import run\n"
        "from loraover_export.cli import COMMANDS\n"
        "verbs = ('train', 'study', 'compare', 'eval', 'inspect', 'recipes', 'doctor', 'check', 'verify')\n"
        "exports = [['export', verb] for verb in COMMANDS]\n"
        "from loraover_serve.cli import cli as serve\n"
        "served = [['serve', verb] for verb in serve.list_commands(None)]\n"
        "for words in ([], *([verb] for verb in verbs), *exports, *served):\n"
        "    assert run(cli, [*words, '--help']) == 0\n"
        "slow = {'torch', 'transformers', 'peft', 'scipy', 'numpy', 'pydantic', 'httpx2', 'onnxruntime', 'vllm'}\n"
        "slow = {*slow, 'ssl'} & sys.modules.keys()\n"
        "sys.exit(f'imported {slow}' if slow else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_interrupted_process_shows_its_output_and_ends_without_clearing_up() -> None:
    code = (
        "import atexit, click\nfrom loraover.common.command_line import entry_point\n"
        "atexit.register(print, 'cleared up')\n"
        "def work():\n    print('shown')\n    raise KeyboardInterrupt\n"
        "entry_point(click.Command('work', callback=work))()\n"
    )
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=buffered)
    assert (ended.returncode, ended.stdout) == (130, "shown\n")
    assert ended.stderr.strip() == INTERRUPTED
