"""bf16 where it is faster: measured once a machine. What is cast for it, and when, stands in `casts.py`."""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from ..errors import RecipeError, RunError
from ..files import read_json, write_json
from ..recipe import Recipe

FASTER = 1.3  # from here on bf16 counts as faster: less would not pay for its rounding
ROWS, FEW, WIDTHS = 512, 16, (768, 3072)  # tokens of a batch, of a first look, and a feed-forward matrix of BERT's
GROWTH = 4  # from one look to the next
REPEATS = 5
LONGEST = 0.3  # seconds of one measurement; what takes longer in bf16 is worked out from fewer rows

Seconds = Callable[[int, bool], float]


@dataclass(frozen=True)
class Probe:
    """What was measured of a machine.

    Attributes:
        speedup: how many times as fast as fp32 bf16 is.
    """

    speedup: float

    @property
    def faster(self) -> bool:
        """Whether bf16 is used where nothing else is asked for."""
        return self.speedup >= FASTER

    def __str__(self) -> str:
        return f"{self.speedup:.2f}x as fast as fp32 here"


@dataclass(frozen=True)
class Choice:
    """What a run computes in.

    Attributes:
        bf16: whether under autocast to bf16. Trained weights and the optimizer's states are in fp32 either way.
        default: whether hybridtune chose it.
        reason: why it did.
    """

    bf16: bool
    default: bool
    reason: str

    def __str__(self) -> str:
        return f"{'on' if self.bf16 else 'off'}, {'default: ' if self.default else ''}{self.reason}"


def choose(recipe: Recipe, device: torch.device, begun: bool | None = None) -> Choice:
    """What the recipe asks for, and where it asks for nothing, what is faster.

    Args:
        recipe: its `bf16`, `fp16` and `engine` count.
        device: that is trained on.
        begun: what a run that is resumed was begun in: its rest has to be computed in the same.

    Raises:
        RecipeError: bf16 or fp16 is asked for, and the device has none.
    """
    if recipe.fp16 and not recipe.bf16:
        refuse_fp16(device)
    if recipe.bf16 if recipe.bf16 is not None else begun:
        refuse_bf16(device)
    if recipe.bf16 is not None:
        return Choice(recipe.bf16, False, "as asked for")
    if begun is not None:
        return Choice(begun, True, "as the run was begun")
    if recipe.fp16:
        return Choice(False, True, "fp16 is asked for")
    if recipe.engine == "off":
        return Choice(False, True, "engine: off")
    if not has_bf16(device):
        return Choice(False, True, "this device has none")
    found = probe(device)
    return Choice(found.faster, True, str(found))


def refuse_bf16(device: torch.device) -> None:
    """Refuses bf16 where there is none.

    Raises:
        RecipeError: the device cannot compute in it.
    """
    if not has_bf16(device):
        raise RecipeError(
            "bf16 is asked for, but this device cannot compute in it",
            found=machine(device)["device"],
            mend="leave it away",
        )


def refuse_fp16(device: torch.device) -> None:
    """Refuses fp16 where Accelerate would quietly compute in fp32.

    Raises:
        RecipeError: the device is a CPU.
    """
    if device.type == "cpu":
        raise RecipeError(
            "fp16: true, but a CPU is not trained in it",
            expected="a GPU",
            mend="leave fp16 away; bf16 is used by default where it is faster",
        )


def say(device: torch.device) -> str:
    """What `choose` does on a device where nothing is asked for, for a person."""
    if not has_bf16(device):
        return "not on this device"
    found = probe(device)
    return f"{found}: {'used by default' if found.faster else 'not used'}"


def has_bf16(device: torch.device) -> bool:
    """Whether a device computes in bf16 at all; every CPU does, many of them slowly."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    return device.type == "cpu" or torch.backends.mps.is_macos_or_newer(14, 0)


def machine(device: torch.device) -> dict[str, Any]:
    """All that the speed of a product depends on."""
    return {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else device.type,
        "processor": _processor(),
        "threads": torch.get_num_threads(),
    }


def probe(device: torch.device) -> Probe:
    """What is known of this machine; what is not known yet is measured and kept in the user's cache folder."""
    path = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "hybridtune" / "precision.json"
    try:
        kept = read_json(path)
    except (RunError, OSError):
        kept = None
    kept = kept if isinstance(kept, dict) else {}
    key = " | ".join(map(str, machine(device).values()))
    known = kept.get(key)
    if isinstance(known, (int, float)) and math.isfinite(known) and known > 0:
        return Probe(float(known))
    found = measure(device)
    with suppress(RunError, OSError):  # where nothing can be kept, it is measured every time
        write_json(path, {**kept, key: found})
    return Probe(found)


def measure(device: torch.device) -> float:
    """How many times as fast as fp32 bf16 is, in less than two seconds also where it is very slow."""
    return compare(_products(device))


def compare(seconds: Seconds) -> float:
    """The best of several times in fp32 over that in bf16.

    Args:
        seconds: computes that many rows, in bf16 or in fp32, and says how long it took.
    """
    for bf16 in (False, True):  # wakes the libraries up
        seconds(FEW, bf16)
    rows, half = FEW, _best(seconds, FEW, True)
    # step by step: of a few rows most is the cast of the weight, and on a busy machine what else it does
    while rows < ROWS and half * GROWTH <= LONGEST:
        rows = min(rows * GROWTH, ROWS)
        half = _best(seconds, rows, True)
    return _best(seconds, ROWS, False) / (half * ROWS / rows)


def _best(seconds: Seconds, rows: int, bf16: bool) -> float:
    best, spent = math.inf, 0.0
    for _ in range(REPEATS):
        took = seconds(rows, bf16)
        best, spent = min(best, took), spent + took
        if spent > LONGEST:
            break
    return best


def _products(device: torch.device) -> Seconds:
    """Times a linear layer as training has it: forward and both products of its backward, under autocast or not."""
    width, wide = WIDTHS
    inputs = torch.ones(ROWS, width, device=device)
    weight = torch.ones(wide, width, device=device, requires_grad=True)

    def wait() -> None:
        if device.type != "cpu":
            torch.accelerator.synchronize()

    def seconds(rows: int, bf16: bool) -> float:
        part = inputs[:rows].requires_grad_()
        wait()
        begin = time.perf_counter()
        with torch.enable_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            outputs = F.linear(part, weight)
        torch.autograd.grad(outputs, (part, weight), torch.ones_like(outputs))
        wait()
        return time.perf_counter() - begin

    return seconds


def _processor() -> str:
    """Its name and what it can do: virtual machines of one name differ by what speeds depend on."""
    name, flags = platform.processor() or platform.machine(), set[str]()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = (line.partition(":") for line in cpuinfo.read_text().splitlines())
        told = {key.strip(): value.strip() for key, _, value in lines}
        name, flags = told.get("model name", name), set(told.get("flags", "").split())
    able = [torch.backends.cpu.get_cpu_capability(), *sorted(flags & {"avx512_bf16", "amx_bf16"})]
    return f"{name} ({', '.join(able)})"
