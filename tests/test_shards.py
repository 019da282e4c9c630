"""Models in several files, damaged one way each: refused from the headers alone, before anything slow."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_pipeline import invoke
from transformers import AutoModelForCausalLM

from converters.errors import InputError
from prehab_export.inputs.models import load_model
from prehab_export.inputs.stored_weights import weight_files
from prehab_export.inputs.tasks import TASKS

GENERATION = TASKS["text-generation"]
INDEX = "model.safetensors.index.json"
NORM, PROJECTION = "model.norm.weight", "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def sharded_folder(llama_folder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    shutil.copytree(llama_folder, folder)
    (folder / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(llama_folder).save_pretrained(folder, max_shard_size="20KB")
    return folder


@pytest.fixture
def sharded(sharded_folder, tmp_path) -> Path:
    return Path(shutil.copytree(sharded_folder, tmp_path / "llama"))


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def edit_index(folder: Path, change) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def edit_shard(path: Path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def shard_of(folder: Path, name: str) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


def cut(folder: Path) -> None:
    path = shards(folder)[1]
    path.write_bytes(path.read_bytes()[:-100])


def lengthen_header(folder: Path) -> None:
    path = shards(folder)[1]
    path.write_bytes((2**60).to_bytes(8, "little") + path.read_bytes()[8:])


def spoil_header(folder: Path) -> None:
    path = shards(folder)[1]
    content = bytearray(path.read_bytes())
    content[10:20] = b"\0" * 10
    path.write_bytes(content)


def point_to_lfs(folder: Path) -> None:
    shards(folder)[1].write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")


def move_out(folder: Path) -> None:
    shutil.copy(shards(folder)[0], folder.parent)
    edit_index(folder, lambda files: files.update({NORM: f"../{shards(folder)[0].name}"}))


def name_twice(folder: Path) -> None:
    text = (folder / INDEX).read_text()
    entry = f'"{NORM}": "{shards(folder)[0].name}"'
    (folder / INDEX).write_text(text.replace('"weight_map": {', f'"weight_map": {{{entry},'))


def drop_from_shard(folder: Path) -> None:
    edit_shard(shard_of(folder, PROJECTION), lambda tensors: tensors.pop(PROJECTION))


def copy_to_another(folder: Path) -> None:
    there = shard_of(folder, PROJECTION)
    other = next(path for path in shards(folder) if path != there)
    edit_shard(other, lambda tensors: tensors.update({PROJECTION: torch.zeros(64, 32)}))


def move_to_another(folder: Path) -> None:
    there = shard_of(folder, PROJECTION)
    other = next(path for path in shards(folder) if path != there)
    edit_index(folder, lambda files: files.update({PROJECTION: other.name}))


def store_as(dtype: torch.dtype):
    def change(folder: Path) -> None:
        edit_shard(shard_of(folder, NORM), lambda tensors: tensors.update({NORM: tensors[NORM].to(dtype)}))

    return change


def reshape(folder: Path) -> None:
    edit_shard(shard_of(folder, NORM), lambda tensors: tensors.update({NORM: torch.ones(33)}))


DAMAGES = {
    "missing": (
        lambda folder: shards(folder)[1].unlink(),
        r"lacks model-00002-of-\d+.safetensors, which .* names.*copy",
    ),
    "truncated": (cut, r"model-00002-of-\d+.safetensors is damaged or cut short \(.*\); copy or download it again"),
    "empty": (lambda folder: shards(folder)[1].write_bytes(b""), r"model-00002-of-\d+.safetensors is damaged or cut"),
    "long header": (lengthen_header, r"model-00002-of-\d+.safetensors is damaged or cut short \(.*\); copy"),
    "spoilt header": (spoil_header, r"model-00002-of-\d+.safetensors is damaged or cut short \(.*\); copy"),
    "pointer": (point_to_lfs, r"model-00002-of-\d+.safetensors is a pointer of Git LFS.*git lfs pull"),
    "elsewhere": (drop_from_shard, rf"lacks {PROJECTION}, which {INDEX} places there; copy"),
    "twice in files": (copy_to_another, rf"{PROJECTION} is in both model-.* and .*model-.*save the model again"),
    "misplaced": (move_to_another, rf"{PROJECTION} is in .*, but {INDEX} places it in model-.*save the model again"),
    "twice in index": (name_twice, rf"{INDEX} names {NORM} twice.*save the model again"),
    "no JSON": (lambda folder: (folder / INDEX).write_text('{"weight_map": {'), rf"{INDEX} is not valid JSON.*copy"),
    "no map": (lambda folder: (folder / INDEX).write_text("{}"), rf"{INDEX} has no weight_map.*copy"),
    "list": (lambda folder: (folder / INDEX).write_text("[]"), rf"{INDEX} has no weight_map.*copy"),
    "numbers": (
        lambda folder: edit_index(folder, lambda files: files.update({NORM: 1})),
        rf"{INDEX} has no weight_map",
    ),
    "outside": (move_out, rf"{INDEX} names \.\./model-.*, a file outside the model's folder; save"),
    "float8": (store_as(torch.float8_e4m3fn), rf"{NORM} in .*stored as F8_E4M3, a quantised format; give the original"),
    "integers": (store_as(torch.int8), rf"{NORM} in .*stored as I8, a quantised format; give the original"),
    "shape": (reshape, rf"{NORM} in .*has shape \(33,\) instead of \(32,\).*config.json"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_model_is_refused_before_anything_slow(damage, sharded, prose, tmp_path, monkeypatch, capsys):
    from prehab_export.pipeline import session

    monkeypatch.setattr(session, "load_model", lambda *_, **__: pytest.fail("weights were read"))
    monkeypatch.setattr(session, "load_data", lambda *_, **__: pytest.fail("data were read"))
    change, message = DAMAGES[damage]
    change(sharded)
    options = ["--task", "text-generation", "--data", prose, "--sequence-length", "16", "-o", tmp_path / "run"]
    for more in ([], ["--dry-run"]):
        assert invoke("run", sharded, *options, *more) == 2
        error = capsys.readouterr().err.replace("\n", " ")
        assert re.search(message, error), error
        assert "Traceback" not in error
    with pytest.raises(InputError):
        load_model(str(sharded), GENERATION)


def test_shards_that_agree_are_read_whole(sharded, llama_folder):
    found = weight_files(str(sharded))
    assert len(found.files) > 2
    expected = load_file(llama_folder / "model.safetensors")
    assert {name: tensor.shape for name, tensor in found.tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in expected.items()
    }
    loaded = load_model(str(sharded), GENERATION).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_weights_in_float32_among_halves_keep_their_precision(half, sharded):
    """As they are stored, without taking the memory of a float32 model; computed as a float32 model computes."""
    for path in shards(sharded):
        edit_shard(path, lambda tensors: tensors.update({n: t.to(half) for n, t in tensors.items() if n != NORM}))
    torch.manual_seed(0)
    norm = 1 + 1e-4 * torch.randn(32)
    edit_shard(shard_of(sharded, NORM), lambda tensors: tensors.update({NORM: norm}))
    model = load_model(str(sharded), GENERATION, dtype=None)
    assert {name: weight.dtype for name, weight in model.named_parameters() if weight.dtype != half} == {
        NORM: torch.float32
    }
    assert torch.equal(model.get_parameter(NORM), norm)
    ids = torch.randint(4, 60, (2, 12))
    with torch.no_grad():
        expected = load_model(str(sharded), GENERATION)(input_ids=ids).logits
        assert torch.equal(model(input_ids=ids).logits, expected)


def test_two_kinds_of_halves_are_read_in_float32(sharded):
    first, *others = shards(sharded)
    for path, half in ((first, torch.float16), *((path, torch.bfloat16) for path in others)):
        edit_shard(path, lambda tensors, half=half: tensors.update({n: t.to(half) for n, t in tensors.items()}))
    model = load_model(str(sharded), GENERATION, dtype=None)
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    stored = {name: tensor for path in shards(sharded) for name, tensor in load_file(path).items()}
    assert all(torch.equal(weight, stored[name].float()) for name, weight in model.named_parameters())
