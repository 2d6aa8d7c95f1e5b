"""Extension of griffe: show functions made by `loraover.sources.verb.verb` with the fields of their requests."""

from __future__ import annotations

import inspect
from typing import Any

import griffe


class ShowRequests(griffe.Extension):
    """Take parameters and docstring of such a function from the imported one."""

    def on_function(self, *, func: griffe.Function, **kwargs: Any) -> None:
        """Replace both."""
        if not any(str(decorator.value).startswith("verb(") for decorator in func.decorators):
            return
        made = griffe.dynamic_import(func.path)
        assert func.docstring is not None
        func.docstring.value = inspect.getdoc(made) or ""
        kinds = {kind.name.lower(): kind for kind in griffe.ParameterKind}
        func.parameters = griffe.Parameters(
            *(
                griffe.Parameter(
                    one.name,
                    annotation=one.annotation,
                    kind=kinds[one.kind.name.lower()],
                    default=None if one.default is one.empty else repr(one.default),
                )
                for one in inspect.signature(made).parameters.values()
            )
        )
