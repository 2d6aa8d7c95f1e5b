"""The distribution as a stranger gets it: a wheel that was built from the sdist, in a new environment."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from collections import Counter
from collections.abc import Iterable
from graphlib import TopologicalSorter
from importlib import import_module
from importlib.metadata import Distribution, distribution, packages_distributions
from pathlib import Path

import grimp
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from loraover.common.extras import EXTRAS
from loraover.common.version import __version__

pytestmark = pytest.mark.process

ROOT = Path(__file__).parents[1]
HOMES = {
    "loraover": ROOT,
    "loraover_export": ROOT / "export",
    "loraover_serve": ROOT / "serve",
    "loraover_lab": ROOT / "lab",
}
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
    for package in ("loraover", "export", "serve", "lab"):
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
    for package in HOMES:
        assert f"{package}/py.typed" in names
    assert "loraover/training/recipes/demo.yaml" in names
    shipped = (path for root in HOMES.items() for path in files_of(*root))
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


def test_the_recipe_for_conda_has_the_commands_and_requirements_of_the_base() -> None:
    recipe = yaml.safe_load((ROOT / "release" / "recipe.yaml").read_text())
    found = recipe["requirements"]["run"]
    found[0] = found[0].replace("${{ python_min }}", recipe["context"]["python_min"])
    wanted = [f"python{PROJECT['requires-python']}", *PROJECT["dependencies"]]
    one, other = (
        [(canonicalize_name(r.name), r.specifier) for r in map(Requirement, names)] for names in (found, wanted)
    )
    assert one == other
    assert recipe["build"]["python"]["entry_points"] == [f"{name} = {at}" for name, at in PROJECT["scripts"].items()]
    assert recipe["about"]["summary"] == PROJECT["description"]


@pytest.mark.parametrize(
    ("tag", "message"),
    [
        ("v9.9", "the tag is v9.9, and loraover/common/version.py has"),
        (f"v{__version__}", "write the day of the release"),
    ],
    ids=["another version", "no day"],
)
def test_a_tag_needs_its_version_and_a_day_in_the_changelog(tag: str, message: str) -> None:
    if f"## {__version__}, unreleased" not in (ROOT / "CHANGELOG.md").read_text():
        pytest.skip("the present version has its day")
    command = [sys.executable, str(ROOT / "release" / "make.py"), "--tag", tag]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert message in done.stderr


def test_workflows_call_targets_of_make_and_only_the_last_job_publishes() -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for file in (ROOT / ".github" / "workflows").iterdir():
        workflow = yaml.safe_load(file.read_text())
        runs = [step.get("run", "") for job in workflow["jobs"].values() for step in job["steps"]]
        called = [words.split()[1] for words in runs if words.startswith("make ")]
        assert called
        assert set(called) <= {*targets}
        assert workflow["permissions"] == {"contents": "read"}
        trusted = [name for name, job in workflow["jobs"].items() if "id-token" in job.get("permissions", {})]
        assert trusted == (["publish"] if file.name == "release.yml" else [])


@pytest.mark.parametrize("package", HOMES)
def test_a_package_has_the_names_that_type_checkers_see(package: str) -> None:
    tree = ast.parse((HOMES[package] / package / "__init__.py").read_text())
    (checked,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {name.asname for node in checked.body if isinstance(node, ast.ImportFrom) for name in node.names}
    assert set(import_module(package).__all__) - {"__version__"} == seen
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nothing'"):
        import_module(package).nothing  # noqa: B018


def test_no_module_imports_itself_through_others() -> None:
    graph = grimp.build_graph(
        "loraover", "loraover_export", "loraover_serve", "loraover_lab", exclude_type_checking_imports=True
    )
    TopologicalSorter({one: graph.find_modules_directly_imported_by(one) for one in graph.modules}).prepare()


def test_a_name_of_a_class_stands_for_one_thing() -> None:
    files = [file for package, root in HOMES.items() for file in (root / package).rglob("*.py")]
    names = Counter(name for file in files for name in re.findall(r"^class (\w+)", file.read_text(), re.MULTILINE))
    assert {name for name, count in names.items() if count > 1} == set()
