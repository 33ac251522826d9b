"""The only place of the package that imports private names of torch, by topic.

Each function wraps one private facility and says what it is for, so that a torch release that moves a name
costs one edit here. Everything expensive (Dynamo, inductor) is imported inside the functions: importing any
of these modules, and so `import fxpasses`, loads neither.

Elsewhere a private name is an error: ruff knows those that are used here (TID251 in pyproject.toml), and
`tests/test_torch_internals.py` finds any other.
"""
