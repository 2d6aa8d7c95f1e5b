"""What a base installation does without PyTorch: run it with the python of an environment that holds nothing else.

    NEW/bin/python tests/support/base_installation.py

The adapter and the base model of `tests/golden/base_installation` are those of `save_base` and `save_adapter` in
`support/verified.py`, with one layer of hidden size 32, and the reference is what `record` found for four questions.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

TESTS = Path(__file__).parents[1]
GOLDEN = TESTS / "golden" / "base_installation"
ABSENT = ("torch", "transformers", "peft", "onnxruntime")
MODEL = "owner/base"
NAMES = ("loraover", "loraover-export", "loraover-serve")
ROOT = TESTS.parent
BASE = GOLDEN / "base"
HERE = {" my-adapter ": f" {GOLDEN / 'adapter'} ", " merged ": f" {BASE} ", "--model base": f"--model {BASE}"}
"""What stands here for the folders in the README's commands."""


def commands(address: str) -> Iterator[tuple[str, int, str]]:
    """Command lines, the exit code of each, and a text that it prints."""
    from loraover.common.extras import INSTALL

    adapter, base = GOLDEN / "adapter", BASE
    for name in NAMES:
        yield f"{name} --version", 0, "version"
    yield f"loraover check {adapter} --model {base}", 0, "check passed"
    yield f"loraover check {adapter} --model {MODEL} --engine vllm", 0, "check passed"
    yield f"loraover export prepare {adapter} --model {base} --cache prepared", 0, "1 prepared"
    verify = f"loraover verify --reference {adapter} --endpoint {address} --base-name base --served-name"
    yield from readme_commands(address)
    yield f"{verify} right", 0, "as trained"
    yield f"{verify} wrong", 1, "Served as base"
    yield "loraover doctor --offline", 0, INSTALL.format("torch")
    prepare = f"loraover export prepare {adapter} --model {base} --cache other"
    yield f"{prepare} --engine mlx", 2, INSTALL.format("torch")
    for name in ("mpo", "svd", "chain", "eigen", "dynamic"):
        yield f"loraover export fold {TESTS / 'golden' / 'schema_3' / name} -o {name}", 0, "fold passed"
    yield (
        f"loraover export fold {TESTS / 'golden' / 'schema_3' / 'mpo'} -o a --check-error",
        2,
        INSTALL.format("torch"),
    )
    yield "loraover train demo -o run", 2, INSTALL.format("train")


def readme_commands(address: str) -> Iterator[tuple[str, int, str]]:
    """Command lines of the README: those that need more than a base installation name the extra."""
    from loraover.common.extras import INSTALL

    blocks = "".join(re.findall(r"^```sh\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL))
    lines = [f"{line.partition('#')[0].strip()} " for line in blocks.splitlines() if line.startswith("loraover ")]
    for line in lines:
        for name, place in HERE.items():
            line = line.replace(name, place)
        if line.startswith(("loraover check", "loraover export vllm")):
            yield f"{line}--model {BASE}", 0, "passed"
        elif line.startswith("loraover verify"):
            named = line.replace("http://localhost:8000", address).rpartition("--served-name")[0]
            yield f"{named}--base-name base --served-name right", 0, "as trained"
        elif line.startswith("loraover export inspect-merge"):
            yield line, 1, "not merged"
        elif line.startswith(("loraover doctor", "loraover serve ")):
            yield f"{line}--help", 0, "Usage"
        elif line.startswith("loraover record"):
            yield f"{line}-o other.json.gz", 2, INSTALL.format("serve")
        else:
            yield f"{line}--model {BASE}", 2, "pip install"


def show_every_help() -> int:
    """Make the help of every command; return their number."""
    import click

    from loraover.cli import cli

    def helps(command: click.Command, parent: click.Context | None) -> int:
        context = click.Context(command, parent)
        assert command.get_help(context)
        if not isinstance(command, click.Group):
            return 1
        found = (command.get_command(context, name) for name in command.list_commands(context))
        return 1 + sum(helps(one, context) for one in found if one is not None)

    return helps(cli, None)


def is_right(line: str, code: int, text: str, folder: str, variables: dict[str, str]) -> bool:
    """Run a command, print what became of it, and return whether it did as it should."""
    name, *words = line.split()
    command = [str(Path(sys.executable).parent / name), *words]
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)
    right = done.returncode == code and text in done.stdout + done.stderr
    print(f"{'ok    ' if right else 'FAILED'}  exit {done.returncode}  {line.replace(f'{TESTS}/', '')}", flush=True)
    if not right:
        print(done.stdout, done.stderr)
    return right


def main() -> int:
    sys.path.insert(0, str(TESTS))
    from loraover_serve.judge.reference import read_reference

    from support.hub_server import model_hub
    from support.openai_server import openai_server
    from support.reference_server import AS_BASE, RIGHT, FromReference

    if present := [name for name in ABSENT if find_spec(name) is not None]:
        sys.exit(f"{', '.join(present)}: expected an environment without")
    print(f"{show_every_help()} commands have a help")
    reference = read_reference(GOLDEN / "adapter" / "adapter_reference.json.gz")
    answers = FromReference(reference, lambda name: RIGHT if name == "right" else AS_BASE)
    served = {"base": None, "right": "base", "wrong": "base"}
    files = {path.name: path.read_bytes() for path in (GOLDEN / "base").iterdir()}
    hubs = model_hub(MODEL, files, gives_weights=False)
    with tempfile.TemporaryDirectory() as folder, openai_server(answers, served) as server, hubs as hub:
        variables = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "HF_"))}
        variables |= {"XDG_CACHE_HOME": folder, "HF_HOME": folder, "HF_ENDPOINT": hub}
        done = [is_right(*command, folder, variables) for command in commands(server.url)]
    return 0 if all(done) else 1


if __name__ == "__main__":
    sys.exit(main())
