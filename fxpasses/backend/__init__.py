"""The backend of torch.compile: `torch.compile(model, backend="fxpasses")`.

The package may be given to torch.compile itself: `torch.compile(model, backend=fxpasses.backend)`.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

from fxpasses.backend.door import backend as backend


class _CallableModule(types.ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        return backend(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule
