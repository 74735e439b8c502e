"""The report: one HTML file that shows a run, written from the run folder's JSON alone.

Python reads the files and works out positions; what is said and how it looks stands in `report.html.j2`. The file
works offline: no address in it leads to the network, and its content policy forbids one. The curves and intervals are
plain HTML and SVG; only a confusion matrix too large for a table brings plotly, compressed, once.
"""

from __future__ import annotations

import base64
import glob
import gzip
import json
import math
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jinja2 import ChainableUndefined, Environment, PackageLoader

from . import console, own_file
from .errors import RunError
from .files import refuse_no_run, write_text

TABLE_LABELS = 16  # a confusion matrix up to this size is a table with its numbers, beyond it a plotly heat map
MATRIX_LABELS = 150  # beyond this, only the labels with most mistakes are drawn
CURVE_POINTS = 400
NOTHING = "–"


def write_report(run: Path, *, include_texts: bool | None = None) -> Path:
    """Writes `report.html` into a run folder.

    Args:
        run: the run folder. Only `recipe.yaml` must be there; the report says what else is missing.
        include_texts: whether the user's texts are shown as examples; None takes the recipe's `include_texts`.

    Returns:
        The path of the report.

    Raises:
        RunError: the folder has no recipe.yaml, or one of its files cannot be read.
    """
    recipe = _recipe(run := Path(run))
    texts = recipe.get("include_texts") is not False if include_texts is None else include_texts
    page = _environment().get_template("report.html.j2").render(_facts(run, recipe, texts))
    path = run / "report.html"
    write_text(path, page)
    return path


def _facts(run: Path, recipe: dict[str, Any], texts: bool) -> dict[str, Any]:
    """All that the template shows."""
    defaults = {str(path) for path in recipe.pop("defaults", None) or []}
    files = {name: _json(run / f"{name}.json") for name in ("environment", "data", "decision", "evaluation")}
    decision, evaluation = files["decision"] or {}, files["evaluation"] or {}
    candidates = _candidates(recipe, decision, evaluation)
    asked, told = recipe.get("goal") or {}, decision.get("goal") or {}
    first = next(iter(evaluation.get("metrics") or {}), None)
    metric = told.get("metric") or asked.get("maximize") or asked.get("minimize") or first
    falls = told.get("direction") == "minimize" if told else bool(asked.get("minimize"))
    baselines = [dict(entry, score=entry.get("metrics", {}).get(metric)) for entry in evaluation.get("baselines") or []]
    baselines.sort(key=lambda entry: _rank(entry["score"], falls))
    candidates.sort(key=lambda entry: (not entry["chosen"], _rank({"value": entry["validation"].get(metric)}, falls)))
    for entry in candidates:
        folder = run if entry["chosen"] else _trial(run, str(entry["strategy"]))
        entry["score"], entry["curves"] = entry["metrics"].get(metric), _curves(folder, metric)
    matrix = _matrix(evaluation.get("confusion"))
    return {
        **files,
        "run": run.resolve().name,
        "recipe": recipe,
        "defaults": defaults,
        "recipe_lines": list(_recipe_lines(recipe, defaults)),
        "metric": metric,
        "falls": falls,
        "candidates": candidates,
        "baselines": baselines,
        "intervals": _intervals(candidates, baselines),
        "large": _large(candidates + baselines),
        "metrics": list(dict.fromkeys(key for entry in candidates + baselines for key in entry.get("metrics") or {})),
        "texts": texts,
        "matrix": matrix,
        "plotly": _plotly() if matrix and len(matrix["labels"]) > TABLE_LABELS else None,
        "nonce": secrets.token_urlsafe(16),
    }


def _trial(run: Path, strategy: str) -> Path:
    """Where a candidate was trained; of several seeds or folds the first."""
    trials, name = run / "trials", glob.escape(strategy)
    found = (path for turn in ("seed", "fold") for path in sorted(trials.glob(f"{name}-{turn}-*")))
    return next(found, trials / strategy)


def _recipe(run: Path) -> dict[str, Any]:
    refuse_no_run(run)
    path, mend = run / "recipe.yaml", "name a folder that `hybridtune tune` wrote"
    try:
        tree = yaml.safe_load(path.read_text("utf-8"))
    except FileNotFoundError:
        raise RunError(f"{run}: is not a run folder", found="no recipe.yaml", mend=mend) from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        tree = " ".join(str(error).split())
    if not isinstance(tree, dict):
        raise RunError(f"{path}: cannot be read", found=tree, expected="the keys of a recipe", mend=mend)
    return tree


