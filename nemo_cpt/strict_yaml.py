"""YAML in which a key that stands twice is refused: PyYAML takes the last one, and the first is ignored silently."""

from typing import Any

import yaml

from nemo_cpt.errors import CptError


class StrictLoader(yaml.SafeLoader):
    """PyYAML's safe loader, with CptError for a key that stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Construct a mapping, as the library does, of keys that differ."""
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise CptError(f"line {node.start_mark.line + 1}: {twice[0]} stands twice")
        return super().construct_mapping(node, deep)
