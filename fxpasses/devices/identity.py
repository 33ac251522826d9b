"""What a device is called, and what else decides how long an operator takes on it."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path

import torch

from fxpasses.devices.profile import COLD, OPERANDS
from fxpasses.torch_internals.onednn import onednn_takes

_ONEDNN_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
"""Variables by which a user keeps oneDNN from using longer vectors."""


def device_name(device: str | torch.device = "cpu") -> str:
    """The name that profiles of this device carry; for a CPU with the number of threads torch may use."""
    checked = torch.device(device)
    if checked.type == "cpu":
        return f"{processor_name()}, {torch.get_num_threads()} threads"
    if checked.type == "cuda":
        return torch.cuda.get_device_name(checked)
    return checked.type


def processor_name() -> str:
    """The processor's brand, family and model: virtual machines often hide the model behind a bare brand."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(re.findall(r"^(model name|cpu family|model)\s*:\s*(.+)$", text, re.MULTILINE))
    name = fields.get("model name", "").strip() or platform.processor() or platform.machine()
    if "cpu family" in fields and "model" in fields:
        return f"{name}, family {fields['cpu family']} model {fields['model']}"
    return name


def settings_in_force(device: str | torch.device = "cpu") -> Mapping[str, str]:
    """What decides times besides the device: the precision of float32, and on a CPU the vectors in use."""
    precision = torch.get_float32_matmul_precision()
    found = {"float32_precision": "ieee" if precision == "highest" else precision, OPERANDS: COLD}
    if torch.device(device).type != "cpu":
        return found
    found["vectors"] = torch.backends.cpu.get_cpu_capability()
    limit = next((os.environ[name] for name in _ONEDNN_LIMITS if os.environ.get(name)), "")
    if limit:
        found["onednn_limit"] = limit.upper()
    if not onednn_takes(torch.float32):
        found["onednn"] = "off"
    return found
