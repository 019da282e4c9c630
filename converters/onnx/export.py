"""Export models from torch to ONNX, for image classification, text classification and text generation."""

import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from converters.errors import InputError
from converters.model_config import without_cache
from converters.onnx.attention import ONNX_ATTENTION, PLAIN_ATTENTION, attention_implementation
from converters.onnx.cache import CacheLayout, cache_layout
from converters.onnx.expected import ATTENTION, OPERATORS, counting, missing, spelled_out
from converters.onnx.form import GraphForm
from converters.onnx.fuse import count_fusions, fuse_graph, simplify_graph
from converters.onnx.inputs import GraphInputs, decoder_inputs, image_inputs, text_inputs
from converters.onnx.latent import latent_layout
from converters.onnx.modes import FULL
from converters.onnx.names import restore_weight_names, store_by_head, store_transposed, tidy
from converters.onnx.quiet import quiet
from converters.onnx.rope import traceable_frequencies
from converters.onnx.stack import stack_products
from converters.onnx.stored import in_float32, put_stored
from converters.onnx.write import publish_graph

TASKS = ("image-classification", "text-classification", "text-generation")

# Fused graphs use Attention, RotaryEmbedding and RMSNormalization, which were added in opset 23; plain ones do not.
FUSED_OPSET, PLAIN_OPSET = 23, 20

# The exporter's message about an operator that it cannot write.
_WITHOUT_FUNCTION = re.compile(r"No ONNX function found for <OpOverload\(op='([^']+)'")


@dataclass(frozen=True)
class OnnxExport:
    """Facts about an exported graph.

    fusions: number of fused operators in the graph, by operator.
    bytes: size of the graph and its external data.
    warnings: which operations were not fused, and which layers do not support the requested cache.
    cache_bytes_per_token: None if the graph has no cache.
    """

    path: Path
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    opset: int
    fusions: dict[str, int]
    bytes: int
    warnings: tuple[str, ...] = ()
    cache_bytes_per_token: int | None = None


def export_onnx(
    model: PreTrainedModel,
    task: str,
    path: Path,
    form: GraphForm | None = None,
    *,
    samples: Mapping[str, Tensor] | None = None,
) -> OnnxExport:
    """Write the model, dense or factored, as one ONNX graph; the model does not change.

    - image-classification: ``pixel_values`` → ``logits``. The batch size is free; the image size is the form's
      ``image_size`` or else the config's.
    - text-classification: ``input_ids``, ``attention_mask``, ``token_type_ids`` → ``logits``. The graph has those
      inputs that the model uses and, if the form has ``text_inputs``, that are among them.
    - text-generation: ``input_ids``, ``attention_mask``, ``position_ids`` (if the model takes them) and
      ``past_key_values.{i}.key/value`` → ``logits`` and ``present.{i}.key/value``, both for a prompt (past length 0)
      and for decoding. The attention mask marks padding, on either side. With ``kv_cache`` ``latent-values`` or
      ``latent``, the cache holds narrower latents of low-rank layers, under other names (see
      `converters.onnx.latent`).

    The model is traced with the first rows of ``samples`` (inputs by name, rows outermost), or else with artificial
    inputs that fit its config; the graph is the same for all inputs.

    The graph has the model's dtype. ONNX Runtime on CPU runs float16 graphs, but it has few bfloat16 kernels and cannot
    open a bfloat16 graph: such a model needs the form's ``widen``.

    Raises:
        InputError: an unknown task, a model that does not fit the task, or ``path`` is a folder; or ``widen`` with
            weights in half precision and a cache of latents, which are found by running the model in float32.
        RuntimeError: torch could not trace the model.
    """
    if task not in TASKS:
        raise InputError(f"unknown task {task!r}; expected one of {', '.join(TASKS)}")
    form = form or GraphForm()
    if path.is_dir():
        raise InputError(f"{path} is a folder; name the graph in it, such as {path / 'model.onnx'}")
    halves: AbstractContextManager[dict[int, Tensor]] = in_float32(model) if form.widen else nullcontext({})
    with _evaluating(model), torch.no_grad(), halves as stored:
        if stored and form.kv_cache != FULL:
            raise InputError(f"a {form.kv_cache} cache needs the model in float32: load it with dtype=torch.float32")
        traced = _Traced(model, task, form, samples)
        attention, reason = _attention(traced) if form.fuse else (PLAIN_ATTENTION, None)
        graph = _trace(traced, attention, FUSED_OPSET if form.fuse else PLAIN_OPSET)
        put_stored(graph.graph, stored)
        _optimise(graph, form.fuse, _first_names(model))
        fusions = count_fusions(graph)
        unfused = _unfused(traced, graph, fusions, reason) if form.fuse else []
        size = publish_graph(graph, path, form.external_data_threshold)
    return OnnxExport(
        path=path,
        inputs=traced.inputs.names,
        outputs=traced.outputs,
        opset=graph.opset_imports[""],
        fusions=fusions,
        bytes=size,
        warnings=(*traced.warnings, *unfused),
        cache_bytes_per_token=None if traced.layout is None else traced.layout.bytes_per_token,
    )


