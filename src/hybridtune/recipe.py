"""The recipe: what the user asks for. One YAML file = one pydantic object = the same keyword arguments in Python.

Keys that TrainingArguments has keep its names and meanings. A key that is not given is None here; `resolve.py` fills
it from the defaults of the method, so that the resolved recipe can say which values were chosen and which were given.
Nothing here imports torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from . import own_file, yaml12
from .errors import RecipeError, UserError, unknown
from .mistakes import as_recipe_error
from .recipe_file import NOWHERE, placed, read_recipe

_NAME = re.compile(r"\w[\w.+ -]{0,79}")  # what stages and strategies are called, and their folders with them


class Keys(BaseModel):
    """A group of keys; unknown ones are refused with the nearest known one."""

    model_config = ConfigDict(
        extra="forbid",
        validate_assignment=True,
        protected_namespaces=(),
        coerce_numbers_to_str=True,
        allow_inf_nan=False,
    )


class Active(Keys):
    """Which layers of a rule's part are trained at a time.

    Attributes:
        layers: how many; below 1 a share of them.
        every: for how many steps, until others take their turn; below 1 a share of the stage's steps.
        order: "random" (a new choice each time), "cycle" (one group after the other, from the top down) or "unfreeze"
            (from the top down, that many more each time).
    """

    layers: float = Field(gt=0)
    every: float = Field(gt=0)
    order: Literal["random", "cycle", "unfreeze"] = "random"


class Rule(Keys):
    """`part: method(options)`: one way to tune one part of the model, with its own learning rate and weight decay.

    Every further key is an option of the method (`r`, `bottleneck`, ...) and is checked by it.
    """

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    part: str
    method: str
    learning_rate: float | None = Field(None, gt=0)
    weight_decay: float | None = Field(None, ge=0)
    layerwise_lr_decay: float | None = Field(None, gt=0, le=1)
    active: Active | None = None

    _find = field_validator("method")(own_file.absolute)

    @property
    def options(self) -> dict[str, Any]:
        """The method's own options, as written."""
        return dict(self.model_extra or {})

    def __str__(self) -> str:
        options = ", ".join(f"{key}={value}" for key, value in self.options.items())
        return f"{self.part}: {own_file.shown(self.method)}" + (f"({options})" if options else "")


class Training(Keys):
    """How a stage is trained. In the recipe: for every stage; in a stage: for that stage alone.

    The names are those of `transformers.TrainingArguments`, `early_stopping_patience` and
    `early_stopping_threshold` those of `transformers.EarlyStoppingCallback`. Four are our own: `max_seconds` ends a
    stage at the first step after that time, `layerwise_lr_decay` multiplies the learning rate once for each layer that
    lies between a weight and the head, `max_tokens_per_micro_batch` (`max_` as in `max_length`: a limit) says how many
    tokens are computed at a time of a batch, which stays as it is, and a stage's `repeat`.
    """

    learning_rate: float | None = Field(None, gt=0)
    weight_decay: float | None = Field(None, ge=0)
    num_train_epochs: float | None = Field(None, gt=0)
    max_steps: int | None = Field(None, gt=0)
    max_seconds: float | None = Field(None, gt=0)
    layerwise_lr_decay: float | None = Field(None, gt=0, le=1)
    per_device_train_batch_size: int | None = Field(None, gt=0)
    gradient_accumulation_steps: int | None = Field(None, gt=0)
    max_tokens_per_micro_batch: int | None = Field(None, gt=0)
    gradient_checkpointing: bool | None = None
    lr_scheduler_type: str | None = None
    lr_scheduler_kwargs: dict[str, Any] | None = None
    warmup_steps: float | None = Field(None, ge=0)
    optim: str | None = None
    adam_beta1: float | None = None
    adam_beta2: float | None = None
    adam_epsilon: float | None = None
    max_grad_norm: float | None = Field(None, ge=0)
    neftune_noise_alpha: float | None = Field(None, gt=0)
    early_stopping_patience: int | None = Field(None, gt=0)
    early_stopping_threshold: float | None = Field(None, ge=0)
    eval_strategy: Literal["no", "steps", "epoch"] | None = None
    eval_steps: float | None = None
    save_strategy: Literal["no", "steps", "epoch", "best"] | None = None
    save_steps: float | None = None
    save_total_limit: int | None = Field(None, gt=0)
    load_best_model_at_end: bool | None = None
    logging_steps: float | None = None


