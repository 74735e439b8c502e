"""Fifty random sets of rules: what each trains is worked out again by hand; all come back in one new process."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from elsewhere import OURS, in_a_new_process

from hybridtune import checkpoint, methods
from hybridtune.anatomy import Anatomy, Part
from hybridtune.compose import Assembly
from hybridtune.errors import MethodError, PartError, RunError
from hybridtune.layers import Block
from hybridtune.recipe import Rule, Stage, Strategy, Training
from hybridtune.resolve import resolve

SETS, STEPS, RATE = 50, 3, 1e-2
ARCHITECTURES = ("bert", "llama", "gpt2", "t5")
BODIES = {"bert": "bert", "llama": "model", "gpt2": "transformer", "t5": "transformer.encoder"}

ROTATED = ("llama",)  # positions enter queries and keys alone

PLAIN = ("all", "embeddings", "head", "new", "norms", "biases")
PATTERNS = (r"re:.*\.[02]\..*(attention|attn|Attention)", r"re:.*(down_proj|output\.dense|c_proj|wo)", r"re:.*\.1")
INDICES = ("", "", "[0]", "[-1]", "[1:]", "[:2]", "[-2:]", "[0:2]", "[0,2]", "[1,-1]", "[:]")
SUFFIXES = (
    *("", "", "", ".attention", ".mlp", ".cross_attention", ".norms", ".biases", ".q", ".o", ".down"),
    *(".attention.q", ".attention.k", ".attention.v", ".attention.qkv", ".attention.o"),
    *(".mlp.up", ".mlp.gate", ".mlp.down", ".cross_attention.k"),
)


# --- drawing


def draw_part(pick: random.Random, architecture: str) -> str:
    kind = pick.random()
    if kind < 0.3:
        return pick.choice(PLAIN)
    if kind < 0.4:
        return pick.choice(PATTERNS)
    stack = pick.choice(("", "", "encoder.", "decoder.")) if architecture == "t5" else ""
    return f"{stack}layers{pick.choice(INDICES)}{pick.choice(SUFFIXES)}"


def draw_options(pick: random.Random, method: str) -> dict[str, Any]:
    if method == "lora":
        init = pick.choice((True, True, True, "gaussian", "pissa", "mica"))
        dora = init != "mica" and pick.random() < 0.3
        return {"r": pick.randint(1, 3), "init_lora_weights": init, "use_dora": dora, "use_rslora": pick.random() < 0.3}
    if method == "adapter":
        mode, placement = pick.choice(("sequential", "parallel")), pick.choice(("houlsby", "pfeiffer"))
        return {"bottleneck": pick.randint(1, 5), "mode": mode, "placement": placement}
    return {"num_virtual_tokens": pick.randint(1, 4)} if method in ("prompt", "prefix") else {}


def draw_rules(pick: random.Random, architecture: str) -> list[Rule]:
    rules = []
    for _ in range(pick.randint(1, 4)):
        method = pick.choice(methods.names())
        part = "embeddings" if method == "prompt" and pick.random() < 0.7 else draw_part(pick, architecture)
        rules.append(tiny.rule(part, method, **draw_options(pick, method)))
    return rules


# --- what a set of rules trains, worked out again: every tensor is the last one's that claims it


def with_new(rules: list[Rule]) -> list[Rule]:
    """New weights are trained unless a rule names them: before all rules, but behind one that freezes everything."""
    if any(rule.part == "new" for rule in rules):
        return rules
    frozen = [number for number, rule in enumerate(rules) if (rule.part, rule.method) == ("all", "freeze")]
    at = max(frozen, default=-1) + 1
    return [*rules[:at], tiny.rule("new", "full"), *rules[at:]]


def scaled(part: Part) -> list[str]:
    """The matrices that (IA)3 scales: keys, values and `down`, or all where they are of one kind."""
    one_kind = len(set(part.roles.values())) == 1
    return [name for name in part.matrices if one_kind or part.roles.get(name) in ("k", "v", "qkv", "down")]


def claims(method: str, part: Part) -> set[str]:
    own = set(part.parameters)
    if method in ("full", "freeze"):
        return own
    if method == "norm":
        return set(part.norms)
    if method == "bias":
        return {name for name in own if name.endswith(".bias")}
    if method == "lora":
        return own & {f"{name}.weight" for name in part.matrices}
    if method == "ia3":
        return own & {f"{name}.{tensor}" for name in scaled(part) for tensor in ("weight", "bias")}
    return set()


def trained(rules: list[Rule], anatomy: Anatomy, architecture: str) -> set[str]:
    """Names of all tensors that the rules train, added ones too."""
    rules, new = with_new(rules), set(anatomy.new)
    parts = [anatomy.part(rule.part) for rule in rules]
    owner: dict[str, int] = {}
    for number, (rule, part) in enumerate(zip(rules, parts, strict=True)):
        wraps = rule.method in ("lora", "ia3")
        owner |= {name: number for name in claims(rule.method, part) if not (wraps and name in new)}
    found: set[str] = set()
    for number, (rule, part) in enumerate(zip(rules, parts, strict=True)):
        own = {name for name in part.parameters if owner.get(name, number) == number}
        found |= set(_trained_by(rule, part, own, new, architecture))
    return found


def _trained_by(rule: Rule, part: Part, own: set[str], new: set[str], architecture: str) -> Iterator[str]:
    method, options, kept = rule.method, rule.options, claims(rule.method, part) & own
    matrices = [name for name in part.matrices if f"{name}.weight" in own]
    if method in ("full", "norm"):
        yield from kept
    elif method == "bias":
        has_some = any(name.endswith(".bias") for name in part.parameters)
        yield from kept if has_some else (f"{name}_bias.bias" for name in matrices)
    elif method == "lora":
        for name in (name for name in matrices if f"{name}.weight" not in new):
            yield f"{name}.lora_A.default.weight"
            if options["init_lora_weights"] != "mica":
                yield f"{name}.lora_B.default.weight"
            if options["use_dora"]:
                yield f"{name}.lora_magnitude_vector.default.weight"
    elif method == "ia3":
        yield from (
            f"{name}.ia3_l.default" for name in scaled(part) if name in matrices and f"{name}.weight" not in new
        )
    elif method == "adapter":
        for block in part.blocks:
            if options["placement"] == "houlsby" or block.kind == "mlp":
                here = f"{block.path}.adapter_{block.kind}"
                yield from (f"{here}.{side}.{tensor}" for side in ("down", "up") for tensor in ("weight", "bias"))
    elif method == "prefix":
        own_attention = [block for block in part.blocks if block.kind == "attention"]
        for block in own_attention or [block for block in part.blocks if block.kind == "cross_attention"]:
            yield from (f"{_keys_of(block).rpartition('.')[0]}.prefix.{what}" for what in ("key", "value"))
    elif method == "prompt":
        yield f"{BODIES[architecture]}.soft_prompt.prompt"


def _keys_of(block: Block) -> str:
    return next(name for name, role in block.matrices.items() if role in ("k", "qkv"))


def without_gradient(anatomy: Anatomy, architecture: str) -> set[str]:
    """Biases of keys shift all scores of a query alike, which softmax does not see; rotated ones do not."""
    keys = (_keys_of(block) for stack in anatomy.stacks for block in stack.blocks if block.kind != "mlp")
    return (
        {f"{name}{ending}" for name in keys for ending in (".bias", "_bias.bias")}
        if architecture not in ROTATED
        else set()
    )


# --- the fifty


@dataclass
class Outcome:
    """A set of rules that was trained: what moved, what it wrote, and its logits."""

    architecture: str
    rules: list[Rule]
    moved: set[str]
    expected: set[str]
    may_stay: set[str]
    folder: Path
    logits: np.ndarray

    def __str__(self) -> str:
        return f"{self.architecture}: {'; '.join(map(str, self.rules))}"


def train(assembly: Assembly, names: tuple[str, ...]) -> set[str]:
    """Three steps of Adam, whose steps are seen however small a gradient is; gives the names of what has moved."""
    model, loaded_as = assembly.model, {id(assembly.parameter(name)): name for name in assembly.anatomy.parameters}
    every = {loaded_as.get(id(parameter), name): parameter for name, parameter in model.named_parameters()}
    before = {name: parameter.detach().clone() for name, parameter in every.items()}
    model.requires_grad_(False)
    chosen = [assembly.parameter(name).requires_grad_(True) for name in names]
    optimizer = torch.optim.Adam(chosen, lr=RATE)
    for _ in range(STEPS):
        loss = torch.nn.functional.cross_entropy(model(**tiny.batch()).logits, torch.tensor([0, 1]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.isfinite(loss)
    return {name for name, parameter in every.items() if not torch.equal(parameter, before[name])}


Drawn = tuple[list[Outcome], Counter[str]]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Drawn:
    """The sets, trained and written; and how often each kind of error has refused one."""
    return draw_sets(tmp_path_factory.mktemp("random"), seed=0)


def draw_sets(home: Path, seed: int) -> Drawn:
    """Draws sets until enough of them are not refused; those are put on a model, trained and written."""
    pick, refused, outcomes = random.Random(seed), Counter[str](), list[Outcome]()
    bases = {name: tiny.save_body(home / name, name) for name in ARCHITECTURES}
    plain = {name: tiny.assembly(folder)[0] for name, folder in bases.items()}
    while len(outcomes) < SETS:
        architecture = ARCHITECTURES[len(outcomes) % len(ARCHITECTURES)]
        rules, anatomy = draw_rules(pick, architecture), plain[architecture].anatomy
        try:
            strategy, _ = resolve(Strategy(name="s", stages=[Stage(rules=rules)]), Training(), plain[architecture], 32)
        except (MethodError, PartError) as error:
            refused[type(error).__name__] += 1
            continue
        torch.manual_seed(len(outcomes))
        assembly, base = tiny.assembly(bases[architecture])
        composition = assembly.begin(strategy.stages[0])
        moved = train(assembly, composition.names)
        folder = home / str(len(outcomes))
        folder.mkdir()
        checkpoint.write(folder, assembly, base)
        outcomes.append(
            Outcome(
                architecture,
                rules,
                moved,
                trained(rules, anatomy, architecture),
                without_gradient(anatomy, architecture),
                folder,
                tiny.logits(assembly.model).double().numpy(),
            )
        )
    return outcomes, refused


def test_the_sets_are_various(drawn: Drawn) -> None:
    outcomes, refused = drawn
    used = Counter(rule.method for outcome in outcomes for rule in outcome.rules)
    assert min(used[name] for name in methods.names()) >= 3, used
    assert sum(len(outcome.rules) > 1 for outcome in outcomes) >= 20
    parts = " ".join(rule.part for outcome in outcomes for rule in outcome.rules)
    pieces = ("[", ":", ",", "re:", "encoder.", "decoder.", "attention", "mlp", "norms", "biases", "embeddings", "head")
    assert [piece for piece in pieces if piece not in parts] == []
    assert min(refused["MethodError"], refused["PartError"]) >= 10, refused


def test_what_moved_is_what_the_rules_name(drawn: Drawn) -> None:
    for outcome in drawn[0]:
        assert outcome.moved <= outcome.expected, f"{outcome}: {outcome.moved - outcome.expected} moved"
        stayed = outcome.expected - outcome.moved - outcome.may_stay
        assert not stayed, f"{outcome}: {stayed} did not move"


def test_all_come_back_in_one_new_process(drawn: Drawn) -> None:
    jobs = [(str(outcome.folder), str(outcome.folder / "logits.json")) for outcome in drawn[0]]
    in_a_new_process(OURS, jobs)
    for outcome, (_, out) in zip(drawn[0], jobs, strict=True):
        difference = np.abs(np.array(json.loads(Path(out).read_text())) - outcome.logits).max()
        assert difference == 0.0, f"{outcome}: logits differ by {difference}"


def test_one_altered_byte_is_refused(drawn: Drawn) -> None:
    pick = random.Random(1)
    for outcome in drawn[0]:
        path = outcome.folder / checkpoint.DELTA
        whole = path.read_bytes()
        at = pick.randrange(len(whole))
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << pick.randrange(8)]) + whole[at + 1 :])
        with pytest.raises(RunError, match="truncated or altered"):
            checkpoint.load(outcome.folder)
        path.write_bytes(whole)
