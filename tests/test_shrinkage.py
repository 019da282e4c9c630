"""Shrinkage against scikit-learn's Ledoit–Wolf and against known covariances, drawn again and again."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.covariance import ledoit_wolf

from prehab_export.linalg.shrinkage import ClusterSums, Sampling, shrunk


def sums_of(samples, sizes=None, dtype=torch.float64):
    """``ClusterSums`` of samples of unequal length, padded with rubbish and added in two batches."""
    result = ClusterSums()
    sizes = torch.tensor([len(rows) for rows in samples] if sizes is None else sizes)
    for batch in (slice(0, len(samples) // 2), slice(len(samples) // 2, None)):
        part = samples[batch]
        if not part:
            continue
        longest = max(len(rows) for rows in part)
        values = torch.full((len(part), longest, samples[0].shape[1]), float("nan"), dtype=dtype)
        mask = torch.zeros(len(part), longest, dtype=torch.bool)
        for at, rows in enumerate(part):
            values[at, : len(rows)], mask[at, : len(rows)] = rows.to(dtype), True
        result.add(values, mask, sizes[batch])
    return result


def brute_error(samples):
    """B/(B−1) Σ ‖S_i − s_i Ĉ‖² / (Σ s_i)² / ‖Ĉ‖², term by term."""
    outers, sizes = [rows.T @ rows for rows in samples], [len(rows) for rows in samples]
    moment = sum(outers) / sum(sizes)
    spread = sum(float(((s - n * moment) ** 2).sum()) for s, n in zip(outers, sizes, strict=True))
    return len(samples) / (len(samples) - 1) * spread / sum(sizes) ** 2 / float((moment**2).sum())


def random_samples(seed, count, n, longest, equal=False):
    """Samples whose tokens resemble each other and lie in few directions."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(0, -2, n, dtype=torch.float64)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [
        (
            torch.randn(1, n, generator=generator, dtype=torch.float64)
            + torch.randn(longest if equal else length, n, generator=generator, dtype=torch.float64)
        )
        * scale
        for length in lengths
    ]


@given(seed=st.integers(0, 2**16), count=st.integers(2, 12), n=st.integers(2, 30), longest=st.integers(1, 9))
def test_error_is_exact_for_samples_of_one_length(seed, count, n, longest):
    samples = random_samples(seed, count, n, longest, equal=True)
    sums = sums_of(samples)
    rows = torch.cat(samples)
    assert torch.allclose(sums.outer, rows.T @ rows, rtol=1e-10, atol=1e-12)
    assert sums.sampling().error == pytest.approx(brute_error(samples), rel=1e-6, abs=1e-12)


@pytest.mark.parametrize(("n", "longest"), [(40, 6), (12, 40)])
def test_error_for_samples_of_unequal_length(n, longest):
    """The mean size is probed, not exact: the error of that must not be seen."""
    for seed in range(5):
        samples = random_samples(seed, 60, n, longest)
        assert sums_of(samples).sampling().error == pytest.approx(brute_error(samples), rel=0.05)


def test_a_giant_token_in_every_sample_is_no_reason_for_a_negative_error():
    """Attention sinks: one huge token a sample, whatever its length, so that S_i hardly varies but its size does."""
    samples = random_samples(0, 50, 24, 20)
    for rows in samples:
        rows[0] = 0
        rows[0, 0] = 1e3
    sampling = sums_of(samples).sampling()
    assert sampling.error == pytest.approx(brute_error(samples), rel=0.05)
    assert sampling.error > 0


@given(seed=st.integers(0, 2**16), count=st.integers(2, 40), n=st.integers(2, 20))
def test_samples_of_one_token_are_ledoit_wolf(seed, count, n):
    rows = torch.cat(random_samples(seed, count, n, 1))
    sums = sums_of(list(rows.split(1)))
    expected, rho = ledoit_wolf(rows.numpy(), assume_centered=True)
    moment, sampling = sums.outer / count, sums.sampling()
    # Theirs lacks the small-sample factor n/(n − 1), so it is taken out before the comparison.
    plain = Sampling(count, sampling.error * (count - 1) / count, sampling.token_error)
    assert plain.intensity(moment) == pytest.approx(rho, abs=1e-8)
    assert torch.allclose(shrunk(moment, plain.intensity(moment)), torch.from_numpy(expected), atol=1e-8)
    assert sampling.effective_tokens == pytest.approx(count)


@given(count=st.integers(2, 20), copies=st.integers(1, 7), seed=st.integers(0, 2**16))
def test_repeated_tokens_are_worth_nothing(count, copies, seed):
    rows = torch.cat(random_samples(seed, count, 6, 1))
    samples = [row.expand(copies, -1) for row in rows.split(1)]
    share = (count * copies / (count * copies - 1)) / (count / (count - 1))
    assert sums_of(samples).sampling().effective_tokens == pytest.approx(count * share)


def test_shrunk_estimates_are_closer_to_the_truth_and_the_error_is_the_true_one():
    """Tokens of one sample share a part; expected squared error over 100 draws, covariance known."""
    n, tokens = 16, 5
    truth = 2 * torch.diag(torch.logspace(0, -1, n, dtype=torch.float64).square())
    for count in (4, 16, 64):
        raw = better = estimated = 0.0
        for seed in range(100):
            samples = random_samples_of(truth, seed, count, tokens)
            sums = sums_of(samples)
            moment, sampling = sums.outer / sums.rows, sums.sampling()
            raw += float((moment - truth).square().sum())
            better += float((shrunk(moment, sampling.intensity(moment)) - truth).square().sum())
            estimated += sampling.error * float(moment.square().sum())
        assert better < 0.95 * raw
        assert estimated == pytest.approx(raw, rel=0.2)


def random_samples_of(covariance, seed, count, tokens):
    """Normal tokens with this diagonal covariance and correlation ½ between tokens of a sample."""
    generator = torch.Generator().manual_seed(seed)
    n = len(covariance)
    shared = torch.randn(count, 1, n, generator=generator, dtype=torch.float64)
    own = torch.randn(count, tokens, n, generator=generator, dtype=torch.float64)
    return list((shared + own) * (covariance.diagonal() / 2).sqrt())


def test_one_sample_falls_back_to_its_tokens():
    samples = random_samples(0, 1, 8, 9, equal=True)
    assert sums_of(samples).sampling().effective_tokens == pytest.approx(9)


def test_shrinking_keeps_the_trace_and_ends_at_the_identity():
    moment = torch.cov(torch.randn(4, 9, generator=torch.Generator().manual_seed(0)))
    for rho in (0.0, 0.3, 1.0):
        assert shrunk(moment, rho).trace() == pytest.approx(float(moment.trace()), rel=1e-6)
    assert torch.allclose(shrunk(moment, 1.0), moment.double().trace() / 4 * torch.eye(4, dtype=torch.float64))
    assert Sampling(2, 0.5, 1.0).intensity(torch.zeros(3, 3)) == 1.0
