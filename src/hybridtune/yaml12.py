"""YAML 1.2's numbers and truth values, by PyYAML, which reads YAML 1.1.

In 1.1 `learning_rate: 1e-4` is a text, `eval_strategy: no` is false, and `output: 2024-01-01` a date.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

_VALUES = {  # tag: pattern, first characters
    "null": (r"~|null|Null|NULL|", "~nN"),
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?(0|[1-9][0-9]*)", "-+0123456789"),  # a commit such as 0123456 is a text
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+0123456789.",
    ),
    "merge": (r"<<", "<"),
}


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        return int(self.construct_scalar(node))


class _Dumper(yaml.SafeDumper):
    """Puts quotes around every text that a reader of 1.1 or of 1.2 would take for something else."""

    yaml_implicit_resolvers: dict[str, Any] = {  # noqa: RUF012
        first: list(known) for first, known in yaml.SafeDumper.yaml_implicit_resolvers.items()
    }


for _tag, (_pattern, _first) in _VALUES.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), [*_first, ""])
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def load(text: str) -> Any:
    """Reads YAML, with no other types than JSON has.

    Raises:
        yaml.YAMLError: it is not YAML, or a key is given twice.
    """
    return yaml.load(text, _Loader)  # a SafeLoader


def lines(text: str) -> dict[tuple[Any, ...], int]:
    """The lines, from 1, that keys and entries stand on, by the keys and numbers that lead to them.

    Keys are as they are written; what an alias in a list stands for is where its anchor is.

    Raises:
        yaml.YAMLError: it is not YAML.
    """
    found: dict[tuple[Any, ...], int] = {}

    def walk(node: yaml.Node | None, path: tuple[Any, ...], above: tuple[yaml.Node, ...]) -> None:
        if node in above:  # an alias inside of what it stands for
            return
        if isinstance(node, yaml.MappingNode):
            inner = [(key.value, key, value) for key, value in node.value if isinstance(key, yaml.ScalarNode)]
        elif isinstance(node, yaml.SequenceNode):
            inner = [(number, value, value) for number, value in enumerate(node.value)]
        else:
            return
        for step, begins, value in inner:
            found[(*path, step)] = 1 + text.count("\n", 0, begins.start_mark.index)
            walk(value, (*path, step), (*above, node))

    walk(yaml.compose(text, _Loader), (), ())
    return found


def dump(tree: Any) -> str:
    """Writes YAML that any reader reads as it was."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
