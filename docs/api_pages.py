"""Hook of mkdocs that completes the pages of the Python interface: the parts of reports, and contents of one level."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from importlib import import_module
from typing import Any, get_args, get_type_hints

from pydantic import BaseModel

NAMES = ("loraover", "loraover_export", "loraover_serve", "loraover_lab")
PACKAGES = {f"api/{name.removeprefix('loraover_')}.md": name for name in NAMES}
"""Package of each page."""
PART = """
::: {path}
    options:
      heading_level: 3
      show_root_full_path: false
"""


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """Add an entry for each type that a function of the package returns as a part of something else."""
    package = PACKAGES.get(page.file.src_uri)
    if package is None:
        return markdown
    entries = "".join(PART.format(path=f"{part.__module__}.{part.__qualname__}") for part in parts(package))
    return f"{markdown}\n## Parts of results\n\nTypes of the fields of what functions return.\n{entries}"


def on_page_context(context: Any, page: Any, **kwargs: Any) -> None:
    """Leave the members of classes out of the table of contents."""
    if page.file.src_uri in PACKAGES:
        for title in page.toc:
            for entry in title.children:
                entry.children = []


def parts(package: str) -> list[type]:
    """Types of this package that its public functions return within something else, in the order of their names."""
    public = {name: getattr(import_module(package), name) for name in import_module(package).__all__}
    found: dict[type, None] = {}
    left = [one for value in public.values() if inspect.isfunction(value) for one in returned(value, public)]
    while left:
        one = left.pop()
        if one not in found and home_of(one) == package:
            found[one] = None
            left += [part for hint in hints_of_fields(one) for part in types_in(hint)]
    known = [value for value in public.values() if inspect.isclass(value)]
    return sorted(found.keys() - set(known), key=lambda one: one.__name__)


def home_of(one: type) -> str:
    """Package on whose page a type stands: reports about adapters stand with the functions of loraover_export."""
    module = one.__module__
    return "loraover_export" if module.startswith("loraover.adapters.") else module.partition(".")[0]


def hints_of_fields(one: type) -> list[Any]:
    """Annotations of the fields of a model or a dataclass; of another class, none."""
    if issubclass(one, BaseModel):
        fields = set(one.model_fields)
    else:
        fields = {field.name for field in dataclasses.fields(one)} if dataclasses.is_dataclass(one) else set()
    return [hint for name, hint in get_type_hints(one).items() if name in fields] if fields else []


def returned(function: Any, names: dict[str, Any]) -> Iterator[type]:
    """Yield the classes that a function's annotation says it returns."""
    yield from types_in(get_type_hints(inspect.unwrap(function), localns=names).get("return"))


def types_in(hint: Any) -> Iterator[type]:
    """Yield the classes in an annotation."""
    if get_args(hint):
        for part in get_args(hint):
            yield from types_in(part)
    elif isinstance(hint, type):
        yield hint
