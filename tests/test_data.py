"""Data in the shapes that people keep it in: small files made here, read back by brute force."""

import copy
import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
import yaml
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PilImage
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    ConvNextConfig,
    DistilBertConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
    ViTConfig,
    ViTImageProcessorPil,
)

from converters.errors import InputError
from prehab_export.cli.commands import cli
from prehab_export.cli.parsing import parse_request
from prehab_export.config.data import DataConfig
from prehab_export.config.options import from_dict, to_yaml
from prehab_export.config.run import RunConfig
from prehab_export.inputs.data import loading
from prehab_export.inputs.data.labels import read_labels
from prehab_export.inputs.data.loading import load_data
from prehab_export.inputs.data.source import open_source
from prehab_export.inputs.data.windows import chunked, start_tokens, token_windows
from prehab_export.inputs.evaluation import evaluate, torch_predictor
from prehab_export.inputs.models import load_config, load_model, load_processor
from prehab_export.inputs.tasks import TASKS

IMAGE, TEXT, GENERATION = TASKS["image-classification"], TASKS["text-classification"], TASKS["text-generation"]
SHARED = Path(__file__).resolve().parents[2] / "shared"
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
WORDS = ["the", "a", "film", "was", "good", "bad", "dull", "fine", "very", "not", "and", "but", "one", "two", "three"]
WORDS += ["four", "five"]
NAMES = {0: "negative", 1: "positive"}


@pytest.fixture(scope="module")
def word_tokenizer(tmp_path_factory):
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return saved_tokenizer(core, tmp_path_factory.mktemp("words"), pad_token="[PAD]", unk_token="[UNK]")


@pytest.fixture(scope="module")
def byte_tokenizer(tmp_path_factory):
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    core.train_from_iterator([story(400)], trainer)
    core.add_special_tokens(["<s>"])
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))]
    )
    return saved_tokenizer(core, tmp_path_factory.mktemp("bytes"), bos_token="<s>")


def saved_tokenizer(core, folder, **tokens):
    PreTrainedTokenizerFast(tokenizer_object=core, **tokens).save_pretrained(folder)
    BertConfig().save_pretrained(folder)
    return load_processor(str(folder), TEXT)


def story(words, seed=0):
    rng = np.random.default_rng(seed)
    gaps = rng.choice([" ", " ", " ", "\n", " \n \n ", ", ", ".\n", "  "], words)
    return "".join(str(rng.choice(WORDS)) + gap for gap in gaps)


def reviews(count, seed=0):
    rng = np.random.default_rng(seed)
    texts = [" ".join(rng.choice(WORDS, rng.integers(2, 9))) for _ in range(count)]
    return texts, rng.integers(0, 2, count).tolist()


def bert_config(names=NAMES, **options):
    return BertConfig(**SMALL, vocab_size=40, max_position_embeddings=16, id2label=dict(names), **options)


def write_csv(path, columns, separator=","):
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter=separator)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    return path


def load(data, task, processor, model_config, seed=0, **options):
    return load_data(DataConfig(data=str(data), **options), task, processor, model_config, seed=seed)


def labels_of(samples):
    return torch.cat([batch["labels"] for batch in samples.batches(7)]).tolist()


def first_batch(samples, size=1000):
    return next(iter(samples.batches(size)))


# ----------------------------------------------------------------- kinds of files


def test_single_files_of_every_kind_hold_the_same_samples(tmp_path, word_tokenizer):
    texts, labels = reviews(30)
    columns = {"text": texts, "label": labels}
    write_csv(tmp_path / "a.csv", columns)
    write_csv(tmp_path / "a.tsv", columns, "\t")
    pandas.DataFrame(columns).to_parquet(tmp_path / "a.parquet")
    rows = [{"text": text, "label": label} for text, label in zip(texts, labels, strict=True)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    batches = []
    for name in ("a.csv", "a.tsv", "a.parquet", "a.jsonl", "a.json"):
        data = load(tmp_path / name, TEXT, word_tokenizer, bert_config())
        assert (len(data.train), len(data.evaluation)) == (24, 6)
        batches.append(first_batch(data.train))
    for batch in batches[1:]:
        assert batch.keys() == batches[0].keys()
        assert all(torch.equal(batch[name], batches[0][name]) for name in batch)


def test_a_csv_with_odd_names_needs_only_what_cannot_be_told(tmp_path, word_tokenizer):
    texts, labels = reviews(20)
    verdicts = [NAMES[label].upper() for label in labels]
    path = write_csv(tmp_path / "odd.csv", {"Unnamed: 0": range(20), "What they wrote": texts, "Verdict (±)": verdicts})
    with pytest.raises(InputError, match=r"'Verdict \(±\)'.*--label-column"):
        load(path, TEXT, word_tokenizer, bert_config())
    for options in ({"label_column": "Verdict (±)"}, {"input_column": "What they wrote"}):
        data = load(path, TEXT, word_tokenizer, bert_config(), **options)
        assert data.description["columns"] == {"input": "What they wrote", "label": "Verdict (±)"}
        assert sorted(labels_of(data.train) + labels_of(data.evaluation)) == sorted(labels)


def test_words_that_look_like_missing_values_stay_words(tmp_path, word_tokenizer):
    path = write_csv(tmp_path / "a.csv", {"text": ["null", "NA", "None", "good"], "label": [0, 1, 0, 1]})
    data = load(path, TEXT, word_tokenizer, bert_config())
    assert len(data.train) + len(data.evaluation) == 4


def test_splits_are_found_by_file_name(tmp_path, word_tokenizer):
    sizes = {"train": 12, "dev": 5, "test": 4}
    for seed, (name, size) in enumerate(sizes.items()):
        texts, labels = reviews(size, seed)
        write_csv(tmp_path / f"{name}.tsv", {"sentence": texts, "label": labels}, "\t")
    data = load(tmp_path, TEXT, word_tokenizer, bert_config())
    assert (len(data.train), len(data.evaluation)) == (12, 5)
    both = load(tmp_path, TEXT, word_tokenizer, bert_config(), eval_split="validation+test")
    assert labels_of(both.evaluation) == reviews(5, 1)[1] + reviews(4, 2)[1]
    part = load(tmp_path, TEXT, word_tokenizer, bert_config(), train_split="train[:50%]", eval_split="train[50%:]")
    assert labels_of(part.train) + labels_of(part.evaluation) == reviews(12, 0)[1]


def test_a_dataset_saved_to_disk_is_read(tmp_path, word_tokenizer):
    texts, labels = reviews(20)
    rows = Dataset.from_dict({"text": texts, "label": labels})
    DatasetDict(train=rows, test=rows.select(range(5))).save_to_disk(tmp_path / "saved")
    data = load(tmp_path / "saved", TEXT, word_tokenizer, bert_config())
    assert labels_of(data.evaluation) == labels[:5]


@pytest.mark.parametrize("name", ["./none", "/no/such/file.csv", "none.parquet", "a/b/c"])
def test_a_path_that_is_not_there_is_refused_at_once(name, word_tokenizer):
    with pytest.raises(InputError, match="no such file or folder"):
        load(name, TEXT, word_tokenizer, bert_config())


def test_a_hub_dataset_out_of_reach_says_where_it_looked(monkeypatch, word_tokenizer):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"nobody/has-this.*looked for on the hub"):
        load("nobody/has-this", TEXT, word_tokenizer, bert_config())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.docx", b"x", "not a supported kind of file"),
        ("a.csv", b"", "is empty"),
        ("a.parquet", b"not parquet at all", "cannot read the data"),
        ("a.jsonl", b'{"text": ', "cannot read the data"),
        ("a.csv", b"text,label\n", "the split train of .* is empty"),
    ],
)
def test_files_that_cannot_be_read_are_refused(tmp_path, name, content, message, word_tokenizer):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        load(tmp_path / name, TEXT, word_tokenizer, bert_config())


def test_an_empty_folder_is_refused(tmp_path, word_tokenizer):
    with pytest.raises(InputError, match="cannot read the data"):
        load(tmp_path, TEXT, word_tokenizer, bert_config())


def test_the_command_line_has_all_of_it(tmp_path):
    given = ["--encoding", "cp1252", "--delimiter", "tab", "--no-header", "--labels-by-position"]
    arguments = ["model", "-o", str(tmp_path), "--task", "text-generation", "--data", "a.csv", *given]
    given = cli.commands["run"].make_context("run", [*arguments, "--window-start", "none"]).params
    config, _ = parse_request(given, inherit=False)
    expected = {"encoding": "cp1252", "delimiter": "tab", "header": False, "labels_by_position": True}
    assert config.data == DataConfig("a.csv", window_start="none", **expected)
    assert from_dict(RunConfig, yaml.safe_load(to_yaml(config))) == config


BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.json"])
def test_a_byte_order_mark_is_no_part_of_a_table(tmp_path, word_tokenizer, name):
    rows = [{"text": "good", "label": 1}, {"text": "bad", "label": 0}] * 3
    separator = "\t" if name.endswith("tsv") else ","
    text = {
        "csv": "\n".join(["text,label", *(f"{row['text']},{row['label']}" for row in rows)]).replace(",", separator),
        "jsonl": "\n".join(map(json.dumps, rows)),
        "json": json.dumps(rows),
    }[name.removeprefix("a.").replace("tsv", "csv")]
    (tmp_path / name).write_bytes(BOM + text.encode())
    data = load(tmp_path / name, TEXT, word_tokenizer, bert_config())
    assert data.description["columns"] == {"input": "text", "label": "label"}
    assert sorted(labels_of(data.train) + labels_of(data.evaluation)) == [0] * 3 + [1] * 3


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path, byte_tokenizer):
    for split in ("train", "test"):
        (tmp_path / f"{split}.txt").write_bytes(BOM + story(100).encode())
    config = LlamaConfig(**SMALL, vocab_size=500)
    data = load(tmp_path, GENERATION, byte_tokenizer, config, sequence_length=8, window_start="none")
    expected = byte_tokenizer(story(100), add_special_tokens=False).input_ids[:8]
    for samples in (data.train, data.evaluation):
        assert first_batch(samples)["input_ids"][0].tolist() == expected


