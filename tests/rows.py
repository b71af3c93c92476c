"""Small tensors written out, and their comparison."""

import math

import torch

FP64 = {"rtol": 1e-12, "atol": 1e-12}
NAN = math.nan


def row(*values):
    return torch.tensor(values, dtype=torch.float64)


def flags(*values):
    return torch.tensor(values, dtype=torch.bool)


def ids(*values):
    return torch.tensor(values, dtype=torch.int64)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def assert_row(found, *expected):
    torch.testing.assert_close(found, row(*expected), **FP64)