class Stage(Training):
    """A list of rules that are trained together.

    Attributes:
        name: of its folder.
        rules: what is trained, and how.
        previous: what happens to what the stage before has added: it stays on the model, is merged into its weights,
            or is taken off.
        repeat: how often it runs, each time as a stage of its own with a new optimizer and schedule.
    """

    name: str | None = None
    rules: list[Rule] = Field(min_length=1)
    previous: Literal["keep", "merge", "drop"] = "keep"
    repeat: int | None = Field(None, gt=0)


Check = Callable[[Rule], None]


class Strategy(Keys):
    """A named list of stages."""

    name: str
    title: str | None = None
    when: str | None = None
    source: str | None = None
    stages: list[Stage] = Field(min_length=1)

    @model_validator(mode="after")
    def _name_the_stages(self) -> Strategy:
        _refuse_odd_name("name", self.name)
        names: set[str] = set()
        for number, stage in enumerate(self.stages, 1):
            if stage.name is None:
                stage.name = "-".join(dict.fromkeys(Path(rule.method).stem for rule in stage.rules))
            _refuse_odd_name(f"stages.{number - 1}.name", stage.name)
            if stage.name in names:
                stage.name = f"{stage.name}-{number}"
            names.add(stage.name)
        return self


def _refuse_odd_name(key: str, name: str) -> None:
    """Folders are named so."""
    if not _NAME.fullmatch(name):
        raise ValueError(f'{key}: "{name}" cannot name a folder: use letters, digits, spaces and . + - _')


class Data(Keys):
    """Where the labelled rows are, and what their columns are called.

    A split is a path, a pattern of paths or an address, or a list of them; in train also `{path: ..., weight: ...}`,
    whose rows are drawn `weight` times as often. In Python it may be a `datasets.Dataset`, a pandas frame or a list of
    dicts too.

    Attributes:
        columns: what the columns of the task are called in the files.
        on_bad_row: what becomes of a row that cannot be read: "refuse" is an error, "skip" puts it into rejected.jsonl
            of the run.
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, protected_namespaces=())

    train: Any = None
    validation: Any = None
    test: Any = None
    columns: dict[str, str] = Field(default_factory=dict)
    survey: bool = True
    folds: int | None = Field(None, ge=2)
    on_bad_row: Literal["refuse", "skip"] = "refuse"


class Vocabulary(Keys):
    """What becomes of the model's vocabulary; its tables follow. Of several, the order is train, add, trim.

    Attributes:
        trim: only pieces that training and validation rows use are kept, special tokens and single characters.
        train: a tokenizer of the same kind is trained on the training rows, with at most that many pieces.
        add_tokens: texts that become one token each.
        add_languages: codes that a multilingual model can mark texts with from now on.
    """

    trim: bool = False
    train: int | None = Field(None, ge=2)
    add_tokens: list[str] = Field(default_factory=list)
    add_languages: list[str] = Field(default_factory=list)

    @model_validator(mode="after")
    def _fits(self) -> Vocabulary:
        if self.trim and self.train:
            raise ValueError("give one of trim and train: a vocabulary trained on the rows has nothing to trim")
        if not (self.trim or self.train or self.add_tokens or self.add_languages):
            raise ValueError("says nothing: give trim: true, train: 8000, add_tokens: [...] or add_languages: [...]")
        for key in ("add_tokens", "add_languages"):
            asked = getattr(self, key)
            if any(not token.strip() for token in asked) or len(set(asked)) < len(asked):
                raise ValueError(f"{key}: an empty text, or one that is listed twice")
        return self


class Abstain(Keys):
    """When a classifier gives no label: where its best score is below a threshold, fitted on validation rows.

    Attributes:
        accuracy: as many rows get a label as leave this share of them right.
        coverage: this share of the rows gets a label.
    """

    accuracy: float | None = Field(None, gt=0, le=1)
    coverage: float | None = Field(None, gt=0, le=1)

    @model_validator(mode="after")
    def _one_of_them(self) -> Abstain:
        if (self.accuracy is None) == (self.coverage is None):
            raise ValueError("give one of accuracy and coverage")
        return self


class Goal(Keys):
    """What to raise or lower. The metric is one of the task's."""

    maximize: str | None = None
    minimize: str | None = None

    @model_validator(mode="after")
    def _one_of_them(self) -> Goal:
        if self.maximize and self.minimize:
            raise ValueError("give one of maximize and minimize, not both")
        return self

    @property
    def metric(self) -> str | None:
        """The metric's name, or None for the task's own."""
        return self.maximize or self.minimize

    @property
    def direction(self) -> str:
        """maximize or minimize."""
        return "minimize" if self.minimize else "maximize"


