"""The distribution as a stranger gets it: a wheel that was built from the sdist, in a new environment."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from collections.abc import Iterable
from importlib.metadata import Distribution, distribution, packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from loraover.common.extras import EXTRAS

pytestmark = pytest.mark.process

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def run(*command: str | Path, cwd: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
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


def needed(requirements: Iterable[str], found: dict[str, Distribution]) -> dict[str, Distribution]:
    """The distributions that requirements name, and those that these need."""
    for requirement in map(Requirement, requirements):
        name = canonicalize_name(requirement.name)
        if name not in found and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
            found[name] = distribution(name)
            needed(found[name].requires or [], found)
    return found


@pytest.fixture(scope="module")
def stranger(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of scripts in a new environment that holds the wheel, and links to the packages that its base needs."""
    folder = tmp_path_factory.mktemp("stranger")
    venv.create(folder)
    scripts = folder / ("Scripts" if os.name == "nt" else "bin")
    run(sys.executable, "-m", "pip", "--python", scripts / "python", "install", "-q", "--no-deps", wheel, cwd=folder)
    packages = next(p for p in folder.rglob("site-packages") if p.is_dir())
    for other in needed(PROJECT["dependencies"], {}).values():
        for name in {file.parts[0] for file in other.files or []} - {"..", "__pycache__"}:
            (packages / name).symlink_to(str(other.locate_file(name)))
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


def test_a_base_installation_checks_prepares_and_verifies_without_torch(stranger: Path, tmp_path: Path) -> None:
    run(stranger / "python", ROOT / "tests" / "support" / "base_installation.py", cwd=tmp_path)


def test_extras_that_messages_name_bring_the_package() -> None:
    brought = {name: {canonicalize_name(one) for one in names} for name, names in packages_distributions().items()}
    for package, extras in EXTRAS.items():
        for extra in extras:
            bring = {canonicalize_name(one) for one in names_of(extra)}
            assert brought.get(package, bring) & bring or package == "cryptography", (package, extra)


def names_of(extra: str) -> set[str]:
    """Names of the packages that an extra brings, with those of the extras that it names."""
    names: set[str] = set()
    for one in map(Requirement, PROJECT["optional-dependencies"][extra]):
        names |= {one.name} if one.name != PROJECT["name"] else {n for e in one.extras for n in names_of(e)}
    return names


@pytest.mark.parametrize("module", ["loraover.cli", "loraover_export.cli", "loraover_serve.cli"])
def test_help_imports_no_heavy_package(module: str) -> None:
    command = [sys.executable, "-X", "importtime", "-m", module, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "click" in imported
    assert not imported & {"torch", "transformers", "peft", "numpy", "pydantic", "httpx2", "onnxruntime", "vllm"}
