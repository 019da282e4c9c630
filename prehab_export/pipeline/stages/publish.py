"""The stage that publishes the verified model."""

import shutil
from pathlib import Path

from prehab_export.pipeline.report.card import write_card
from prehab_export.pipeline.session import Session
from prehab_export.system import link


def publish_artifact(session: Session, folder: Path) -> None:
    """Assemble the artifact from the verified files, and add a model card.

    Files are hard links where the file system supports them, so that they take no extra space.
    """
    shutil.copytree(session.workspace.folder("export") / "model", folder, copy_function=link, dirs_exist_ok=True)
    if session.config.quantize:
        quantised = session.workspace.folder("quantize") / "compressed"
        shutil.copytree(quantised, folder / "onnx", copy_function=link, dirs_exist_ok=True)
    if session.config.ort:
        ort = session.workspace.folder("ort") / "onnx"
        shutil.copytree(ort, folder / "onnx", copy_function=link, dirs_exist_ok=True)
    write_card(session, folder)
