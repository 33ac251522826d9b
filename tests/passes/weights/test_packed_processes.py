"""weights="cached" through inductor, in a process that has needed none of our kernels before."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest


@pytest.mark.parametrize(
    ("capability", "dtype", "codes"),
    [("default", "float32", ["no-kernels"]), (None, "bfloat16", [])],
    ids=["no vectors", "no float32"],
)
def test_a_process_that_never_needed_our_operators_packs_too(capability, dtype, codes):
    """They are made known to torch together with the kernels, which are compiled when they are needed."""
    program = f"""
        import torch, fxpasses
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU()).eval().to(torch.{dtype})
        x = torch.randn(1, 3, 9, 9, dtype=torch.{dtype})
        run = torch.compile(model, backend="fxpasses", options={{"weights": "cached"}})
        with torch.no_grad():
            torch.testing.assert_close(run(x), model(x))
        print([remark.code for remark in fxpasses.last_report().remarks if remark.rule == "own_kernels"])
        """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        env={**os.environ, **({"ATEN_CPU_CAPABILITY": capability} if capability else {})},
        check=True,
    )
    assert done.stdout.strip() == str(codes)
