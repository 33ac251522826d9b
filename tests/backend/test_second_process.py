"""A second process that finds everything in inductor's caches counts, remarks, plans and packs the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

PROGRAM = Path(__file__).with_name("second_process.py")


def told_by(cache: Path, capability: str, *networks: str) -> dict[str, Any]:
    """What a process says of the networks, all by default, that torch runs with such vectors."""
    environment = {"TORCHINDUCTOR_CACHE_DIR": str(cache), "ATEN_CPU_CAPABILITY": capability}
    command = [sys.executable, str(PROGRAM), *networks]
    done = subprocess.run(
        command, env={**os.environ, **environment}, check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def test_a_warm_second_process_hits_the_caches_and_tells_the_same(tmp_path):
    """And the first finds nothing that was compiled for longer vectors, of which stock's keys do not tell."""
    own = torch.backends.cpu.get_cpu_capability().lower()
    if own != "default":
        told_by(tmp_path, own, "pair")
    cold, warm = (told_by(tmp_path, "default") for _ in range(2))
    assert {name: found["told"] for name, found in warm.items()} == {
        name: found["told"] for name, found in cold.items()
    }
    told = {name: found["told"] for name, found in warm.items()}
    assert told["pair"] == {"ours": {"efficient_conv_bn_eval": 1}, "remarks": 1}
    assert told["mask"] == {"masks": 1}
    assert told["plan"]["applied"]["layout"] == told["plan"]["counted"] == 1
    assert told["constants"] == {"packed": 1, "kernels": ["no-kernels"]}
    for name in ("pair", "mask", "plan"):
        assert (hits(cold[name]), hits(warm[name])) == (0, 1), name
        assert not {
            kind: warm[name][of].get(kind, 0)
            for of, kind in (
                ("inductor", "fxgraph_cache_miss"),
                ("inductor", "fxgraph_cache_bypass"),
                ("aot", "autograd_cache_bypass"),
            )
            if warm[name][of].get(kind, 0)
        }, name


def hits(counted: dict[str, dict[str, int]]) -> int:
    """How often AOTAutograd found a whole compilation in its cache."""
    return counted["aot"].get("autograd_cache_hit", 0)
