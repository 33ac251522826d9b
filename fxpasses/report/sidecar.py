"""What a pass inside inductor did, kept beside inductor's cached artifact.

On a hit in inductor's caches no pass runs. What the passes did when the artifact was made is read from a
file beside it, so that counters and reports are those of the first compilation.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule

from fxpasses.report.data import Remark
from fxpasses.report.whole_files import write_whole
from fxpasses.torch_internals.inductor import inductor_cache_folder, inductor_caches_are_on


def save(name: str, data: object, patches: Mapping[str, Any]) -> None:
    """Keeps `data` (JSON) under a name, where inductor keeps its artifacts under these settings."""
    if not inductor_caches_are_on(patches):
        return
    # Where it cannot be written, whoever finds the artifact later is told that the record is gone.
    with contextlib.suppress(OSError):
        write_whole(_path(name), json.dumps(data))


def load(name: str) -> Any:
    """What was kept under a name.

    Raises:
        OSError: nothing was, or it is gone.
        ValueError: the file is damaged.
    """
    return json.loads(_path(name).read_text(encoding="utf-8"))


def remarks_of(
    rule: str, name: str, made: Sequence[Remark] | None, patches: Mapping[str, Any]
) -> list[Remark]:
    """What a pass remarked: kept under a name where it ran now, else what was kept so before.

    Args:
        rule: the name of the pass.
        name: where its remarks are kept.
        made: what it remarked now; None if the graph came from inductor's cache.
        patches: inductor's settings.
    """
    if made is not None:
        save(name, [asdict(remark) for remark in made], patches)
        return list(made)
    try:
        return [Remark(**fields) for fields in load(name)]
    except (OSError, ValueError, TypeError):
        message = "the graph came from inductor's cache, and the record of this pass is gone"
        return [Remark(rule, "declined", "no-record", message, node="", stage="check")]


def _path(name: str) -> Path:
    return Path(inductor_cache_folder()) / "fxpasses" / f"{name}.json"


@functools.cache
def sources() -> str:
    """A digest of the package's sources, so that a change of any makes the caches stale."""
    package = Path(str(resources.files("fxpasses")))
    texts = [path.read_bytes() for path in sorted(package.rglob("*.py"))]
    return hashlib.sha256(b"\0".join(texts)).hexdigest()


def digest(*parts: str) -> str:
    """A name for everything that `parts` say."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def graph_key(graph_module: GraphModule, inputs: Sequence[Any]) -> str:
    """What two compilations of the same graph have in common, in whichever process."""
    signature = [
        (tuple(map(str, given.shape)), tuple(map(str, given.stride())), str(given.dtype), given.requires_grad)
        if isinstance(given, torch.Tensor)
        else str(type(given))
        for given in inputs
    ]
    return digest(graph_module.code, str(signature), str(torch.is_grad_enabled()), torch.__version__)
