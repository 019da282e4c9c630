"""What quantisation left in floating point, told."""

from converters.onnx.coverage import Coverage
from prehab_export.system import say, warn

# A share of the weights in floating point that is worth a warning, and the least that one of its lines is about.
CONSIDERABLE = 0.1
LEAST_TOLD = 0.01


def tell_coverage(name: str, covered: Coverage) -> None:
    """Say how much of a graph was quantised; where much was not, what."""
    say(f"  {name}: {covered.share:.1%} of {covered.weights:,} weights quantised")
    if covered.share < 1 - CONSIDERABLE:
        for left in covered.left:
            if left.weights >= LEAST_TOLD * covered.weights:
                share = left.weights / covered.weights
                warn(
                    f"{share:.1%} of the weights of {name} stay in floating point, in "
                    f"{left.tensors} tensors of {left.operator}: {left.reason}"
                )