def _json(path: Path, lines: bool = False) -> Any:
    """Reads a JSON file, or the complete lines (no torn last one) of a JSON Lines file; None where there is none."""
    try:
        text = path.read_text("utf-8")
        return [json.loads(line) for line in text.split("\n")[:-1] if line.strip()] if lines else json.loads(text)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        mend = "delete the file and run the step again that writes it"
        raise RunError(f"{path}: cannot be read", found=str(error), expected="JSON", mend=mend) from None


def _candidates(recipe: dict[str, Any], decision: dict[str, Any], evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    """Joins what the recipe, decision.json (validation, cost) and evaluation.json (test) know of each strategy."""
    listed = recipe["strategy"] if isinstance(recipe.get("strategy"), list) else []
    asked = [one for one in listed if isinstance(one, dict) and "stages" in one]
    titles = {str(one.get("name")): one.get("title") for one in asked}
    chosen = decision.get("chosen") or (next(iter(titles)) if len(titles) == 1 else None)
    joined: dict[str, dict[str, Any]] = {}
    tested = [{**one, "test_spread": one.get("spread"), "spread": None} for one in evaluation.get("candidates") or []]
    for entry in [*({"strategy": name} for name in titles), *(decision.get("candidates") or []), *tested]:
        one = joined.setdefault(entry["strategy"], {"validation": {}, "metrics": {}, "chosen": False})
        one.update({key: value for key, value in entry.items() if one.get(key) in (None, {}, False)})
    for name, one in joined.items():
        one.update(title=titles.get(name) or name, chosen=name == chosen if chosen else one["chosen"])
        if one["chosen"]:
            one["metrics"] = evaluation.get("metrics") or one["metrics"]
    return list(joined.values())


class Axis(NamedTuple):
    """A linear axis with round ticks."""

    low: float
    high: float
    ticks: list[float]

    @classmethod
    def over(cls, values: list[float], *, within: tuple[float, float] = (-math.inf, math.inf)) -> Axis:
        """Returns the axis that spans the values, with three to seven ticks."""
        low, high = min(values), max(values)
        pad = 0.06 * (high - low) or abs(high) * 0.05 or 1.0
        low, high = max(low - pad, within[0]), min(high + pad, within[1])
        step = 10 ** math.floor(math.log10((high - low) / 3))
        step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (factor * step) <= 6)
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        return cls(low, high, [round(step * n, 10) for n in range(first, last + 1)])

    def at(self, value: float) -> float:
        """Returns the place of a value in percent of the axis."""
        return round(100 * (value - self.low) / (self.high - self.low), 2)


def _intervals(candidates: list[dict[str, Any]], baselines: list[dict[str, Any]]) -> Axis | None:
    """The axis of the dot plot: strategies, the best baseline and what is near; what lies far out is an arrow."""
    values: list[float] = []
    for entry in candidates + baselines:
        ends = [end for end in map((entry["score"] or {}).get, ("value", "low", "high")) if _is_number(end)]
        low, high = min(values, default=0), max(values, default=0)
        near = all(2 * low - high <= end <= 2 * high - low for end in ends)
        values += ends if near or "strategy" in entry or entry is baselines[0] else []
    unit = all(0 <= value <= 1 for value in values)
    return Axis.over(values, within=(0, 1) if unit else (-math.inf, math.inf)) if values else None


def _curves(folder: Path, metric: str | None) -> dict[str, Any] | None:
    """The learning curves of one strategy: its stages one after the other over the steps of all."""
    stages, start = [], 0
    for path in sorted(folder.glob("stages/*/"), key=lambda path: (len(path.name.partition("-")[0]), path.name)):
        told, log = _json(path / "metrics.json") or {}, _json(path / "log.jsonl", lines=True) or []
        seen = told.get("evaluations") or []
        last = max([told.get("steps") or 0, *(entry.get("step") or 0 for entry in [*log, *seen])])
        log = _thinned([entry for entry in log if _is_number(entry.get("loss"))])
        told = {"name": path.name.partition("-")[2], **told, "start": start, "last": last}
        stages.append({**told, "log": log, "evaluations": seen})
        start += last
    if not start:
        return None
    x, panels = Axis(0, start, [tick for tick in Axis.over([0, start]).ticks if 0 <= tick <= start]), []
    for key, kinds in (("loss", ("log", "evaluations")), (metric, ("evaluations",))):
        lines = {
            kind: [[(s["start"] + e["step"], e[key]) for e in s[kind] if _is_number(e.get(key))] for s in stages]
            for kind in kinds
        }
        found = [value for series in lines.values() for points in series for _, value in points]
        if len({step for series in lines.values() for points in series for step, _ in points}) > 1:  # else no curve
            panels.append({"key": key, "lines": lines, "y": Axis.over(found)})
    return {"stages": stages, "x": x, "panels": panels, "last": start}


