"""Reports how much of a graph was quantised and what stayed in floating point."""

from converters.onnx.quantized_weights import QuantizedWeights
from prehab_export.system import say, warn

# Shares of the weights in floating point: above the first there are warnings, each about at least the second.
CONSIDERABLE = 0.1
LEAST_REPORTED = 0.01


def tell_quantized(name: str, counted: QuantizedWeights) -> None:
    """Print how much of a graph was quantised; warn about what was not, if that is much."""
    say(f"  {name}: {counted.share:.1%} of {counted.weights:,} weights quantised")
    if counted.share < 1 - CONSIDERABLE:
        for unquantized in counted.left:
            if unquantized.weights >= LEAST_REPORTED * counted.weights:
                share = unquantized.weights / counted.weights
                warn(
                    f"{share:.1%} of the weights of {name} stay in floating point, in "
                    f"{unquantized.tensors} tensors of {unquantized.operator}: {unquantized.reason}"
                )
