"""``--ort``: the compressed graphs of a run in ONNX Runtime's own format, checked against the ONNX graphs."""

from dataclasses import asdict
from pathlib import Path

from converters.errors import InputError
from converters.onnx.ort_format import mobile_verdict, write_ort
from prehab_export.deployment import SAMPLES, TOLERANCE, largest_difference
from prehab_export.pipeline.session import Session
from prehab_export.pipeline.stages.quantize import quantized_graphs
from prehab_export.system import ParityError, say, warn, write_json


def write_ort_files(session: Session, folder: Path) -> None:
    """Write ``onnx/<name>.ort`` and its configuration for every compressed graph, and the verdict for phones.

    A quantised graph that the format cannot hold is left out with a warning.

    Raises:
        InputError: the format cannot hold the float32 graph.
        ParityError: the outputs of an .ort file differ from those of its ONNX graph.
    """
    float32 = session.workspace.folder("export") / "model" / "onnx" / "model.onnx"
    quantised = {name: graph for name, graph in quantized_graphs(session).items() if name.startswith("compressed")}
    rows, left_out = [], []
    for name, graph in {"compressed": float32, **quantised}.items():
        say(f"  {name}")
        try:
            files = write_ort(graph, folder / "onnx")
        except InputError as error:
            if graph == float32:
                raise
            warn(str(error))
            left_out.append({"graph": name, "reason": str(error)})
            continue
        samples = session.data.evaluation.subset(min(SAMPLES, len(session.data.evaluation)), 0)
        difference = largest_difference(graph, files.model, samples.batches(4), session.threads)
        if difference > TOLERANCE:
            raise ParityError(
                f"{files.model.name} differs by {difference:.1e} from {graph.name}; {TOLERANCE:.0e} is allowed"
            )
        rows.append(
            {"graph": name, "file": files.model.name, "bytes": files.model.stat().st_size, "max_relative": difference}
        )
    facts = {"files": rows, "left_out": left_out, "mobile": asdict(mobile_verdict(float32))}
    write_json(folder / "ort.json", facts)
