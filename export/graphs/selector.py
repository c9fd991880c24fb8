"""The token selection as an ONNX graph of standard operators, with a fixed number of output tokens.

The graph is authored node by node, not traced, which takes milliseconds instead of minutes. It computes
:func:`promprune.method.reference.select_tokens` in float32 for features of any dtype, with the spectral entropy from
matrix products (:mod:`promprune.method.entropy_table`) because neither ONNX nor TensorRT has an eigensolver.

TensorRT must build it with TF32 off: the Gram matrix needs all 24 bits (docs/method.md has the measurement).
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, helper

from promprune._version import __version__
from promprune.dtypes import BY_NAME, BY_NUMPY, DTYPES
from promprune.errors import ConfigError
from promprune.export.graphs.builder import Constant, GraphBuilder, floats, ints
from promprune.export.graphs.opset import DEFAULT_OPSET, check_opset
from promprune.method.config import DEFAULT_LOOP, LoopForm, SelectionConfig, check_loop
from promprune.method.entropy import NORM_FLOOR
from promprune.method.entropy_table import ENTROPY_TABLE
from promprune.method.reference import BLANK_NORM, RESIDUAL_FLOOR, TAKEN, random_order

__all__ = ["build_selector"]

_FEATURE_DTYPES = tuple(BY_NAME[name].numpy for name in DTYPES)
_IR_VERSION = 10
_LOWEST = -3.0e38
_TINY = 1.0e-30
# The Gram matrix is computed in this many strips. Rows whose length is a multiple of _ALIASED floats are padded with
# _SPREAD zeros: one cache line.
_GRAM_STRIPS = 3
_ALIASED = 256
_SPREAD = 16


class Sizes(NamedTuple):
    """The sizes of one graph: N input tokens with D features each, T output tokens."""

    tokens: int
    hidden: int
    keep: int


def build_selector(
    num_tokens: int,
    hidden_size: int,
    keep_tokens: int,
    config: SelectionConfig = SelectionConfig(),  # noqa: B008 - frozen
    *,
    batch_size: int | str = 1,
    dtype: str = "float32",
    opset: int = DEFAULT_OPSET,
    loop: LoopForm = DEFAULT_LOOP,
    token_mask: bool = False,
) -> onnx.ModelProto:
    """Author the selection of T of N tokens as an ONNX model of default-domain operators.

    Inputs: ``image_features [B, N, D]`` of ``dtype``, ``saliency [B, N]`` float32 and, if asked for,
    ``token_mask [B, N]`` bool (false for padding).

    Outputs: ``selected_features [B, T, D]`` of ``dtype``; ``token_indices [B, T]`` int64, T distinct indices per
    image in the configured order; ``saliency_mask [B, T]`` bool, true if the saliency stage picked that token;
    ``saliency_count [B, 1]`` int64; ``spectral_entropy [B, 1]`` float32, NaN if the features or the saliency of an
    image are not finite (its indices are then still T distinct ones, by saliency alone).

    Args:
        num_tokens: N, tokens per image.
        hidden_size: D, features per token.
        keep_tokens: T, tokens to keep, 1 to N.
        batch_size: B, or the name of a dynamic dimension.
        dtype: dtype of the features; everything inside is float32.
        config: policy, parameters of the budget split, output order.
        opset: operator set of the default domain.
        loop: ``"loop"`` for one ONNX Loop over the coverage stage, with as many iterations as the batch needs;
            ``"fixed"`` for a Loop of always T iterations, so that nothing depends on the data; ``"unrolled"`` for T
            copies of its body.
        token_mask: add the ``token_mask`` input.

    Returns:
        A model that passes ``onnx.checker`` with shape inference.

    Raises:
        ConfigError: a size, dtype, opset or loop form is out of range.
    """
    sizes = Sizes(num_tokens, hidden_size, keep_tokens)
    _check(sizes, batch_size, dtype, opset, loop)
    g = GraphBuilder()
    mask = "token_mask" if token_mask else None
    features = "image_features" if dtype == "float32" else g("Cast", "image_features", to=TensorProto.FLOAT)
    kernel, is_zero = _cosine_kernel(g, features, mask, sizes)
    entropy = g("Add", _spectral_entropy(g, kernel, mask, sizes), _nan_flag(g, mask))
    count = _saliency_count(g, entropy, keep_tokens, config)
    in_saliency = g("Less", ints([range(keep_tokens)]), count)
    salient = _saliency_stage(g, mask, keep_tokens)
    if config.policy == "saliency":
        covering = salient  # not used: T_sal = T
    elif config.policy == "random":
        covering = _random_stage(g, mask, count, sizes)
    else:
        loss = _initial_loss(g, kernel, is_zero, mask, salient, in_saliency, num_tokens)
        covering = _coverage_stage(g, kernel, loss, count, sizes, loop)
    indices, saliency_mask = _slots(g, salient, covering, in_saliency, count, sizes, config)
    g.rename(g("GatherND", "image_features", _column(g, indices), batch_dims=1), "selected_features")
    g.rename(indices, "token_indices")
    g.rename(saliency_mask, "saliency_mask")
    g.rename(count, "saliency_count")
    g.rename(entropy, "spectral_entropy")
    return _model(g, sizes, batch_size, dtype, opset, token_mask)


def _check(sizes: Sizes, batch_size: int | str, dtype: str, opset: int, loop: str) -> None:
    n, d, t = sizes
    if n < 1 or d < 1:
        raise ConfigError(f"received num_tokens = {n}, hidden_size = {d}", expected="both at least 1")
    if not 1 <= t <= n:
        raise ConfigError(f"received keep_tokens = {t}", expected=f"1 to num_tokens = {n}")
    if not (batch_size.isidentifier() if isinstance(batch_size, str) else batch_size >= 1):
        raise ConfigError(f"received batch_size = {batch_size!r}", expected="a positive integer, or a name")
    if dtype not in _FEATURE_DTYPES:
        raise ConfigError(f"received dtype = {dtype!r}", expected=f"one of {', '.join(_FEATURE_DTYPES)}")
    check_opset(opset)
    check_loop(loop)


def _diagonal(g: GraphBuilder, matrix: str, n: int) -> str:
    """[B, n, n] -> [B, n]."""
    flat = g("Reshape", matrix, ints([0, n * n]))
    return g("Slice", flat, ints([0]), ints([n * n]), ints([1]), ints([n + 1]))


def _column(g: GraphBuilder, vector: str) -> str:
    return g("Unsqueeze", vector, ints([2]))


def _row(g: GraphBuilder, vector: str) -> str:
    return g("Unsqueeze", vector, ints([1]))


def _nan_flag(g: GraphBuilder, mask: str | None) -> str:
    """0 if the saliency of every token is finite, else NaN, [B, 1]."""
    saliency = g("Where", mask, "saliency", floats(0)) if mask else "saliency"
    return g("Mul", g("ReduceSum", saliency, ints([1]), keepdims=1), floats(0))


def _saliency_stage(g: GraphBuilder, mask: str | None, keep_tokens: int) -> str:
    """The T most salient tokens, most salient first, [B, T]; last come tokens with NaN saliency, then padding."""
    score = g("Where", g("IsNaN", "saliency"), floats(_LOWEST / 2), "saliency")
    if mask:
        score = g("Where", mask, score, floats(_LOWEST))
    return g.many("TopK", score, ints([keep_tokens]), outputs=2, axis=1, largest=1, sorted=1)[1]


def _random_stage(g: GraphBuilder, mask: str | None, count: str, sizes: Sizes) -> str:
    """The first T tokens of `random_order`, padding last, [B, T]: the same for every image."""
    order = random_order(sizes.tokens)
    if mask is None:
        return g("Add", g("Mul", count, ints([[0]])), ints(order[: sizes.keep][None].numpy()))
    score = g("Where", mask, floats(-order.argsort()[None].numpy()), floats(_LOWEST))
    return g.many("TopK", score, ints([sizes.keep]), outputs=2, axis=1, largest=1, sorted=1)[1]


def _cosine_kernel(g: GraphBuilder, features: str, mask: str | None, sizes: Sizes) -> tuple[str, str]:
    """Cosine similarity of every two tokens, [B, N, N], and which tokens are zero vectors, [B, N] bool.

    The squared lengths are the diagonal of the Gram matrix, so the features need not be normalised first. The
    similarity of zero vectors and padding to every token is 0.
    """
    gram = _gram(g, features, sizes)
    if mask:
        gram = g("Where", g("And", _column(g, mask), _row(g, mask)), gram, floats(0))
    squared = _diagonal(g, gram, sizes.tokens)
    is_zero = g("Less", squared, floats(NORM_FLOOR**2))
    inverse = g("Where", is_zero, floats(0), g("Reciprocal", g("Sqrt", squared)))
    return g("Mul", g("Mul", gram, _column(g, inverse)), _row(g, inverse)), is_zero


def _gram(g: GraphBuilder, features: str, sizes: Sizes) -> str:
    """features @ features^T, [B, N, N], in blocks; those below the diagonal are mirrored, not computed.

    If the rows are a large power of two apart in memory, they map to the same few cache lines, which costs ONNX
    Runtime's matrix product a third of its speed; a few columns of zeros avoid that.
    """
    n, d, _ = sizes
    if n < _GRAM_STRIPS:
        return g("MatMul", features, g("Transpose", features, perm=[0, 2, 1]))
    zeros = _SPREAD if d % _ALIASED == 0 else 0
    edges = [n * i // _GRAM_STRIPS for i in range(_GRAM_STRIPS + 1)]
    strips = [g("Pad", features, ints([0, -start, 0, 0, end - n, zeros])) for start, end in itertools.pairwise(edges)]
    across = [g("Transpose", strip, perm=[0, 2, 1]) for strip in strips]
    rows: list[list[str]] = []
    for i, strip in enumerate(strips):
        mirrored = [g("Transpose", row[i], perm=[0, 2, 1]) for row in rows]
        rows.append(mirrored + [g("MatMul", strip, other) for other in across[i:]])
    return g("Concat", *(g("Concat", *row, axis=2) for row in rows), axis=1)


def _centred_kernel(g: GraphBuilder, kernel: str, mask: str | None, n: int) -> tuple[str, Constant | str]:
    """Gram matrix of the unit tokens minus their mean, [B, N, N], and the number that are not padding, [1 or B, 1]."""
    if mask is None:
        tokens: Constant | str = floats([[n]])
        mean = g("ReduceMean", kernel, ints([2]), keepdims=1)
        grand = g("ReduceMean", mean, ints([1]), keepdims=1)
    else:
        tokens = g("ReduceSum", g("Cast", mask, to=TensorProto.FLOAT), ints([1]), keepdims=1)
        divisor = _column(g, g("Max", tokens, floats(1)))
        mean = g("Div", g("ReduceSum", kernel, ints([2]), keepdims=1), divisor)
        grand = g("Div", g("ReduceSum", mean, ints([1]), keepdims=1), divisor)
    across = g("Reshape", g("Sub", mean, grand), ints([0, 1, n]))
    centred = g("Sub", g("Sub", kernel, mean), across)
    if mask:
        centred = g("Where", g("And", _column(g, mask), _row(g, mask)), centred, floats(0))
    return centred, tokens


def _spectral_entropy(g: GraphBuilder, kernel: str, mask: str | None, sizes: Sizes) -> str:
    """Normalised entropy of the spectrum of the centred kernel, [B, 1]; 1 for a blank image.

    The formula is that of promprune.method.entropy_table.
    """
    centred, tokens = _centred_kernel(g, kernel, mask, sizes.tokens)
    trace = g("ReduceSum", _diagonal(g, centred, sizes.tokens), ints([1]), keepdims=1)
    norm = g("ReduceL2", g("ReduceL2", centred, ints([2]), keepdims=0), ints([1]), keepdims=1)
    scale = g("Div", floats(ENTROPY_TABLE.multiplier**2 / 4), norm)
    products = _inner_products(g, g("Mul", centred, _column(g, scale)), sizes.tokens)
    share = g("Div", norm, trace)
    p_ln_p = g("Sum", g("Mul", share, products), g("Log", share), floats(ENTROPY_TABLE.linear))
    if isinstance(tokens, str):
        rank = g("Max", g("Min", tokens, floats(sizes.hidden)), floats(2))
        entropy = g("Div", p_ln_p, g("Neg", g("Log", rank)))
        blank = g("Mul", tokens, floats(BLANK_NORM))
    else:
        entropy = g("Div", p_ln_p, floats(-np.log(max(min(sizes.tokens, sizes.hidden), 2))))
        blank = g.constant(floats(sizes.tokens * BLANK_NORM))
    # A NaN norm is not below the threshold, so the entropy stays NaN.
    return g("Where", g("LessOrEqual", norm, blank), floats(1), entropy)


def _inner_products(g: GraphBuilder, first: str, n: int) -> str:
    """sum over (i, j) of c_ij <V_i, V_j>, [B, 1], from V_0 [B, N, N]."""
    index = np.arange(n)
    multiple = g("Where", g("Equal", ints(index[:, None]), ints(index)), floats(ENTROPY_TABLE.multiplier), floats(0))
    chain = [first]
    for _ in range(ENTROPY_TABLE.products):
        chain.append(g("MatMul", chain[-1], g("Sub", multiple, chain[-1])))
    stack = g("Reshape", g("Concat", *chain, axis=2), ints([0, n, len(chain), n]))
    per_row = g("MatMul", stack, g("Transpose", stack, perm=[0, 1, 3, 2]))
    coefficients = np.zeros((len(chain), len(chain)), np.float32)
    for i, j, c in ENTROPY_TABLE.pairs:
        coefficients[i, j] = c
    # Summed over the rows first: two short sums have a smaller rounding error than a long one.
    weighted = g("Mul", g("ReduceSum", per_row, ints([1]), keepdims=1), coefficients)
    return g("ReduceSum", weighted, ints([2, 3]), keepdims=0)


def _saliency_count(g: GraphBuilder, entropy: str, keep_tokens: int, config: SelectionConfig) -> str:
    """T_sal, [B, 1] int64; T if the entropy is NaN."""
    z = g("Mul", g("Sub", floats(config.mu), entropy), floats(1 / config.tau))
    low, high = config.saliency_limits
    share = g("Mul", g("Sigmoid", z), floats((high - low) * keep_tokens))
    if low:
        share = g("Add", share, floats(low * keep_tokens))
    count = g("Round", share)
    return g("Cast", g("Where", g("IsNaN", entropy), floats(keep_tokens), count), to=TensorProto.INT64)


def _initial_loss(
    g: GraphBuilder, kernel: str, is_zero: str, mask: str | None, salient: str, in_saliency: str, n: int
) -> str:
    """The loss 1 - d^2 of every token before the first pick of the coverage stage, [B, 1, N].

    0 for a token that can be picked, 1 for a zero vector, 2 for padding, a huge number for tokens that the saliency
    stage picked, and just below 0 for the first pick: the token whose largest similarity to those of the saliency
    stage is least, or the first token if that stage is empty.
    """
    loss = g("Cast", is_zero, to=TensorProto.FLOAT)
    if mask:
        loss = g("Where", mask, loss, floats(2))
    amounts = g("Where", in_saliency, floats(TAKEN), g("GatherElements", loss, salient, axis=1))
    loss = g("ScatterElements", loss, salient, amounts, axis=1)
    is_salient = _row(g, g("Greater", loss, floats(TAKEN / 2)))
    overlap = g("ReduceMax", g("Where", is_salient, kernel, floats(-2)), ints([2]), keepdims=0)
    first = g("ArgMin", g("Add", overlap, g("Mul", loss, floats(3))), axis=1, keepdims=1)
    is_first = g("Equal", ints([range(n)]), first)
    return _row(g, g("Where", is_first, floats(-_TINY), loss))


def _coverage_stage(g: GraphBuilder, kernel: str, loss: str, count: str, sizes: Sizes, loop: LoopForm) -> str:
    """The picks of the coverage stage, [B, T]: each step takes the token with the smallest loss."""
    if loop != "unrolled":
        return _coverage_loop(g, kernel, loss, count, sizes, loop)
    coordinates, picks = None, []
    for _ in range(sizes.keep):
        loss, new, pick = _greedy_step(g, kernel, loss, coordinates, sizes.tokens)
        coordinates = g("Concat", coordinates, new, axis=1) if coordinates else new
        picks.append(pick)
    return g("Squeeze", g("Concat", *picks, axis=1), ints([2]))


def _coverage_loop(g: GraphBuilder, kernel: str, loss: str, count: str, sizes: Sizes, loop: LoopForm) -> str:
    """Run as many steps as the image with the largest coverage stage needs, and at least one; or always T.

    All loop-carried values have fixed shapes, because TensorRT requires it: step t writes row t of the coordinates
    [B, T, N] and of the picks [B, T, 1].
    """
    if loop == "fixed":
        steps: Constant | str = ints(sizes.keep)
    else:
        steps = g("Max", g("Sub", ints(sizes.keep), g("ReduceMin", count, keepdims=0)), ints(1))
    coordinates = g("Mul", loss, floats(np.zeros((1, sizes.keep, 1))))
    picks = g("ArgMin", coordinates, axis=2, keepdims=1)  # integer zeros
    image = g("CumSum", g("Clip", count, ints(1), ints(1)), ints(0), exclusive=1)
    row = _row(g, g("Mul", image, ints([[1, 0]])))  # (image, 0)
    body = GraphBuilder(parent=g)
    new_loss, new, pick = _greedy_step(body, kernel, "loss_in", "coordinates_in", sizes.tokens)
    carried = {
        "loss": new_loss,
        "coordinates": body("ScatterND", "coordinates_in", "row_in", new),
        "picks": body("ScatterND", "picks_in", "row_in", pick),
        "row": body("Add", "row_in", ints([[[0, 1]]])),
    }
    graph = _loop_body(body, carried)
    # No loop condition: TensorRT's parser warns if there is one besides the trip count.
    finals = g.many("Loop", steps, "", loss, coordinates, picks, row, outputs=4, body=graph)
    return g("Squeeze", finals[2], ints([2]))


def _greedy_step(g: GraphBuilder, kernel: str, loss: str, coordinates: str | None, n: int) -> tuple[str, str, str]:
    """Pick one token, given the loss [B, 1, N] and the coordinates so far [B, t, N].

    Returns the new loss, the coordinate of every token along the newly picked direction [B, 1, N], and the pick
    [B, 1, 1]. Tokens within RESIDUAL_FLOOR of being spanned count as tied, and the lowest index wins.
    """
    spanned = g("Greater", loss, floats(1 - RESIDUAL_FLOOR))
    key = g("Where", spanned, g("Round", loss), loss)
    least, pick = g.many("TopK", key, ints([1]), outputs=2, axis=2, largest=0)
    is_pick = g("Equal", ints(np.arange(n)[None, None]), pick)
    # If all tokens are spanned, the new direction is rounding noise, and dividing by a large number removes it.
    residual = g("Where", g("Less", least, floats(1)), g("Sub", floats(1), least), floats(TAKEN))
    new = g("GatherND", kernel, pick, batch_dims=1)
    if coordinates is not None:
        one_hot = g("Cast", is_pick, to=TensorProto.FLOAT)
        own = g("MatMul", one_hot, g("Transpose", coordinates, perm=[0, 2, 1]))
        new = g("Sub", new, g("MatMul", own, coordinates))
    new = g("Div", new, g("Sqrt", residual))
    loss = g("Where", is_pick, floats(TAKEN), g("Add", loss, g("Mul", new, new)))
    return loss, new, pick


def _loop_body(body: GraphBuilder, carried: dict[str, str]) -> onnx.GraphProto:
    """Wrap the nodes of one greedy step as the body of a Loop, whose inputs are named ``<name>_in``."""
    value = helper.make_tensor_value_info
    types = {"loss": TensorProto.FLOAT, "coordinates": TensorProto.FLOAT}
    inputs = [value("step", TensorProto.INT64, []), value("going", TensorProto.BOOL, [])]
    outputs = [value("going", TensorProto.BOOL, [])]
    for name, new in carried.items():
        inputs.append(value(f"{name}_in", types.get(name, TensorProto.INT64), None))
        outputs.append(value(new, types.get(name, TensorProto.INT64), None))
    return helper.make_graph(body.nodes, "greedy_step", inputs, outputs)


def _slots(
    g: GraphBuilder,
    salient: str,
    covering: str,
    in_saliency: str,
    count: str,
    sizes: Sizes,
    config: SelectionConfig,
) -> tuple[str, str]:
    """Indices and their stage, [B, T] each: entry t is salient[t] if t < T_sal, else covering[t - T_sal]."""
    slot = np.arange(sizes.keep)[None]
    source = g("Where", in_saliency, ints(slot), g("Sub", ints(slot + sizes.keep), count))
    indices = g("GatherElements", g("Concat", salient, covering, axis=1), source, axis=1)
    if config.order == "selection":
        return indices, in_saliency
    key = g("Cast", indices, to=TensorProto.FLOAT)
    order = g.many("TopK", key, ints([sizes.keep]), outputs=2, axis=1, largest=0, sorted=1)[1]
    return g("GatherElements", indices, order, axis=1), g("GatherElements", in_saliency, order, axis=1)


def _model(
    g: GraphBuilder,
    sizes: Sizes,
    batch_size: int | str,
    dtype: str,
    opset: int,
    token_mask: bool,
) -> onnx.ModelProto:
    """Make a model of the nodes by adding inputs, outputs and metadata, and check it."""
    n, d, t = sizes
    element, b = BY_NUMPY[dtype].onnx, batch_size
    value = helper.make_tensor_value_info
    inputs = [value("image_features", element, [b, n, d]), value("saliency", TensorProto.FLOAT, [b, n])]
    if token_mask:
        inputs.append(value("token_mask", TensorProto.BOOL, [b, n]))
    outputs = [
        value("selected_features", element, [b, t, d]),
        value("token_indices", TensorProto.INT64, [b, t]),
        value("saliency_mask", TensorProto.BOOL, [b, t]),
        value("saliency_count", TensorProto.INT64, [b, 1]),
        value("spectral_entropy", TensorProto.FLOAT, [b, 1]),
    ]
    graph = helper.make_graph(g.nodes, "token_selector", inputs, outputs, g.initializers)
    model = helper.make_model(
        graph,
        producer_name="promprune",
        producer_version=__version__,
        ir_version=_IR_VERSION,
        opset_imports=[helper.make_opsetid("", opset)],
    )
    onnx.checker.check_model(model, full_check=True)
    return model
