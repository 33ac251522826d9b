"""Operator views: a normalised reading of a node, the same at every capture level.

A rule asks "is this a convolution, and what are its weight, bias and groups", not "is this
`torch.conv2d` with five positional arguments". Reading never changes the graph. What cannot be read with
certainty gives a `Decline` that says why; what is not that operator at all gives None.

    Producer    a convolution, or a matrix product with a weight: what a normalisation may follow
    BatchNorm   batch normalisation, or instance normalisation with running statistics
"""

from fxpasses.graph.views.batch_norm import BATCH_NORMS as BATCH_NORMS
from fxpasses.graph.views.batch_norm import BatchNorm as BatchNorm
from fxpasses.graph.views.batch_norm import is_batch_norm as is_batch_norm
from fxpasses.graph.views.batch_norm import read_batch_norm as read_batch_norm
from fxpasses.graph.views.convolution import CONVOLUTIONS as CONVOLUTIONS
from fxpasses.graph.views.convolution import Convolution as Convolution
from fxpasses.graph.views.linear import Linear as Linear
from fxpasses.graph.views.linear import is_linear as is_linear
from fxpasses.graph.views.linear import read_linear as read_linear
from fxpasses.graph.views.producer import Producer as Producer
from fxpasses.graph.views.producer import read_producer as read_producer
