"""The token selection as an ONNX graph of standard operators, with a fixed number of output tokens.

The graph is authored node by node, not traced: milliseconds instead of minutes. What it computes is
:func:`promprune.selection.select_tokens`, in float32 whatever the features' dtype, with the spectral entropy from
matrix products (:mod:`promprune.entropy_table`) because neither ONNX nor TensorRT has an eigensolver.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from promprune._version import __version__
from promprune.config import SelectionConfig
from promprune.entropy_table import ENTROPY_TABLE
from promprune.errors import ConfigError
from promprune.prominence import NORM_FLOOR
from promprune.selection import RESIDUAL_FLOOR

__all__ = ["FeatureDtype", "LoopForm", "build_selector"]

FeatureDtype = Literal["float32", "float16", "bfloat16"]
LoopForm = Literal["loop", "unrolled"]

_ELEMENT_TYPES: dict[str, int] = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
}
_IR_VERSION = 10
_LOWEST = -3.0e38
_TAKEN = 1.0e30
# Mean variance of the unit tokens below which float32 cannot tell an image from a blank one.
_BLANK_VARIANCE = 1e-6


class _Graph:
    """Collects nodes and constants; calling it appends one node and returns the name of its output."""

    def __init__(self, parent: _Graph | None = None) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.root: _Graph = parent.root if parent else self
        self.initializers: dict[str, onnx.TensorProto] = {}
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._count = 0

    def __call__(self, op_type: str, *inputs: str | np.ndarray[Any, Any], **attributes: Any) -> str:
        return self.many(op_type, *inputs, outputs=1, **attributes)[0]

    def many(self, op_type: str, *inputs: str | np.ndarray[Any, Any], outputs: int, **attributes: Any) -> list[str]:
        names = [x if isinstance(x, str) else self.constant(x) for x in inputs]
        results = [self.root.fresh(op_type.lower()) for _ in range(outputs)]
        self.nodes.append(helper.make_node(op_type, names, results, name=results[0], **attributes))
        return results

    def fresh(self, stem: str) -> str:
        self._count += 1
        return f"{stem}_{self._count}"

    def constant(self, value: np.ndarray[Any, Any]) -> str:
        """Name of an initializer of the outermost graph with this value; equal values share one."""
        root = self.root
        value = np.asarray(value)
        key = (value.dtype.str, value.shape, value.tobytes())
        if key not in root._constants:
            name = root.fresh("constant")
            root._constants[key] = name
            root.initializers[name] = numpy_helper.from_array(value, name)
        return root._constants[key]

    def rename(self, name: str, public_name: str) -> None:
        """Give a value its public name through an Identity."""
        self.nodes.append(helper.make_node("Identity", [name], [public_name], name=f"output_{public_name}"))


def _f(value: Any) -> np.ndarray[Any, Any]:
    return np.asarray(value, np.float32)


def _i(value: Any) -> np.ndarray[Any, Any]:
    return np.asarray(value, np.int64)


def build_selector(
    num_tokens: int,
    hidden_size: int,
    keep_tokens: int,
    *,
    config: SelectionConfig = SelectionConfig(),  # noqa: B008 - frozen
    batch_size: int | Literal["batch"] = 1,
    dtype: FeatureDtype = "float32",
    opset: int = 20,
    loop: LoopForm = "loop",
    token_mask: bool = False,
) -> onnx.ModelProto:
    """Author the selection of T of N tokens as an ONNX model of default-domain operators.

    Inputs: ``image_features [B, N, D]`` of ``dtype``, ``saliency [B, N]`` float32 and, if asked for,
    ``token_mask [B, N]`` bool (false for padding).

    Outputs: ``selected_features [B, T, D]`` of ``dtype``; ``token_indices [B, T]`` int64, T distinct indices per
    image in the configured order; ``saliency_mask [B, T]`` bool, true where the saliency stage picked that token;
    ``saliency_count [B, 1]`` int64; ``spectral_entropy [B, 1]`` float32, NaN if the features or the saliency of an
    image are not finite (its indices are then still T distinct ones, by saliency alone).

    Args:
        num_tokens: N, tokens per image.
        hidden_size: D, features per token.
        keep_tokens: T, tokens to keep, 1 to N.
        config: the budget split's parameters and the output order.
        batch_size: B, or ``"batch"`` for a dynamic batch dimension of that name.
        dtype: of the features; everything inside is float32.
        opset: 18 or later.
        loop: ``"loop"`` for one ONNX Loop over the coverage stage, ``"unrolled"`` for T copies of its body.
        token_mask: add the ``token_mask`` input.

    Returns:
        A model that passes ``onnx.checker`` with shape inference.

    Raises:
        ConfigError: a size, dtype, opset or loop form is out of range.
    """
    _check(num_tokens, hidden_size, keep_tokens, batch_size, dtype, opset, loop)
    g = _Graph()
    mask = "token_mask" if token_mask else None
    features = "image_features" if dtype == "float32" else g("Cast", "image_features", to=TensorProto.FLOAT)
    kernel, is_zero = _cosine_kernel(g, features, mask, num_tokens)
    score, is_bad = _saliency_score(g, mask)
    entropy = _spectral_entropy(g, kernel, mask, num_tokens, hidden_size)
    entropy = g("Where", is_bad, _f(np.nan), entropy)
    count = _saliency_count(g, entropy, keep_tokens, config)
    salient = _saliency_stage(g, score, keep_tokens)
    state = _token_state(g, is_zero, mask)
    covering = _coverage_stage(g, kernel, state, salient, count, num_tokens, keep_tokens, loop)
    indices, from_saliency = _slots(g, salient, covering, count, keep_tokens, config)
    selected = g("GatherND", "image_features", g("Unsqueeze", indices, _i([2])), batch_dims=1)
    for name, public in (
        (selected, "selected_features"),
        (indices, "token_indices"),
        (from_saliency, "saliency_mask"),
        (count, "saliency_count"),
        (entropy, "spectral_entropy"),
    ):
        g.rename(name, public)
    return _model(g, (num_tokens, hidden_size, keep_tokens), batch_size, dtype, opset, token_mask)


def _check(
    num_tokens: int, hidden_size: int, keep_tokens: int, batch_size: int | str, dtype: str, opset: int, loop: str
) -> None:
    if num_tokens < 1 or hidden_size < 1:
        raise ConfigError(
            f"received num_tokens = {num_tokens}, hidden_size = {hidden_size}", expected="both at least 1"
        )
    if not 1 <= keep_tokens <= num_tokens:
        raise ConfigError(f"received keep_tokens = {keep_tokens}", expected=f"1 to num_tokens = {num_tokens}")
    if batch_size != "batch" and not (isinstance(batch_size, int) and batch_size >= 1):
        raise ConfigError(f"received batch_size = {batch_size!r}", expected="a positive integer or 'batch'")
    if dtype not in _ELEMENT_TYPES:
        raise ConfigError(f"received dtype = {dtype!r}", expected=f"one of {', '.join(_ELEMENT_TYPES)}")
    if opset < 18:
        raise ConfigError(f"received opset = {opset}", expected="18 or later (reductions with axes as an input)")
    if loop not in ("loop", "unrolled"):
        raise ConfigError(f"received loop = {loop!r}", expected="'loop' or 'unrolled'")


def _diagonal(g: _Graph, matrix: str, n: int) -> str:
    """[B, n, n] -> [B, n]."""
    flat = g("Reshape", matrix, _i([0, n * n]))
    return g("Slice", flat, _i([0]), _i([n * n]), _i([1]), _i([n + 1]))


def _column(g: _Graph, vector: str) -> str:
    return g("Unsqueeze", vector, _i([2]))


def _row(g: _Graph, vector: str) -> str:
    return g("Unsqueeze", vector, _i([1]))


def _saliency_score(g: _Graph, mask: str | None) -> tuple[str, str]:
    """Saliency with NaN, then padding, ranked last, [B, N]; and whether an image has any NaN, [B, 1] bool."""
    is_nan = g("IsNaN", "saliency")
    if mask:
        is_nan = g("And", is_nan, mask)
    score = g("Where", is_nan, _f(_LOWEST / 2), "saliency")
    if mask:
        score = g("Where", mask, score, _f(_LOWEST))
    is_bad = g("ReduceMax", g("Cast", is_nan, to=TensorProto.FLOAT), _i([1]), keepdims=1)
    return score, g("Greater", is_bad, _f(0.5))


def _token_state(g: _Graph, is_zero: str, mask: str | None) -> str:
    """0 for a token with a direction, 1 for a zero vector, 2 for padding, [B, N]."""
    state = g("Cast", is_zero, to=TensorProto.FLOAT)
    return g("Where", mask, state, _f(2)) if mask else state


def _cosine_kernel(g: _Graph, features: str, mask: str | None, n: int) -> tuple[str, str]:
    """Cosine similarity of every two tokens, [B, N, N], and which tokens are zero vectors, [B, N] bool.

    The lengths are the diagonal of the Gram matrix, so the features are read once and never written.
    Padding counts as zero vectors.
    """
    gram = g("MatMul", features, g("Transpose", features, perm=[0, 2, 1]))
    if mask:
        both = g("And", _column(g, mask), _row(g, mask))
        gram = g("Where", both, gram, _f(0))
    squared = _diagonal(g, gram, n)
    is_zero = g("Less", squared, _f(NORM_FLOOR**2))
    inverse = g("Where", is_zero, _f(0), g("Reciprocal", g("Sqrt", squared)))
    kernel = g("Mul", g("Mul", gram, _column(g, inverse)), _row(g, inverse))
    return kernel, is_zero


def _centred_kernel(g: _Graph, kernel: str, mask: str | None, n: int) -> tuple[str, np.ndarray[Any, Any] | str]:
    """Gram matrix of the centred unit tokens, [B, N, N], and the number of tokens that are not padding.

    Row 0 is subtracted first, so that the kernel of a blank image becomes exactly zero.
    """
    if mask is None:
        shifted = g("Sub", kernel, g("Slice", kernel, _i([0]), _i([1]), _i([1])))
        columns = g("Sub", shifted, g("ReduceMean", shifted, _i([1]), keepdims=1))
        return g("Sub", columns, g("ReduceMean", columns, _i([2]), keepdims=1)), _f([[n]])
    weight = g("Cast", mask, to=TensorProto.FLOAT)
    tokens = g("ReduceSum", weight, _i([1]), keepdims=1)
    share = g("Div", weight, g("Max", tokens, _f(1)))
    columns = g("Sub", kernel, g("MatMul", _row(g, share), kernel))
    rows = g("Sub", columns, g("MatMul", columns, _column(g, share)))
    return g("Where", g("And", _column(g, mask), _row(g, mask)), rows, _f(0)), tokens


def _spectral_entropy(g: _Graph, kernel: str, mask: str | None, n: int, d: int) -> str:
    """Normalised entropy of the spectrum of the centred kernel, [B, 1]; 1 for a blank image."""
    centred, tokens = _centred_kernel(g, kernel, mask, n)
    trace = g("ReduceSum", _diagonal(g, centred, n), _i([1]), keepdims=1)
    square = g("MatMul", centred, centred)
    # The Schatten-4 norm is at least the largest eigenvalue, so the spectrum over it lies in [0, 1].
    squared_norm = g("ReduceSum", g("ReduceSumSquare", square, _i([2]), keepdims=0), _i([1]), keepdims=1)
    norm = g("Max", g("Sqrt", g("Sqrt", squared_norm)), _f(1e-9))
    chain = g("Mul", centred, _column(g, g("Div", _f(ENTROPY_TABLE.scale), norm)))
    products = _inner_products(g, chain, n)
    s = g("Div", norm, g("Max", trace, _f(1e-9)))
    bracket = g("Mul", s, g("Add", products, _f(ENTROPY_TABLE.constant * n)))
    total = g("Add", bracket, g("Add", g("Log", s), _f(ENTROPY_TABLE.linear)))
    entropy = g("Div", g("Neg", total), _log_rank(g, tokens, d))
    # Written so that NaN, which is neither less nor greater, stays NaN.
    return g("Where", g("Less", trace, g("Mul", tokens, _f(_BLANK_VARIANCE))), _f(1), entropy)


def _log_rank(g: _Graph, tokens: np.ndarray[Any, Any] | str, d: int) -> np.ndarray[Any, Any] | str:
    """ln min(N, D), at least ln 2."""
    if isinstance(tokens, str):
        return g("Log", g("Max", g("Min", tokens, _f(d)), _f(2)))
    return _f(np.log(np.clip(np.minimum(tokens, d), 2, None)))


def _inner_products(g: _Graph, first: str, n: int) -> str:
    """sum over (i, j) of c_ij <V_i, V_j>, [B, 1]."""
    chain = [first]
    for multiplier in ENTROPY_TABLE.multipliers:
        diagonal = np.eye(n, dtype=np.float32) * np.float32(multiplier)
        chain.append(g("MatMul", chain[-1], g("Sub", diagonal, chain[-1])))
    stack = g("Concat", *(g("Unsqueeze", v, _i([2])) for v in chain), axis=2)
    grams = g("MatMul", stack, g("Transpose", stack, perm=[0, 1, 3, 2]))
    coefficients = np.zeros((len(chain), len(chain)), np.float32)
    for i, j, c in ENTROPY_TABLE.pairs:
        coefficients[i, j] = c
    weighted = g("Mul", g("ReduceSum", grams, _i([1]), keepdims=0), coefficients)
    return g("ReduceSum", g("ReduceSum", weighted, _i([2]), keepdims=0), _i([1]), keepdims=1)


def _saliency_count(g: _Graph, entropy: str, keep_tokens: int, config: SelectionConfig) -> str:
    """T_sal, [B, 1] int64; T where the entropy is NaN."""
    z = g("Clip", g("Div", g("Sub", entropy, _f(config.mu)), _f(config.tau)), _f(-20), _f(20))
    span = config.saliency_ratio_max - config.saliency_ratio_min
    ratio = g("Add", _f(config.saliency_ratio_min), g("Mul", g("Sigmoid", g("Neg", z)), _f(span)))
    count = g("Round", g("Mul", ratio, _f(keep_tokens)))
    count = g("Where", g("IsNaN", entropy), _f(keep_tokens), g("Clip", count, _f(0), _f(keep_tokens)))
    return g("Cast", count, to=TensorProto.INT64)


def _saliency_stage(g: _Graph, score: str, keep_tokens: int) -> str:
    """The T most salient tokens, most salient first, [B, T]."""
    return g.many("TopK", score, _i([keep_tokens]), outputs=2, axis=1, largest=1, sorted=1)[1]


def _coverage_stage(
    g: _Graph, kernel: str, state: str, salient: str, count: str, n: int, keep_tokens: int, loop: LoopForm
) -> str:
    """Greedy picks on the tokens that the saliency stage left, [B, steps].

    The loss l = 1 - d^2 is kept and the smallest is picked. ``state`` is its value before any pick: 0 for a token
    to pick from, 1 for a zero vector, 2 for padding.
    """
    loss = _initial_loss(g, kernel, state, salient, count, keep_tokens)
    if loop == "unrolled":
        coordinates, picks = None, []
        for _ in range(keep_tokens):
            loss, coordinates, pick = _greedy_step(g, kernel, loss, coordinates, n)
            picks.append(pick)
        return g("Concat", *picks, axis=1)
    # At least one step: the stacked picks of a Loop that never runs have no rank in ONNX Runtime.
    steps = g("Max", g("Sub", _i(keep_tokens), g("ReduceMin", count, keepdims=0)), _i(1))
    body = _Graph(parent=g)
    next_loss, next_coordinates, pick = _greedy_step(body, kernel, "loss_in", "coordinates_in", n)
    graph = _loop_body(body, next_loss, next_coordinates, pick)
    start = g("Slice", g("Unsqueeze", loss, _i([1])), _i([0]), _i([0]), _i([1]))
    true = np.asarray(True)
    picks_by_step = g.many("Loop", steps, true, loss, start, outputs=3, body=graph)[2]
    return g("Transpose", g("Squeeze", picks_by_step, _i([2])), perm=[1, 0])


def _initial_loss(g: _Graph, kernel: str, state: str, salient: str, count: str, keep_tokens: int) -> str:
    """The loss before the first step; just below 0 for the first pick, huge for the tokens already taken.

    The first pick is the token whose largest similarity to the saliency stage is least, or the first token if
    that stage is empty.
    """
    in_stage = g("Less", _i([range(keep_tokens)]), count)
    zeros = g("Mul", state, _f(0))
    taken = g("ScatterElements", zeros, salient, g("Cast", in_stage, to=TensorProto.FLOAT), axis=1)
    is_taken = g("Greater", taken, _f(0.5))
    loss = g("Where", is_taken, _f(_TAKEN), state)
    overlap = g("ReduceMax", g("Where", _row(g, is_taken), kernel, _f(-2)), _i([2]), keepdims=0)
    score = g("Where", g("Greater", loss, _f(0.5)), g("Add", loss, _f(2)), overlap)
    first = g("ArgMin", score, axis=1, keepdims=1)
    lowered = g("GatherElements", g("Sub", loss, _f(1e-30)), first, axis=1)
    return g("ScatterElements", loss, first, lowered, axis=1)


def _greedy_step(g: _Graph, kernel: str, loss: str, coordinates: str | None, n: int) -> tuple[str, str, str]:
    """One pick: (loss [B, N], coordinates [B, t, N]) -> (loss, coordinates [B, t + 1, N], pick [B, 1])."""
    spanned = g("And", g("Greater", loss, _f(1 - RESIDUAL_FLOOR)), g("Less", loss, _f(1.5)))
    pick = g("ArgMin", g("Where", spanned, _f(1), loss), axis=1, keepdims=1)
    residual = g("Sub", _f(1), g("GatherElements", loss, pick, axis=1))
    scale = g("Reciprocal", g("Sqrt", g("Max", residual, _f(RESIDUAL_FLOOR))))
    scale = g("Where", g("Less", residual, _f(RESIDUAL_FLOOR)), _f(0), scale)
    new = g("GatherND", kernel, pick, batch_dims=1)
    if coordinates is not None:
        by_token = g("Transpose", coordinates, perm=[0, 2, 1])
        row = g("Unsqueeze", g("GatherND", by_token, pick, batch_dims=1), _i([1]))
        new = g("Sub", new, g("Squeeze", g("MatMul", row, coordinates), _i([1])))
    new = g("Mul", new, scale)
    is_pick = g("Equal", _i([range(n)]), pick)
    loss = g("Where", is_pick, _f(_TAKEN), g("Add", loss, g("Mul", new, new)))
    new = g("Unsqueeze", new, _i([1]))
    return loss, g("Concat", coordinates, new, axis=1) if coordinates else new, pick


def _slots(
    g: _Graph, salient: str, covering: str, count: str, keep_tokens: int, config: SelectionConfig
) -> tuple[str, str]:
    """Indices and their stage, [B, T] each: slot t is salient[t] for t < T_sal, else covering[t - T_sal]."""
    slot = _i([range(keep_tokens)])
    from_saliency = g("Less", slot, count)
    source = g("Where", from_saliency, slot, g("Sub", _i([range(keep_tokens, 2 * keep_tokens)]), count))
    indices = g("GatherElements", g("Concat", salient, covering, axis=1), source, axis=1)
    if config.order == "selection":
        return indices, from_saliency
    _, order = g.many(
        "TopK", g("Cast", indices, to=TensorProto.FLOAT), _i([keep_tokens]), outputs=2, axis=1, largest=0, sorted=1
    )
    return g("GatherElements", indices, order, axis=1), g("GatherElements", from_saliency, order, axis=1)


def _loop_body(body: _Graph, loss: str, coordinates: str, pick: str) -> onnx.GraphProto:
    """Wrap the greedy step as the body of a Loop."""
    value = helper.make_tensor_value_info
    body.nodes.append(helper.make_node("Identity", ["going_in"], ["going_out"], name="going_out"))
    return helper.make_graph(
        body.nodes,
        "greedy_step",
        [
            value("step", TensorProto.INT64, []),
            value("going_in", TensorProto.BOOL, []),
            value("loss_in", TensorProto.FLOAT, None),
            value("coordinates_in", TensorProto.FLOAT, None),
        ],
        [
            value("going_out", TensorProto.BOOL, []),
            value(loss, TensorProto.FLOAT, None),
            value(coordinates, TensorProto.FLOAT, None),
            value(pick, TensorProto.INT64, None),
        ],
    )


def _model(
    g: _Graph,
    sizes: tuple[int, int, int],
    batch_size: int | str,
    dtype: str,
    opset: int,
    token_mask: bool,
) -> onnx.ModelProto:
    """Put inputs, outputs and metadata around the nodes, and check the result."""
    n, d, t = sizes
    element, b = _ELEMENT_TYPES[dtype], batch_size
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
    graph = helper.make_graph(g.nodes, "token_selector", inputs, outputs, list(g.initializers.values()))
    model = helper.make_model(
        graph,
        producer_name="promprune",
        producer_version=__version__,
        ir_version=_IR_VERSION,
        opset_imports=[helper.make_opsetid("", opset)],
    )
    onnx.checker.check_model(model, full_check=True)
    return model
