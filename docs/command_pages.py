"""Hook of mkdocs that writes a page for each group of commands, from the help of the commands themselves."""

from __future__ import annotations

import html
import inspect
from collections.abc import Iterator
from typing import Any

import click
from mkdocs.structure.files import File, Files

from loraover.cli import SHORTCUTS
from loraover.cli import cli as loraover
from loraover.common.command_line import Command
from loraover_export.cli import cli as export
from loraover_serve.cli import cli as serve
from loraover_serve.engines import ENGINES, engine_class

GROUPS = {"loraover": loraover, "loraover export": export, "loraover serve": serve}


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of commands to the site."""
    for name, group in GROUPS.items():
        place = f"commands/{name.split()[-1]}.md"
        files.append(File.generated(config, place, content="\n\n".join(page(name, group)) + "\n"))
    return files


def page(name: str, group: click.Group) -> Iterator[str]:
    """Yield the paragraphs of one group's page."""
    context = click.Context(group, info_name=name)
    yield f"# {name}"
    yield paragraphs(group)
    for word in group.list_commands(context):
        command = group.get_command(context, word)
        if group is not loraover and word in SHORTCUTS:
            yield f"## {name} {word}"
            yield f"The same as [`loraover {word}`](loraover.md#loraover-{word})."
        elif command is not None and not command.hidden and f"{name} {word}" not in GROUPS:
            yield from section(click.Context(command, context, info_name=word))
    if group is serve:
        yield from engines()


def engines() -> Iterator[str]:
    """Yield the paragraphs on engines, which are those of the table that the commands take them from."""
    yield "## Engines"
    yield "`loraover verify` starts each of these, and `loraover serve parity` those that it can measure."
    lines = ["| `--engine` | engine | what it loads | parity | install |", "| --- | --- | --- | --- | --- |"]
    for name, entry in ENGINES.items():
        is_timed = "yes" if entry.is_timed else "no"
        lines.append(f"| `{name}` | {entry.title} | {entry.takes} | {is_timed} | {engine_class(name).hint} |")
    yield "\n".join(lines)


def section(context: click.Context) -> Iterator[str]:
    """Yield the paragraphs of one command: what it does, examples, arguments and options."""
    command = context.command
    yield f"## {context.command_path}"
    yield paragraphs(command)
    if isinstance(command, Command):
        yield "\n".join(("```sh", *command.examples, "```"))
    yield "\n".join(("```text", command.get_usage(context).removeprefix("Usage: "), "```"))
    records = (option.get_help_record(context) for option in command.get_params(context) if option.name != "help")
    rows = [record for record in records if record is not None and record[1]]
    lines = (f"| <code>{cell(name)}</code> | {cell(meaning)} |" for name, meaning in rows)
    yield "\n".join(("| option | meaning |", "| --- | --- |", *lines))


def paragraphs(command: click.Command) -> str:
    """Return a command's help as Markdown, in which lines that click may not wrap are code."""
    parts = inspect.cleandoc(command.help or "").split("\n\n")
    return "\n\n".join(
        "```text\n" + part.removeprefix("\b\n") + "\n```" if part.startswith("\b") else part for part in parts
    )


def cell(text: str) -> str:
    """Return a text that can stand in a cell of a table."""
    return html.escape(" ".join(text.split()), quote=False).replace("|", "&#124;").replace("*", "&#42;")