def check_exportable(
    model: PreTrainedModel,
    task: str,
    form: GraphForm | None = None,
    *,
    samples: Mapping[str, Tensor] | None = None,
) -> None:
    """Check that `export_onnx` can trace a model, with or without fused operators; nothing is written.

    Raises:
        InputError: a model that does not fit the task.
        RuntimeError: torch could not trace the model.
    """
    with _evaluating(model), torch.no_grad():
        traced = _Traced(model, task, form or GraphForm(), samples)
        attention, _ = _attention(traced)
        try:
            _trace(traced, attention, FUSED_OPSET)
        except RuntimeError:
            _trace(traced, PLAIN_ATTENTION, PLAIN_OPSET)


class _Traced(nn.Module):
    """A model that takes and returns tensors in the order of the graph's inputs and outputs."""

    def __init__(
        self,
        model: PreTrainedModel,
        task: str,
        form: GraphForm,
        samples: Mapping[str, Tensor] | None,
    ) -> None:
        super().__init__()
        self.model = model
        self.outputs: tuple[str, ...] = ("logits",)
        self.layout: CacheLayout | None = None
        self.warnings: list[str] = []
        if task == "text-generation":
            self.layout, self.warnings = latent_layout(model, cache_layout(model), form.kv_cache)
            self.inputs: GraphInputs = decoder_inputs(model, self.layout, samples)
            self.outputs += self.layout.present_names
        elif task == "text-classification":
            self.inputs = text_inputs(model, form.text_inputs, samples)
        else:
            self.inputs = image_inputs(model, form.image_size, samples)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        inputs = dict(zip(self.inputs.names, tensors, strict=True))
        if self.layout is None:
            return (self.model(**inputs).logits,)
        past = [inputs.pop(name) for name in self.layout.past]
        return self.layout.run(self.model, inputs, past)

    @contextmanager
    def attending(self, base: str) -> Iterator[None]:
        """Use ``base`` as the model's attention within the block, except where the cache needs its own."""
        layout = nullcontext(base) if self.layout is None else self.layout.attention(base)
        with layout as name, attention_implementation(self.model, name), traceable_frequencies(self.model):
            yield


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Set evaluation mode, and no cache except on request, within the block; both are restored at the end."""
    training = {name: module.training for name, module in model.named_modules()}
    model.eval()
    try:
        with without_cache(model.config):
            yield
    finally:
        for name, module in model.named_modules():
            module.training = training[name]


def _attention(traced: _Traced) -> tuple[str, str | None]:
    """The attention to trace with, and the reason if it is not ONNX's operator."""
    with traced.attending(ONNX_ATTENTION), counting(traced.model) as counts:
        try:
            traced(*traced.inputs.tensors.values())
        except NotImplementedError as error:
            return PLAIN_ATTENTION, f"ONNX's operator cannot do {error}"
    if not counts[ATTENTION] and not _mixes_latents(traced):
        return PLAIN_ATTENTION, "the model does not take its attention from transformers' registry"
    return ONNX_ATTENTION, None


def _mixes_latents(traced: _Traced) -> bool:
    return traced.layout is not None and traced.layout.mixes_latents


def _unfused(traced: _Traced, graph: ir.Model, fusions: Mapping[str, int], reason: str | None) -> list[str]:
    """A sentence for each kind of operation that the finished graph has in unfused form, with the reason for
    attention."""
    plain = spelled_out(graph.graph)
    if _mixes_latents(traced):
        del plain[ATTENTION]  # over latents, the unfused form is less work
    sentences = []
    for kind, count in plain.items():
        fused = sum(fusions.get(operator, 0) for operator in OPERATORS[kind])
        (sentence,) = missing({kind: count + fused}, fusions)
        sentences.append(f"{sentence}: {reason}" if kind == ATTENTION and reason else sentence)
    return sentences


def _trace(traced: _Traced, attention: str, opset: int) -> ir.Model:
    """Trace the model to an ONNX graph with torch's exporter.

    Raises:
        RuntimeError: torch could not trace it.
    """
    inputs = traced.inputs
    try:
        with quiet(), traced.attending(attention):
            program = torch.onnx.export(
                traced,
                tuple(inputs.tensors.values()),
                input_names=inputs.names,
                output_names=traced.outputs,
                dynamic_shapes=(tuple(inputs.axes.values()),),
                opset_version=opset,
                dynamo=True,
                optimize=False,
                verbose=False,
            )
    except Exception as error:
        kind = type(traced.model).__name__
        raise RuntimeError(f"torch could not export {kind} to ONNX: {_reason(error)}") from error
    assert program is not None
    return program.model


def _reason(error: BaseException) -> str:
    """The innermost cause of an exporter's error, in one line and without the advice around it."""
    while error.__cause__ is not None:
        error = error.__cause__
    if operator := _WITHOUT_FUNCTION.search(str(error)):
        return f"there is no function for the operator {operator[1]}"
    first, *rest = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join([first, *rest[:1]]) if first.endswith(":") else first


def _first_names(model: PreTrainedModel) -> dict[str, str]:
    """Map every name of a parameter or buffer to the first name of the same tensor."""
    tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in tensors}


def _optimise(graph: ir.Model, fused: bool, first_names: Mapping[str, str]) -> None:
    """Name the weights, fuse or simplify the graph, and tidy it, in place."""
    with quiet():
        restore_weight_names(graph.graph, "model.", first_names)
        store_transposed(graph)
        store_by_head(graph)
        names = set(first_names)
        if fused:
            fuse_graph(graph)
            names.update(stack_products(graph))
        else:
            simplify_graph(graph)
        tidy(graph, names)
