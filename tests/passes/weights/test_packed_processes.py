"""weights="cached" through inductor, in a process of its own: what caches hand over and what they do not."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest


def test_a_second_process_does_not_get_constants_from_a_cache(tmp_path):
    """The first process fills inductor's caches; the second must fill its own constants."""
    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent("""
        import torch, fxpasses
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU()).eval()
        x = torch.randn(1, 3, 9, 9)
        run = torch.compile(model, backend="fxpasses", options={"weights": "cached"})
        with torch.no_grad():
            print((run(x) - model(x)).abs().max().item() < 1e-5, fxpasses.last_report().packed_tensors)
        """)
    )
    environment = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, str(program)],
            capture_output=True,
            text=True,
            env={**os.environ, **environment},
            check=True,
        )
        assert done.stdout.split() == ["True", "1"]


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
