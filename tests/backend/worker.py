"""One of two processes: `python worker.py INNER` trains in eager and compiled, twice, and prints JSON."""

from __future__ import annotations

import contextlib
import json
import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from trainers import losses, network

import fxpasses


def distributed(kind: str, inner: str | None) -> nn.Module:
    """The network, for data parallel or fully sharded training, compiled where there is an inner backend.

    What is sharded is compiled part by part before it is wrapped: its hooks break the graph of the whole.
    """
    model = network()
    chosen = {"backend": "fxpasses", "options": {"inner": inner}}
    if kind == "ddp":
        wrapped = DistributedDataParallel(model)
        return torch.compile(wrapped, **chosen) if inner else wrapped  # type: ignore[call-overload]
    for name in ("stem", "body"):
        part = getattr(model, name)
        if inner:
            part = torch.compile(part, **chosen)  # type: ignore[call-overload]
            setattr(model, name, part)
        fully_shard(part)
    return fully_shard(model)


def trained(kind: str, inner: str) -> dict[str, object]:
    """Losses in eager and compiled, and what was rewritten."""
    fxpasses.reset()
    rank = dist.get_rank()
    eager = losses(distributed(kind, None), rank=rank)
    found = losses(distributed(kind, inner), rank=rank)
    counters = dict(fxpasses.Report.merge(fxpasses.reports()).applied)
    return {"eager": eager, "compiled": found, "counters": counters}


def main(inner: str) -> None:
    """Trains and prints what was found."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    print(json.dumps({kind: trained(kind, inner) for kind in ("ddp", "fsdp")}), flush=True)
    # The result is out. The peer may be gone already, and gloo's threads may still run when the interpreter's
    # teardown destroys them, which aborts the process now and then: so there is no teardown.
    with contextlib.suppress(RuntimeError):
        dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
