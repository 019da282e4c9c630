"""Tridiagonalise symmetric operators with Lanczos' method, for quadratures of spectral functions."""

from collections.abc import Callable

import torch
from torch import Tensor


def lanczos(operator: Callable[[Tensor], Tensor], start: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Run Lanczos with full reorthogonalisation from each column of ``start`` (k×p).

    Args:
        operator: a symmetric operator on k×p matrices, column by column.

    Returns:
        The tridiagonal matrices (p×s×s) and the Lanczos vectors (s×k×p), s = min(steps, k). Both are zero past an
        invariant subspace.
    """
    steps = min(steps, start.shape[0])
    vector = start / start.norm(dim=0)
    vectors = [vector]
    tridiagonal = start.new_zeros(start.shape[1], steps, steps)
    for step in range(steps):
        image = operator(vector)
        tridiagonal[:, step, step] = (vector * image).sum(0)
        if step + 1 == steps:
            break
        basis, scale = torch.stack(vectors), image.norm(dim=0)
        for _ in range(2):  # one pass is not enough in float32
            image = image - torch.einsum("skp,sp->kp", basis, torch.einsum("skp,kp->sp", basis, image))
        beta = image.norm(dim=0)
        alive = beta > 1e-5 * scale  # a smaller remainder is rounding noise
        tridiagonal[:, step, step + 1] = tridiagonal[:, step + 1, step] = torch.where(alive, beta, 0.0)
        vector = torch.where(alive, image / beta.clamp_min(torch.finfo(image.dtype).tiny), 0.0)
        vectors.append(vector)
    return tridiagonal, torch.stack(vectors)
