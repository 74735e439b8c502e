"""Lists what there is: methods, strategies, runs."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

from .console import Console, seconds
from .errors import UserError
from .files import read_json
from .recipe import built_in_strategies, load_strategy
from .recipe_file import read_recipe


def methods(name: str | None, console: Console) -> Any:
    """Lists the methods, or explains one."""
    from . import methods as found

    if name is None:
        listed = {method: found.load(method).SUMMARY for method in found.names()}
        console.table(
            ("method", "formula", "what it trains"), [(m, found.load(m).FORMULA, s) for m, s in listed.items()]
        )
        return listed
    method = found.load(name)
    fields = method.Options.model_fields.items()
    options = {key: "required" if field.is_required() else field.get_default() for key, field in fields}
    told = {
        "name": name,
        "summary": method.SUMMARY,
        "formula": method.FORMULA,
        "merges": method.MERGES,
        "options": options,
        "weight_decay": method.WEIGHT_DECAY,
        "source": method.SOURCE,
    }
    console.line(f"{name}: {method.SUMMARY}\n\n  {method.FORMULA}\n")
    console.line("  options   " + (", ".join(f"{key} = {value}" for key, value in options.items()) or "none"))
    merges = "yes" if method.MERGES is True else f"no, {method.MERGES}"
    console.line(f"  merges    {merges}\n  source    {method.SOURCE}")
    if method.documentation:
        console.line("\n" + method.documentation)
    return told


def strategies(name: str | None, console: Console) -> Any:
    """Lists the built-in strategies, or explains one."""
    if name is None:
        found = {known: load_strategy(known) for known in built_in_strategies()}
        rows = [
            (
                known,
                " -> ".join(f"{stage.name}" + (f" x {stage.repeat}" if stage.repeat else "") for stage in s.stages),
                s.title or "",
            )
            for known, s in found.items()
        ]
        console.table(("strategy", "stages", "what it does"), rows)
        return {known: s.title for known, s in found.items()}
    strategy = load_strategy(name)
    console.line(f"{strategy.name}: {strategy.title or ''}\n")
    console.line(f"  when      {strategy.when or '-'}\n  source    {strategy.source or '-'}\n")
    for number, stage in enumerate(strategy.stages, 1):
        before = f" ({stage.previous} what the stage before added)" if number > 1 or stage.repeat else ""
        before += f", {stage.repeat} times" if stage.repeat else ""
        console.line(f"  {number}. {stage.name}{before}: " + "; ".join(map(str, stage.rules)))
    own = resources.files(__package__).joinpath("strategies", f"{name}.yaml")
    console.line("\n" + (own.read_text("utf-8") if own.is_file() else Path(name).read_text("utf-8")))
    return strategy.model_dump(mode="json", exclude_none=True)


def runs(folder: Path, console: Console) -> list[dict[str, Any]]:
    """Lists the runs in a folder."""
    found: list[dict[str, Any]] = []
    for recipe in sorted(folder.glob("*/recipe.yaml")):
        run = recipe.parent
        if not (run / "environment.json").is_file():  # somebody's recipe, not a run
            continue
        try:
            found.append(_run(run))
        except (UserError, OSError, LookupError, TypeError, ValueError, AttributeError) as error:
            # One file that cannot be read, or holds something else, must not hide the other runs.
            problem = error.problem if isinstance(error, UserError) else f"a file of it holds something else: {error!r}"
            found.append({"run": str(run), "state": "damaged", "problem": problem})
    if not found:
        console.line(f"no runs in {folder}")
        return found
    rows = [
        (
            e["run"],
            e.get("model", "-"),
            e.get("task", "-"),
            e.get("strategy", "-"),
            e["state"] + (": continue with --resume" if e["state"] == "unfinished" else ""),
            f"{e['metric']} {e['value']:.3f}" if "value" in e else "-",
            seconds(e["seconds"]) if "seconds" in e else "-",
        )
        for e in found
    ]
    console.table(("run", "model", "task", "strategy", "state", "test", "trained for"), rows)
    for entry in found:
        if "problem" in entry:
            console.warn(f"{entry['run']}: {entry['problem']}")
    return found


def _run(run: Path) -> dict[str, Any]:
    """What is known of one run; it is unfinished as long as there is no evaluation."""
    asked = read_recipe(run / "recipe.yaml")
    entry: dict[str, Any] = {"run": str(run), "model": asked["model"], "task": asked["task"], "state": "unfinished"}
    if (run / "decision.json").is_file():
        entry["strategy"] = read_json(run / "decision.json")["chosen"]
    if (run / "evaluation.json").is_file():
        evaluation = read_json(run / "evaluation.json")
        metric = evaluation["goal"]["metric"]
        spent = sum(candidate["seconds"] for candidate in evaluation["candidates"])
        entry |= {"state": "done", "metric": metric, **evaluation["metrics"].get(metric, {}), "seconds": spent}
    return entry
