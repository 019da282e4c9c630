"""Speed and size of full-size shapes with random weights: dense against low rank, float32 and quantised, in one run.

    python benchmarks/latency.py --shape bert-base --out benchmarks/results/latency-bert-base.json

All graphs are exported and fused in the same way. ``ideal`` is what the removed multiply-adds alone would give,
``1 / (non-linear share of the dense time + linear share · share kept)``, the shares from the dense graph's own kernel
times; ``of_ideal`` is the measured speed-up over it. For a decoder ``of_bytes`` is the gain in tokens a second over
what reading fewer bytes would give, all weights of a graph being read once a token. Weights are random: speed and
memory say something here, answers do not.
"""

import json
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import torch
import transformers

import prehab_export as px
from converters.lowrank import Factors, dense_weight, factorize
from converters.onnx.export import export_onnx
from converters.onnx.form import GraphForm
from converters.onnx.modes import FILE_NAMES, MODES
from converters.onnx.quantize import quantize_graph
from prehab_export.config.bench import BenchConfig
from prehab_export.linalg.allocation import parameters, uniform_rank
from prehab_export.measurement.benchmark import bench
from prehab_export.pipeline.session import quiet_libraries
from prehab_export.system.terminal import bar

# Operators that multiply by a weight.
LINEAR = {"MatMul", "Gemm", "FusedMatMul"}

# Task, batch sizes, lengths.
SHAPES: dict[str, tuple[str, tuple[int, ...], tuple[int, ...]]] = {
    "vit-b16": ("image-classification", (1, 8), (1,)),
    "bert-base": ("text-classification", (1,), (128, 384)),
    "llama-1b": ("text-generation", (1,), (128,)),
}
LLAMA = {
    "vocab_size": 32_000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
    "num_attention_heads": 32, "num_key_value_heads": 4, "max_position_embeddings": 2048,
}  # fmt: skip


@click.command(help=__doc__)
@click.option("--shape", type=click.Choice(list(SHAPES)), required=True)
@click.option("--removed", type=float, multiple=True, default=(0.4, 0.6, 0.8))
@click.option("--mode", "modes", type=click.Choice(MODES), multiple=True, default=("int8",))
@click.option("--threads", type=int, multiple=True, default=(1, 2))
@click.option("--rank-multiple", type=int, default=16)
@click.option("--blocks", type=int, help="Blocks of the model, for a quick look; the model's own number by default.")
@click.option("--rounds", type=int, default=BenchConfig.rounds)
@click.option("--new-tokens", type=int, default=64)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(
    shape: str,
    removed: tuple[float, ...],
    modes: tuple[str, ...],
    threads: tuple[int, ...],
    rank_multiple: int,
    blocks: int | None,
    rounds: int,
    new_tokens: int,
    out: Path,
) -> None:
    quiet_libraries()
    _task, batches, lengths = SHAPES[shape]
    result: dict[str, Any] = {"command": shlex.join(["python", "benchmarks/latency.py", *sys.argv[1:]])}
    with tempfile.TemporaryDirectory() as folder:
        graphs, kept = make_graphs(shape, removed, modes, rank_multiple, blocks, Path(folder))
        result["kept"], result["runs"] = kept, []
        for count in threads:
            config = BenchConfig(
                threads=count, batch_sizes=batches, sequence_lengths=lengths, rounds=rounds, new_tokens=new_tokens
            )
            run = bench(graphs, config, progress=bar)
            add_ideals(run, kept)
            result["runs"].append(run)
            for row in run["comparison"]:
                click.echo(f"{count} threads {row}", err=True)
            out.write_text(json.dumps(result, indent=1) + "\n")


def make_graphs(
    shape: str, removed: tuple[float, ...], modes: tuple[str, ...], multiple: int, blocks: int | None, folder: Path
) -> tuple[dict[str, Path], dict[str, float]]:
    """Name → graph, the dense one first; and the share of the linear layers' parameters that each keeps."""
    graphs: dict[str, Path] = {}
    kept: dict[str, float] = {}
    for share in (0.0, *removed):
        torch.manual_seed(0)
        model = build(shape, blocks)
        left = cut(model, share, multiple) if share else 1.0
        name = f"{share:.0%} removed" if share else "dense"
        graph = folder / name.replace("% ", "-") / "model.onnx"
        export_onnx(model, SHAPES[shape][0], graph, GraphForm(text_inputs=("input_ids", "attention_mask")))
        del model
        variants = {name: graph}
        for mode in modes:
            variants[f"{name} {mode}"] = quantize_graph(graph, graph.with_name(FILE_NAMES[mode]), mode)
        graphs |= variants
        kept |= dict.fromkeys(variants, left)
    return graphs, kept


def build(shape: str, blocks: int | None, tiny: bool = False) -> transformers.PreTrainedModel:
    """The model with random weights; ``tiny``: of the same kind, but next to nothing."""
    sizes: dict[str, int] = {} if blocks is None else {"num_hidden_layers": blocks}
    if tiny:
        sizes |= {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4}
    if shape == "vit-b16":
        classes = {index: str(index) for index in range(1000)}
        return transformers.ViTForImageClassification(transformers.ViTConfig(id2label=classes, **sizes)).eval()
    if shape == "bert-base":
        return transformers.BertForSequenceClassification(transformers.BertConfig(num_labels=2, **sizes)).eval()
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA | sizes)).eval()


def cut(model: transformers.PreTrainedModel, removed: float, multiple: int) -> float:
    """Random factors in every layer, the same share off each, ranks rounded down; returns the share kept."""
    layers = px.select_layers(model)
    factors, before, after = {}, 0.0, 0.0
    for name, layer in layers.items():
        m, n = dense_weight(layer).shape
        rank = uniform_rank(m, n, 1 - removed, multiple)
        before, after = before + m * n, after + parameters(m, n, rank)
        if rank is not None:
            bias = None if layer.bias is None else layer.bias.detach()
            factors[name] = Factors(torch.randn(m, rank) / rank**0.5, torch.randn(rank, n) / n**0.5, bias)
    factorize(model, factors)
    return after / before


def add_ideals(run: dict[str, Any], kept: dict[str, float]) -> None:
    """``ideal`` and ``of_ideal`` for the float32 encoders, ``of_bytes`` for decoders, in the comparison's rows."""
    cases = {(row["model"], row["batch"], row["sequence"]): row for row in run["cases"]}
    for row in run["comparison"]:
        own, dense = (cases[name, row["batch"], row["sequence"]] for name in (row["model"], "dense"))
        if own["tokens_per_s"] is not None:
            by_bytes = dense["file_mb"] / own["file_mb"]
            row |= {"by_bytes": by_bytes, "of_bytes": own["tokens_per_s"] / dense["tokens_per_s"] / by_bytes}
        elif row["model"].endswith("removed"):
            times = {entry["op"]: entry["ms"] for entry in dense["operators"]["request"]}
            linear = sum(times.get(op, 0.0) for op in LINEAR) / sum(times.values())
            ideal = 1 / (1 - linear + linear * kept[row["model"]])
            row |= {"linear_share": linear, "ideal": ideal, "of_ideal": row["speedup"] / ideal}


if __name__ == "__main__":
    main()
