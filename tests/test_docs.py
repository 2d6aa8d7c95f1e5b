"""The documentation: its site builds without a warning, its API pages have every public name, and its links work."""

from __future__ import annotations

import html
import inspect
import os
import re
import runpy
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import click
import pytest

from loraover import Budget, LoraOverConfig
from loraover_serve.engines import ENGINES

ROOT = Path(__file__).parents[1]
API_PAGES = {"loraover": "loraover", "loraover_export": "export", "loraover_serve": "serve"}
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs", reason="mkdocs is not installed")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.process
@pytest.mark.parametrize("package", API_PAGES)
def test_every_public_name_has_an_entry(package: str, site: Path) -> None:
    page = (site / "api" / API_PAGES[package] / "index.html").read_text()
    entries = set(re.findall(rf'<h\d id="{package}\.(\w+)"', page))
    assert entries == set(import_module(package).__all__) - {"__version__"}


@pytest.mark.process
def test_every_field_shows_its_description(site: Path) -> None:
    page = (site / "api" / "loraover" / "index.html").read_text()
    shown = " ".join(html.unescape(re.sub(r"<[^>]+>", "", page)).split())
    fields = LoraOverConfig.model_fields | Budget.model_fields
    assert [name for name, field in fields.items() if not field.description or field.description not in shown] == []


@pytest.mark.parametrize("package", API_PAGES)
def test_every_argument_of_a_public_function_is_described(package: str) -> None:
    griffe = pytest.importorskip("griffe", reason="griffe is not installed")
    missing = []
    for name in import_module(package).__all__:
        function = getattr(import_module(package), name)
        if inspect.isfunction(function):
            sections = griffe.Docstring(inspect.getdoc(function)).parse("google")
            described = {
                entry.name for section in sections if section.kind.value == "parameters" for entry in section.value
            }
            missing += [f"{name}({argument})" for argument in inspect.signature(function).parameters.keys() - described]
    assert missing == []


@pytest.mark.process
@pytest.mark.parametrize("group", ["loraover", "loraover export", "loraover serve"])
def test_every_command_has_a_section_with_its_options(group: str, site: Path) -> None:
    page = (site / "commands" / group.split()[-1] / "index.html").read_text()
    shown = html.unescape(page)
    program: click.Group = import_module({"loraover": "loraover.cli"}.get(group, f"loraover_{group[9:]}.cli")).cli
    context = click.Context(program)
    for name in program.list_commands(context):
        command = program.get_command(context, name)
        assert command is not None
        if not isinstance(command, click.Group):
            assert f'id="{group.replace(" ", "-")}-{name}"' in page
            assert not [option for option in command.params if option.opts[-1] not in shown]


@pytest.mark.process
def test_the_page_of_serve_has_the_table_of_engines(site: Path) -> None:
    page = (site / "commands" / "serve" / "index.html").read_text()
    assert [entry.title for entry in ENGINES.values() if f"<td>{entry.title}</td>" not in page] == []


@pytest.mark.process
def test_the_home_page_is_the_readme(site: Path) -> None:
    page = (site / "index.html").read_text()
    assert 'href="how-it-works/"' in page, "a page of the site"
    assert re.search(r'href="https://github.com/[^"]*/tree/main/docs/examples"', page), "a folder that the site lacks"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_to_files(page: Path) -> None:
    relative_links = runpy.run_path(str(ROOT / "docs" / "site_links.py"))["relative_links"]
    links = [link for link in relative_links(page.read_text()) if "://" not in link and not link.startswith("mailto:")]
    assert not [link for link in links if not (page.parent / link).exists()]
