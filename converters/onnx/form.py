"""In which form a graph is to be written."""

from collections.abc import Sequence
from dataclasses import dataclass

from converters.errors import InputError
from converters.onnx.modes import FULL, KV_CACHES


@dataclass(frozen=True)
class GraphForm:
    """What a user of the graph may choose; see `converters.onnx.export.export_onnx`.

    text_inputs: names that a tokenizer produces; the graph of a classifier of texts takes those of them that the model
        uses. None: all that the model uses.
    image_size: height and width; None: the config's.
    fuse: operators of ONNX that stand for many (attention, norms, rotary embeddings); without them, standard operators
        of an older opset only, to compare with or for other runtimes.
    kv_cache: what a decoder keeps of past tokens: ``full``, ``latent-values`` or ``latent``.
    external_data_threshold: weights above so many bytes go to ``<name>.onnx_data`` beside the graph; None: those that
        one file cannot hold.

    Raises (when made):
        InputError: no such cache.
    """

    text_inputs: Sequence[str] | None = None
    image_size: tuple[int, int] | None = None
    fuse: bool = True
    kv_cache: str = FULL
    external_data_threshold: int | None = None

    def __post_init__(self) -> None:
        if self.kv_cache not in KV_CACHES:
            raise InputError(f"unknown kv_cache {self.kv_cache!r}; expected one of {', '.join(KV_CACHES)}")