class Recipe(Training):
    """All that a tuning needs to know."""

    model: str
    task: str
    data: Data
    revision: str | None = None
    goal: Goal = Field(default_factory=Goal)
    strategy: Any = "lora"
    output: str = "runs/run"
    seed: int = Field(0, ge=0, lt=2**32)
    seeds: list[Annotated[int, Field(ge=0, lt=2**32)]] | None = Field(None, min_length=1)
    max_rows: int | None = Field(None, gt=0)
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    engine: Literal["auto", "off"] = "auto"
    max_length: int | None = Field(None, gt=0)
    vocabulary: Vocabulary | None = None
    template: str | None = None
    chat_template: str | None = None
    multi_label: bool | None = None
    metrics: str | list[str] | None = None
    abstain: Abstain | None = None
    doc_stride: int | None = Field(None, gt=0)
    max_answer_length: int | None = Field(None, gt=0)
    n_best_size: int | None = Field(None, gt=0)
    source_language: str | None = None
    target_language: str | None = None
    num_beams: int | None = Field(None, gt=0)
    max_new_tokens: int | None = Field(None, gt=0)
    length_penalty: float | None = None
    no_repeat_ngram_size: int | None = Field(None, ge=0)
    repetition_penalty: float | None = Field(None, gt=0)
    early_stopping: bool | Literal["never"] | None = None
    generate_on: int | None = Field(None, gt=0)
    class_weight: Literal["balanced"] | dict[str, float] | None = None
    trust_remote_code: bool = False
    per_device_eval_batch_size: int | None = Field(None, gt=0)
    bf16: bool | None = None
    fp16: bool | None = None
    report_to: str | list[str] = "none"
    push_to_hub: bool = False
    hub_model_id: str | None = None
    hub_private_repo: bool | None = None
    hub_token: str | None = Field(None, exclude=True)
    dataloader_num_workers: int | None = Field(None, ge=0)
    baselines: bool = True
    defaults: list[str] = Field(default_factory=list, description="written by hybridtune; not read")
    include_texts: bool = True

    _find = field_validator("task")(own_file.absolute)

    @field_validator("metrics")
    @classmethod
    def _find_metrics(cls, files: str | list[str] | None) -> str | list[str] | None:
        return list(map(own_file.absolute, files)) if isinstance(files, list) else files and own_file.absolute(files)

    @field_validator("seeds")
    @classmethod
    def _seeds_differ(cls, seeds: list[int] | None) -> list[int] | None:
        if seeds and len(set(seeds)) < len(seeds):
            raise ValueError("a seed is listed more than once")
        return seeds

    @model_validator(mode="after")
    def _strategies_exist(self) -> Recipe:
        self.strategies()
        return self

    @classmethod
    def make(cls, source: str | Path | dict[str, Any] | Recipe | None = None, /, **keys: Any) -> Recipe:
        """Builds a recipe from any of the three doors.

        Args:
            source: a YAML file, a dict, a recipe, or None.
            **keys: keys that add to or replace those of `source`, as `with_keys` takes them.

        Raises:
            RecipeError: a key is unknown, missing or has a value it cannot have.
        """
        where = str(Path(source)) if isinstance(source, (str, Path)) else NOWHERE
        if isinstance(source, Recipe):
            asked: dict[str, Any] = source.model_dump(exclude_unset=True)
            asked["data"] = {name: getattr(source.data, name) for name in source.data.model_fields_set}
            asked["hub_token"] = source.hub_token  # no dump holds it
        elif isinstance(source, (str, Path)):
            asked = read_recipe(Path(source))
        else:
            asked = dict(source or {})
        with placed(source):
            asked = with_keys(asked, keys, where)
            try:
                return cls(**asked)
            except ValidationError as error:
                raise as_recipe_error(error, where, cls) from None

    def strategies(self, check: Check | None = None) -> list[Strategy]:
        """Returns the candidates: one strategy, or several that are raced.

        Args:
            check: refuses a rule that cannot be kept; its errors say which rule it is.

        Raises:
            RecipeError: a strategy is unknown or cannot be read.
        """
        asked, at = self.strategy, ("strategy",)
        if are_stages(asked):
            return [read_strategy({"name": "custom", "stages": asked}, at, check, within=("stages",))]
        if isinstance(asked, (list, tuple)):
            found = [read_strategy(item, (*at, number), check) for number, item in enumerate(asked)]
        else:
            found = [read_strategy(asked, at, check)]
        if not found:
            raise RecipeError("strategy: the list is empty", mend="name at least one strategy")
        names = [strategy.name for strategy in found]
        for number, name in enumerate(names):
            if name in names[:number]:
                raise RecipeError(
                    f'strategy: "{name}" is listed more than once',
                    at=(*at, number),
                    given=asked[number],
                    mend="give each candidate its own name",
                )
        return found

    def all_seeds(self) -> list[int]:
        """The seeds that are run: `seeds`, or the one `seed`."""
        return list(self.seeds) if self.seeds else [self.seed]


