"""The kinds of quantisation and of caches, by name. Light: a command line lists them without loading onnx."""

# Mode → the file's name, as the ecosystem has it beside ``model.onnx``.
FILE_NAMES = {
    "int8": "model_int8.onnx",
    "int8-tables4": "model_int8_tables4.onnx",
    "int8-static": "model_int8_static.onnx",
    "int8-blocks": "model_q8.onnx",
    "int4": "model_q4.onnx",
    "float16": "model_fp16.onnx",
}
MODES = tuple(FILE_NAMES)
INT8_STATIC = "int8-static"  # the one that needs data, to find ranges on
# Those that have a scale for every block of so many inputs of one output.
BLOCK_MODES = ("int8-blocks", "int4")
BLOCK = 32

# What a decoder keeps of past tokens: keys and values, or of low-rank layers the latents (`converters.onnx.latent`).
FULL, LATENT_VALUES, LATENT = "full", "latent-values", "latent"
KV_CACHES = (FULL, LATENT_VALUES, LATENT)

# After the name of a graph: the file of weights that do not fit into it.
DATA_SUFFIX = "_data"
