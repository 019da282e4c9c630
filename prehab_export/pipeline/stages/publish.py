"""The stage that publishes what was verified."""

import shutil
from pathlib import Path

from prehab_export.pipeline.report.card import write_card
from prehab_export.pipeline.session import Session
from prehab_export.system import link


def publish_artifact(session: Session, folder: Path) -> None:
    """What was verified, file by file, with a model card. Hard links where the file system has them: no second copy."""
    shutil.copytree(session.workspace.folder("export") / "model", folder, copy_function=link, dirs_exist_ok=True)
    if session.config.quantize:
        quantised = session.workspace.folder("quantize") / "compressed"
        shutil.copytree(quantised, folder / "onnx", copy_function=link, dirs_exist_ok=True)
    if session.config.ort:
        ort = session.workspace.folder("ort") / "onnx"
        shutil.copytree(ort, folder / "onnx", copy_function=link, dirs_exist_ok=True)
    write_card(session, folder)
