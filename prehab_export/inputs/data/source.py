"""Opens datasets on disk or on the hub, and chooses the rows to train on and the rows to evaluate on."""

import glob
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, ReadInstruction

from converters.errors import InputError
from prehab_export.config import DataConfig
from prehab_export.inputs.data.scratch import scratch_folder
from prehab_export.inputs.data.text_files import check_text, guess_encoding, reader_options, table_options
from prehab_export.system import sha256_of, sha256_of_all, sha256_of_text

DIGITS = "sklearn-digits"
DIGITS_EVALUATION = 360

# Suffix of a single file → the reader of `datasets` for it.
FILE_READERS = {
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".txt": "text",
    ".arrow": "arrow",
}
TRAIN_NAMES = ("train", "training")
EVAL_NAMES = ("validation", "valid", "dev", "val", "test", "testing", "eval", "evaluation")
HELD_OUT_SHARE = 0.2
HELD_OUT_MAX = 5000


@dataclass(frozen=True)
class Source:
    """All splits of a dataset, and a hash of its content."""

    splits: DatasetDict
    fingerprint: str


@dataclass(frozen=True)
class Splits:
    """Rows to train on and rows to evaluate on, with the names of their splits.

    ``evaluation`` is None if the data has only one split: the evaluation samples are then cut from its samples.
    """

    train: Dataset
    train_name: str
    evaluation: Dataset | None
    evaluation_name: str


def open_source(config: DataConfig, sha256_of: Callable[[Path], str] = sha256_of) -> Source:
    """Open all splits of the data.

    Args:
        sha256_of: computes a file's hash; a function with a cache avoids reading large files again.

    Raises:
        InputError: the data is not there, the kind of file is not supported, or the hub is out of reach.
    """
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # every logged error is raised as well
    if config.data == DIGITS:
        return Source(_digits(), sha256_of_text(DIGITS))  # the same rows for everyone
    path = Path(config.data)
    try:
        if path.is_file():
            return _without_indices(Source(_from_file(path, config), _content_hash(path, [path], sha256_of)))
        if path.is_dir():
            splits = _from_folder(path, config)
            files = [file for file in path.rglob("*") if file.is_file()]
            return _without_indices(Source(splits, _content_hash(path, files, sha256_of)))
        if config.data.startswith((".", "~", "/")) or config.data.count("/") > 1 or path.suffix in FILE_READERS:
            raise InputError(f"no such file or folder: {config.data}")
        return _without_indices(_from_hub(config))
    except InputError:
        raise
    # A dataset that is a script raises RuntimeError.
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        empty = re.search(r'Instruction "(.+)" corresponds to no data', str(error))
        if empty is not None:
            raise InputError(f"the split {empty[1]} of {config.data} is empty; give it rows or remove it") from error
        where = "" if path.exists() else " (not a local file or folder, so it was looked for on the hub)"
        raise InputError(f"cannot read the data {config.data}{where}: {_reason(error, config)}") from error


def choose_splits(source: Source, config: DataConfig) -> Splits:
    """Return the splits that the configuration names, or those with common names.

    Raises:
        InputError: a split is unknown or empty, or it is unclear which one to train on.
    """
    sizes = {name: split.num_rows for name, split in source.splits.items()}
    evaluation_name = config.eval_split or _evaluation_name(list(sizes), config)
    train_name = config.train_split or _train_name(list(sizes), config)
    if config.eval_split is not None and config.train_split is None:
        used = {part.splitname for part in _instruction(config.eval_split, sizes, config)}
        if train_name in used:
            raise InputError(
                f"--eval-split {config.eval_split} takes rows of {train_name}, which would also be trained on; "
                f"name the rows to train on with --train-split, as in '{train_name}[:80%]'"
            )
    train = _select(source.splits, train_name, sizes, config)
    if evaluation_name is None:
        return Splits(train, train_name, None, f"{train_name}, held out")
    return Splits(train, train_name, _select(source.splits, evaluation_name, sizes, config), evaluation_name)


def held_out_count(samples: int) -> int:
    """Return how many samples of a dataset's only split are for evaluation: a fifth, at most 5,000, at least one."""
    return min(HELD_OUT_MAX, max(1, int(samples * HELD_OUT_SHARE)))


def _train_name(names: Sequence[str], config: DataConfig) -> str:
    split = _named(names, TRAIN_NAMES)
    if split is None and len(names) == 1:
        split = names[0]
    if split is None:
        raise InputError(
            f"{config.data} has the splits {', '.join(names)}; choose the one to train on with --train-split"
        )
    return split


def _evaluation_name(names: Sequence[str], config: DataConfig) -> str | None:
    if len(names) == 1:
        return None
    exact = _named(names, EVAL_NAMES)
    if exact is not None:
        return exact
    # GLUE's MNLI has validation_matched and validation_mismatched: the user has to choose.
    similar = [name for name in names if name.lower().startswith(EVAL_NAMES)]
    if len(similar) > 1:
        raise InputError(
            f"{config.data} has the splits {', '.join(similar)}; choose the one to evaluate on with --eval-split"
        )
    return similar[0] if similar else None


def _named(names: Sequence[str], candidates: Sequence[str]) -> str | None:
    by_lower = {name.lower(): name for name in names}
    return next((by_lower[name] for name in candidates if name in by_lower), None)


def _instruction(split: str, sizes: dict[str, int], config: DataConfig) -> list[Any]:
    try:
        return ReadInstruction.from_spec(split).to_absolute(sizes)
    except (ValueError, AssertionError) as error:
        raise InputError(
            f"{config.data} has no split {split!r}; it has {', '.join(sizes)} (also 'a+b' and 'a[:80%]')"
        ) from error


