"""A second process that finds everything in inductor's caches counts, remarks, plans and packs the same."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

PROGRAM = Path(__file__).with_name("second_process.py")


def told_by(factor: str, *networks: str, **environment: str) -> dict[str, Any]:
    """What a process says of the networks, all by default."""
    done = subprocess.run(
        [sys.executable, str(PROGRAM), factor, *networks],
        env={**os.environ, **environment},
        check=True,
        capture_output=True,
        text=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


SOME = ("pair", "plan", "sequence", "measured", "given_by_kernels")


@pytest.mark.parametrize(
    "networks", [SOME, pytest.param((*SOME, "given", "half"), marks=pytest.mark.full)], ids=len
)
def test_a_warm_second_process_hits_the_caches_and_tells_the_same(networks, tmp_path):
    """And a third, for shorter vectors, finds nothing: stock's keys do not tell for which vectors code is."""
    factor = f"1.{secrets.randbelow(10**12)}"
    cold, warm = (told_by(factor, *networks, FXPASSES_PROFILE_DIR=str(tmp_path)) for _ in range(2))
    assert {name: found["told"] for name, found in warm.items()} == {
        name: found["told"] for name, found in cold.items()
    }
    told = {name: found["told"] for name, found in warm.items()}
    ours = {"efficient_conv_bn_eval": 1, "activation_masks": 1}
    assert told["pair"] == {"ours": ours, "masks": 1, "remarks": 2}
    assert told["plan"]["applied"]["layout"] == told["plan"]["counted"] == 1
    for name in {"given", "given_by_kernels"}.intersection(told):
        assert [each.count("channels_last") for each in told[name]["io"]] == [0, 1], told[name]
    if "half" in told:
        assert told["half"]["kernels"] == []
    ours = torch.backends.cpu.get_cpu_capability() != "DEFAULT"
    assert told["sequence"]["packed"] == 3
    assert told["sequence"]["kernels"] == (["applied"] * 3 if ours else ["no-kernels"])
    assert (cold["measured"]["measured"], warm["measured"]["measured"]) == (2 if ours else 0, 0)
    for name in warm:
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
    shorter = told_by(factor, "pair", "sequence", ATEN_CPU_CAPABILITY="default")
    others = ["other-kernels"] if ours else []
    assert shorter["sequence"]["told"] == {"packed": 3, "kernels": ["no-kernels"], "others": others}
    assert not told["sequence"]["others"]
    if torch.backends.cpu.get_cpu_capability() != "DEFAULT":
        assert hits(shorter["pair"]) == 0


@pytest.mark.full
def test_an_archive_of_the_caches_carries_them_to_another_machine(tmp_path):
    """Which has weights of its own; the report comes with them."""
    factor = f"1.{secrets.randbelow(10**12)}"
    archive = str(tmp_path / "archive")
    for machine in ("first", "second"):
        folders = {"TORCHINDUCTOR_CACHE_DIR": machine, "FXPASSES_PROFILE_DIR": f"{machine}-profiles"}
        environment = {name: str(tmp_path / folder) for name, folder in folders.items()}
        told = told_by(factor, "sequence", CACHE_ARCHIVE=archive, **environment)["sequence"]
        assert told["told"]["packed"] == 3
        assert set(told["told"]["kernels"]) <= {"applied", "no-kernels"}
        assert told["told"]["kernels"]
        assert hits(told) == (machine == "second")
    assert told["inductor"].get("fxgraph_cache_miss", 0) == 0


def hits(counted: dict[str, dict[str, int]]) -> int:
    """How often AOTAutograd found a whole compilation in its cache."""
    return counted["aot"].get("autograd_cache_hit", 0)