def built_in_strategies() -> list[str]:
    """Names of the strategies that the package brings: one YAML file each."""
    return sorted(
        file.name[:-5]
        for file in resources.files(__package__).joinpath("strategies").iterdir()
        if file.name.endswith(".yaml")
    )


def without_heads(strategy: Strategy) -> Strategy:
    """A built-in strategy for a model that writes; others stay as they are.

    Its head is no new one, as a classifier's is, but the pretrained table of all words, often that of the embeddings
    too: a rule for the head is left out where its stage has other rules.
    """
    if strategy.name not in built_in_strategies():
        return strategy
    stages = [
        stage.model_copy(update={"rules": [rule for rule in stage.rules if rule.part != "head"] or stage.rules})
        for stage in strategy.stages
    ]
    if stages == strategy.stages:
        return strategy
    title = f"{strategy.title} (the pretrained head of a model that writes stays as it is)"
    return strategy.model_copy(update={"stages": stages, "title": title})


def load_strategy(name: str, at: tuple[Any, ...] = (), check: Check | None = None) -> Strategy:
    """Reads a strategy by its name, or from a YAML file.

    Args:
        name: of the strategy or the file.
        at: where the recipe says it.
        check: as of `Recipe.strategies`.

    Raises:
        RecipeError: there is no such strategy.
    """
    if name.endswith((".yaml", ".yml")):
        with placed(name):
            file = Path(name)
            return read_strategy({"name": file.stem, **read_recipe(file, "stages: [...]")}, (), check, where=str(file))
    if name not in built_in_strategies():
        raise RecipeError(
            f"strategy: {unknown('strategy', name, built_in_strategies())}",
            at=at,
            given=name,
            expected=", ".join(built_in_strategies()) + ", a YAML file, or the stages themselves",
            mend="`hybridtune strategies` lists them",
        )
    text = resources.files(__package__).joinpath("strategies", f"{name}.yaml").read_text("utf-8")
    return Strategy(name=name, **yaml12.load(text))