def _select(splits: DatasetDict, split: str, sizes: dict[str, int], config: DataConfig) -> Dataset:
    parts = [
        splits[part.splitname].select(range(part.from_ or 0, sizes[part.splitname] if part.to is None else part.to))
        for part in _instruction(split, sizes, config)
    ]
    rows = datasets.concatenate_datasets(parts)
    if not rows.num_rows:
        raise InputError(f"the split {split} of {config.data} is empty; name one that has rows")
    return rows


def _from_file(path: Path, config: DataConfig) -> DatasetDict:
    reader = FILE_READERS.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"{path} is not a supported kind of file; give {', '.join(FILE_READERS)} or a folder")
    if not path.stat().st_size:
        raise InputError(f"{path} is empty")
    _check_name(path)
    options = reader_options(reader, config)
    check_text([path], reader, config)
    if reader == "csv":
        options.setdefault("sep", "\t" if path.suffix.lower() == ".tsv" else ",")
        options |= table_options([path], options["sep"], config)
    splits = datasets.load_dataset(
        reader, data_files={"train": glob.escape(str(path))}, cache_dir=_scratch(), **options
    )
    return _checked(splits, config) if reader == "csv" else splits


def _from_folder(path: Path, config: DataConfig) -> DatasetDict:
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        reader_options("arrow", config)
        saved = datasets.load_from_disk(str(path))
        return saved if isinstance(saved, DatasetDict) else DatasetDict(train=saved)
    if glob.has_magic(str(path.resolve())):
        raise InputError(f"{path.resolve()} contains one of * ? [ ], which would be read as a pattern; rename it")
    _check_name(path)
    builder = datasets.load_dataset_builder(str(path), config.data_config, cache_dir=_scratch())
    options = reader_options(builder.name, config)
    files = [Path(file) for split in (builder.config.data_files or {}).values() for file in split]
    check_text(files, builder.name, config)
    if builder.name == "csv":
        options |= table_options(files, options.get("sep", builder.config.sep), config)
    splits = datasets.load_dataset(str(path), config.data_config, cache_dir=_scratch(), **options)
    return _checked(splits, config) if builder.name == "csv" else splits


def _from_hub(config: DataConfig) -> Source:
    builder = datasets.load_dataset_builder(config.data, config.data_config)
    options = reader_options(builder.name, config)
    if config.header is False:
        raise InputError("--no-header is for local files only; download the data, or name its columns on the hub")
    splits = datasets.load_dataset(config.data, config.data_config, **options)
    identity = f"{config.data}\0{config.data_config}\0{builder.hash}"
    splits = _checked(splits, config) if builder.name == "csv" else splits
    return Source(splits, sha256_of_text(identity))


def _checked(splits: DatasetDict, config: DataConfig) -> DatasetDict:
    for split in splits.values():
        # If rows have too many fields, pandas makes an index of the first ones, and the others move up.
        if _indices(split):
            raise InputError(
                f"rows of {config.data} have more fields than its first row; quote texts that hold the delimiter, or "
                "give the right one with --delimiter"
            )
    return splits


def _check_name(path: Path) -> None:
    if "::" in str(path.resolve()):
        raise InputError(f"{path.resolve()} contains ::, which would be read as a place inside an archive; rename it")


def _without_indices(source: Source) -> Source:
    """Remove the column in which pandas writes the row numbers of shuffled or filtered tables."""
    splits = DatasetDict({name: split.remove_columns(_indices(split)) for name, split in source.splits.items()})
    return Source(splits, source.fingerprint)


def _indices(split: Dataset) -> list[str]:
    return [name for name in split.column_names if name.startswith("__index_level_")]


def _scratch() -> str:
    """Return the folder for the Arrow copies that `datasets` makes of local files; the user's cache would keep them."""
    return str(scratch_folder())


def _content_hash(root: Path, files: list[Path], sha256_of: Callable[[Path], str]) -> str:
    return sha256_of_all({str(file.relative_to(root.parent)): sha256_of(file) for file in sorted(files)})


def _reason(error: Exception, config: DataConfig) -> str:
    """Return the innermost cause of an error: it says what is wrong with the file, the outer errors only that it is."""
    while error.__cause__ is not None and isinstance(error.__cause__, Exception):
        error = error.__cause__
    if isinstance(error, UnicodeDecodeError):
        likely = guess_encoding(error.object) or "cp1252"
        return (
            f"its text is not {config.encoding or 'UTF-8'} ({error.reason}, byte {error.object[error.start]:#04x}); "
            f"give its encoding, as in --encoding {likely}"
        )
    text = " ".join(str(error).split()) or type(error).__name__
    if text.startswith("Error tokenizing data"):  # raised by pandas for a table with ragged rows
        text += "; quote texts that hold the delimiter, or give the right one with --delimiter"
    return text if len(text) <= 300 else text[:300] + "…"


def _digits() -> DatasetDict:
    """Return scikit-learn's 1,797 digits of 8×8 pixels in a fixed order: 1,437 to train on, 360 to evaluate on."""
    from PIL import Image as PilImage
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    order = np.random.default_rng(0).permutation(len(pixels))
    features = Features({"image": Image(), "label": ClassLabel(names=[str(name) for name in digits.target_names])})
    parts = {"train": order[DIGITS_EVALUATION:], "test": order[:DIGITS_EVALUATION]}
    return DatasetDict(
        {
            name: Dataset.from_dict(
                {"image": [PilImage.fromarray(pixels[i]) for i in rows], "label": digits.target[rows]},
                features=features,
            )
            for name, rows in parts.items()
        }
    )
