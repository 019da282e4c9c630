"""Can the model be exported at all? Found out on a skeleton of it, before calibration and not after rehab."""

from prehab_export.deployment import check_exportable_model
from prehab_export.pipeline.session import Session


def check_export(session: Session) -> None:
    """Refuse a run whose model the export to ONNX would refuse at its end.

    Raises:
        InputError: why it cannot be exported, and what can be done without.
    """
    names = None if session.task.name == "image-classification" else session.processor.model_input_names
    check_exportable_model(
        session.model_config,
        session.task.at("float32"),  # in which graphs are made
        session.data.evaluation,
        text_inputs=names,
        trust_remote_code=session.config.trust_remote_code,
    )
