"""Build a release into `dist`, and try it: `make release` runs this in an environment with the tools of a release.

    .venv-release/bin/python release/make.py [--tag v0.1.0] [--every-python]
    .venv-release/bin/python release/make.py --sizes torch serve export train     # of what has been built

`dist/packages` gets the wheel and the sdist; `dist` gets the checker of servers, the bill of materials of a base
installation (CycloneDX), the notes of the version, those for the owner of the name, and the recipe for conda-forge. The
wheel is installed into a new environment of each Python that is here, where a base installation has to do without
PyTorch what it promises, the README's commands among it. With --sizes, the sizes of installations are printed instead,
as docs/how-to/install.md has them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from time import perf_counter

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"
PYENV = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MIB = 2**20
CHECKER = """import sys
from pathlib import Path

from loraover_serve.verify.checker import write_checker

write_checker(Path(sys.argv[1]))
"""
"""Program that writes the checker by what the wheel has installed."""


def main() -> int:
    """Build and try; return 1 if the wheel was tried on no Python, or on fewer than asked for."""
    parser = argparse.ArgumentParser(description="Build a release into dist, and try it.")
    parser.add_argument("--tag", help="Tag of the release, which has to name the version that is built.")
    parser.add_argument("--every-python", action="store_true", help="Fail where a Python is not installed.")
    parser.add_argument("--sizes", nargs="*", metavar="EXTRA", help="Print the sizes of these installations instead.")
    asked = parser.parse_args()
    if asked.sizes is not None:
        return print_sizes(asked.sizes)
    version = read_version()
    text = notes(version, asked.tag)
    shutil.rmtree(DIST, ignore_errors=True)
    (DIST / "packages").mkdir(parents=True)
    (DIST / "release-notes.md").write_text(text)
    shutil.copyfile(ROOT / "release" / "owner.md", DIST / "owner-notes.md")
    print(f"loraover {version}", flush=True)
    wheel = build()
    write_recipe(version)
    missing, tried = [], 0
    for python in pythons():
        interpreter = find_python(python)
        if interpreter is None:
            missing.append(python)
            continue
        with tempfile.TemporaryDirectory(prefix="loraover-release-") as folder:
            environment = install(interpreter, wheel, Path(folder))
            if tried == 0:
                write_bill(environment, version)
                run(environment, "-c", CHECKER, DIST / "adapter_check.pyz", cwd=Path(folder))
            run(environment, ROOT / "tests" / "support" / "base_installation.py", cwd=Path(folder))
            run(interpreter, DIST / "adapter_check.pyz", "--help", quiet=True)
            tried += 1
    for python in missing:
        print(f"Python {python} is not installed here: the wheel was not tried on it", flush=True)
    for file in sorted(path for path in DIST.rglob("*") if path.is_file()):
        print(f"{file.relative_to(ROOT)}  {file.stat().st_size / 2**10:.0f} KiB")
    print("Before the first release, read dist/owner-notes.md: the name is not ours yet.")
    return 1 if not tried or (missing and asked.every_python) else 0


def read_version() -> str:
    """Return the version, which stands in one place."""
    found = re.search(r'__version__ = "(.+)"', (ROOT / "loraover" / "common" / "version.py").read_text())
    assert found is not None
    return found[1]


def notes(version: str, tag: str | None) -> str:
    """Return the section of a version in the changelog.

    A tag has to name the version, and the section then has a date.
    """
    changelog = (ROOT / "CHANGELOG.md").read_text()
    found = re.search(rf"^## {re.escape(version)}, (\S+)\n\n(.*?)(?=^## |\Z)", changelog, re.DOTALL | re.MULTILINE)
    if found is None:
        sys.exit(f"CHANGELOG.md has no section '## {version}, DATE'; write it.")
    if tag is not None and tag != f"v{version}":
        sys.exit(f"the tag is {tag}, and loraover/common/version.py has {version}; change one of them.")
    if tag is not None and not re.fullmatch(r"\d{4}-\d\d-\d\d", found[1]):
        sys.exit(f"CHANGELOG.md says '## {version}, {found[1]}'; write the day of the release.")
    return f"# LoRA-Over {version}\n\n{found[2].strip()}\n"


def build() -> Path:
    """Build the sdist, and the wheel from it, with the time of the commit; return the wheel."""
    done = subprocess.run(["git", "log", "-1", "--format=%ct"], cwd=ROOT, capture_output=True, text=True, check=True)
    os.environ["SOURCE_DATE_EPOCH"] = done.stdout.strip()
    packages = DIST / "packages"
    run(Path(sys.executable), "-m", "build", "--outdir", packages, ROOT, quiet=True)
    run(Path(sys.executable), "-m", "twine", "check", "--strict", *sorted(packages.iterdir()))
    return next(packages.glob("*.whl"))


def write_recipe(version: str) -> None:
    """Write the recipe for conda-forge, with the version and the SHA-256 of the sdist."""
    sdist = next((DIST / "packages").glob("*.tar.gz")).read_bytes()
    words = {"VERSION": version, "SHA256": hashlib.sha256(sdist).hexdigest()}
    recipe = (ROOT / "release" / "recipe.yaml").read_text().partition("\n")[2]  # the first line is about this file
    file = DIST / "recipe.yaml"
    file.write_text(re.sub("|".join(words), lambda found: words[found[0]], recipe))
    code = "import sys; from rattler_build import *; Stage0Recipe.from_file(sys.argv[1]).render(VariantConfig())"
    run(Path(sys.executable), "-c", code, file)


def pythons() -> list[str]:
    """Return the versions of Python that the package is for, such as "3.11"."""
    classifiers = [re.fullmatch(r"Programming Language :: Python :: (3\.\d+)", one) for one in PROJECT["classifiers"]]
    return [found[1] for found in classifiers if found]


def find_python(version: str) -> Path | None:
    """Return a Python of a version, from the path or from pyenv; None if there is none that runs."""
    names = [shutil.which(f"python{version}"), *sorted(PYENV.glob(f"{version}.*/bin/python"))]
    code = "import sys; print(*sys.version_info[:2], sep='.')"
    for name in filter(None, names):
        done = subprocess.run([name, "-c", code], capture_output=True, text=True, check=False)
        if done.returncode == 0 and done.stdout.strip() == version:
            return Path(name)
    return None


def install(interpreter: Path, requirement: Path | str, folder: Path) -> Path:
    """Install a package into a new environment without pip; print what that takes, and return its python."""
    started, new = perf_counter(), folder / "new"
    run(interpreter, "-m", "venv", "--without-pip", new)
    environment = new / "bin" / "python"
    run(Path(sys.executable), "-m", "pip", "--python", environment, "install", "-q", "--no-compile", requirement)
    packages = next((new / "lib").glob("python*/site-packages"))
    files = (path for path in packages.rglob("*") if path.is_file())
    size = sum(path.stat().st_size for path in files) / MIB
    number = len(list(packages.glob("*.dist-info")))
    seconds = perf_counter() - started
    print(f"{interpreter.resolve().name}: {number} packages, {size:.0f} MiB, installed in {seconds:.0f} s", flush=True)
    return environment


def print_sizes(extras: list[str]) -> int:
    """Install the wheel alone, and with each extra, into new environments."""
    wheel, interpreter = next((DIST / "packages").glob("*.whl")), find_python(pythons()[0])
    if interpreter is None:
        sys.exit(f"Python {pythons()[0]} is not installed here.")
    for extra in ("", *extras):
        print(f"{extra or 'base'}: ", end="", flush=True)
        with tempfile.TemporaryDirectory(prefix="loraover-sizes-") as folder:
            install(interpreter, f"{wheel}[{extra}]" if extra else wheel, Path(folder))
    return 0


def write_bill(environment: Path, version: str) -> None:
    """Write the bill of materials of an environment in CycloneDX's form."""
    bill = DIST / f"loraover-{version}.cdx.json"
    command = ["-m", "cyclonedx_py", "environment", environment, "--pyproject", ROOT / "pyproject.toml"]
    run(Path(sys.executable), *command, "--output-reproducible", "--output-file", bill, quiet=True)
    content = json.loads(bill.read_text())
    content["metadata"]["component"]["version"] = version  # which pyproject.toml does not have
    bill.write_text(json.dumps(content, indent=1) + "\n")


def run(python: Path, *words: Path | str, cwd: Path = ROOT, quiet: bool = False) -> None:
    """Run a Python with some words; end here if it fails."""
    variables = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        [str(python), *map(str, words)], cwd=cwd, env=variables, check=False, capture_output=quiet, text=True
    )
    if done.returncode:
        print(done.stdout or "", done.stderr or "")
        sys.exit(f"failed: {python.name} {' '.join(map(str, words))}")


if __name__ == "__main__":
    sys.exit(main())
