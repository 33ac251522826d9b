"""Operator inputs: recorded, written, read and made into tensors again.

`recorder` counts what a model calls, `log` writes and reads the counts in PyTorch's text format, `notation`
holds the grammar of a line, `suites` the models whose logs lie in `logs/`, and `materialise` turns a line
into arguments that an operator accepts. `python -m benchmarks.operator_inputs` lists and records logs.
"""

from benchmarks.operators.inputs.log import (
    LogError,
    OperatorLog,
    Sample,
    read_log,
    read_logs,
    resolve_operator,
    write_log,
)
from benchmarks.operators.inputs.notation import Call, NotationError, TensorSpec, format_call, parse_call
from benchmarks.operators.inputs.recorder import OperatorInputsMode

__all__ = [
    "Call",
    "LogError",
    "NotationError",
    "OperatorInputsMode",
    "OperatorLog",
    "Sample",
    "TensorSpec",
    "format_call",
    "parse_call",
    "read_log",
    "read_logs",
    "resolve_operator",
    "write_log",
]
