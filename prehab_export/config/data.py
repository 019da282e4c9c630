"""Where samples come from and which of them."""

from dataclasses import dataclass

from converters.errors import InputError
from prehab_export.config.checks import AUTO, at_least, one_of

WINDOW_STARTS = ("auto", "bos", "none")


@dataclass(frozen=True)
class DataConfig:
    """Where samples come from and which of them; None means: find it.

    data: hub id, folder or file, or ``sklearn-digits``. sequence_length: window of a language model, longest text
    of a classifier. window_start: what each window of a language model starts with: ``auto`` (what the tokenizer puts
    before a text), ``bos`` (its BOS token) or ``none``. labels_by_position: class names of the data are not looked up
    among the model's, they stand in the same order. encoding, delimiter, header: of text, csv and JSON files; columns
    of a csv without a header are column1, column2 and so on.
    """

    data: str
    data_config: str | None = None
    train_split: str | None = None
    eval_split: str | None = None
    input_column: str | None = None
    pair_column: str | None = None
    label_column: str | None = None
    labels_by_position: bool = False
    encoding: str | None = None
    delimiter: str | None = None
    header: bool | None = None
    sequence_length: int | None = None
    window_start: str = AUTO
    eval_samples: int | None = None
    batch_size: int = 32

    def __post_init__(self) -> None:
        at_least("--batch-size", self.batch_size, 1)
        at_least("--sequence-length", self.sequence_length, 2)
        one_of("--window-start", self.window_start, WINDOW_STARTS)
        if self.delimiter is not None and len(self.separator or "") != 1:
            raise InputError(f"--delimiter must be one character, or tab, not {self.delimiter!r}")
        _check_encoding(self.encoding)
        at_least("--eval-samples", self.eval_samples, 1)

    @property
    def separator(self) -> str | None:
        """The delimiter itself."""
        return "\t" if self.delimiter in ("tab", "\\t") else self.delimiter


def _check_encoding(name: str | None) -> None:
    try:
        "".encode(name or "utf-8")
    except LookupError as error:
        raise InputError(f"--encoding: no text encoding is called {name!r}; try utf-8, cp1252 or utf-16") from error
