"""A test export of a skeleton of the model, which finds problems before calibration instead of after rehab."""

from prehab_export.deployment import check_exportable_model
from prehab_export.pipeline.session import Session


def check_export(session: Session) -> None:
    """Refuse a run whose model cannot be exported to ONNX.

    Raises:
        InputError: the model cannot be exported; the message gives the reason and an alternative.
    """
    names = None if session.task.name == "image-classification" else session.processor.model_input_names
    check_exportable_model(
        session.model_config,
        session.task.at("float32"),  # graphs are exported in float32
        session.data.evaluation,
        text_inputs=names,
        trust_remote_code=session.config.trust_remote_code,
    )
