"""The action, the pre-commit hook and the extension of `hf`, run as their hosts run them."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from support.plain_adapter import make_adapter

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with a right adapter and a broken one."""
    folder = tmp_path_factory.mktemp("repository")
    right = make_adapter(folder, "Llama")
    broken = shutil.copytree(right, folder / "bro|ken")
    (broken / "adapter_model.safetensors").write_bytes(b"\0" * 100)
    return folder


def ran(words: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    places = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **environment}
    return subprocess.run(words, cwd=folder, env=places, capture_output=True, text=True, check=False)


@pytest.mark.process
@pytest.mark.parametrize(("chosen", "code"), [("", 1), ("adapter", 0)])
def test_the_action_checks_all_adapters(chosen: str, code: int, repository: Path, tmp_path: Path) -> None:
    action = yaml.safe_load((ROOT / "action.yml").read_text())
    step = action["runs"]["steps"][1]
    given = {name.upper(): field["default"] for name, field in action["inputs"].items()}
    assert step["env"].keys() <= given.keys()
    given |= {"ADAPTERS": chosen, "ENGINES": "vllm"}
    places = {"RUNNER_TEMP": str(tmp_path), "GITHUB_STEP_SUMMARY": str(tmp_path / "summary.md")}
    shell = ["bash", "--noprofile", "--norc", "-e", "-o", "pipefail", "-c", step["run"]]
    found = ran(shell, repository, GITHUB_ACTION_PATH=str(ROOT), **places, **given)
    assert found.returncode == code, found.stderr
    _, _, *rows = (tmp_path / "summary.md").read_text().splitlines()
    assert [row.split(" | ")[1] for row in rows] == ["right", "refused"][: len(rows)]
    assert all(row.count("|") == 7 for row in rows), "no name leaves its cell"
    assert len(rows) == (1 if chosen else 2)
    assert (tmp_path / "loraover.html").is_file()


@pytest.mark.process
def test_the_hook_checks_the_folders_of_changed_files(repository: Path) -> None:
    (hook,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
    files = [
        f"{folder}/{name}"
        for folder in ("adapter", "bro|ken")
        for name in ("adapter_config.json", "adapter_model.safetensors")
    ]
    found = ran([*shlex.split(hook["entry"]), *files], repository)
    assert found.returncode == 1
    assert "of 2 adapters" in found.stdout
    assert ran([*shlex.split(hook["entry"]), files[0]], repository).returncode == 0


@pytest.mark.process
def test_the_action_installs_its_own_checkout() -> None:
    action = yaml.safe_load((ROOT / "action.yml").read_text())
    script = f"python() {{ printf '%s\\n' \"$@\"; }}\n{action['runs']['steps'][0]['run']}"
    given = {"GITHUB_ACTION_PATH": "/one checkout", "EXTRAS": action["inputs"]["extras"]["default"]}
    said = subprocess.run(["bash", "-c", script], env=os.environ | given, capture_output=True, text=True)
    assert said.stdout.splitlines()[-1] == "/one checkout[remote]"


@pytest.mark.process
def test_the_extension_of_hf_checks(repository: Path) -> None:
    script = str(ROOT / "integrations" / "hf-loraover" / "hf-loraover")
    assert ran([script, "adapter", "--engine", "vllm"], repository).returncode == 0
    missing = ran(["/bin/sh", script, "adapter"], repository, PATH="/nowhere")
    assert missing.returncode == 2
    assert "pip install" in missing.stderr
