"""Arrays for the simulator's tests, poisoned where kernels write."""

import numpy as np
import simulated_kernels as kernels

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.standard_normal(shape).astype("float32")


def nan(*shape, dtype="float32"):
    return np.full(shape, np.nan).astype(dtype)


def operands():
    a, b = normal(kernels.K * kernels.M), normal(kernels.K * kernels.N)
    return {"a": a, "b": b, "y": nan(kernels.M, kernels.N)}
