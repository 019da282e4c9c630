"""Options of data: the data set, its splits and columns, and the samples to use."""

from dataclasses import dataclass

from converters.errors import InputError
from prehab_export.config.checks import AUTO, check_choice, check_minimum

WINDOW_STARTS = ("auto", "bos", "none")


@dataclass(frozen=True)
class DataConfig:
    """Which data set, splits, columns and samples to use.

    data: hub id, folder or file; ``sklearn-digits`` is built in.
    data_config: configuration of a hub data set, such as sst2 of glue.
    train_split: split to calibrate and train on; detected when not given.
    eval_split: split to evaluate on, such as validation+test; detected when not given.
    input_column: column of images or texts; detected when not given.
    pair_column: second text column of a pair task, such as the hypothesis of mnli; detected when not given.
    label_column: column of labels; detected when not given.
    labels_by_position: match the data's classes to the model's by position instead of by name.
    encoding: encoding of text, CSV and JSON files, such as cp1252; UTF-8 when not given.
    delimiter: column separator of a CSV file: one character, or tab; detected when not given.
    header: whether the first row of a CSV file names its columns; otherwise they are called column1, column2 ….
    sequence_length: number of tokens in a window of a language model, or maximum for a text of a classifier.
    window_start: tokens that start each window of a language model: ``auto`` (those that the tokenizer puts before a
        text), ``bos`` (its BOS token) or ``none``.
    eval_samples: number of samples to evaluate on, at most all; when not given, all, or for a language model the first
        windows of 65,536 tokens.
    batch_size: samples per batch in calibration and evaluation.
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
        check_minimum("--batch-size", self.batch_size, 1)
        check_minimum("--sequence-length", self.sequence_length, 2)
        check_choice("--window-start", self.window_start, WINDOW_STARTS)
        if self.delimiter is not None and len(self.separator or "") != 1:
            raise InputError(f"--delimiter must be one character, or tab, not {self.delimiter!r}")
        _check_encoding(self.encoding)
        check_minimum("--eval-samples", self.eval_samples, 1)

    @property
    def separator(self) -> str | None:
        """The delimiter as a single character."""
        return "\t" if self.delimiter in ("tab", "\\t") else self.delimiter


def _check_encoding(name: str | None) -> None:
    try:
        "".encode(name or "utf-8")
    except LookupError as error:
        raise InputError(f"--encoding: no text encoding is called {name!r}; try utf-8, cp1252 or utf-16") from error
