"""Counted work against cases worked out by hand, and against PyTorch's own counter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlavaForConditionalGeneration

from promprune.errors import PackageError
from promprune.export import ExportResult
from promprune.export.graphs.selector import build_selector
from promprune.export.roofline.work import count_work, cut_selection, load_graph


def model_of(
    nodes: list[onnx.NodeProto], inputs: dict[str, list[Any]], outputs: dict[str, list[Any]], weights: dict[str, Any]
) -> onnx.ModelProto:
    def values(shapes: dict[str, list[Any]]) -> list[onnx.ValueInfoProto]:
        return [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]

    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "g", values(inputs), values(outputs), tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)


def zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


def test_a_product_with_a_dynamic_batch() -> None:
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    model = model_of([node], {"x": ["batch", 3, 4]}, {"y": ["batch", 3, 5]}, {"w": zeros(4, 5)})
    work = count_work(model, {"batch": 7})
    assert work.flops == 2 * 7 * 3 * 4 * 5
    assert work.traffic_bytes == 4 * (7 * 3 * 4 + 4 * 5 + 7 * 3 * 5)
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"  # not changed


def test_a_product_that_broadcasts_both_ways() -> None:
    node = helper.make_node("MatMul", ["a", "b"], ["y"])
    model = model_of([node], {"a": [5, 1, 2, 3], "b": [4, 3, 6]}, {"y": [5, 4, 2, 6]}, {})
    assert count_work(model, {}).flops == 2 * 5 * 4 * 2 * 3 * 6


def test_a_transposed_gemm() -> None:
    node = helper.make_node("Gemm", ["x", "w"], ["y"], transA=1, transB=1)
    model = model_of([node], {"x": [8, 3]}, {"y": [3, 5]}, {"w": zeros(5, 8)})
    assert count_work(model, {}).flops == 2 * 3 * 8 * 5


def test_a_convolution_in_groups() -> None:
    node = helper.make_node("Conv", ["x", "w"], ["y"], strides=[2, 2], group=2)
    model = model_of([node], {"x": [1, 4, 9, 9]}, {"y": [1, 6, 4, 4]}, {"w": zeros(6, 2, 3, 3)})
    assert count_work(model, {}).flops == 2 * (6 * 4 * 4) * (2 * 3 * 3)


def test_an_einsum() -> None:
    node = helper.make_node("Einsum", ["a", "b"], ["y"], equation="bij, bjk -> bik")
    model = model_of([node], {"a": [2, 3, 4], "b": [2, 4, 5]}, {"y": [2, 3, 5]}, {})
    assert count_work(model, {}).flops == 2 * 2 * 3 * 4 * 5


def test_an_attention_of_parts_and_in_one_operator() -> None:
    """4 heads of 8, 6 queries on 10 keys: twice 4 * 6 * 10 * 8 multiply-adds."""
    wanted = 2 * 2 * 4 * 6 * 10 * 8
    shapes = {"q": [1, 4, 6, 8], "kt": [1, 4, 8, 10], "v": [1, 4, 10, 8]}
    parts = [
        helper.make_node("MatMul", ["q", "kt"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["p"]),
        helper.make_node("MatMul", ["p", "v"], ["y"]),
    ]
    assert count_work(model_of(parts, shapes, {"y": [1, 4, 6, 8]}, {}), {}).flops == wanted
    whole = helper.make_node("Attention", ["q", "k", "v"], ["y"])
    inputs = {"q": [1, 4, 6, 8], "k": [1, 4, 10, 8], "v": [1, 4, 10, 8]}
    assert count_work(model_of([whole], inputs, {"y": [1, 4, 6, 8]}, {}), {}).flops == wanted
    flat = helper.make_node("Attention", ["q", "k", "v"], ["y"], q_num_heads=4, kv_num_heads=2)
    inputs = {"q": [1, 6, 32], "k": [1, 10, 16], "v": [1, 10, 16]}
    assert count_work(model_of([flat], inputs, {"y": [1, 6, 32]}, {}), {}).flops == wanted


def test_of_a_table_only_the_rows_that_are_looked_up_move() -> None:
    node = helper.make_node("Gather", ["table", "ids"], ["y"])
    model = model_of([node], {}, {"y": [2, 3, 8]}, {"table": zeros(1000, 8), "ids": np.zeros((2, 3), np.int64)})
    assert count_work(model, {}).traffic_bytes == 4 * 2 * 3 * 8 * 2 + 8 * 6  # rows read and written, and the indices


def test_a_loop_counts_as_often_as_it_runs() -> None:
    """Every iteration counts the same; the unrolled selector has no loop, so the number of iterations has no effect."""
    looped, unrolled = (build_selector(16, 8, 5, loop=form) for form in ("loop", "unrolled"))
    once, twice, thrice = (count_work(looped, {}, loop_trips=trips).flops for trips in (1, 2, 3))
    assert thrice - twice == twice - once > 0
    assert count_work(unrolled, {}).flops == count_work(unrolled, {}, loop_trips=9).flops


def test_operators_of_other_domains_are_named_and_not_guessed() -> None:
    node = helper.make_node("Strange", ["x"], ["y"], domain="com.example")
    model = model_of([node], {"x": [2]}, {"y": [2]}, {})
    model.opset_import.append(helper.make_opsetid("com.example", 1))
    work = count_work(model, {})
    assert (work.flops, work.uncounted) == (0, ("Strange",))


def test_an_unknown_shape_is_refused() -> None:
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    model = model_of([node], {"x": ["batch", 4]}, {"y": ["batch", 5]}, {"w": zeros(4, 5)})
    with pytest.raises(PackageError, match="'x'"):
        count_work(model, {"other": 3})


@torch.no_grad()
def test_the_exported_graphs_count_what_pytorch_counts(tiny_llava: Path, tiny_full_export: ExportResult) -> None:
    model = LlavaForConditionalGeneration.from_pretrained(tiny_llava).eval()
    language, tower, length = model.model.language_model, model.model.vision_tower, 23
    with FlopCounterMode(display=False) as prefill, sdpa_kernel(SDPBackend.MATH):
        hidden = language(inputs_embeds=torch.zeros(1, length, 48)).last_hidden_state
        model.lm_head(hidden[:, -1:])
    folder = tiny_full_export.output / "onnx"
    sizes = {"batch_size": 1, "sequence_length": length, "past_sequence_length": 0, "total_sequence_length": length}
    counted = count_work(load_graph(folder / "decoder_model_merged.onnx"), sizes).flops
    # The rotary angles are a product of one, which the exporter may write as a multiplication.
    angles = 2 * length * language.config.hidden_size // language.config.num_attention_heads // 2
    assert counted == pytest.approx(prefill.get_total_flops(), abs=angles)

    tower.encoder.layers = tower.encoder.layers[:2]  # the features are read after these
    with FlopCounterMode(display=False) as vision, sdpa_kernel(SDPBackend.MATH):
        features = tower(torch.zeros(1, 3, 56, 56)).last_hidden_state
        model.model.multi_modal_projector(features[:, 1:])
    encoder = count_work(load_graph(folder / "vision_encoder.onnx"), {"batch_size": 1}).flops
    assert encoder == vision.get_total_flops()


def test_the_selection_is_cut_out_whole(tiny_export: ExportResult) -> None:
    graph = load_graph(tiny_export.output / "onnx" / "vision_encoder.onnx")
    encoder, selection = cut_selection(graph)
    assert selection is not None
    whole, before, after = (
        count_work(part, {"batch_size": 1}, loop_trips=4).flops for part in (graph, encoder, selection)
    )
    assert whole == before + after
    alone = count_work(load_graph(tiny_export.output / "onnx" / "token_selector.onnx"), {"batch_size": 1}, loop_trips=4)
    assert after == alone.flops > 0


def test_a_graph_without_selection_is_left_whole(tiny_full_export: ExportResult) -> None:
    graph = load_graph(tiny_full_export.output / "onnx" / "vision_encoder.onnx")
    encoder, selection = cut_selection(graph)
    assert (encoder, selection) == (graph, None)
