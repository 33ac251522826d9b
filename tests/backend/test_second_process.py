"""A second process that finds everything in inductor's caches counts, remarks, plans and packs the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PROGRAM = Path(__file__).with_name("second_process.py")


def test_a_warm_second_process_hits_the_caches_and_tells_the_same(tmp_path):
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    cold, warm = (
        json.loads(
            subprocess.run(
                [sys.executable, str(PROGRAM)], env=environment, check=True, capture_output=True, text=True
            ).stdout.splitlines()[-1]
        )
        for _ in range(2)
    )
    assert {name: found["told"] for name, found in warm.items()} == {
        name: found["told"] for name, found in cold.items()
    }
    told = {name: found["told"] for name, found in warm.items()}
    assert told["pair"] == {"ours": {"efficient_conv_bn_eval": 1}, "remarks": 1}
    assert told["mask"] == {"masks": 1}
    assert told["plan"]["applied"]["layout"] == told["plan"]["counted"] == 1
    assert told["constants"] == {"right": True, "packed": 1}
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


CAPABILITIES = {"AVX512": ("avx512", "avx2"), "AVX2": ("avx2", "default")}


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in CAPABILITIES, reason="needs AVX2 or AVX-512"
)
def test_code_for_longer_vectors_does_not_come_back_from_a_cache(tmp_path):
    """Stock inductor's keys do not tell for which vectors a graph was compiled."""
    program = (
        "import torch, fxpasses; x = torch.linspace(-3, 3, 1000); f = lambda x: torch.sin(x) * 2 + x.exp()\n"
        "torch.testing.assert_close(torch.compile(f, backend='fxpasses')(x), f(x))\n"
        "print(torch.backends.cpu.get_cpu_capability().lower())"
    )
    for capability in CAPABILITIES[torch.backends.cpu.get_cpu_capability()]:
        environment = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "ATEN_CPU_CAPABILITY": capability}
        done = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, **environment},
            check=True,
            capture_output=True,
            text=True,
        )
        assert done.stdout.strip() == capability
