"""Units, losses and metrics against transformers' own losses, brute force, and ONNX Runtime."""

import math
from contextlib import contextmanager

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from converters.errors import InputError
from prehab_export.config.run import TASK_NAMES
from prehab_export.inputs.evaluation import evaluate, onnx_predictor, torch_predictor
from prehab_export.inputs.tasks import TASKS

CLASSIFICATION = TASKS["text-classification"]
GENERATION = TASKS["text-generation"]


@pytest.fixture(scope="module")
def classifier():
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=50, num_labels=3
    )
    return BertForSequenceClassification(config).eval()


@pytest.fixture(scope="module")
def decoder():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64,
        vocab_size=50,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def classifier_batches(count=3):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        mask = torch.ones(4, 7, dtype=torch.int64)
        mask[1, 5:] = 0
        yield {
            "input_ids": torch.randint(0, 50, (4, 7), generator=generator),
            "attention_mask": mask,
            "labels": torch.randint(0, 3, (4,), generator=generator),
        }


def test_the_command_line_knows_every_task():
    assert tuple(TASKS) == TASK_NAMES


def test_classifier_losses_are_the_models_own(classifier):
    batch = next(classifier_batches())
    losses = CLASSIFICATION.losses(CLASSIFICATION.logits(classifier, batch), batch)
    assert losses.shape == (4,)
    assert losses.mean().item() == pytest.approx(classifier(**batch).loss.item(), rel=1e-5)


def test_decoder_losses_shift_by_one_and_leave_padding_out(decoder):
    ids = torch.randint(0, 50, (2, 6), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    logits = GENERATION.logits(decoder, batch)
    expected = []
    for row, length in ((0, 6), (1, 4)):
        for position in range(length - 1):
            scores = logits[row, position].double()
            expected.append((scores.logsumexp(-1) - scores[ids[row, position + 1]]).item())
    assert GENERATION.losses(logits, batch).tolist() == pytest.approx(expected, rel=1e-5)
    assert GENERATION.unit_logits(logits, batch).shape == (8, 50)
    assert GENERATION.token_mask(batch).sum() == 10


def test_decoder_windows_need_no_mask_and_labels_may_be_left_out(decoder):
    ids = torch.randint(0, 50, (2, 6), generator=torch.Generator().manual_seed(3))
    logits = GENERATION.logits(decoder, {"input_ids": ids})
    assert GENERATION.token_mask({"input_ids": ids}) is None
    own = decoder(input_ids=ids, labels=ids).loss.item()
    assert GENERATION.losses(logits, {"input_ids": ids}).mean().item() == pytest.approx(own, rel=1e-5)
    labels = ids.clone()
    labels[0, :3] = -100
    assert len(GENERATION.losses(logits, {"input_ids": ids, "labels": labels})) == 3 + 5


def test_losses_of_half_precision_logits_are_taken_in_float32():
    batch = {"labels": torch.tensor([0])}
    assert CLASSIFICATION.losses(torch.zeros(1, 3, dtype=torch.bfloat16), batch).dtype == torch.float32


def test_accuracy_and_loss_do_not_depend_on_how_samples_are_batched(classifier):
    batches = list(classifier_batches())
    whole = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    watched = []

    @contextmanager
    def watching(what, steps):
        yield lambda amount=1, note="": watched.append((what, steps, amount))

    parts = evaluate(torch_predictor(classifier, CLASSIFICATION), CLASSIFICATION, batches, progress=watching)
    at_once = evaluate(torch_predictor(classifier, CLASSIFICATION), CLASSIFICATION, [whole])
    guesses = classifier(**{k: v for k, v in whole.items() if k != "labels"}).logits.argmax(-1)
    assert parts.value == at_once.value == (guesses == whole["labels"]).double().mean().item()
    assert parts.loss == pytest.approx(at_once.loss, rel=1e-5)
    assert (parts.units, parts.samples, parts.metric) == (12, 12, "accuracy")
    assert watched == [("evaluate", 3, 1)] * 3


def test_perplexity_weighs_tokens_not_batches(decoder):
    generator = torch.Generator().manual_seed(4)
    batches = [{"input_ids": torch.randint(0, 50, shape, generator=generator)} for shape in ((3, 8), (1, 4))]
    result = evaluate(torch_predictor(decoder, GENERATION), GENERATION, batches)
    losses = torch.cat([GENERATION.losses(GENERATION.logits(decoder, batch), batch) for batch in batches])
    assert result.units == len(losses) == 3 * 7 + 3
    assert result.value == pytest.approx(math.exp(losses.double().mean().item()), rel=1e-5)


def test_a_loss_that_is_not_finite_names_its_sample(classifier):
    def predict(batch):
        logits = torch_predictor(classifier, CLASSIFICATION)(batch).clone()
        logits[2] = float("nan")
        return logits

    with pytest.raises(FloatingPointError, match="on sample 2;"):
        evaluate(predict, CLASSIFICATION, classifier_batches())


def test_nothing_to_evaluate_is_refused(classifier):
    with pytest.raises(InputError, match="nothing to evaluate"):
        evaluate(torch_predictor(classifier, CLASSIFICATION), CLASSIFICATION, [])


def decoder_graph():
    """A graph with a decoder's inputs; its logits are one-hot at position + past length + 10·mask."""
    inputs = [
        helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "length"]),
        helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch", "total"]),
        helper.make_tensor_value_info("position_ids", TensorProto.INT64, ["batch", "length"]),
        helper.make_tensor_value_info("past_key_values.0.key", TensorProto.FLOAT, ["batch", 2, "past", 4]),
        helper.make_tensor_value_info("past_key_values.0.value", TensorProto.FLOAT, ["batch", 2, "past", 4]),
    ]
    constants = [
        helper.make_tensor("depth", TensorProto.INT64, [], [32]),
        helper.make_tensor("levels", TensorProto.FLOAT, [2], [0.0, 1.0]),
        helper.make_tensor("ten", TensorProto.INT64, [], [10]),
    ]
    nodes = [
        helper.make_node("Mul", ["attention_mask", "ten"], ["offset"]),
        helper.make_node("Add", ["offset", "position_ids"], ["hot"]),
        helper.make_node("OneHot", ["hot", "depth", "levels"], ["logits"], axis=-1),
        helper.make_node("Concat", ["past_key_values.0.key", "past_key_values.0.value"], ["present.0.key"], axis=2),
    ]
    outputs = [
        helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "length", 32]),
        helper.make_tensor_value_info("present.0.key", TensorProto.FLOAT, ["batch", 2, "p", 4]),
    ]
    graph = helper.make_graph(nodes, "decoder", inputs, outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options)


