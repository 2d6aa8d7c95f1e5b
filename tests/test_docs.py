"""The documentation: its site builds without a warning, its API pages have every public name, and its links work."""

from __future__ import annotations

import html
import inspect
import os
import re
import runpy
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, get_args, get_type_hints

import click
import pytest
from pydantic import BaseModel

from loraover import Budget, LoraOverConfig
from loraover.cli import SHORTCUTS
from loraover.common.extras import INSTALL, SOURCE
from loraover_serve.engines import ENGINES

ROOT = Path(__file__).parents[1]
ROOMS = ("loraover", "export/loraover_export", "serve/loraover_serve", "lab/loraover_lab")
API_PAGES = {"loraover": "loraover", "loraover_export": "export", "loraover_serve": "serve", "loraover_lab": "lab"}
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
@pytest.mark.parametrize("package", API_PAGES)
def test_every_type_that_a_function_returns_has_an_entry(package: str, site: Path) -> None:
    """Also those of the fields of what it returns, as far as they are classes of this package."""
    page = (site / "api" / API_PAGES[package] / "index.html").read_text()
    module = import_module(package)
    public = {name: getattr(module, name) for name in module.__all__}
    returned = [
        get_type_hints(inspect.unwrap(function), localns=public).get("return")
        for function in public.values()
        if inspect.isfunction(function)
    ]
    reports = [one for one in returned if isinstance(one, type) and issubclass(one, BaseModel)]
    parts = {one for report in reports for field in report.model_fields.values() for one in classes(field.annotation)}
    named = {one for hint in returned for one in classes(hint)} | {
        one for one in parts if one.__module__.startswith(f"{package}.")
    }
    own = {one for one in named if one.__module__.partition(".")[0] in API_PAGES} - {*public.values()}
    assert [one for one in own if f'id="{one.__module__}.{one.__qualname__}"' not in page] == []
    assert reports


def classes(hint: Any) -> Iterator[type]:
    """Classes in an annotation."""
    for part in get_args(hint):
        yield from classes(part)
    if isinstance(hint, type) and not get_args(hint):
        yield hint


@pytest.mark.process
@pytest.mark.parametrize("page", API_PAGES.values())
def test_an_api_page_shows_what_a_caller_needs(page: str, site: Path) -> None:
    """Contents of one level, and no settings of pydantic's models."""
    text = (site / "api" / page / "index.html").read_text()
    contents = text[text.index('data-md-component="toc"') : text.index('class="md-content"')]
    assert "doc-symbol-function" in contents
    assert "doc-symbol-attribute" not in contents
    assert "doc-symbol-method" not in contents
    assert "<p>Config:" not in text


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
            entries = (entry for each in sections if each.kind.value == "parameters" for entry in each.value)
            described = {entry.name.lstrip("*") for entry in entries}
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
            if group != "loraover" and name in SHORTCUTS:
                assert f'../loraover/#loraover-{name}"' in page
            else:
                options = [option.opts[-1] for option in command.params if isinstance(option, click.Option)]
                assert not [option for option in options if option not in shown]


@pytest.mark.process
def test_the_page_of_serve_has_the_table_of_engines(site: Path) -> None:
    page = (site / "commands" / "serve" / "index.html").read_text()
    assert [entry.title for entry in ENGINES.values() if f"<td>{entry.title}</td>" not in page] == []


@pytest.mark.process
def test_the_home_page_is_the_readme(site: Path) -> None:
    page = (site / "index.html").read_text()
    assert 'href="how-it-works/"' in page, "a page of the site"
    text = re.sub("<[^>]+>", "", page[page.index("<h1") :])
    assert text.index("Train adapters with more capacity") < text.index("pip install") < text.index("make demo   ")
    assert re.search(r'href="https://github.com/[^"]*/tree/main/docs/examples"', page), "a folder that the site lacks"


@pytest.mark.process
def test_the_site_has_a_tab_for_each_stage_and_a_switch_for_the_dark(site: Path) -> None:
    page = (site / "index.html").read_text()
    tabs = re.findall(r'<li class="md-tabs__item[^>]*>\s*<a[^>]*>\s*(\w+)', page)
    assert tabs[:7] == ["Start", "Train", "Export", "Serve", "Check", "Loops", "Evidence"]
    assert re.findall(r'data-md-color-media="\(prefers-color-scheme: dark\)" data-md-color-scheme="slate"', page)
    assert page.count('name="__palette"') == 3


