"""Changing graphs: rules, the driver, the registry, and the decorator `@fxpasses.rewrite(...)`.

The decorator and the package share a name, so the package may be called; `fxpasses.rewrite.declarative` has
the decorator and a tutorial.
"""

from __future__ import annotations

import sys
import types
from typing import Any


class _CallablePackage(types.ModuleType):
    """This package, which may be called as the decorator."""

    def __call__(self, **arguments: Any) -> Any:
        from fxpasses.rewrite.declarative import rewrite

        return rewrite(**arguments)


sys.modules[__name__].__class__ = _CallablePackage