@pytest.mark.parametrize(("name", "encoding"), [("a.csv", "cp1252"), ("a.jsonl", "cp1252"), ("a.csv", "utf-16")])
def test_other_encodings_are_refused_with_advice_that_works(tmp_path, word_tokenizer, name, encoding):
    lines = ["text,label", "one café,1", "two,0"]
    if name == "a.jsonl":
        lines = [json.dumps({"text": text, "label": 1}, ensure_ascii=False) for text in ("one café", "two")]
    (tmp_path / name).write_bytes("\n".join(lines).encode(encoding))
    with pytest.raises(InputError, match=f"not UTF-8.*--encoding {encoding}"):
        load(tmp_path / name, TEXT, word_tokenizer, bert_config())
    data = load(tmp_path / name, TEXT, word_tokenizer, bert_config(), encoding=encoding)
    rows = data.train.rows.tolist() + data.evaluation.rows.tolist()
    assert sorted(rows) == [0, 1]


def test_an_encoding_that_is_none_is_refused(tmp_path, word_tokenizer):
    with pytest.raises(InputError, match="no text encoding is called 'latin-99'"):
        DataConfig("a.csv", encoding="latin-99")
    pandas.DataFrame({"text": ["one"], "label": [1]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"--encoding is for csv and json and text files.*read as parquet"):
        load(tmp_path / "a.parquet", TEXT, word_tokenizer, bert_config(), encoding="cp1252")


@pytest.mark.parametrize(("separator", "option"), [(";", ";"), ("\t", "tab"), ("|", "|")])
@pytest.mark.parametrize("whole_folder", [False, True])
def test_another_delimiter_is_refused_with_advice_that_works(tmp_path, word_tokenizer, separator, option, whole_folder):
    columns = {"text": ["one, two, three", "good", "bad, but fine"] * 4, "label": [0, 1, 0] * 4}
    for split in ("train", "test"):
        write_csv(tmp_path / f"{split}.csv", columns, separator)
    place = tmp_path if whole_folder else tmp_path / "train.csv"
    with pytest.raises(InputError, match=rf"--delimiter '?{re.escape(option)}'? or ','"):
        load(place, TEXT, word_tokenizer, bert_config())
    data = load(place, TEXT, word_tokenizer, bert_config(), delimiter=option)
    assert data.description["columns"] == {"input": "text", "label": "label"}
    with pytest.raises(InputError, match="--delimiter must be one character, or tab"):
        DataConfig("a.csv", delimiter="::")


def test_commas_under_the_name_of_another_kind_of_table_can_be_said_too(tmp_path, word_tokenizer):
    for split in ("train", "test"):
        write_csv(tmp_path / f"{split}.tsv", {"text": WORDS[:4], "label": [0, 1, 0, 1]})
    with pytest.raises(InputError, match="--delimiter ',' or tab"):
        load(tmp_path, TEXT, word_tokenizer, bert_config())
    assert len(load(tmp_path, TEXT, word_tokenizer, bert_config(), delimiter=",").train) == 4


def test_rows_with_more_fields_than_the_header_are_refused(tmp_path, word_tokenizer):
    (tmp_path / "a.csv").write_text("text,label\none, two,1\nthree, four,0\n")
    with pytest.raises(InputError, match="more fields than its first row; quote texts"):
        load(tmp_path / "a.csv", TEXT, word_tokenizer, bert_config())
    (tmp_path / "b.csv").write_text("text,label\none,1\nthree, four,0\n")
    with pytest.raises(InputError, match=r"cannot read the data.*quote texts that hold the delimiter"):
        load(tmp_path / "b.csv", TEXT, word_tokenizer, bert_config())


@pytest.mark.parametrize(
    "rows",
    [
        [("a good film", 1), ("bad", 0), ("fine", 1)],
        [("a good film", "positive"), ("bad", "negative"), ("fine", "positive")],
        [("a good film", "y"), ("bad", "n"), ("fine", "y")],
        [(1, "a good film"), (0, "bad"), (1, "fine")],
    ],
)
def test_a_csv_without_a_header_does_not_lose_its_first_row(tmp_path, word_tokenizer, rows):
    for split in ("train", "test"):
        with (tmp_path / f"{split}.csv").open("w", newline="") as file:
            csv.writer(file).writerows(rows)
    label = 0 if isinstance(rows[0][0], int) else 1
    model = bert_config({0: rows[1][label], 1: rows[0][label]})
    for place in (tmp_path, tmp_path / "train.csv"):
        with pytest.raises(InputError, match=r"train.csv seems to be data.*--no-header.*column1"):
            load(place, TEXT, word_tokenizer, model)
    named = {"label_column": f"column{label + 1}"} if isinstance(rows[0][label], str) else {}
    data = load(tmp_path, TEXT, word_tokenizer, model, header=False, **named)
    assert data.description["columns"] == {"input": f"column{2 - label}", "label": f"column{label + 1}"}
    assert labels_of(data.train) == [1, 0, 1]


def test_sentences_without_a_header_do_not_lose_the_first(tmp_path, byte_tokenizer):
    (tmp_path / "a.csv").write_text("\n".join(["one two three four five", "good, bad and dull".replace(",", "")] * 50))
    config = LlamaConfig(**SMALL, vocab_size=500)
    with pytest.raises(InputError, match="seems to be data"):
        load(tmp_path / "a.csv", GENERATION, byte_tokenizer, config, sequence_length=8)
    data = load(tmp_path / "a.csv", GENERATION, byte_tokenizer, config, sequence_length=8, header=False)
    expected = byte_tokenizer("one two three four five", add_special_tokens=False).input_ids
    assert first_batch(data.train)["input_ids"][0, 1 : 1 + len(expected)].tolist() == expected


@pytest.mark.parametrize(
    "header",
    [
        ("text", "label"),
        ("What they wrote", "Verdict"),
        ("Unnamed: 0", "0"),
        ("0", "1"),
        ("How did you like the film that you saw?", "label"),
        ("comment", "2019"),
    ],
)
def test_headers_are_taken_for_headers(tmp_path, word_tokenizer, header):
    path = write_csv(tmp_path / "a.csv", {header[0]: ["good", "bad"] * 3, header[1]: [1, 0] * 3})
    data = load(path, TEXT, word_tokenizer, bert_config(), input_column=header[0], label_column=header[1])
    assert len(data.train) + len(data.evaluation) == 6


def test_a_header_that_looks_like_data_can_be_said_to_be_one(tmp_path, word_tokenizer):
    path = write_csv(tmp_path / "a.csv", {"opinion": ["good", "bad"] * 3, "2019": [1, 0] * 3})
    with pytest.raises(InputError, match=r"'2019' heads a column of numbers.*or --header"):
        load(path, TEXT, word_tokenizer, bert_config())
    data = load(path, TEXT, word_tokenizer, bert_config(), header=True)
    assert data.description["columns"] == {"input": "opinion", "label": "2019"}


READS = """
from prehab_export.config import DataConfig
from prehab_export.inputs.data.labels import read_labels
from prehab_export.inputs.data.source import open_source
open_source(DataConfig({path!r}))
"""
OWNER = """
import time
from prehab_export.inputs.data.scratch import scratch_folder
print(scratch_folder(), flush=True)
time.sleep({seconds})
"""


def test_what_a_killed_process_leaves_goes_with_the_next_one_and_what_a_living_one_has_stays(tmp_path):
    path = write_csv(tmp_path / "a.csv", {"text": WORDS[:4], "label": [0, 1] * 2})
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    stranger = temporary / "prehab-export-data-notes"  # no lock in it: not known to be anybody's copy
    stranger.mkdir()

    def start(code):
        environment = {**os.environ, "TMPDIR": str(temporary)}
        return subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)

    killed = start(READS.format(path=str(path)) + OWNER.format(seconds=600))
    living = start(OWNER.format(seconds=600))
    try:
        folders = {process: Path(process.stdout.readline().strip()) for process in (killed, living)}
        assert all(folder.parent == temporary for folder in folders.values())
        assert any(folders[killed].rglob("*.arrow"))
        killed.kill()
        killed.wait()
        assert folders[killed].is_dir()
        next_one = start(OWNER.format(seconds=0))
        own = Path(next_one.stdout.read().strip())
        assert next_one.wait() == 0
        assert own not in folders.values()
        assert sorted(temporary.iterdir()) == sorted([folders[living], stranger])
    finally:
        for process in (killed, living):
            process.kill()
            process.wait()
            process.stdout.close()


# ----------------------------------------------------------------- splits


@pytest.fixture
def three_splits(tmp_path):
    for name, size in {"train": 12, "validation": 5, "test": 4}.items():
        texts, labels = reviews(size)
        write_csv(tmp_path / f"{name}.csv", {"text": texts, "label": labels})
    return tmp_path


def test_an_unknown_split_lists_those_there_are(three_splits, word_tokenizer):
    with pytest.raises(InputError, match="no split 'holdout'; it has train, validation, test"):
        load(three_splits, TEXT, word_tokenizer, bert_config(), eval_split="holdout")


def test_an_empty_slice_is_refused(three_splits, word_tokenizer):
    with pytest.raises(InputError, match="is empty"):
        load(three_splits, TEXT, word_tokenizer, bert_config(), eval_split="test[:0]")


