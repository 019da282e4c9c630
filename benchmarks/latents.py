"""What a decoder's cache of latents costs and saves: full-size shapes with random weights, by length of the context.

    python benchmarks/latents.py --shape llama-gqa --out benchmarks/results/latents-llama-gqa.json

The same factors are exported with each kind of cache and measured in turns, next to the dense model. A request is a
prompt and the tokens that follow it; ``cache_mb`` is what the cache holds at its end. The vocabulary is small, so that
a prompt's logits do not hide what the cache takes.
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
from latency import LLAMA, cut

from converters.onnx.export import export_onnx
from converters.onnx.form import GraphForm
from converters.onnx.modes import FULL, KV_CACHES
from prehab_export.config.bench import BenchConfig
from prehab_export.measurement.benchmark import bench
from prehab_export.pipeline.session import quiet_libraries
from prehab_export.system.terminal import bar

# Key and value heads: fewer than heads of queries; as many; as many, and no rotation of keys.
SHAPES = ("llama-gqa", "llama-mha", "opt")
VOCABULARY = 2048


@click.command(help=__doc__)
@click.option("--shape", type=click.Choice(SHAPES), required=True)
@click.option("--removed", type=float, default=0.6)
@click.option("--prompt", "prompts", type=int, multiple=True, default=(128, 1984))
@click.option("--new-tokens", type=int, default=32)
@click.option("--blocks", type=int, default=8)
@click.option("--threads", type=int, default=2)
@click.option("--rounds", type=int, default=5)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(
    shape: str,
    removed: float,
    prompts: tuple[int, ...],
    new_tokens: int,
    blocks: int,
    threads: int,
    rounds: int,
    out: Path,
) -> None:
    quiet_libraries()
    result: dict[str, Any] = {"command": shlex.join(["python", "benchmarks/latents.py", *sys.argv[1:]])}
    config = BenchConfig(
        threads=threads, sequence_lengths=prompts, rounds=rounds, new_tokens=new_tokens, warmup=1, timeout_s=1800
    )
    with tempfile.TemporaryDirectory() as folder:
        model = build(shape, blocks)
        graphs = {"dense": Path(folder, "dense.onnx")}
        per_token = {"dense": export_onnx(model, "text-generation", graphs["dense"]).cache_bytes_per_token}
        cut(model, removed, 16)
        for kind in KV_CACHES:
            name = f"{removed:.0%} removed, {kind}"
            graphs[name] = Path(folder, f"{kind}.onnx")
            export = export_onnx(model, "text-generation", graphs[name], GraphForm(kv_cache=kind))
            per_token[name] = export.cache_bytes_per_token
            if kind != FULL:
                assert not export.warnings, export.warnings
        del model
        result |= bench(graphs, config, progress=bar)
    result["cache_bytes_per_token"] = per_token
    for case in result["cases"]:
        case["cache_mb"] = per_token[case["model"]] * (case["sequence"] + new_tokens) / 1e6
    out.write_text(json.dumps(result, indent=1) + "\n")


def build(shape: str, blocks: int) -> transformers.PreTrainedModel:
    """The model with random weights."""
    torch.manual_seed(0)
    if shape == "opt":
        sizes = {
            "vocab_size": VOCABULARY,
            "hidden_size": 2048,
            "word_embed_proj_dim": 2048,
            "ffn_dim": 8192,
            "num_attention_heads": 32,
        }
        config = transformers.OPTConfig(num_hidden_layers=blocks, max_position_embeddings=2048, **sizes)
        return transformers.OPTForCausalLM(config).eval()
    sizes = LLAMA | {"vocab_size": VOCABULARY, "num_hidden_layers": blocks}
    sizes |= {"num_key_value_heads": 32} if shape == "llama-mha" else {}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()


if __name__ == "__main__":
    main()
