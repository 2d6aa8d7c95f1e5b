"""The distribution as a stranger gets it: a wheel that was built from the sdist, in a new environment."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.process

ROOT = Path(__file__).parents[1]
COMMANDS = ("loraover", "loraover-export", "loraover-serve")


def run(*command: str | Path, cwd: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for package in ("loraover", "export", "serve"):
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    run(
        sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, source, cwd=folder
    )  # the wheel from the sdist
    assert len(list(folder.glob("loraover-*.tar.gz"))) == 1
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def stranger(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of scripts in a new environment that holds the wheel, and the dependencies of this one by path.

    A path line does not run the .pth files behind it, so the editable install of this checkout stays invisible.
    """
    folder = tmp_path_factory.mktemp("stranger")
    venv.create(folder, with_pip=True)
    scripts = folder / ("Scripts" if os.name == "nt" else "bin")
    run(scripts / "python", "-m", "pip", "install", "--quiet", "--no-deps", wheel, cwd=folder)
    packages = next(p for p in folder.rglob("site-packages") if p.is_dir())
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return scripts


def files_of(package: str, root: Path) -> set[str]:
    """Paths of a package's modules and templates, as a wheel names them."""
    found = (path for ending in ("py", "j2") for path in (root / package).rglob(f"*.{ending}"))
    return {str(path.relative_to(root)) for path in found}


def test_wheel_holds_code_types_templates_and_recipes(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for package in ("loraover", "loraover_export", "loraover_serve"):
        assert {f"{package}/py.typed", f"{package}/cli/__init__.py"} <= names
    assert "loraover/training/recipes/demo.yaml" in names
    sources = {"loraover": ROOT, "loraover_export": ROOT / "export", "loraover_serve": ROOT / "serve"}
    shipped = (path for root in sources.items() for path in files_of(*root))
    assert set(shipped) <= names
    assert not [name for name in names if name.startswith("test") or "/test" in name]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_answer_in_a_new_environment(stranger: Path, command: str, tmp_path: Path) -> None:
    assert "--help" in run(stranger / command, "--help", cwd=tmp_path)
    assert "0.1.0" in run(stranger / command, "--version", cwd=tmp_path)


def test_library_works_in_a_new_environment(stranger: Path, tmp_path: Path) -> None:
    program = (
        "import loraover, loraover_export, torch\n"
        "from loraover.training.recipe import load_recipe\n"
        "from loraover.overparam.decompositions import Mpo\n"
        "assert 'site-packages' in loraover.__file__, loraover.__file__\n"
        "cores = Mpo().init(torch.eye(4, 6).double()[None], [torch.Generator()])\n"
        "assert torch.allclose(Mpo().contract(cores, 4, 6)[0], torch.eye(4, 6).double())\n"
        "print(load_recipe('demo').model)\n"
    )
    assert "SmolLM2" in run(stranger / "python", "-c", program, cwd=tmp_path)


@pytest.mark.parametrize("module", ["loraover.cli", "loraover_export.cli", "loraover_serve.cli"])
def test_help_imports_no_heavy_package(module: str) -> None:
    command = [sys.executable, "-X", "importtime", "-m", module, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "click" in imported
    assert not imported & {"torch", "transformers", "peft", "numpy", "pydantic", "httpx2", "onnxruntime", "vllm"}
