"""`--set key.path=value`: any value of a recipe, by the path that leads to it."""

from __future__ import annotations

import json
import re
from typing import Any, get_args

import yaml
from pydantic.fields import FieldInfo

from . import yaml12
from .errors import RecipeError
from .recipe import Recipe, are_stages, load_strategy


def with_values(tree: dict[str, Any], assignments: list[str]) -> dict[str, Any]:
    """Applies `--set key.path=value` to a recipe's dict. Values are YAML.

    `stages.N` are the stages of the one strategy; `strategy.N` is an entry of the list of strategies or of stages. The
    name of a strategy stands for its stages.

    Raises:
        RecipeError: an assignment has no `=`, its path leads nowhere, or its value is not YAML.
    """
    tree = json.loads(json.dumps(tree))
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals:
            raise RecipeError(f'--set "{assignment}" has no value', expected="key.path=value")
        steps = path.strip().split(".")
        value = _value(steps, text, assignment)
        if steps[0] == "stages" or (steps[0] == "strategy" and len(steps) > 1):
            steps = _open_strategy(tree, steps, assignment)
        here: Any = tree
        for step in steps[:-1]:
            here = _descend(here, step, assignment)
        _assign(here, steps[-1], value, assignment)
    return tree


def _value(steps: list[str], text: str, assignment: str) -> Any:
    """A value as YAML has it. Of a key whose value is a text, what YAML would take for a mapping or cannot read is the
    text itself: `--set template="Message: {text}"` comes without the quotes, which the shell takes off."""
    of_text = len(steps) == 1 and steps[0] in Recipe.model_fields and _takes_text(Recipe.model_fields[steps[0]])
    try:
        value = yaml12.load(text)
    except yaml.YAMLError as error:
        if of_text:
            return text
        raise RecipeError(f'--set "{assignment}": the value is not YAML', found=" ".join(str(error).split())) from None
    return text if of_text and isinstance(value, (dict, list)) else value


def _takes_text(field: FieldInfo) -> bool:
    return field.annotation is str or set(get_args(field.annotation)) == {str, type(None)}


def _open_strategy(tree: dict[str, Any], steps: list[str], assignment: str) -> list[str]:
    """Puts stages in the place of a strategy's name, where a path leads into it; returns the path from the top."""
    asked = tree.get("strategy") or Recipe.model_fields["strategy"].default
    if are_stages(asked):
        tree["strategy"] = asked
        return ["strategy", *steps[1:]]
    listed = asked if isinstance(asked, list) else [asked]
    if steps[0] == "stages":
        if len(listed) != 1:
            names = ", ".join(str(one.get("name") if isinstance(one, dict) else one) for one in listed)
            raise RecipeError(
                f'--set "{assignment}": there are several strategies', found=names, mend=f"strategy.0.{assignment}"
            )
        steps = ["strategy", "0", *steps]
    elif len(listed) == 1 and not re.fullmatch(r"-?\d+", steps[1]):
        steps = ["strategy", "0", *steps[1:]]
    at = _index(listed, steps[1], assignment)
    one = listed[at]
    if isinstance(one, str) and len(steps) > 2:
        chosen = load_strategy(one)
        one = {"name": chosen.name, **chosen.model_dump(exclude_unset=True, exclude={"name"})}
    elif isinstance(one, dict) and "rules" in one and steps[2:3] == ["stages"]:
        one = {"name": one.get("name") or "custom", "stages": [one]}
    if not isinstance(asked, list) and len(steps) > 2:
        tree["strategy"] = one
        return [steps[0], *steps[2:]]
    tree["strategy"] = [*listed[:at], one, *listed[at + 1 :]]
    return steps


def _descend(here: Any, step: str, assignment: str) -> Any:
    if isinstance(here, list):
        return here[_index(here, step, assignment)]
    if isinstance(here, dict):
        if here.get(step) is None:
            here[step] = {}
        return here[step]
    raise RecipeError(f'--set "{assignment}": "{step}" leads nowhere', found=here)


def _assign(here: Any, step: str, value: Any, assignment: str) -> None:
    if isinstance(here, list):
        here[_index(here, step, assignment)] = value
    elif isinstance(here, dict):
        here[step] = value
    else:
        raise RecipeError(f'--set "{assignment}": "{step}" leads nowhere', found=here)


def _index(here: list[Any], step: str, assignment: str) -> int:
    if not re.fullmatch(r"-?\d+", step) or not -len(here) <= int(step) < len(here):
        listed = ", ".join(f"{number} ({_entry(one)})" for number, one in enumerate(here))
        raise RecipeError(f'--set "{assignment}": no entry "{step}"', expected=f"a number: {listed}")
    return int(step) % len(here)


def _entry(one: Any) -> str:
    """What a person knows an entry of a list by: a strategy, a stage, a rule, or a value."""
    if isinstance(one, dict):
        methods = (str(rule.get("method")) for rule in one.get("rules") or [] if isinstance(rule, dict))
        rule = f"{one.get('part')}: {one.get('method')}" if "part" in one else "-".join(methods)
        return str(one.get("name") or rule or "an entry without a name")
    return str(one)