@pytest.mark.process
def test_the_list_for_programs_has_every_page(site: Path) -> None:
    listed = re.findall(r"^- \[[^]]+\]\(([^)]*)\)", (site / "llms.txt").read_text(), re.MULTILINE)
    assert [one for one in listed if not (site / one).exists()] == []
    named = re.findall(r": ([\w/.-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert len(listed) == len(named) > 40


def test_every_page_is_in_a_group_of_the_site() -> None:
    """But what `make gpu` writes, which is not there before."""
    named = re.findall(r": ([\w/.-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    pages = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    assert pages - {*named, "results-gpu.md"} == set()
    assert len(set(named)) == len(named)


def test_pages_and_messages_install_as_one_constant_says() -> None:
    """No package index has a release yet; once one has, release/by_name.py changes the constant and the pages."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    sources = [*PAGES, *(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))]
    texts = {
        path: path.read_text() for path in [*sources, ROOT / "action.yml", *(ROOT / "integrations").rglob("hf-*/*")]
    }
    commands = {path: re.findall(r"pip install [^\n`]*", text) for path, text in texts.items()}
    other = {".": r"[ '\"]loraover(?![-\w])", "loraover": r" \"?\.(?![\w/])"}[SOURCE]
    assert [(path, line) for path, lines in commands.items() for line in lines if re.search(other, line)] == []
    prefix, _, suffix = INSTALL.removeprefix("pip install ").partition("{}")
    named = re.compile(rf"{re.escape(prefix)}([\w,]+){re.escape(suffix)}")
    found = [one.split(",") for path in PAGES for line in commands[path] for one in named.findall(line)]
    assert len(found) > 8, "pages say it in the words of messages"
    assert {extra for one in found for extra in one} <= extras.keys()
    assert INSTALL.format("load") in texts[ROOT / "serve/loraover_serve/vllm/request.py"]


def test_pages_and_messages_can_install_by_name(tmp_path: Path) -> None:
    """After a release, by one command: nothing installs from a clone then, and the constant says so."""
    program = runpy.run_path(str(ROOT / "release" / "by_name.py"))
    copied = {path for pattern in program["WRITTEN"] for path in ROOT.glob(pattern)} | {ROOT / program["EXTRAS"]}
    for path in copied:
        place = tmp_path / path.relative_to(ROOT)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(path.read_text())
    program["main"](tmp_path)
    texts = {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    lines = [line for text in texts.values() for line in re.findall(r"pip install [^\n`]*", text)]
    assert sum('"loraover[' in line for line in lines) > 8
    assert [line for line in lines if re.search(r" \"?\.(?![\w/])", line.partition("#")[0])] == []
    assert not [path for path, text in texts.items() if "in a clone of LoRA-Over" in text and path.suffix == ".md"]
    assert runpy.run_path(str(tmp_path / program["EXTRAS"]))["install"]("serve") == 'pip install "loraover[serve]"'


def test_every_example_has_all_its_names(tmp_path: Path) -> None:
    """Those of pages, and those of docstrings; the tests of examples run the latter."""
    sources = [*PAGES, *(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))]
    for number, file in enumerate(sources):
        for place in re.finditer(r"^([ \t]*)```python\n(.*?)^[ \t]*```", file.read_text(), re.DOTALL | re.MULTILINE):
            example = tmp_path / f"{number}_{place.start()}_{file.stem}.py"
            example.write_text(textwrap.dedent(place[2]))
            assert "..." not in place[2], file
    assert len([*tmp_path.iterdir()]) > 15
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F", "--output-format", "concise"]
    found = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def test_figures_can_be_read_on_a_phone() -> None:
    """At 388 pixels, which the site leaves on a screen of 420; the map of all rooms is for larger ones."""
    linked = {
        (page.parent / link).resolve()
        for page in PAGES
        for link in re.findall(r"!\[[^]]*\]\(([^)]+\.svg)\)", page.read_text())
    }
    assert len(linked) > 8
    for figure in linked - {ROOT / "docs" / "rooms.svg"}:
        text = figure.read_text()
        width = re.search(r'viewBox="0 0 ([\d.]+)', text)
        assert width is not None
        smallest = min(map(float, re.findall(r'font-size[=:]"?\s*([\d.]+)', text)))
        assert smallest * min(1, 388 / float(width[1])) > 10, figure


def test_the_readme_is_short_and_answers_in_the_order_in_which_readers_ask() -> None:
    """Its two commands come first, since nothing is shown without them."""
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) <= 700
    order = [
        *("make demo", "make test", "Train adapters with more", "caught.svg", "comparison.md", "pip install"),
        *("**Check a server**", "**Serve any adapter**", "**Train, and watch", "## Does it train", "answer.svg"),
        *("**Never run: a GPU", "measured here"),
    ]
    places = [text.index(one) for one in order]
    assert places == sorted(places)
    blocks = re.findall(r"^```(?:sh|python)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert all(sum(bool(line.strip()) for line in block.splitlines()) <= 7 for block in blocks)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_to_files(page: Path) -> None:
    relative_links = runpy.run_path(str(ROOT / "docs" / "site_links.py"))["relative_links"]
    links = [link for link in relative_links(page.read_text()) if "://" not in link and not link.startswith("mailto:")]
    assert not [link for link in links if not (page.parent / link).exists()]
