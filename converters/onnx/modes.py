"""Name the quantisation modes and the kinds of caches. This module is light, so that a command line can list them
without loading onnx."""

# Mode → file name, as is usual beside ``model.onnx``.
FILE_NAMES = {
    "int8": "model_int8.onnx",
    "int8-tables4": "model_int8_tables4.onnx",
    "int8-static": "model_int8_static.onnx",
    "int8-blocks": "model_q8.onnx",
    "int4": "model_q4.onnx",
    "float16": "model_fp16.onnx",
}
MODES = tuple(FILE_NAMES)
INT8_STATIC = "int8-static"  # the only mode that needs data, to measure the ranges of activations
# Modes with one scale per block of BLOCK inputs of one output.
BLOCK_MODES = ("int8-blocks", "int4")
BLOCK = 32

# What a decoder caches of past tokens: keys and values, or latents of low-rank layers (see `converters.onnx.latent`).
FULL, LATENT_VALUES, LATENT = "full", "latent-values", "latent"
KV_CACHES = (FULL, LATENT_VALUES, LATENT)

# Added to a graph's name, it names the file of weights that are not in the graph itself.
DATA_SUFFIX = "_data"
