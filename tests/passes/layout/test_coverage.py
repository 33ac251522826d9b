"""Every operator of the running torch that takes or gives tensors has a row, or a reason why it forces."""

from __future__ import annotations

import inspect
import re

import pytest
import torch

from fxpasses.graph.names import _base
from fxpasses.passes.layout.forced import FAMILIES, reason_of
from fxpasses.passes.layout.labels import ELEMENTWISE, FOLLOWING, INDEXING, OPERATORS, Kind, row_of
from fxpasses.torch_internals.operators import operators_of

HELPERS = frozenset(("assert_int_or_pair", "boolean_dispatch"))
"""What torch.nn.functional has beside its functions of tensors."""


def functions_of_tensors() -> set[str]:
    """The public functions of torch.nn.functional that are called with tensors."""
    found = vars(torch.nn.functional).items()
    names = {name for name, each in found if callable(each) and not inspect.isclass(each)}
    of_overrides = {name for name in names if "torch_function" in name}
    return {name for name in names - HELPERS - of_overrides if not name.startswith("_")}


@pytest.mark.parametrize(
    ("namespace", "some"),
    [
        ("aten", {"conv2d", "reflection_pad3d", "linalg_svd"}),
        ("prims", {"convert_element_type", "iota", "fma"}),
        ("inductor", {"_reinterpret_tensor"}),
    ],
)
def test_every_operator_has_a_row_or_a_reason(namespace, some):
    names = operators_of(namespace)
    assert some <= {_base(name) for name in names}
    assert sorted(name for name in names if row_of(_base(name)) is None) == []


def test_every_function_of_tensors_has_a_row_or_a_reason():
    names = functions_of_tensors()
    assert {"conv2d", "grid_sample", "interpolate", "lp_pool2d"} <= names
    assert sorted(name for name in names if row_of(_base(name)) is None) == []


def test_an_operator_that_torch_might_have_tomorrow_has_none():
    for name in ("conv4d", "pixel_reshuffle", "upsample_lanczos3d", "instance_norm2", "softplus2"):
        assert row_of(name) is None, name


def test_what_forces_has_one_reason_and_what_has_a_row_does_not_force():
    assert Kind.FORCING not in OPERATORS.values()
    assert reason_of("linalg_svd") == "reads matrices or vectors of what is no image"
    assert row_of("special_log_softmax") is Kind.ABSORBING
    assert row_of("special_entr") is Kind.AGNOSTIC
    assert len({family.reason for family in FAMILIES}) == len(FAMILIES)
    assert not [
        name for name in OPERATORS if re.fullmatch(ELEMENTWISE, name) and row_of(name) is Kind.AGNOSTIC
    ]


def test_what_is_said_of_operators_beside_the_table_is_said_of_such_as_keep_a_layout():
    assert {row_of(name) for name in FOLLOWING} <= {Kind.AGNOSTIC, Kind.COSTED}
    kept = {row_of(name) for name in INDEXING - {"_unsafe_index_put"}}
    assert kept <= {Kind.AGNOSTIC, Kind.COSTED, Kind.GATHERING, Kind.ABSORBING}


def test_each_row_is_an_operator():
    """Of some version, so that most of them are of this."""
    known = functions_of_tensors()
    known |= {_base(name) for namespace in ("aten", "prims") for name in operators_of(namespace)}
    of_others = sorted(name for name in OPERATORS if name not in known)
    assert set(of_others) <= AS_FUNCTIONS_OR_METHODS


AS_FUNCTIONS_OR_METHODS = {
    *("iadd", "identity", "imul", "isub", "itruediv", "truediv"),
    *("_upsample_lanczos2d_aa", "_upsample_lanczos2d_aa_backward", "ndimension", "nelement", "len"),
}
"""Spellings of operators in a graph that are no names of ATen, and operators that some versions have."""
