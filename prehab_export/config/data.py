"""Where samples come from and which of them."""

from dataclasses import dataclass

from converters.errors import InputError
from prehab_export.config.checks import AUTO, at_least, one_of

WINDOW_STARTS = ("auto", "bos", "none")


@dataclass(frozen=True)
class DataConfig:
    """Where samples come from and which of them. What is None is found.

    data: hub id, folder or file; ``sklearn-digits`` is built in.
    data_config: configuration of a hub data set, such as sst2 of glue.
    train_split: split to calibrate and train on; found when not given.
    eval_split: split to report on, such as validation+test; found when not given.
    input_column: column of images or texts; found when not given.
    pair_column: second text column of a pair task, such as the hypothesis of mnli; found when not given.
    label_column: column of labels; found when not given.
    labels_by_position: take the data's class names in the model's order, whatever they are called.
    encoding: encoding of text, csv and JSON files, such as cp1252; UTF-8 when not given.
    delimiter: what separates the columns of a csv file: one character, or tab; found when not given.
    header: whether the first row of a csv file names its columns; they are column1, column2 … where it does not.
    sequence_length: tokens in a window of a language model, or in the longest text of a classifier.
    window_start: what each window of a language model starts with: ``auto`` (what the tokenizer puts before a text),
        ``bos`` (its BOS token) or ``none``.
    eval_samples: number of samples to report on; all when not given.
    batch_size: samples per batch, in calibration and evaluation.
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
