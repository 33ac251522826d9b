"""Names of parameters, as graphs and modules both know them."""

from __future__ import annotations

import re


def canonical(name: str) -> str:
    """A parameter's name with underscores for dots: ``layer1.0.weight`` -> ``layer1_0_weight``.

    Dynamo writes ``L_self_modules_layer1_modules_0_parameters_weight_``.
    """
    text = re.sub(r"\W+", "_", name).strip("_")
    if re.match(r"[lL]_.*?_(modules|parameters|buffers)_", text):
        text = re.sub(r"^.*?(?=(modules|parameters|buffers)_)", "", text, count=1)
        text = re.sub(r"(?:^|(?<=_))(modules|parameters|buffers)_+", "", text)
    return re.sub(r"_+", "_", text).strip("_")
