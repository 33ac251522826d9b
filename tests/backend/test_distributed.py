"""Data parallel and fully sharded training on two processes: eager's losses, the same rewrites on each."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
ROOT = HERE.parent.parent

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="needs gloo"
)


def run(inner: str) -> list[dict[str, dict[str, object]]]:
    """What each of two processes found, by way of training: losses in eager and compiled, counters."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE), os.environ.get("PYTHONPATH", "")]),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    command = [sys.executable, str(HERE / "worker.py"), inner]
    processes = [
        subprocess.Popen(
            command,
            env={**environment, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    results = []
    try:
        for process in processes:
            output, errors = process.communicate(timeout=240)
            assert process.returncode == 0, errors[-3000:]
            results.append(json.loads(output.splitlines()[-1]))
    finally:
        for process in processes:
            process.kill()
    return results


def check(inner: str) -> None:
    first, second = run(inner)
    for kind in ("ddp", "fsdp"):
        assert first[kind]["counters"] == second[kind]["counters"] == {"efficient_conv_bn_eval": 3}
        for each in (first[kind], second[kind]):
            found, expected = each["compiled"], each["eager"]
            assert isinstance(found, list)
            assert sum(found[-5:]) < sum(found[:5])
            assert found == pytest.approx(expected, rel=1e-4)


def test_two_processes_train_as_in_eager() -> None:
    check("aot_eager")


@pytest.mark.full
def test_two_processes_train_as_in_eager_with_inductor() -> None:
    check("inductor")
