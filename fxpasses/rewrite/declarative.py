"""Rules in ten lines: a pattern and a replacement, written as plain torch functions.

An identity first. The parameters are tensors, and `examples` gives one for each:

>>> import fxpasses, torch
>>> @fxpasses.rewrite(name="double_negation", examples=(torch.randn(2, 3),))
... class DoubleNegation:
...     def pattern(x):
...         return torch.neg(torch.neg(x))
...     def replacement(x):
...         return x
>>> with fxpasses.testing.registered(DoubleNegation):
...     report = fxpasses.explain(lambda x: (-(-x.exp())).sin(), torch.randn(4))
>>> print(report.remarks[0])  # doctest: +ELLIPSIS
double_negation at ...: matched 2 of 2 nodes; applied: replaced ...

`-(-x)`, `x.neg().neg()` and `aten.neg` are the same operator, so one pattern serves every spelling and
every capture level. A parameter whose example is a float takes any number. `check` may decline with a reason
(a `Decline`, or False); it sees what each parameter took:

>>> import torch.nn.functional as F
>>> @fxpasses.rewrite(name="rms_norm", examples=(torch.randn(2, 8), torch.randn(8), 1e-6))
... class RmsNorm:
...     def pattern(x, weight, eps):
...         return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight
...     def replacement(x, weight, eps):
...         return F.rms_norm(x, (x.shape[-1],), weight, eps)
...     def check(match):
...         if match.tensor("weight").shape != match.tensor("x").shape[-1:]:
...             return match.decline("weight-shape", "the weight is not one number per channel")
>>> x, weight = torch.randn(4, 16), torch.randn(16)
>>> def norm(x, weight):
...     return weight * (x * torch.rsqrt((x ** 2).mean(1, keepdim=True) + 1e-5))
>>> def cubic(x, weight):
...     return weight * (x * torch.rsqrt((x ** 3).mean(1, keepdim=True) + 1e-5))
>>> with fxpasses.testing.registered(RmsNorm):
...     print(dict(fxpasses.explain(norm, x, weight).applied))
...     print(fxpasses.explain(cubic, x, weight).remarks[0])  # doctest: +ELLIPSIS
{'rms_norm': 1}
rms_norm at ...: matched 5 of 6 nodes; declined [other-constant]: ... has 3 where the pattern has 2

A rule with a `profit` of its own is applied where that pays (`profit="always"` overrides it):

>>> @fxpasses.rewrite(name="addmm", examples=(torch.randn(2, 3), torch.randn(3, 4), torch.randn(4)))
... class AddMM:
...     def pattern(x, weight, bias):
...         return torch.matmul(x, weight) + bias
...     def replacement(x, weight, bias):
...         return torch.addmm(bias, x, weight)
...     def check(match):
...         return match.tensor("x").ndim == match.tensor("weight").ndim == 2
...     def profit(match):
...         if match.tensor("weight").numel() < 16:
...             return match.decline("small", "too small a product to gain anything")
>>> def affine(x, weight, bias):
...     return bias + x @ weight
>>> with fxpasses.testing.registered(AddMM):
...     small = fxpasses.explain(affine, torch.randn(2, 3), torch.randn(3, 2), torch.randn(2))
...     large = fxpasses.explain(affine, torch.randn(2, 8), torch.randn(8, 8), torch.randn(8))
>>> [remark.code for remark in (*small.remarks, *large.remarks)]
['small', 'applied']

A parameter with the default None is optional: the pattern is tried with and without it. A function may
return several results. Rules that need code of their own derive from `fxpasses.Rule` instead.

The driver refuses for every rule: results of the pattern's inside that are read elsewhere, another grad
mode, autocast or stream somewhere in it, a write to an operand on the way, and a replacement that shares
storage with an operand where the pattern did not (or the other way round) if anybody could tell.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch  # noqa: F401  # Dynamo looks up what the tutorial's functions use in the module that holds it

from fxpasses.errors import PatternError
from fxpasses.rewrite.declarative_rule import DeclarativeRule


def rewrite(
    *,
    name: str,
    examples: Sequence[Any],
    after: tuple[str, ...] = (),
    default: bool = True,
    max_sweeps: int = 1,
) -> Callable[[type], DeclarativeRule]:
    """Makes a rule from a class with `pattern`, `replacement` and, if wanted, `check`, `profit`, `pays_for`.

    The functions take no `self` (and may be marked static). `pattern` and `replacement` have the same
    parameters, tensors or numbers; those with the default None are optional. `check(match)` and
    `profit(match)` take a `PatternMatch` and return a `Decline` or False to decline; `pays_for(match)` gives
    `fxpasses.SizeRange`s. Register the rule with `fxpasses.register`, or give it to a compilation.

    Args:
        name: the rule's name, in counters, remarks and options.
        examples: one tensor or float per parameter; or several such tuples, where the pattern is traced to
            other operators for other dtypes or ranks.
        after: names of rules or passes that must have run before, where they run at all.
        default: whether the rule is part of the default pipeline once it is registered.
        max_sweeps: how often it may go over a graph, until it changes nothing; see `fxpasses.RulePass`.

    Raises:
        PatternError: the functions or the examples do not fit together, or cannot be traced.
    """

    def made(cls: type) -> DeclarativeRule:
        plain = {key: getattr(member, "__func__", member) for key, member in vars(cls).items()}
        functions = {key: member for key, member in plain.items() if inspect.isfunction(member)}
        optional = ("check", "profit", "pays_for")
        unknown = functions.keys() - {"pattern", "replacement", *optional}
        if unknown or not {"pattern", "replacement"} <= functions.keys():
            raise PatternError(
                f"the class of rule {name!r} needs functions `pattern` and `replacement`, and may have "
                f"`check`, `profit` and `pays_for`; it has {', '.join(sorted(functions)) or 'none'}."
            )
        rule = DeclarativeRule(
            name, examples=examples, after=after, default=default, max_sweeps=max_sweeps, **functions
        )
        rule.__doc__ = cls.__doc__
        return rule

    return made