def test_evaluation_rows_out_of_the_training_split_must_be_taken_out_of_training(three_splits, word_tokenizer):
    with pytest.raises(InputError, match="--train-split"):
        load(three_splits, TEXT, word_tokenizer, bert_config(), eval_split="train[80%:]")


def test_splits_without_one_to_train_on_are_refused(tmp_path, word_tokenizer):
    texts, labels = reviews(5)
    for name in ("validation", "test"):
        write_csv(tmp_path / f"{name}.csv", {"text": texts, "label": labels})
    with pytest.raises(InputError, match="--train-split"):
        load(tmp_path, TEXT, word_tokenizer, bert_config())


def test_a_lone_split_is_cut_without_overlap_and_by_the_seed(tmp_path, word_tokenizer):
    path = write_csv(tmp_path / "a.csv", {"text": [f"one {'two ' * i}" for i in range(10)], "label": [0, 1] * 5})
    first, again = (load(path, TEXT, word_tokenizer, bert_config(), seed=3) for _ in range(2))
    other = load(path, TEXT, word_tokenizer, bert_config(), seed=4)
    assert sorted([*first.train.rows, *first.evaluation.rows]) == list(range(10))
    assert first.train.rows.tolist() == again.train.rows.tolist()
    assert first.train.rows.tolist() != other.train.rows.tolist()
    assert len(first.evaluation) == 2


def test_secret_labels_are_refused(tmp_path, word_tokenizer):
    texts, labels = reviews(8)
    write_csv(tmp_path / "train.csv", {"sentence": texts, "label": labels})
    write_csv(tmp_path / "test.csv", {"sentence": texts, "label": [-1] * 8})
    with pytest.raises(InputError, match="every label of test is -1"):
        load(tmp_path, TEXT, word_tokenizer, bert_config())


# ----------------------------------------------------------------- columns and labels


@pytest.mark.parametrize("option", ["input_column", "label_column", "pair_column"])
def test_a_column_that_is_not_there_lists_those_that_are(three_splits, word_tokenizer, option):
    flag = "--" + option.replace("_", "-")
    with pytest.raises(InputError, match=f"{flag}.*no column 'nope'; it has 'text', 'label'"):
        load(three_splits, TEXT, word_tokenizer, bert_config(), **{option: "nope"})


def test_several_columns_of_text_ask_for_a_choice(tmp_path, word_tokenizer):
    texts, labels = reviews(10)
    path = write_csv(tmp_path / "a.csv", {"headline": texts, "opinion": texts, "label": labels})
    with pytest.raises(InputError, match="'headline', 'opinion': choose with --input-column"):
        load(path, TEXT, word_tokenizer, bert_config())


def test_sentence_pairs_are_found_and_both_encoded(tmp_path, word_tokenizer):
    columns = {"idx": [0, 1], "premise": ["one two", "good"], "hypothesis": ["three", "bad film"], "label": [0, 1]}
    write_csv(tmp_path / "train.csv", columns)
    write_csv(tmp_path / "test.csv", columns)
    data = load(tmp_path, TEXT, word_tokenizer, bert_config())
    assert data.description["columns"] == {"input": "premise", "pair": "hypothesis", "label": "label"}
    batch = first_batch(data.train)
    expected = word_tokenizer(["one two", "good"], ["three", "bad film"], padding=True, return_tensors="pt")
    assert all(torch.equal(batch[name], expected[name]) for name in expected)
    named = load(tmp_path, TEXT, word_tokenizer, bert_config(), input_column="hypothesis", pair_column="premise")
    assert named.description["columns"] == {"input": "hypothesis", "pair": "premise", "label": "label"}


@pytest.mark.parametrize("kind", ["names", "class labels"])
def test_labels_follow_the_models_names_whatever_their_order(tmp_path, word_tokenizer, kind):
    names = ["Positive", "NEGATIVE"]  # the model has them the other way round
    rows = [names[i] for i in (0, 1, 1, 0)]
    table = {"text": ["good", "bad", "dull", "fine"], "label": rows}
    features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
    dataset = Dataset.from_dict(table, features=features if kind == "class labels" else None)
    for split in ("train", "test"):
        dataset.to_parquet(tmp_path / f"{split}.parquet")
    assert labels_of(load(tmp_path, TEXT, word_tokenizer, bert_config()).train) == [1, 0, 0, 1]


def labelled(folder, names, labels, model_names, tokenizer, **options):
    """Labels that rows of these class names get of a model of those."""
    features = Features({"text": Value("string"), "label": ClassLabel(names=list(names))})
    rows = Dataset.from_dict({"text": ["one"] * len(labels), "label": labels}, features=features)
    DatasetDict(train=rows, test=rows).save_to_disk(folder / "saved")
    model_names = dict(enumerate(model_names))
    data = load(folder / "saved", TEXT, tokenizer, bert_config(model_names), **options)
    return labels_of(data.train), data


@pytest.mark.parametrize(
    ("names", "model_names", "expected"),
    [
        (["b", "a"], ["a", "b", "c"], [1, 0]),  # some of the model's, in another order
        (["Golden_Retriever", "TABBY-cat"], ["tabby cat", "golden retriever"], [1, 0]),
        (["Cafe\u0301", "th\u00e9"], ["thé", "café"], [1, 0]),  # accents as another system writes them
        (["Tinca tinca", "goldfish"], ["goldfish, Carassius auratus", "tench, Tinca tinca"], [1, 0]),
        (["tench, a fish", "goldfish"], ["goldfish, Carassius auratus", "tench, Tinca tinca"], [1, 0]),
        (["maillot", "crane"], ["maillot, tank suit", "crane", "maillot"], [2, 1]),  # the whole name comes first
        (["other", "crane", "x"], ["x", "crane", "crane"], [None, 1]),  # of two, the one in its place
        (["1", "0"], ["cat", "dog"], [1, 0]),  # numbers are the model's classes
        (["10", "2"], [str(i) for i in range(11)], [10, 2]),
        (["-1", "1"], ["1", "0", "-1"], [2, 0]),
        (["LABEL_1", "label_0"], ["LABEL_0", "LABEL_1"], [1, 0]),
    ],
)
def test_class_names_are_found_among_the_models(tmp_path, word_tokenizer, names, model_names, expected):
    rows = [at for at in (0, 1) if expected[at] is not None]
    found, data = labelled(tmp_path, names, rows, model_names, word_tokenizer)
    assert found == [expected[at] for at in rows]
    assert data.description["warnings"] == []


@pytest.mark.parametrize(
    ("names", "model_names"),
    [
        (["cat", "goldfish"], ["cat", "tench"]),
        (["bad", "good"], ["negative", "positive"]),
        (["cat", "dog", "zebra"], ["cat", "dog", "horse"]),
        (["zebra", "ant"], ["cat", "dog", "horse"]),
        (["bad", "good"], ["LABEL_0", "LABEL_1", "LABEL_2"]),
        (["bad", "fair", "good"], ["LABEL_0", "LABEL_1"]),
    ],
)
def test_classes_that_the_model_does_not_know_are_never_guessed(tmp_path, word_tokenizer, names, model_names):
    with pytest.raises(InputError) as refusal:
        labelled(tmp_path, names, range(len(names)), model_names, word_tokenizer)
    message = str(refusal.value)
    assert all(f"'{name}'" in message for name in set(names) - set(model_names))
    assert "LABEL_0" in model_names or all(f"'{name}'" in message for name in model_names)
    assert "number" in message


def test_a_name_that_two_classes_share_is_refused(tmp_path, word_tokenizer):
    with pytest.raises(InputError, match=r"'crane' of the data may be any of the model's classes 1 \('crane'\), 2"):
        labelled(tmp_path, ["crane", "dog"], [0, 1], ["dog", "crane", "crane"], word_tokenizer)


def test_classes_that_no_row_has_need_not_be_known(tmp_path, word_tokenizer):
    found, _ = labelled(tmp_path, ["unsure", "positive", "negative"], [1, 2], NAMES.values(), word_tokenizer)
    assert found == [1, 0]


@pytest.mark.parametrize("model_names", [["LABEL_0", "LABEL_1"], ["0", "1"]])
def test_classes_of_a_model_without_names_go_by_position_and_that_is_said(tmp_path, word_tokenizer, model_names):
    found, data = labelled(tmp_path, ["bad", "good"], [1, 0, 1], model_names, word_tokenizer)
    assert found == [1, 0, 1]
    (warning,) = data.description["warnings"]
    assert "by position" in warning
    assert "'bad' is 0" in warning


def test_positions_can_be_asked_for(tmp_path, word_tokenizer):
    found, data = labelled(
        tmp_path, ["bad", "good"], [1, 0, 1], NAMES.values(), word_tokenizer, labels_by_position=True
    )
    assert found == [1, 0, 1]
    assert "'bad' is 0 ('negative')" in data.description["warnings"][0]
    with pytest.raises(InputError, match="has 3 classes, the model 2"):
        labelled(tmp_path / "more", ["a", "b", "c"], [0, 1], NAMES.values(), word_tokenizer, labels_by_position=True)
    path = write_csv(tmp_path / "a.csv", {"text": WORDS[:4], "label": ["bad", "good"] * 2})
    with pytest.raises(InputError, match="labels without an order"):
        load(path, TEXT, word_tokenizer, bert_config(), labels_by_position=True)


def test_a_long_list_in_the_models_order_may_name_a_few_classes_otherwise(tmp_path, word_tokenizer):
    model_names = [f"kind {i}" for i in range(100)]
    names = [*model_names[:50], "something else", *model_names[51:]]
    found, data = labelled(tmp_path, names, [50, 7], model_names, word_tokenizer)
    assert found == [50, 7]
    assert "'something else' is 50 ('kind 50')" in data.description["warnings"][0]