def test_an_onnx_decoder_is_fed_an_empty_cache_and_positions_from_the_mask():
    predict = onnx_predictor(session(decoder_graph()), GENERATION)
    batch = {
        "input_ids": torch.zeros(2, 4, dtype=torch.int64),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]]),
    }
    assert predict(batch).argmax(-1).tolist() == [[10, 11, 12, 13], [0, 0, 10, 11]]
    assert predict({"input_ids": batch["input_ids"]}).argmax(-1).tolist() == [[10, 11, 12, 13]] * 2


def test_a_graph_and_a_model_get_the_same_metrics():
    weight = np.random.default_rng(0).standard_normal((6, 3)).astype(np.float32)
    pixels = helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["batch", 6])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])
    matrix = helper.make_tensor("weight", TensorProto.FLOAT, weight.shape, weight.tobytes(), raw=True)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["pixel_values", "weight"], ["logits"])], "g", [pixels], [logits], [matrix]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    generator = torch.Generator().manual_seed(5)
    batches = [
        {"pixel_values": torch.randn(5, 6, generator=generator), "labels": torch.randint(0, 3, (5,))} for _ in range(2)
    ]
    task = TASKS["image-classification"]
    from_graph = evaluate(onnx_predictor(session(model), task), task, batches)
    from_torch = evaluate(lambda batch: batch["pixel_values"] @ torch.from_numpy(weight), task, batches)
    assert from_graph.value == from_torch.value
    assert from_graph.loss == pytest.approx(from_torch.loss, rel=1e-5)


def test_a_graph_with_an_unknown_input_or_no_logits_is_refused():
    model = decoder_graph()
    model.graph.input[2].name = model.graph.node[1].input[1] = "mystery"
    with pytest.raises(InputError, match="mystery"):
        onnx_predictor(session(model), GENERATION)({"input_ids": torch.zeros(1, 2, dtype=torch.int64)})
    model = decoder_graph()
    model.graph.output[0].name = model.graph.node[2].output[0] = "scores"
    with pytest.raises(InputError, match="no output 'logits'"):
        onnx_predictor(session(model), GENERATION)
