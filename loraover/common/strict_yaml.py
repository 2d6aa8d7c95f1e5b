"""YAML, read strictly: a key that occurs twice is refused, since the first value would be dropped without a message."""

from __future__ import annotations

from functools import cache
from typing import Any

MAX_YAML_BYTES = 2**20
"""Largest size of a YAML file."""

MISFITS = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)
"""Errors that PyYAML raises beside its own where a value does not fit its tag or form, such as 2024-02-30."""


def parse_yaml(content: str | bytes) -> Any:
    """Return the value of a YAML text, as `yaml.safe_load` does; a ValueError also if a mapping has a key twice."""
    import yaml

    try:
        return yaml.load(content, _strict_loader())
    except (yaml.YAMLError, *MISFITS) as error:
        raise ValueError(str(error)) from error


@cache
def _strict_loader() -> Any:
    import yaml

    class StrictLoader(yaml.SafeLoader):
        """Loader that looks for repeated keys before `<<` merges other mappings, which may repeat them."""

        def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
            node = super().compose_mapping_node(anchor)
            seen = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode):
                    if (key.tag, key.value) in seen:
                        twice = f"the key {key.value!r} occurs twice in one mapping"
                        raise yaml.MarkedYAMLError(problem=twice, problem_mark=key.start_mark)
                    seen.add((key.tag, key.value))
            return node

    return StrictLoader