@pytest.mark.parametrize(
    ("labels", "model_names", "expected"),
    [
        (["tench", "goldfish"], ["goldfish, Carassius auratus", "tench, Tinca tinca"], [1, 0]),
        (["1.0", "0"], ["no", "yes"], [1, 0]),
        ([1.0, 0.0], ["no", "yes"], [1, 0]),
        ([-1, 1], ["-1", "0", "1"], [0, 2]),
        ([5, 1], ["1", "2", "3", "4", "5"], [4, 0]),
        ([0, 4], ["1", "2", "3", "4", "5"], [0, 4]),
        ([True, False], ["true", "false"], [0, 1]),
        ([True, False], ["no", "yes"], [1, 0]),
    ],
)
def test_labels_without_a_list_of_classes(tmp_path, word_tokenizer, labels, model_names, expected):
    table = Dataset.from_dict({"text": ["one", "two"], "label": labels})
    for split in ("train", "test"):
        table.to_parquet(tmp_path / f"{split}.parquet")
    config = bert_config(dict(enumerate(model_names)))
    assert labels_of(load(tmp_path, TEXT, word_tokenizer, config).train) == expected


def test_numbers_that_may_be_names_or_classes_are_refused(tmp_path, word_tokenizer):
    path = write_csv(tmp_path / "a.csv", {"text": WORDS[:4], "label": [1, 2, 3, 4]})
    config = bert_config({i: str(i + 1) for i in range(5)})
    with pytest.raises(InputError, match=r"may be the model's classes \(0 to 4\) or their names"):
        load(path, TEXT, word_tokenizer, config)


def test_class_names_of_which_some_are_unknown_are_refused(tmp_path, word_tokenizer):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["mixed", "negative", "positive"])})
    rows = Dataset.from_dict({"text": ["one", "two", "three"], "label": [1, 0, 1]}, features=features)
    DatasetDict(train=rows, test=rows).save_to_disk(tmp_path / "saved")
    with pytest.raises(InputError, match=r"'mixed'.*unknown to the model"):
        load(tmp_path / "saved", TEXT, word_tokenizer, bert_config())


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, 2, 1], "row 2 of train has label 2 .*2 classes"),
        ([0, 1, 1, -1], "row 3 of train has label -1"),
        (["positive", "great", "positive", "negative"], "row 1 of train has label 'great'.*'negative', 'positive'"),
        (["positive", "negative", "", "negative"], "row 2 of train has no label"),
    ],
)
def test_a_label_outside_the_models_classes_names_its_row(tmp_path, word_tokenizer, labels, message):
    write_csv(tmp_path / "train.csv", {"text": WORDS[:4], "label": labels})
    write_csv(tmp_path / "test.csv", {"text": WORDS[:4], "label": labels})
    with pytest.raises(InputError, match=message):
        load(tmp_path, TEXT, word_tokenizer, bert_config())


def test_scores_are_not_labels(tmp_path, word_tokenizer):
    path = write_csv(tmp_path / "a.csv", {"text": WORDS[:4], "score": [0.5, 1.5, 2.5, 3.5]})
    with pytest.raises(InputError, match=r"--label-column.*float64.*not one class per row"):
        load(path, TEXT, word_tokenizer, bert_config(), label_column="score")


def test_a_column_of_scores_under_a_labels_name_is_refused_for_what_it_is(tmp_path, word_tokenizer):
    path = write_csv(tmp_path / "a.csv", {"text": WORDS[:4], "label": [0.5, 1, 0, 1]})
    with pytest.raises(InputError, match=r"'label' of .* holds numbers with fractions, not one class per row"):
        load(path, TEXT, word_tokenizer, bert_config())


def test_whole_labels_stay_whole_beside_a_gap(tmp_path, word_tokenizer):
    path = write_csv(tmp_path / "a.csv", {"text": WORDS[:4], "label": ["1.0", "0.0", "1", "0"]})
    data = load(path, TEXT, word_tokenizer, bert_config(), label_column="label")
    assert sorted(labels_of(data.train) + labels_of(data.evaluation)) == [0, 0, 1, 1]
    pandas.DataFrame({"text": WORDS[:4], "label": [1, 0, np.nan, 1]}).to_parquet(tmp_path / "b.parquet")
    with pytest.raises(InputError, match="row 2 of train has no label in column 'label'"):
        load(tmp_path / "b.parquet", TEXT, word_tokenizer, bert_config())


def test_rows_without_text_are_named(tmp_path, word_tokenizer):
    (tmp_path / "a.jsonl").write_text('{"text": "good", "label": 0}\n{"text": null, "label": 1}\n')
    with pytest.raises(InputError, match="row 1 of train has no text"):
        load(tmp_path / "a.jsonl", TEXT, word_tokenizer, bert_config())


# ----------------------------------------------------------------- batches of text


def test_text_batches_are_padded_to_the_longest_and_keep_their_order(tmp_path, word_tokenizer):
    texts, labels = reviews(20)
    for split in ("train", "test"):
        write_csv(tmp_path / f"{split}.csv", {"text": texts, "label": labels})
    data = load(tmp_path, TEXT, word_tokenizer, bert_config())
    for start, batch in zip(range(0, 20, 6), data.train.batches(6), strict=True):
        expected = word_tokenizer(texts[start : start + 6], padding=True, return_tensors="pt")
        assert all(torch.equal(batch[name], expected[name]) for name in expected)
        assert batch["labels"].tolist() == labels[start : start + 6]
    picked = next(iter(data.train.batches(3, indices=[7, 2, 11])))
    assert picked["labels"].tolist() == [labels[i] for i in (7, 2, 11)]


def test_texts_are_cut_at_the_models_reach_or_at_the_given_length(tmp_path, word_tokenizer):
    long = [" ".join(WORDS * 3)] * 5
    path = write_csv(tmp_path / "a.csv", {"text": long, "label": [0] * 5})
    roberta = RobertaConfig(**SMALL, vocab_size=40, max_position_embeddings=16, pad_token_id=1, num_labels=2)
    for config, length, expected in ((bert_config(), None, 16), (bert_config(), 9, 9), (roberta, None, 14)):
        data = load(path, TEXT, word_tokenizer, config, sequence_length=length)
        assert first_batch(data.train)["input_ids"].shape[1] == expected
    with pytest.raises(InputError, match="more than the model's 16 positions"):
        load(path, TEXT, word_tokenizer, bert_config(), sequence_length=17)


def test_the_tokenizers_limit_is_not_called_the_models(tmp_path, word_tokenizer):
    path = write_csv(tmp_path / "a.csv", {"text": [" ".join(WORDS * 3)] * 5, "label": [0] * 5})
    short = copy.deepcopy(word_tokenizer)
    short.model_max_length = 8
    assert first_batch(load(path, TEXT, short, bert_config()).train)["input_ids"].shape[1] == 8
    with pytest.raises(InputError, match=r"12 is more than the 8 tokens that its tokenizer allows .model_max_length"):
        load(path, TEXT, short, bert_config(), sequence_length=12)
    with pytest.raises(InputError, match="17 is more than the model's 16 positions"):
        load(path, TEXT, short, bert_config(), sequence_length=17)


def test_inputs_that_a_model_does_not_take_are_left_out(tmp_path, word_tokenizer):
    texts, labels = reviews(10)
    path = write_csv(tmp_path / "a.csv", {"text": texts, "label": labels})
    distilbert = DistilBertConfig(vocab_size=40, dim=32, n_layers=1, n_heads=2, hidden_dim=64, num_labels=2)
    batch = first_batch(load(path, TEXT, word_tokenizer, distilbert).train)
    assert set(batch) == {"input_ids", "attention_mask", "labels"}


def test_a_decoder_without_a_padding_token_pads_with_its_end_of_text(tmp_path, byte_tokenizer):
    path = write_csv(tmp_path / "a.csv", {"text": ["one", "one two three four", "one two"] * 3, "label": [0, 1, 0] * 3})
    config = LlamaConfig(**SMALL, vocab_size=500, num_labels=2, eos_token_id=9)
    assert byte_tokenizer.pad_token is None
    batch = first_batch(load(path, TEXT, byte_tokenizer, config).train)
    hidden = batch["attention_mask"] == 0
    assert hidden.any()
    assert (batch["input_ids"][hidden] == 9).all()


def test_a_tokenizer_of_another_model_is_refused(tmp_path, byte_tokenizer):
    texts, labels = reviews(10)
    path = write_csv(tmp_path / "a.csv", {"text": texts, "label": labels})
    with pytest.raises(InputError, match="do not belong together"):
        first_batch(load(path, TEXT, byte_tokenizer, small_vocabulary(20)).train)
    (tmp_path / "a.txt").write_text(story(300))
    with pytest.raises(InputError, match="do not belong together"):
        load(tmp_path / "a.txt", GENERATION, byte_tokenizer, LlamaConfig(**SMALL, vocab_size=20), sequence_length=8)


def small_vocabulary(size):
    return BertConfig(**SMALL, vocab_size=size, max_position_embeddings=16, num_labels=2)


# ----------------------------------------------------------------- samples


def test_subsets_and_splits_are_fixed_by_the_seed_and_miss_nothing(three_splits, word_tokenizer):
    train = load(three_splits, TEXT, word_tokenizer, bert_config()).train
    held_out, rest = train.split(5, seed=1)
    assert sorted([*held_out.rows, *rest.rows]) == train.rows.tolist()
    assert (len(held_out), len(rest)) == (5, 7)
    assert held_out.rows.tolist() == train.subset(5, seed=1).rows.tolist()
    assert train.subset(5, seed=1).rows.tolist() != train.subset(5, seed=2).rows.tolist()
    assert len(train.subset(1000, seed=0)) == 12
    everything = first_batch(train)
    assert torch.equal(first_batch(rest)["labels"], everything["labels"][rest.rows])


