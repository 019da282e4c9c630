"""Lanczos' tridiagonalisation, behind quadratures of spectral functions."""

from collections.abc import Callable

import torch
from torch import Tensor


def lanczos(operator: Callable[[Tensor], Tensor], start: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Lanczos with full reorthogonalisation, of a symmetric operator on k-vectors, from each column of ``start`` (k×p).

    Returns:
        tridiagonal matrices (p×s×s) and their vectors (s×k×p), s = min(steps, k). Past an invariant subspace, zeros.
    """
    steps = min(steps, start.shape[0])
    vector = start / start.norm(dim=0)
    held = [vector]
    tridiagonal = start.new_zeros(start.shape[1], steps, steps)
    for step in range(steps):
        image = operator(vector)
        tridiagonal[:, step, step] = (vector * image).sum(0)
        if step + 1 == steps:
            break
        basis, scale = torch.stack(held), image.norm(dim=0)
        for _ in range(2):  # once is not enough in float32
            image = image - torch.einsum("skp,sp->kp", basis, torch.einsum("skp,kp->sp", basis, image))
        beta = image.norm(dim=0)
        alive = beta > 1e-5 * scale  # what is left below is rounding
        tridiagonal[:, step, step + 1] = tridiagonal[:, step + 1, step] = torch.where(alive, beta, 0.0)
        vector = torch.where(alive, image / beta.clamp_min(torch.finfo(image.dtype).tiny), 0.0)
        held.append(vector)
    return tridiagonal, torch.stack(held)