def with_keys(tree: dict[str, Any], keys: dict[str, Any], where: str) -> dict[str, Any]:
    """Adds keys to a recipe's dict; what is said last counts, and None is not said.

    Args:
        tree: the recipe so far; not changed.
        keys: keys of the recipe. `train`, `validation`, `test`, `columns` and `on_bad_row` may be given without their
            `data:`, `maximize` and `minimize` without their `goal:`. Columns add to those that were named before.
        where: where the recipe is, for messages.

    Raises:
        RecipeError: `data` is not a mapping.
    """
    tree, keys = ({key: value for key, value in one.items() if value is not None} for one in (tree, keys))
    data = keys.pop("data", tree.get("data"))
    if data is not None and not isinstance(data, dict):
        raise RecipeError(
            "data is not a mapping",
            where=where,
            at=("data",),
            given=data,
            found=data,
            expected=", ".join(Data.model_fields),
        )
    data = dict(data or {})
    columns = keys.get("columns")
    if isinstance(columns, dict) and isinstance(data.get("columns"), dict):
        keys["columns"] = {**data["columns"], **columns}
    data |= {name: keys.pop(name) for name in Data.model_fields if name in keys}
    goal = {name: keys.pop(name) for name in Goal.model_fields if name in keys}
    if goal:
        keys["goal"] = goal
    if "seed" in keys:
        tree.pop("seeds", None)
    return {**tree, **keys, "data": data}


def are_stages(asked: Any) -> bool:
    """Whether a list is one strategy's stages, not a list of strategies."""
    return (
        isinstance(asked, (list, tuple))
        and bool(asked)
        and all(isinstance(item, Stage) or (isinstance(item, dict) and "rules" in item) for item in asked)
    )


def read_strategy(
    asked: Any,
    at: tuple[Any, ...] = (),
    check: Check | None = None,
    *,
    within: tuple[Any, ...] = (),
    where: str = "",
) -> Strategy:
    """Reads a strategy from any of its forms.

    Args:
        asked: a `Strategy`, its name or file, its keys, or one stage.
        at: where it stands in the recipe.
        check: as of `Recipe.strategies`.
        within: what leads to that in its keys, where it is a part of them alone.
        where: the file is whose keys these are.

    Raises:
        RecipeError: there is no such strategy, or a key is unknown, missing or has a value it cannot have.
    """
    if isinstance(asked, Strategy):
        _check(asked, check)
        return asked
    if isinstance(asked, (str, Path)):
        return load_strategy(str(asked), at, check)
    if isinstance(asked, Stage):
        asked = {"name": asked.name or "custom", "stages": [asked]}
    if not isinstance(asked, dict):
        raise RecipeError(
            "strategy: cannot be read",
            at=at,
            given=asked,
            found=repr(asked),
            expected="a name, stages, or a list of either",
        )
    if "rules" in asked:
        asked, within = {"name": asked.get("name") or "custom", "stages": [asked]}, ("stages", 0)
    name = "" if where else f'strategy "{asked.get("name", "custom")}"'
    try:
        strategy = Strategy(**{"name": "custom", **asked})
    except ValidationError as error:
        raise as_recipe_error(error, where, Strategy, name, at, within) from None
    _check(strategy, check, name, at, within, where)
    return strategy


def _check(
    strategy: Strategy,
    check: Check | None,
    name: str = "",
    at: tuple[Any, ...] = (),
    within: tuple[Any, ...] = (),
    where: str = "",
) -> None:
    """Has every rule checked; see `read_strategy`."""
    if check is None:
        return
    for number, stage in enumerate(strategy.stages):
        for n, rule in enumerate(stage.rules):
            try:
                check(rule)
            except UserError as error:
                path = ("stages", number, "rules", n)
                problem = ": ".join(filter(None, (name, ".".join(map(str, path)), error.said)))
                place = None if error.at is None else (*at, *(*path, *error.at)[len(within) :])
                raise error.but(problem, where=where, at=place) from None