def test_fewer_evaluation_samples_are_a_fixed_draw(three_splits, word_tokenizer):
    whole = load(three_splits, TEXT, word_tokenizer, bert_config())
    part = load(three_splits, TEXT, word_tokenizer, bert_config(), eval_samples=3)
    assert len(part.evaluation) == part.description["eval_samples"] == 3
    assert set(part.evaluation.rows) < set(whole.evaluation.rows)
    assert part.fingerprint == whole.fingerprint


def test_the_fingerprint_follows_rows_splits_and_columns(three_splits, word_tokenizer):
    def fingerprint(**options):
        return load(three_splits, TEXT, word_tokenizer, bert_config(), **options).fingerprint

    first = fingerprint()
    assert fingerprint() == fingerprint(train_split="train", label_column="label", batch_size=3) == first
    assert fingerprint(train_split="train[:6]") != first
    assert fingerprint(sequence_length=8) != first
    texts, labels = reviews(12)
    write_csv(three_splits / "train.csv", {"text": texts, "label": [1 - labels[0], *labels[1:]]})
    assert fingerprint() != first


# ----------------------------------------------------------------- language models


def test_windows_are_the_whole_text_tokenised_once(tmp_path, byte_tokenizer):
    text = story(600)
    (tmp_path / "train.txt").write_text(text)
    (tmp_path / "test.txt").write_text(story(200, seed=1))
    data = load(tmp_path, GENERATION, byte_tokenizer, LlamaConfig(**SMALL, vocab_size=500), sequence_length=16)
    ids = byte_tokenizer(text, add_special_tokens=False).input_ids
    whole = len(ids) // 15
    batch = first_batch(data.train)
    assert set(batch) == {"input_ids"}
    assert (batch["input_ids"][:, 0] == byte_tokenizer.bos_token_id).all()
    assert batch["input_ids"][:, 1:].tolist() == np.reshape(ids[: whole * 15], (whole, 15)).tolist()


@pytest.mark.parametrize("size", [40, 300, 10**6])
def test_a_text_in_chunks_gives_the_tokens_of_the_whole(byte_tokenizer, size):
    text = story(800)
    chunks = list(chunked(text.splitlines(keepends=True), size))
    assert "".join(chunks) == text
    assert (len(chunks) > 1) == (size < len(text))
    ids = [token for chunk in chunks for token in byte_tokenizer(chunk, add_special_tokens=False).input_ids]
    assert ids == byte_tokenizer(text, add_special_tokens=False).input_ids


def test_text_without_a_place_to_cut_stays_whole():
    rows = ["..." * 50] * 40
    assert list(chunked(rows, size=100)) == ["\n".join(rows)]


def test_rows_are_joined_by_one_line_break(tmp_path, byte_tokenizer):
    rows = [{"content": "one two"}, {"content": "three\n"}, {"content": ""}, {"content": "four five"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows * 10)))
    expected = byte_tokenizer("one two\nthree\n\nfour five\n" * 10, add_special_tokens=False).input_ids
    windows = token_windows([row["content"] for row in rows * 10], byte_tokenizer, 4)
    assert windows.ravel().tolist() == expected[: windows.size]
    data = load(
        tmp_path / "a.jsonl",
        GENERATION,
        byte_tokenizer,
        LlamaConfig(**SMALL, vocab_size=500),
        sequence_length=4,
        window_start="none",
    )
    both = torch.cat([first_batch(data.train)["input_ids"], first_batch(data.evaluation)["input_ids"]])
    assert both.tolist() == windows.tolist()


TEMPLATES = {
    "nothing": None,
    "bos": "<s> $A",
    "bos and eos": "<s> $A </s>",
    "eos": "$A </s>",
    "two": "[gMASK] <s> $A",
}


def story_tokenizer(folder, template, vocabulary=tuple(WORDS), **options):
    """Words and white space; named special tokens, of which the template says what is put around a text."""
    special = ["<unk>", "<s>", "</s>", "[gMASK]"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*special, *vocabulary])}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.add_special_tokens(special)
    if template is not None:
        core.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[(token, i) for i, token in enumerate(special)]
        )
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"} | options
    names = {key: value for key, value in names.items() if value is not None}
    PreTrainedTokenizerFast(tokenizer_object=core, **names).save_pretrained(folder)
    LlamaConfig(**SMALL, vocab_size=500).save_pretrained(folder)
    return load_processor(str(folder), GENERATION)


def windows_of(folder, tokenizer, text, length=8, **options):
    (folder / "train.txt").write_text(text)
    (folder / "test.txt").write_text(text)
    config = LlamaConfig(**SMALL, vocab_size=500)
    data = load(folder, GENERATION, tokenizer, config, sequence_length=length, **options)
    return data, first_batch(data.train)


@pytest.mark.parametrize(
    ("template", "start"), [("nothing", []), ("bos", [1]), ("bos and eos", [1]), ("eos", []), ("two", [3, 1])]
)
def test_windows_start_as_the_tokenizer_starts_a_text(tmp_path, template, start):
    tokenizer = story_tokenizer(tmp_path / "tokenizer", TEMPLATES[template])
    text = story(100)
    data, batch = windows_of(tmp_path, tokenizer, text)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    step = 8 - len(start)
    expected = [start + ids[at : at + step] for at in range(0, len(ids) - step + 1, step)]
    assert batch["input_ids"].tolist() == expected
    assert GENERATION.unit_labels(batch).tolist() == [
        token for window in expected for token in window[max(1, len(start)) :]
    ]
    assert data.description["window_start"] == tokenizer.convert_ids_to_tokens(start)


@pytest.mark.parametrize(("template", "adds"), [("nothing", True), ("bos", False), ("nothing", False), ("eos", True)])
def test_the_tokenizers_own_option_decides_whether_windows_have_a_bos(tmp_path, template, adds):
    tokenizer = story_tokenizer(tmp_path / "tokenizer", TEMPLATES[template], add_bos_token=adds)
    _, batch = windows_of(tmp_path, tokenizer, story(100))
    assert (batch["input_ids"] == 1).sum(1).tolist() == [int(adds)] * len(batch["input_ids"])
    assert (batch["input_ids"][:, 0] == 1).all() == adds
    assert not (batch["input_ids"] == 2).any()


def test_the_start_of_a_window_can_be_asked_for(tmp_path):
    plain = story_tokenizer(tmp_path / "plain", None)
    starts = story_tokenizer(tmp_path / "starts", TEMPLATES["bos"])
    text = story(100)
    with_bos, batch = windows_of(tmp_path, plain, text, window_start="bos")
    assert torch.equal(batch["input_ids"], windows_of(tmp_path, starts, text)[1]["input_ids"])
    without, bare = windows_of(tmp_path, starts, text, window_start="none")
    assert torch.equal(bare["input_ids"], windows_of(tmp_path, plain, text)[1]["input_ids"])
    assert (with_bos.description["window_start"], without.description["window_start"]) == (["<s>"], [])
    assert with_bos.fingerprint != without.fingerprint


def test_a_bos_that_is_not_there_is_refused(tmp_path, word_tokenizer):
    tokenizer = story_tokenizer(tmp_path / "tokenizer", None, bos_token=None)
    with pytest.raises(InputError, match="has no BOS token; use --window-start none"):
        windows_of(tmp_path, tokenizer, story(100), window_start="bos")
    with pytest.raises(InputError, match="--window-start must be one of auto, bos, none"):
        DataConfig("a.txt", window_start="always")
    path = write_csv(tmp_path / "a.csv", {"text": reviews(9)[0], "label": reviews(9)[1]})
    with pytest.raises(InputError, match="text-classification has none"):
        load(path, TEXT, word_tokenizer, bert_config(), window_start="bos")
    with pytest.raises(InputError, match="leaves nothing to predict"):
        windows_of(tmp_path, story_tokenizer(tmp_path / "two", TEMPLATES["two"]), story(100), length=2)


def test_text_that_brings_its_own_bos_does_not_get_it_twice(tmp_path):
    tokenizer = story_tokenizer(tmp_path / "tokenizer", TEMPLATES["bos"])
    _, batch = windows_of(tmp_path, tokenizer, "<s> " + "one two three " * 20, length=4)
    one, two, three = tokenizer("one two three", add_special_tokens=False).input_ids
    assert batch["input_ids"].tolist() == [[1, one, two, three]] * 20


def test_a_vocabulary_without_an_a_has_its_start_found(tmp_path):
    core = Tokenizer(models.BPE({"<s>": 0, "G": 1, "C": 2}, []))  # letters that are not there leave no token
    core.add_special_tokens(["<s>"])
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = saved_tokenizer(core, tmp_path, bos_token="<s>")
    assert tokenizer("a").input_ids == [0]
    assert start_tokens(tokenizer) == (0,)


TURNS = "{% for turn in messages %}[{{ turn.role }}] {{ turn.content }} {{ eos_token }}{% endfor %}"
TALK = [("user", "one two"), ("assistant", "three"), ("user", "four"), ("assistant", "five one")]


def chat_folder(folder, shape):
    """The same conversation many times, in one of the shapes that such files have."""
    names = {"user": "human", "assistant": "gpt"}
    turns = [{"role": role, "content": text} for role, text in TALK]
    if shape == "sharegpt":
        turns = [{"from": names[turn["role"]], "value": turn["content"]} for turn in turns]
    if shape == "further keys":
        turns = [{**turns[0], "weight": 1}, *turns[1:]]
    column = "conversations" if shape == "sharegpt" else "messages"
    rows = [{"prompt_id": str(i), "prompt": "one two", column: turns} for i in range(20)]
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))


