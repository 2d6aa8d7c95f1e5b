"""The reports for other projects in `docs/upstream/`: each reproduction shows its fault, and each patch mends it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from support.long_questions import LongCase
from support.real_servers import llama_server
from support.vllm_command import vllm_command

pytestmark = [pytest.mark.engine, pytest.mark.matrix]

UPSTREAM = Path(__file__).parents[2] / "docs" / "upstream"
EQUALITY = UPSTREAM / "vllm-lora-request-equality.py"


def run(script: Path) -> subprocess.CompletedProcess[str]:
    python = vllm_command().parent / "python"
    return subprocess.run([python, script], capture_output=True, text=True)


def test_two_versions_under_one_path_share_their_blocks() -> None:
    done = run(UPSTREAM / "vllm-prefix-cache-under-one-path.py")
    assert (done.returncode, "have the same keys" in done.stdout) == (0, True), done.stdout + done.stderr[-2000:]


def test_two_versions_under_one_name_are_one_element_of_a_set() -> None:
    done = run(EQUALITY)
    assert (done.returncode, "runs but is not activated" in done.stdout) == (0, True), done.stdout + done.stderr[-2000:]


def test_a_missing_folder_raises_inside_a_step() -> None:
    done = run(UPSTREAM / "vllm-missing-folder.py")
    expected = (0, "raises LoRAAdapterNotFoundError")
    assert (done.returncode, done.stdout.strip()[-len(expected[1]) :]) == expected, done.stdout + done.stderr[-2000:]


def test_a_new_path_is_a_namespace_of_the_prefix_cache() -> None:
    done = run(UPSTREAM / "trl-prefix-cache-docstring.py")
    assert (done.returncode, "the keys: True" in done.stdout) == (0, True), done.stdout + done.stderr[-2000:]


def test_async_grpo_fetches_a_micro_batch_before_the_sync() -> None:
    done = subprocess.run([sys.executable, UPSTREAM / "trl-async-grpo-staleness.py"], capture_output=True, text=True)
    assert (done.returncode, "staleness_max is 0" in done.stdout) == (0, True), done.stdout + done.stderr[-2000:]


def test_the_hosts_prompt_cache_mixes_adapters(long_case: LongCase, tmp_path: Path) -> None:
    with llama_server(long_case.base, long_case.adapter, tmp_path) as url:
        command = [sys.executable, str(UPSTREAM / "llamacpp-host-prompt-cache.py"), url]
        done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, "tokens came from the cache" in done.stdout) == (0, True), done.stdout + done.stderr
    print(done.stdout)


def test_the_patch_tells_versions_apart(tmp_path: Path) -> None:
    """On vLLM's own file, which imports nothing of vLLM, with the test of the patch."""
    python = vllm_command().parent / "python"
    where = "import importlib.util as u; print(u.find_spec('vllm').submodule_search_locations[0])"
    found = subprocess.run([python, "-c", where], capture_output=True, text=True, check=True).stdout.split()[-1]
    lora = tmp_path / "vllm" / "lora"
    lora.mkdir(parents=True)
    for package in (lora, lora.parent):
        (package / "__init__.py").touch()
    (lora / "request.py").write_bytes(Path(found, "lora", "request.py").read_bytes())
    tests = (
        "import runpy, sys; sys.path.insert(0, '.')\n"
        "for name, test in runpy.run_path('tests/lora/test_lora_request.py').items():\n"
        "    if name.startswith('test_'):\n        test()\n"
    )
    patch = EQUALITY.with_suffix(".patch")
    subprocess.run(["git", "apply", "--include=tests/*", patch], cwd=tmp_path, check=True)
    before = subprocess.run([python, "-c", tests], cwd=tmp_path, capture_output=True, text=True)
    assert "AssertionError" in before.stderr
    subprocess.run(["git", "apply", "--include=vllm/*", patch], cwd=tmp_path, check=True)
    after = subprocess.run([python, "-c", tests], cwd=tmp_path, capture_output=True, text=True)
    assert after.returncode == 0, after.stderr
