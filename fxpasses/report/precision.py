"""What a compilation computes in a lower precision, and how far that is from float32."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Precision:
    """Operators of a float32 program that compute in another type.

    Attributes:
        dtype: the type: ``"bfloat16"``.
        operators: how many convolutions, linear layers and matrix products compute in it.
        casts: how many casts were written, to it and back.
        errors: of the first call, for each floating-point result the norm of its difference from float32's,
            relative to the norm of float32's; infinite where that one alone is finite. Empty where nothing
            was compared.
        unmeasured: why the first call was not compared with float32; empty where it was, or is still to be.
    """

    dtype: str
    operators: int
    casts: int
    errors: tuple[float, ...] = ()
    unmeasured: str = ""

    @property
    def largest_error(self) -> float | None:
        """The largest of the errors; None where there are none."""
        return max(self.errors, default=None)

    def __str__(self) -> str:
        counts = f"{self.operators} operator{'s' * (self.operators != 1)}"
        made = f"{self.casts} cast{'s' * (self.casts != 1)}"
        parts = [f"precision: {self.dtype}, {counts}, {made}"]
        if self.errors:
            error = f"{self.largest_error:.2%}".replace("%", " %")
            parts.append(f"first call's results differ from float32's by at most {error} (relative norm)")
        elif self.unmeasured:
            parts.append(f"not compared with float32: {self.unmeasured}")
        return "; ".join(parts)

    @staticmethod
    def merge(parts: Iterable[Precision | None]) -> Precision | None:
        """What several compilations compute in lower precision, together; None where none does."""
        found = [part for part in parts if part is not None]
        if not found:
            return None
        return Precision(
            dtype="+".join(dict.fromkeys(part.dtype for part in found)),
            operators=sum(part.operators for part in found),
            casts=sum(part.casts for part in found),
            errors=tuple(error for part in found for error in part.errors),
            unmeasured="; ".join(dict.fromkeys(part.unmeasured for part in found if part.unmeasured)),
        )

    @staticmethod
    def from_dict(data: Mapping[str, Any] | None) -> Precision | None:
        """What `dataclasses.asdict` and JSON made a mapping of; None for None."""
        return None if data is None else Precision(**{**data, "errors": tuple(data["errors"])})