@pytest.mark.parametrize("shape", ["messages", "sharegpt", "further keys"])
@pytest.mark.parametrize("starts_itself", [False, True])
def test_conversations_are_read_through_the_chat_template(tmp_path, shape, starts_itself):
    template = ("{{ bos_token }}" if starts_itself else "") + TURNS
    words = (*WORDS, "[", "]", "user", "assistant")
    tokenizer = story_tokenizer(tmp_path / "tokenizer", TEMPLATES["bos"], words, chat_template=template)
    chat_folder(tmp_path, shape)
    data = load(tmp_path, GENERATION, tokenizer, LlamaConfig(**SMALL, vocab_size=500), sequence_length=8)
    text = "".join(f"[{role}] {words} </s>" for role, words in TALK) * 20
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.unk_token_id not in ids
    windows = first_batch(data.train)["input_ids"].tolist()
    assert windows == [[1, *ids[at : at + 7]] for at in range(0, len(ids) - 6, 7)]
    assert data.description["columns"] == {"input": "conversations" if shape == "sharegpt" else "messages"}


def test_a_bos_that_a_tokenizer_does_not_put_by_itself_stays_in_a_conversation(tmp_path):
    """Some mark every turn with what they call their BOS."""
    template = "{% for turn in messages %}{{ bos_token }}{{ turn.role }} {{ turn.content }} {{ eos_token }}{% endfor %}"
    tokenizer = story_tokenizer(tmp_path / "tokenizer", None, (*WORDS, "user", "assistant"), chat_template=template)
    chat_folder(tmp_path, "messages")
    config = LlamaConfig(**SMALL, vocab_size=500)
    for start in ("auto", "bos"):
        data = load(tmp_path, GENERATION, tokenizer, config, sequence_length=5, window_start=start)
        first = first_batch(data.train)["input_ids"][0].tolist()
        assert first == tokenizer("<s> user one two </s>", add_special_tokens=False).input_ids


def test_a_template_that_writes_the_date_gives_the_same_text_every_day(tmp_path):
    template = "{{ strftime_now('%d %m %Y') }} " + TURNS
    words = (*WORDS, "01", "2025", "[", "]", "user", "assistant")
    tokenizer = story_tokenizer(tmp_path / "tokenizer", None, words, chat_template=template)
    chat_folder(tmp_path, "messages")
    data = load(tmp_path, GENERATION, tokenizer, LlamaConfig(**SMALL, vocab_size=500), sequence_length=3)
    assert tokenizer.decode(first_batch(data.train)["input_ids"][0]) == "01 01 2025"


def test_conversations_that_cannot_be_written_are_refused(tmp_path):
    chat_folder(tmp_path, "messages")
    config = LlamaConfig(**SMALL, vocab_size=500)
    with pytest.raises(InputError, match="'messages' holds conversations, and the tokenizer has no chat template"):
        load(tmp_path, GENERATION, story_tokenizer(tmp_path / "none", None), config, sequence_length=8)
    strict = "{% if messages[0].role == 'user' %}{{ raise_exception('a system message must come first') }}{% endif %}"
    tokenizer = story_tokenizer(tmp_path / "strict", None, chat_template=strict)
    with pytest.raises(InputError, match=r"row 0 of train, column 'messages'.*a system message must come first"):
        load(tmp_path, GENERATION, tokenizer, config, sequence_length=8)
    tokenizer = story_tokenizer(tmp_path / "fine", None, chat_template=TURNS)
    rows = [{"messages": [{"from": "human", "value": "one"}]}, {"messages": [{"from": "parrot", "value": "one"}]}]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(InputError, match=r"row 1 of train.*the speaker of a turn is unknown"):
        load(tmp_path / "train.jsonl", GENERATION, tokenizer, config, sequence_length=8)


def test_fewer_evaluation_windows_are_the_first_ones(tmp_path, byte_tokenizer):
    for split in ("train", "test"):
        (tmp_path / f"{split}.txt").write_text(story(300))
    config = LlamaConfig(**SMALL, vocab_size=500)
    whole = load(tmp_path, GENERATION, byte_tokenizer, config, sequence_length=16)
    part = load(tmp_path, GENERATION, byte_tokenizer, config, sequence_length=16, eval_samples=3)
    assert len(part.train) == len(whole.train)
    expected = first_batch(whole.evaluation)["input_ids"][:3]
    assert torch.equal(first_batch(part.evaluation)["input_ids"], expected)


def test_a_language_model_is_evaluated_on_so_many_tokens_by_default(tmp_path, byte_tokenizer, monkeypatch):
    for split in ("train", "test"):
        (tmp_path / f"{split}.txt").write_text(story(300))
    config = LlamaConfig(**SMALL, vocab_size=500)
    whole = load(tmp_path, GENERATION, byte_tokenizer, config, sequence_length=16)
    assert not whole.description["warnings"]
    monkeypatch.setattr(loading, "EVALUATION_TOKENS", 40)
    part = load(tmp_path, GENERATION, byte_tokenizer, config, sequence_length=16)
    assert len(part.evaluation) == 2 < len(whole.evaluation)
    assert any("first 2 windows of 16 tokens" in warning for warning in part.description["warnings"])
    assert part.evaluation_fingerprint != whole.evaluation_fingerprint
    asked = load(tmp_path, GENERATION, byte_tokenizer, config, sequence_length=16, eval_samples=10**6)
    assert len(asked.evaluation) == len(whole.evaluation)
    assert not asked.description["warnings"]


def test_the_window_is_bounded_by_the_models_positions(tmp_path, byte_tokenizer):
    (tmp_path / "a.txt").write_text(story(600))
    config = LlamaConfig(**SMALL, vocab_size=500, max_position_embeddings=32)
    data = load(tmp_path / "a.txt", GENERATION, byte_tokenizer, config)
    assert data.description["sequence_length"] == first_batch(data.train)["input_ids"].shape[1] == 32


def test_a_text_shorter_than_a_window_is_refused(tmp_path, byte_tokenizer):
    (tmp_path / "a.txt").write_text("one two three")
    with pytest.raises(InputError, match="too short for one window of 256 tokens"):
        load(tmp_path / "a.txt", GENERATION, byte_tokenizer, LlamaConfig(**SMALL, vocab_size=500))


# ----------------------------------------------------------------- images


def processor(size=8, channels=3):
    return ViTImageProcessorPil(
        size={"height": size, "width": size}, image_mean=[0.5] * channels, image_std=[0.5] * channels
    )


def vit_config(names, channels=3):
    return ViTConfig(**SMALL, image_size=8, patch_size=4, num_channels=channels, id2label=dict(enumerate(names)))


def picture(seed, mode="RGB"):
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    return PilImage.fromarray(pixels).convert(mode)


def image_folder(root, *names, count=3, kind="png"):
    for split in ("train", "validation"):
        for number, name in enumerate(names):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                picture(10 * number + i).save(root / split / name / f"{i}.{kind}")
    return root


def test_an_image_folder_of_unknown_classes_is_refused(tmp_path):
    folder = image_folder(tmp_path, "goldfish", "shark")
    with pytest.raises(
        InputError, match=r"'goldfish', 'shark'.*unknown to the model, whose classes are 'tench', 'cat'"
    ):
        load(folder, IMAGE, processor(), vit_config(["tench", "cat"]))
    data = load(folder, IMAGE, processor(), vit_config(["shark, great white", "tench", "goldfish, Carassius"]))
    assert sorted(labels_of(data.train)) == [0] * 3 + [2] * 3


def test_an_image_folder_with_class_subfolders(tmp_path):
    for split, count in (("train", 4), ("validation", 2)):
        for number, name in enumerate(("cat", "dog")):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                picture(10 * number + i, ("RGB", "L", "RGBA", "P")[i]).save(folder / f"{i}.png")
    data = load(tmp_path, IMAGE, processor(), vit_config(["dog", "horse", "cat"]))
    assert (len(data.train), len(data.evaluation)) == (8, 4)
    assert sorted(labels_of(data.train)) == [0] * 4 + [2] * 4  # by the model's names, not the folders' order
    batch = first_batch(data.evaluation)
    expected = processor()(images=[picture(0)], return_tensors="pt")["pixel_values"][0]
    assert any(torch.equal(image, expected) for image in batch["pixel_values"])
    assert batch["pixel_values"].shape == (4, 3, 8, 8)


def test_names_with_brackets_and_stars_are_names(tmp_path):
    """`datasets` reads names as patterns: files of such names are read, folders are refused in a sentence."""
    table = "text,label\n" + "good film,1\nbad film,0\n" * 4
    (tmp_path / "a[b]*.csv").write_text(table, encoding="utf-8")
    (tmp_path / "ab.csv").write_text("text,label\nother,0\n", encoding="utf-8")  # what the pattern would match
    assert len(open_source(DataConfig(str(tmp_path / "a[b]*.csv"))).splits["train"]) == 8
    folder = tmp_path / "x[12]"
    folder.mkdir()
    (folder / "train.csv").write_text(table, encoding="utf-8")
    with pytest.raises(InputError, match="rename it"):
        open_source(DataConfig(str(folder)))


