"""Reason codes: what each means, and what to do about it. The page on passes has the meanings, too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Code:
    """A reason to leave a site alone.

    Attributes:
        meaning: why the site was left alone.
        advice: what to do about it.
        tries: options that would change it, each a mapping of fields of `fxpasses.Options`, the best first.
    """

    meaning: str
    advice: str
    tries: tuple[Mapping[str, Any], ...] = ()


CODES: Mapping[str, Code] = {
    # The pattern is not there
    "training-mode": Code(
        "the norm uses the batch's statistics",
        "call model.eval() where the running statistics are meant, as in fine-tuning with frozen ones",
    ),
    "no-statistics": Code(
        "the norm has no running statistics",
        "make the norm with track_running_stats=True; without statistics nothing can be folded",
    ),
    "no-producer": Code(
        "the norm reads something else than a convolution or a linear operator, such as a concatenation",
        "nothing to do, unless the norm can stand right after a convolution or linear layer",
    ),
    "saved-statistics": Code(
        "more than the result of the norm's operator is read",
        "read only the result of the norm",
    ),
    "not-a-linear": Code(
        "a matrix product of other than two matrices",
        "write the layer as nn.Linear; a product of two computed tensors has no weight to fold into",
    ),
    "bias-shape": Code(
        "an `addmm` that adds a matrix",
        "give the layer a bias of one dimension, and add the matrix after the norm",
    ),
    "unsupported-arguments": Code(
        "an argument that is unknown, no tensor, or scales the operands",
        "call the layer with plain tensors and numbers, as nn.Conv2d and nn.Linear do",
    ),
    "non-constant": Code(
        "the number of groups, the mode or eps is computed in the graph",
        "make it a Python number, not one that the graph computes",
    ),
    "unknown-module": Code(
        "a module of another class than torch.nn's own, which may compute more",
        "derive no class from the layer, or compile, where Dynamo looks inside it",
    ),
    "parametrized": Code(
        "a module that computes its parameters at every call, such as weight norm",
        "torch.nn.utils.parametrize.remove_parametrizations, where training is over",
    ),
    "hooks": Code(
        "a module with hooks, which would no longer run",
        "remove the hooks, or compile, where Dynamo traces what they do",
    ),
    "padding-mode": Code(
        "a convolution module that pads with something else than zeros",
        'use padding_mode="zeros", or call F.pad before an unpadded convolution',
    ),
    "output-size": Code(
        "a transposed convolution called with `output_size`",
        "give output_padding instead of output_size",
    ),
    # The pattern of a rule made of functions is half there
    "other-operator": Code(
        "another operator stands where the pattern goes on",
        "spell the model as the pattern, or add a rule for this spelling",
    ),
    "other-arguments": Code(
        "an operator was called with other arguments than in the pattern",
        "spell the call as the pattern, or add a rule for these arguments",
    ),
    "other-constant": Code(
        "a constant differs",
        "use the pattern's constant, or make it a parameter of the pattern",
    ),
    "other-operand": Code(
        "two places that read the same in the pattern do not here",
        "pass the same tensor in both places, as the pattern does",
    ),
    "operand-kind": Code(
        "a number where the pattern has a tensor, or the other way round",
        "pass a tensor where the pattern has one, and a number where it has that",
    ),
    "another-result": Code("one of several results is missing", "use all results of the pattern"),
    # It would not give eager's answers
    "channel-axis": Code(
        "the norm's channels are not the convolution's output channels, as for a linear layer on [N, T, C]",
        "put the channels last in the norm's input: flatten [N, T, C] to [N * T, C] around the pair",
    ),
    "operand-shape": Code(
        "what the result is multiplied by or added to has not one number per channel",
        "shape the operand like [C, 1, 1], one number per channel of the layer before",
    ),
    "geometry": Code(
        "parallel convolutions that read other places, or differ in stride, groups or shape",
        "give both convolutions the same stride and groups, and paddings that line up their centres",
    ),
    "border": Code(
        "a norm before a layer that pads: its zeros are not shifted",
        "put the norm after the convolution, or use padding=0",
    ),
    "zero-divisor": Code(
        "what it is divided by may be zero, which eager answers with infinities",
        "multiply by the reciprocal instead of dividing",
    ),
    "statistics-require-grad": Code(
        "the running statistics would get a gradient that eager does not give them",
        "detach the statistics, or register them as buffers",
    ),
    "symbolic-channels": Code(
        "a grouped transposed convolution whose number of channels is not constant",
        "compile with a static number of channels",
    ),
    "dtype": Code(
        "a tensor is integer or complex, or a step widens the result to float64; none but float32 is lowered",
        "keep the step in the floating dtype of the layer; a lower precision is for models of float32",
    ),
    "quantised": Code(
        "a value was quantised: int8 graphs and those of quantisation-aware training stay as they are",
        "nothing to do: fold the norms before the model is quantised",
    ),
    "mixed-dtypes": Code(
        "the operands have several floating dtypes, and no example of the rule has",
        "bring the operands to one dtype, or give the rule an example with several",
    ),
    "no-metadata": Code(
        "a tensor's shape and dtype are not known",
        "pass example inputs, or trace with fake tensors; a pass of yours gives what it writes meta",
    ),
    "mutation": Code(
        "something that the convolution or the norm reads is, or may be, written to in between",
        "move the write out from between the two, or write to a clone",
    ),
    "aliasing": Code(
        "the replacement would share storage where the pattern does not, or no longer, and somebody could "
        "tell",
        "return a clone of the result or of the operand",
    ),
    "order": Code(
        "an operand is computed only after a result has been read",
        "compute the operand before the results are read",
    ),
    "grad-mode": Code(
        "one of the two is under another grad mode",
        "put both under the same grad mode; kept weights need torch.no_grad() or inference_mode()",
    ),
    "autocast": Code(
        "one of the two is under another autocast state; it stands under any (of `precision`)",
        "put both under the same autocast; leave it out where the option `precision` chooses",
    ),
    "functorch": Code(
        "one of the two is under another functorch transform, or vmap hides a dimension",
        "put both under the same transform",
    ),
    "stream": Code("the two run on different streams", "run both on one stream"),
    "region": Code(
        "another region, such as inference mode, starts or ends between the two",
        "put both in the same region",
    ),
    "check": Code("the check of a rule made of functions says no", "see the rule's own check"),
    "extra-check": Code(
        "the `extra_check` of one of inductor's patterns says no",
        "see the pattern's extra_check",
    ),
    "handler": Code(
        "the handler of one of inductor's patterns left the graph as it was",
        "see the pattern's handler",
    ),
    # It would not pay
    "multiple-users": Code(
        "somebody else reads the convolution's result, or one inside the pattern: it would be made twice",
        "give the other reader something else to read: the result after the norm, or one computed anew",
    ),
    "nothing-saved": Code(
        "gamma or the scale is frozen, so the convolution's result is not kept for the backward pass",
        "nothing to do: memory stays as it is; unfreeze gamma if it was meant to train",
        ({"profit": "always"},),
    ),
    "adds-weight-gradient": Code(
        "only the norm trains: the fold would add the gradient of a weight",
        "nothing to do: folding would cost more than it saves; train the weight too, or freeze the norm",
        ({"profit": "always"},),
    ),
    "small-result": Code(
        "merging parallel convolutions would move more bytes of weights than it saves",
        "nothing to do at this size: larger batches or images make it pay",
        ({"profit": "always"},),
    ),
    "live-weights": Code(
        "inference: the weights may change between calls, so the fold would run at every call",
        "to serve it, let the weights be kept: they are then folded once per version",
        ({"weights": "cached"}, {"profit": "always"}),
    ),
    "profit": Code(
        "the profit of a rule made of functions says no",
        "see the rule's own profit",
        ({"profit": "always"},),
    ),
    "sizes": Code(
        "it pays for other sizes than those that the graph was traced with (`remark.sizes`)",
        "compile with sizes in that range, or take the rewrite whatever it costs",
        ({"profit": "always"},),
    ),
    "limit": Code(
        "the option `limit` is reached, or torch's compiler bisector has switched it off",
        "raise the limit, or leave it out",
        ({"limit": None},),
    ),
    # It keeps its precision
    "records-gradients": Code(
        "gradients are recorded, and a lower precision is for inference",
        "call it under torch.no_grad() or inference_mode(); in training use torch.autocast",
    ),
    "slow-precision": Code(
        "the device has no instructions for products of bfloat16, so that it would be slower",
        "nothing to do: float32 is the faster precision here",
        ({"profit": "always"},),
    ),
    "nested-graph": Code(
        "it stands in a graph that an operator runs, such as a branch of torch.cond, which stays float32",
        "move the layer out of the branch, or write the branch without torch.cond",
    ),
    "whole-layer": Code(
        "one call computes a whole layer: an LSTM, torch's fast path of attention, a leaf module",
        "trace with export or Dynamo; for attention, torch.backends.mha.set_fastpath_enabled(False)",
    ),
    # Inductor is left out
    "symbolic-strides": Code(
        "inductor failed to compare strides that are symbols: the graph runs operator by operator",
        "compile with dynamic=False, or mark the sizes as static",
    ),
    # A layout is left as it is
    "shared-results": Code(
        "results are views of one tensor, whose strides inductor's layout optimisation would change",
        "return clones in the place of views",
    ),
    "unsafe-kernel": Code(
        "the library's channels-last kernel is wrong, so that what it computes stays contiguous",
        "nothing to do: the library's kernel would be wrong; 16 channels or more avoid it on a CPU",
    ),
    "not-certain": Code(
        "a plan would win by less than its prediction may be off; layouts are as they are without one",
        "measure more (`fxpasses tune`, or a larger tune_seconds), or let a race decide (race=True)",
    ),
    "shared-storage": Code(
        "two tensors share storage in a way that no plan can keep",
        "write to a clone instead of a view",
    ),
    "unrestorable-strides": Code(
        "a tensor stays as it was traced, since somebody reads its strides and no copy can have them",
        "nothing to do, or read a clone of it instead of a view",
    ),
    "no-plan": Code(
        '`io="any"`, and layouts are left to inductor, so that results have eager\'s strides (of `io`)',
        'ask for a layout (layout="channels_last"), or measure with `fxpasses tune`',
    ),
    "no-record": Code(
        "inductor's graph came from a cache, and its plan's record is gone (also of `activation_masks`, "
        "`io`)",
        "nothing to do: what runs is right; a fresh compilation records it again",
    ),
    # weights="cached" keeps nothing
    "no-parameter-work": Code(
        "nothing in the graph depends on parameters alone",
        'nothing to do: weights="live" gives the same program',
    ),
    "cached-memory": Code(
        "it would keep more bytes than the parameters have",
        "nothing to do, or leave out what expands the weights",
    ),
    # A weight is kept, but not packed for oneDNN
    "unpackable": Code(
        "a type that oneDNN does not pack on this CPU, or an `output_padding` as large as the stride",
        "nothing to do: the weight is kept as it is",
    ),
    "other-kernels": Code(
        "code in inductor's caches is for other kernels of fxpasses or another CPU, and is made anew",
        "nothing to do: it was compiled anew",
    ),
    "other-reader": Code(
        "something besides convolutions reads the weight",
        "read the weight in convolutions only",
    ),
    "inputs-changed": Code(
        "AOTAutograd gave the compiled graph other inputs than the captured one has",
        "the weights are kept, and not packed: write to no input that shares memory with another",
    ),
    # A convolution is left to oneDNN
    "no-kernels": Code(
        "fxpasses has none for the vectors that torch uses, or they do not compile; said once",
        "install a C++ compiler, on a CPU with AVX2 or AVX-512",
    ),
    "live-bias": Code("its bias is worked out in every call", "make the bias a parameter or a buffer"),
    "not-faster": Code(
        "oneDNN was measured to be faster than a kernel of fxpasses, by more than a call costs",
        'nothing to do: the faster kernel was taken; profit="always" takes ours untimed',
    ),
    # A program is not run any more
    "dropped": Code(
        "another one was faster, by the ratio of their times over the first calls",
        "nothing to do: the faster program stays",
    ),
    "not-compiled": Code(
        "it was to race, and inductor failed to compile it",
        "nothing to do: the other program runs",
    ),
    # inductor's own conv-BN pass stays off
    "taken-over": Code(
        "it is switched on, and `efficient_conv_bn_eval` rewrites its pairs instead",
        "nothing to do",
    ),
    # The rule failed, and the graph is as it was
    "check-error": Code(
        "an exception while the site was read",
        "report it, with the model: it is a bug of the rule",
    ),
    "rewrite-error": Code(
        "an exception while the replacement was written, or one of another shape, dtype or device",
        "report it, with the model: it is a bug of the rule",
    ),
    "verify-structure": Code(
        "`verify`: lint, metadata or strides are not what they should be, or guards came on top",
        "report it, with the model: it is a bug of the rule (report.save_repro writes the site)",
    ),
    "verify-numerics": Code(
        '`verify="numerics"`: the replacement is further from the truth than allowed',
        "report it, with the model: it is a bug of the rule (report.save_repro writes the site)",
    ),
}