def _thinned(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Keeps the entries with the lowest and the highest loss of each stretch, so that no peak is lost."""
    size = math.ceil(2 * len(log) / CURVE_POINTS)
    if size <= 2:
        return log
    stretches = (log[at : at + size] for at in range(0, len(log), size))
    kept = (pick(stretch, key=lambda entry: entry["loss"]) for stretch in stretches for pick in (min, max))
    return sorted(kept, key=lambda entry: entry["step"])


def _matrix(confusion: dict[str, Any] | None) -> dict[str, Any] | None:
    """The confusion matrix; of very many labels only those with most mistakes."""
    if not confusion or not confusion.get("labels"):
        return None
    labels, counts = [str(label) for label in confusion["labels"]], confusion["matrix"]
    wrong = [sum(counts[i]) + sum(row[i] for row in counts) - 2 * counts[i][i] for i in range(len(labels))]
    kept = sorted(sorted(range(len(labels)), key=lambda i: -wrong[i])[:MATRIX_LABELS])
    return {
        "labels": [labels[i] for i in kept],
        "counts": [[counts[i][j] for j in kept] for i in kept],
        "totals": [sum(counts[i]) for i in kept],
        "of": len(labels),
    }


def _plotly() -> str:
    """plotly.js, compressed: the page unpacks it."""
    from plotly.offline import get_plotlyjs  # type: ignore[import-untyped]

    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), 9, mtime=0)).decode()


def _recipe_lines(tree: Any, defaults: set[str], path: str = "", depth: int = 0) -> Iterator[tuple[str, bool]]:
    """The recipe as lines of YAML, each with whether hybridtune chose its value."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        here, lead = f"{path}.{key}".lstrip("."), "  " * depth + (f"{_scalar(key)}:" if isinstance(tree, dict) else "-")
        if not isinstance(value, (dict, list)) or not value:
            yield f"{lead} {_scalar(value)}", here in defaults
            continue
        lines = _recipe_lines(value, defaults, here, depth + 1)
        if isinstance(tree, dict):
            yield lead, here in defaults
        else:  # the first line of an entry stands behind its dash
            text, default = next(lines)
            yield lead + text[len(lead) :], default or here in defaults
        yield from lines


def _scalar(value: Any) -> str:
    style = '"' if isinstance(value, str) and "\n" in value else None
    text: str = yaml.safe_dump(value, default_flow_style=True, default_style=style, allow_unicode=True, width=math.inf)
    return text.removesuffix("...\n").strip()


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _rank(score: dict[str, Any] | None, falls: bool) -> float:
    """Sorts the best first, what has no score last."""
    value = (score or {}).get("value", math.nan)
    return float(value if falls else -value) if _is_number(value) else math.inf


def _percent(part: float, whole: Any = 1) -> str:
    share = 100 * part / whole if _is_number(whole) and whole else math.nan
    return f"{share:.0f}%" if share in (0, 100) else f"{share:.1f}%" if share >= 1 else f"{share:.2g}%"


def _seconds(value: float) -> str:
    if value < 60:
        return f"{value:.1f} s" if value >= 1 else f"{value:.2g} s"
    minutes, seconds = divmod(round(value), 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min {seconds:02} s"


def _bytes(value: float) -> str:
    power = min(4, int(math.log(max(value, 1), 1024)))
    return f"{value / 1024**power:.{min(power, 1)}f} {('bytes', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def _large(entries: list[dict[str, Any]]) -> set[str]:
    """The metrics that do not run from 0 to 1: two decimals are enough for them."""
    values = [item for entry in entries for item in (entry.get("validation") or {}).items()]
    values += [(name, one.get("value")) for entry in entries for name, one in (entry.get("metrics") or {}).items()]
    return {name for name, value in values if _is_number(value) and abs(value) > 1}


def _words(key: Any) -> str:
    return str(key).replace("_f1", "-F1").replace("_", " ")


def _environment() -> Environment:
    environment = Environment(loader=PackageLoader("hybridtune", ""), autoescape=True, undefined=ChainableUndefined)
    environment.trim_blocks = environment.lstrip_blocks = True
    environment.tests["finite"] = _is_number

    def or_nothing(show: Callable[..., str]) -> Callable[..., str]:
        return lambda value, *more: show(value, *more) if _is_number(value) else NOTHING

    shows: dict[str, Callable[..., str]] = {"percent": _percent, "seconds": _seconds, "bytes": _bytes}
    shows["score"] = console.number
    shows["number"] = lambda value, digits=3: f"{round(value, digits) + 0.0:,.{digits}f}"  # + 0.0: no "-0.000"
    environment.filters.update({name: or_nothing(show) for name, show in shows.items()})
    environment.filters["words"] = _words
    environment.filters["named"] = lambda name: own_file.shown(name) if own_file.is_path(str(name)) else _words(name)
    return environment
