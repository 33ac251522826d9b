"""Compilers of one-operator graphs, right and wrong, for the tests of the operator benchmark."""

from __future__ import annotations


def eager_graph(graph, inputs):
    """A configuration that runs the graph as it is."""
    return graph


def wrong_by_a_factor(graph, inputs):
    return lambda *tensors: tuple(1.5 * output for output in graph(*tensors))


def wrong_dtype(graph, inputs):
    return lambda *tensors: tuple(output.double() for output in graph(*tensors))


def broken(graph, inputs):
    raise NotImplementedError("this compiler compiles nothing\nat all")


def fails_when_repeated(graph, inputs):
    calls = iter(range(1))

    def once(*tensors):
        if next(calls, None) is None:
            raise NotImplementedError("once is all there is")
        return graph(*tensors)

    return once
