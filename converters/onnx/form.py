"""Define the options for the form of an exported graph."""

from collections.abc import Sequence
from dataclasses import dataclass

from converters.errors import InputError
from converters.onnx.modes import FULL, KV_CACHES


@dataclass(frozen=True)
class GraphForm:
    """The form of a graph; see `converters.onnx.export.export_onnx`.

    text_inputs: names of the inputs that the tokenizer produces. The graph of a text classifier takes those of them
        that the model uses; None for all that the model uses.
    image_size: height and width in pixels; None for the config's.
    fuse: use operators that combine many (attention, norms, rotary embeddings). Otherwise, use only standard operators
        of an older opset, for comparisons and for other runtimes.
    kv_cache: what a decoder caches of past tokens: ``full``, ``latent-values`` or ``latent``.
    widen: write a float32 graph of a model in half precision. The weights are converted one at a time, when they are
        written, so that the model is never in memory in float32.
    external_data_threshold: if the weights have more bytes than this, they are written to ``<name>.onnx_data`` beside
        the graph; None for the largest size that one file can hold.

    Raises (when made):
        InputError: an unknown ``kv_cache``.
    """

    text_inputs: Sequence[str] | None = None
    image_size: tuple[int, int] | None = None
    fuse: bool = True
    kv_cache: str = FULL
    widen: bool = False
    external_data_threshold: int | None = None

    def __post_init__(self) -> None:
        if self.kv_cache not in KV_CACHES:
            raise InputError(f"unknown kv_cache {self.kv_cache!r}; expected one of {', '.join(KV_CACHES)}")
