"""What a number was measured with: versions, commit and machine."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import flowrl

__all__ = ["cpu_name", "versions"]


def versions(device: torch.device) -> dict[str, Any]:
    """Versions, the commit of a checkout (with -dirty when files differ from it), and the machine, for a run on ``device``."""
    found: dict[str, Any] = {"flowrl": flowrl.__version__, "python": platform.python_version()}
    for package in ("torch", "diffusers", "transformers", "accelerate", "peft", "safetensors"):
        found[package] = metadata.version(package)
    root = Path(flowrl.__file__).parent.parent
    found["commit"] = None
    if (root / ".git").exists() and shutil.which("git"):
        command = ["git", "--no-optional-locks", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        found["commit"] = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False).stdout.strip() or None
    found |= {"platform": platform.platform(), "cpu": cpu_name(), "cpu_count": os.cpu_count(), "threads": torch.get_num_threads()}
    found["device"] = torch.cuda.get_device_name() if device.type == "cuda" else found["cpu"]
    return found


def cpu_name() -> str:
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text(encoding="utf-8").splitlines() if facts.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
