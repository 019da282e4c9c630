"""What quantisation left in floating point, told."""

from converters.onnx.quantized_weights import QuantizedWeights
from prehab_export.system import say, warn

# A share of the weights in floating point that is worth a warning, and the least that one of its lines is about.
CONSIDERABLE = 0.1
LEAST_TOLD = 0.01


def tell_quantized(name: str, counted: QuantizedWeights) -> None:
    """Say how much of a graph was quantised; where much was not, what."""
    say(f"  {name}: {counted.share:.1%} of {counted.weights:,} weights quantised")
    if counted.share < 1 - CONSIDERABLE:
        for left in counted.left:
            if left.weights >= LEAST_TOLD * counted.weights:
                share = left.weights / counted.weights
                warn(
                    f"{share:.1%} of the weights of {name} stay in floating point, in "
                    f"{left.tensors} tensors of {left.operator}: {left.reason}"
                )