@pytest.mark.parametrize("shape", ["feature", "struct", "bytes"])
def test_images_in_parquet_with_and_without_the_hugging_face_header(tmp_path, shape):
    pictures = [picture(i) for i in range(6)]
    for i, image in enumerate(pictures):
        image.save(tmp_path / f"{i}.png")
    encoded = [(tmp_path / f"{i}.png").read_bytes() for i in range(6)]
    folder = tmp_path / "data"
    folder.mkdir()
    for split in ("train", "test"):
        if shape == "feature":
            features = Features({"img": Image(), "label": Value("int64")})
            Dataset.from_dict({"img": pictures, "label": [0, 1] * 3}, features=features).to_parquet(
                folder / f"{split}.parquet"
            )
        else:
            cells = [{"bytes": data, "path": None} if shape == "struct" else data for data in encoded]
            pandas.DataFrame({"img": cells, "label": [0, 1] * 3}).to_parquet(folder / f"{split}.parquet")
    batch = first_batch(load(folder, IMAGE, processor(), vit_config(["a", "b"])).train)
    expected = processor()(images=pictures, return_tensors="pt")["pixel_values"]
    assert torch.equal(batch["pixel_values"], expected)
    assert batch["labels"].tolist() == [0, 1] * 3


def test_a_damaged_image_names_its_row(tmp_path):
    picture(0).save(tmp_path / "0.png")
    good = (tmp_path / "0.png").read_bytes()
    pandas.DataFrame({"image": [good, good[:60], b"junk", good], "label": [0, 1, 0, 1]}).to_parquet(
        tmp_path / "a.parquet"
    )
    with pytest.raises(InputError, match="row 1 of train: cannot read the image"):
        load(tmp_path / "a.parquet", IMAGE, processor(), vit_config(["a", "b"]))


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "bmp", "tiff"])
@pytest.mark.parametrize("damage", ["cut short", "no image", "empty"])
def test_damaged_images_are_found_at_once_and_named_by_their_file(tmp_path, kind, damage):
    folder = image_folder(tmp_path, "a", "b", kind=kind)
    broken = folder / "train" / "b" / f"1.{kind}"
    PilImage.effect_noise((64, 64), 60).save(broken)
    whole = broken.read_bytes()
    broken.write_bytes({"cut short": whole[: len(whole) // 2], "no image": b"junk", "empty": b""}[damage])
    with pytest.raises(InputError, match=rf"row 4 of train, .*b/1\.{kind}: cannot read the image"):
        load(folder, IMAGE, processor(), vit_config(["a", "b"]))


def test_a_jpeg_with_something_after_its_end_is_sound(tmp_path):
    folder = image_folder(tmp_path, "a", "b", kind="jpg")
    file = folder / "train" / "a" / "0.jpg"
    file.write_bytes(file.read_bytes() + b"\0\0")
    assert len(load(folder, IMAGE, processor(), vit_config(["a", "b"])).train) == 6


RAMP = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4


@pytest.mark.parametrize(
    ("kind", "pixels"),
    [
        ("png", RAMP.astype(np.uint16) * 257),
        ("tiff", RAMP.astype(np.uint16) * 257),
        ("tiff", RAMP.astype(">u2") * 257),
        ("tiff", RAMP.astype(np.int32) * 257),
        ("tiff", (RAMP / 255).astype(np.float32)),
        ("tiff", RAMP.astype(np.float32)),
        ("tiff", RAMP),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_any_depth_keep_their_brightness(tmp_path, kind, pixels, channels):
    PilImage.fromarray(pixels).save(tmp_path / f"ramp.{kind}")
    if kind == "tiff":
        assert np.asarray(PilImage.open(tmp_path / "ramp.tiff")).dtype.itemsize == pixels.dtype.itemsize
    encoded = (tmp_path / f"ramp.{kind}").read_bytes()
    folder = tmp_path / "data"
    folder.mkdir()
    pandas.DataFrame({"image": [encoded] * 4, "label": [0, 1] * 2}).to_parquet(folder / "train.parquet")
    batch = first_batch(load(folder, IMAGE, processor(8, channels), vit_config(["a", "b"], channels)).train)
    expected = (RAMP.astype(np.float32) / 255 - 0.5) / 0.5
    for channel in batch["pixel_values"][0]:
        np.testing.assert_allclose(channel.numpy(), expected, atol=1e-6)


def test_a_mode_that_the_data_declares_is_kept_and_clips_nothing(tmp_path):
    PilImage.fromarray(RAMP.astype(np.uint16) * 257).save(tmp_path / "ramp.png")
    features = Features({"image": Image(mode="L"), "label": Value("int64")})
    files = [str(tmp_path / "ramp.png"), str(tmp_path / "colours.png")]
    picture(0).save(files[1])
    rows = Dataset.from_dict({"image": files, "label": [0, 1]}, features=features)
    DatasetDict(train=rows, test=rows).save_to_disk(tmp_path / "saved")
    batch = first_batch(load(tmp_path / "saved", IMAGE, processor(), vit_config(["a", "b"])).train)
    grey = [PilImage.fromarray(RAMP), picture(0).convert("L")]
    expected = processor()(images=[image.convert("RGB") for image in grey], return_tensors="pt")["pixel_values"]
    assert torch.equal(batch["pixel_values"], expected)


@pytest.mark.parametrize("factor", [300.0, -1.0, np.nan])
def test_floats_of_no_known_range_are_refused_by_name(tmp_path, factor):
    folder = image_folder(tmp_path, "a", "b", kind="tiff")
    PilImage.fromarray((RAMP * factor).astype(np.float32)).save(folder / "validation" / "b" / "2.tiff")
    with pytest.raises(
        InputError, match=r"validation/b/2\.tiff.*only floats from 0 to 1, or from 0 to 255, can be read"
    ):
        load(folder, IMAGE, processor(), vit_config(["a", "b"]))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_images_of_every_mode_become_what_pillow_shows(tmp_path, mode):
    image = picture(3, mode)
    if mode in ("LA", "RGBA"):
        image.putalpha(100)
    if mode == "P":
        image.info["transparency"] = bytes([100] * 256)
    image.save(tmp_path / "image.tiff" if mode == "CMYK" else tmp_path / "image.png")
    (path,) = tmp_path.iterdir()
    folder = tmp_path / "data"
    folder.mkdir()
    pandas.DataFrame({"image": [path.read_bytes()] * 4, "label": [0, 1] * 2}).to_parquet(folder / "train.parquet")
    data = load(folder, IMAGE, processor(), vit_config(["a", "b"]))
    alone = image.convert("RGBA").convert("RGB") if mode == "P" else image.convert("RGB")
    expected = processor()(images=[alone], return_tensors="pt")["pixel_values"]
    assert torch.equal(first_batch(data.train)["pixel_values"][:1], expected)
    assert any("transparency" in warning for warning in data.description["warnings"]) == (mode in ("LA", "RGBA", "P"))


@pytest.mark.parametrize(
    ("options", "model_channels", "message"),
    [
        ({"size": {"height": 16, "width": 16}}, 3, "gives images of 3×16×16, which the model does not accept.*3×8×8"),
        ({"do_resize": False}, 3, r"does not bring images to one size: row 0 of train \(8×8\).*12×8"),
        ({"image_mean": [0.5], "image_std": [0.5]}, 3, "cannot handle images of 8×8"),
        ({"size": {"height": 8, "width": 8}}, 1, "the image processor cannot handle images|images of 3 channels"),
        ({"size": {"height": 8, "width": 8}}, 4, "gives images of 3 channels, but the model takes 4"),
    ],
)
def test_a_processor_that_does_not_match_the_model_is_refused(tmp_path, options, model_channels, message):
    folder = image_folder(tmp_path, "a", "b")
    picture(1).resize((12, 8)).save(folder / "train" / "b" / "1.png")
    given = ViTImageProcessorPil(**({"size": {"height": 8, "width": 8}} | options))
    with pytest.raises(InputError, match=message):
        load(folder, IMAGE, given, vit_config(["a", "b"], model_channels))


def test_a_model_in_half_precision_is_held_to_its_size_too(tmp_path):
    config = vit_config(["a", "b"])
    config.dtype = torch.bfloat16
    with pytest.raises(InputError, match=r"gives images of 3×16×16.*3×8×8"):
        load(image_folder(tmp_path, "a", "b"), IMAGE, processor(16), config)


def test_a_model_that_takes_any_size_is_not_held_to_its_configuration(tmp_path):
    folder = image_folder(tmp_path, "a", "b")
    config = ConvNextConfig(image_size=224, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], id2label={0: "a", 1: "b"})
    data = load(folder, IMAGE, processor(64), config)
    assert first_batch(data.train)["pixel_values"].shape[1:] == (3, 64, 64)


def test_text_is_not_images(three_splits):
    with pytest.raises(InputError, match="no column of images"):
        load(three_splits, IMAGE, processor(), vit_config(["a", "b"]))


@pytest.mark.parametrize("channels", [1, 3])
def test_the_embedded_digits(channels):
    names = [str(i) for i in range(10)]
    first, again = (load("sklearn-digits", IMAGE, processor(8, channels), vit_config(names, channels)) for _ in "ab")
    assert (len(first.train), len(first.evaluation)) == (1437, 360)
    assert set(labels_of(first.evaluation)) == set(range(10))
    batch, other = first_batch(first.train, 4), first_batch(again.train, 4)
    assert batch["pixel_values"].shape == (4, channels, 8, 8)
    assert torch.equal(batch["pixel_values"], other["pixel_values"])
    assert first.fingerprint == again.fingerprint


# ----------------------------------------------------------------- the shared models


def test_the_shared_language_model_is_judged_on_the_first_windows_of_the_text():
    if not SHARED.is_dir():
        pytest.skip("the shared models are not here")
    folder, task = str(SHARED / "models" / "llama-wiki"), GENERATION
    config = load_config(folder)
    data = load(SHARED / "data" / "wikitext2", task, load_processor(folder, task), config, eval_samples=2)
    model = load_model(folder, task)
    found = evaluate(torch_predictor(model, task), task, data.evaluation.batches(2))
    text = (SHARED / "data" / "wikitext2" / "test.txt").read_text()[:20000]
    ids = load_processor(folder, task)(text).input_ids[: 2 * 256]  # this tokenizer puts nothing before a text
    windows = torch.tensor(ids).view(2, 256)
    with torch.inference_mode():
        expected = model(input_ids=windows, labels=windows).loss.item()
    assert found.loss == pytest.approx(expected, rel=1e-4)
    assert found.units == 2 * 255


# ----------------------------------------------------------------- what new users bring


@pytest.mark.parametrize("kind", ["classes", "strings"])
@pytest.mark.parametrize(
    ("names", "model_names", "expected"),
    [
        (["pos", "neg"], ["NEGATIVE", "POSITIVE"], [1, 0]),  # IMDb against SST-2
        (["positive", "negative"], ["neg", "pos"], [1, 0]),
        (["con", "neu", "entailment"], ["entailment", "neutral", "contradiction"], [2, 1, 0]),
        (["cats", "dogs"], ["dog", "cat, house cat"], [1, 0]),
    ],
)
def test_shortened_names_are_taken_where_they_leave_no_doubt_and_that_is_said(
    tmp_path, word_tokenizer, kind, names, model_names, expected
):
    texts, _ = reviews(12)
    picked = [at % len(names) for at in range(12)]
    if kind == "classes":
        features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
        Dataset.from_dict({"text": texts, "label": picked}, features).to_parquet(tmp_path / "a.parquet")
    else:
        pandas.DataFrame({"text": texts, "label": [names[at] for at in picked]}).to_parquet(tmp_path / "a.parquet")
    data = load(tmp_path / "a.parquet", TEXT, word_tokenizer, bert_config(enumerate(model_names)), train_split="train")
    counts = np.bincount(labels_of(data.train) + labels_of(data.evaluation), minlength=len(names))
    assert counts.tolist() == [12 // len(names)] * len(names)
    every = encoded_labels(tmp_path / "a.parquet", bert_config(enumerate(model_names)))
    assert every == [expected[at] for at in picked]
    assert any("start the same" in warning and repr(names[0]) in warning for warning in data.description["warnings"])


def test_a_split_may_lack_some_of_the_shortened_names(tmp_path, word_tokenizer):
    write_csv(tmp_path / "train.csv", {"text": WORDS[:6], "label": ["pos", "neg"] * 3})
    write_csv(tmp_path / "test.csv", {"text": WORDS[:3], "label": ["pos"] * 3})
    data = load(tmp_path, TEXT, word_tokenizer, bert_config())
    assert labels_of(data.train) == [1, 0] * 3
    assert labels_of(data.evaluation) == [1] * 3


def encoded_labels(path, model_config):
    return read_labels(Dataset.from_parquet(str(path)), "label", model_config, "train").values.tolist()


@pytest.mark.parametrize(
    ("names", "model_names"),
    [
        (["cat", "dog"], ["catamaran", "dogsled", "tench"]),  # of a part of the classes nothing can be told
        (["n", "p"], ["negative", "positive"]),
        (["neg", "pos"], ["negative", "negligible"]),
        (["pos", "posi"], ["positive", "possible"]),
    ],
)
def test_shortened_names_in_doubt_are_refused(tmp_path, word_tokenizer, names, model_names):
    texts, labels = reviews(12)
    features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
    Dataset.from_dict({"text": texts, "label": labels}, features).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(InputError, match="unknown to the model"):
        load(tmp_path / "a.parquet", TEXT, word_tokenizer, bert_config(enumerate(model_names)))


def test_row_numbers_that_pandas_keeps_are_no_column(tmp_path, word_tokenizer):
    texts, labels = reviews(20)
    table = pandas.DataFrame({"text": texts, "label": labels}).sample(frac=1, random_state=0)
    table.to_parquet(tmp_path / "numbers.parquet")
    table.set_index(table["text"].map(hash).astype(str).rename(None)).to_parquet(tmp_path / "words.parquet")
    Dataset.from_pandas(table).save_to_disk(tmp_path / "saved")
    for name in ("numbers.parquet", "words.parquet", "saved"):
        data = load(tmp_path / name, TEXT, word_tokenizer, bert_config())
        assert data.description["columns"] == {"input": "text", "label": "label"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"text": "a film", "label": [0, 1]}, "column 'label' of .* holds lists, not one class per row"),
        ({"text": "a film", "label": {"name": "x"}}, "column 'label' of .* holds records of name"),
        ({"text": ["a", "film"], "label": 1}, r"no column of text; it has 'text' \(lists\), 'label' \(int64\)"),
        ({"text": "a film"}, "holds text without labels"),
    ],
)
def test_a_column_of_another_kind_is_refused_for_what_it_holds(tmp_path, word_tokenizer, rows, message):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([json.dumps(rows)] * 8))
    with pytest.raises(InputError, match=message):
        load(path, TEXT, word_tokenizer, bert_config())


def test_images_of_one_folder_have_no_labels(tmp_path):
    with pytest.raises(
        InputError, match="images without labels: labels are read from the names of at least two folders"
    ):
        load(image_folder(tmp_path, "tench"), IMAGE, processor(), vit_config(["tench", "cat"]))


def test_an_empty_label_is_none(tmp_path, word_tokenizer):
    path = write_csv(tmp_path / "a.csv", {"text": ["good", "bad", "fine"], "label": ["positive", "", "negative"]})
    with pytest.raises(InputError, match="row 1 of train has no label"):
        load(path, TEXT, word_tokenizer, bert_config())


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-16", "utf-32"])
@pytest.mark.parametrize("kind", ["txt", "csv", "folder"])
def test_two_bytes_a_letter_are_never_taken_for_letters(tmp_path, byte_tokenizer, encoding, kind):
    path = tmp_path / ("a.csv" if kind == "csv" else "a.txt")
    path.write_bytes(("text\n" + story(300).replace(",", "")).encode(encoding))
    data, config = tmp_path if kind == "folder" else path, LlamaConfig(**SMALL, vocab_size=400)
    with pytest.raises(InputError, match=f"--encoding {encoding}"):
        load(data, GENERATION, byte_tokenizer, config, sequence_length=16)
    read = load(data, GENERATION, byte_tokenizer, config, sequence_length=16, encoding=encoding)
    assert "\0" not in byte_tokenizer.decode(first_batch(read.train)["input_ids"].flatten())


def test_zero_bytes_are_no_text(tmp_path, byte_tokenizer):
    (tmp_path / "a.txt").write_bytes(b"a film\0 was good " * 100)
    with pytest.raises(InputError, match="holds zero bytes"):
        load(tmp_path / "a.txt", GENERATION, byte_tokenizer, LlamaConfig(**SMALL, vocab_size=400), sequence_length=16)


def test_images_that_cameras_turned_are_measured_as_they_are_shown(tmp_path):
    folder = tmp_path / "photos"
    turned = PilImage.Exif()
    turned[0x0112] = 6
    for name in ("tench", "cat"):
        (folder / name).mkdir(parents=True)
        for i in range(4):
            exif = turned if i == 3 else PilImage.Exif()
            picture(i).resize((16, 24)).save(folder / name / f"{i}.jpg", exif=exif)
    loose = ViTImageProcessorPil(do_resize=False)
    with pytest.raises(InputError, match=r"does not bring images to one size: .*24×16.*16×24"):
        load(folder, IMAGE, loose, vit_config(["tench", "cat"]))


def test_colours_by_lightness_are_no_transparency(tmp_path):
    for name in ("tench", "cat"):
        (tmp_path / name).mkdir()
        for i in range(3):
            picture(i, "LAB").save(tmp_path / name / f"{i}.tif")
    assert load(tmp_path, IMAGE, processor(), vit_config(["tench", "cat"])).description["warnings"] == []


def test_parts_of_a_turn_are_its_text(tmp_path, byte_tokenizer):
    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.chat_template = "{% for turn in messages %}{{ turn.role }}: {{ turn.content }}\n{% endfor %}"
    parts = [{"type": "text", "text": "a very "}, {"type": "text", "text": "good film"}]
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": parts}]
    path, config = tmp_path / "a.jsonl", LlamaConfig(**SMALL, vocab_size=400)
    path.write_text("\n".join([json.dumps({"messages": turns})] * 40))
    data = load(path, GENERATION, tokenizer, config, sequence_length=32)
    text = "".join(tokenizer.convert_ids_to_tokens(first_batch(data.train)["input_ids"].flatten()))
    assert "user:ĠaĠveryĠgoodĠfilm" in text
    assert "type" not in text
    turns[0]["content"] = [{"type": "image", "image": "a.png"}, *parts]
    path.write_text("\n".join([json.dumps({"messages": turns})] * 40))
    with pytest.raises(InputError, match=r"row 0 of train.*holds more than text \(image\)"):
        load(path, GENERATION, tokenizer, config, sequence_length=32)


def test_what_stands_beside_conversations_and_is_not_read_is_said(tmp_path, byte_tokenizer):
    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.chat_template = "{% for turn in messages %}{{ turn.role }}: {{ turn.content }}\n{% endfor %}"
    turns = [{"role": "user", "content": "a very good film"}, {"role": "assistant", "content": "a very good film"}]
    path, config = tmp_path / "a.jsonl", LlamaConfig(**SMALL, vocab_size=400)
    for beside, said in (({}, False), ({"tools": [{"type": "function"}]}, True), ({"system": "be good"}, True)):
        path.write_text("\n".join([json.dumps({"messages": turns} | beside)] * 40))
        warnings = load(path, GENERATION, tokenizer, config, sequence_length=32).description["warnings"]
        assert [f"are read without {name!r}" in warnings[0] for name in beside] == [True] * said
        assert bool(warnings) == said
