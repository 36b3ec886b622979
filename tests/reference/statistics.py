"""Comparing a closed form with samples."""

import numpy as np


def assert_moments(samples, mean, var, standard_errors=4.0, atol=1e-6):
    """Asserts that `samples` have the `mean` and `var` given, up to sampling noise.

    samples: ``[R, ..., C]``, R independent replicas (maps, examples); the values within
        one may depend on each other, so the standard error comes from the replicas.
    mean, var: ``[C]`` over everything else, variance of the mean within a replica
        included.
    atol: for what is deterministic, and float32.
    """
    samples = np.asarray(samples, np.float64)
    assert samples[..., 0].size >= 100_000, "too few samples to mean anything"
    mean, var = np.asarray(mean, np.float64), np.asarray(var, np.float64)
    assert mean.shape == var.shape == samples.shape[-1:]
    within = tuple(range(1, samples.ndim - 1))
    assert_mean(samples.mean(within), mean, standard_errors, atol)
    assert_mean(np.square(samples - mean).mean(within), var, standard_errors, atol)


def assert_mean(replicas, expected, standard_errors=4.0, atol=1e-6):
    """Asserts that the mean over ``[R, ...]`` independent replicas is `expected`."""
    replicas = np.asarray(replicas, np.float64)
    standard_error = replicas.std(0, ddof=1) / np.sqrt(len(replicas))
    error = np.abs(replicas.mean(0) - expected)
    bound = standard_errors * standard_error + atol * (1 + np.abs(expected))
    assert np.all(error <= bound), f"off by {error / standard_error} standard errors"
