"""``--ort``: the compressed graphs of a run in ONNX Runtime's own format, checked against what they were made from."""

from dataclasses import asdict
from pathlib import Path

from converters.errors import InputError
from converters.onnx.ort_format import mobile_verdict, write_ort
from prehab_export.deployment import SAMPLES, TOLERANCE, largest_difference
from prehab_export.pipeline.session import Session
from prehab_export.pipeline.stages.quantize import quantized_graphs
from prehab_export.system import ParityError, say, warn, write_json


def write_ort_files(session: Session, folder: Path) -> None:
    """``onnx/<name>.ort`` and its configuration for every compressed graph, and the verdict for phones.

    Raises:
        InputError: the format cannot hold the float32 graph; a quantised one that it cannot hold is left out.
        ParityError: an .ort file does not answer as the graph it was made from.
    """
    plain = session.workspace.folder("export") / "model" / "onnx" / "model.onnx"
    quantised = {name: graph for name, graph in quantized_graphs(session).items() if name.startswith("compressed")}
    rows, left_out = [], []
    for name, graph in {"compressed": plain, **quantised}.items():
        say(f"  {name}")
        try:
            files = write_ort(graph, folder / "onnx")
        except InputError as reason:
            if graph == plain:
                raise
            warn(str(reason))
            left_out.append({"graph": name, "reason": str(reason)})
            continue
        samples = session.data.evaluation.subset(min(SAMPLES, len(session.data.evaluation)), 0)
        apart = largest_difference(graph, files.model, samples.batches(4), session.threads)
        if apart > TOLERANCE:
            raise ParityError(f"{files.model.name} is off by {apart:.1e} from {graph.name}, {TOLERANCE:.0e} is allowed")
        rows.append(
            {"graph": name, "file": files.model.name, "bytes": files.model.stat().st_size, "max_relative": apart}
        )
    facts = {"files": rows, "left_out": left_out, "mobile": asdict(mobile_verdict(plain))}
    write_json(folder / "ort.json", facts)
