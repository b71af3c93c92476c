"""Chunked statistics of tokens are those of the whole softmax, with its gradients, and the whole softmax never exists."""

from __future__ import annotations

import math

import pytest
import torch
from rows import FP64, assert_row, ids, row, seeded
from torch import Tensor, nn
from torch.nn.functional import linear

from flowrl.core.token_weights import min_p_log_prob
from flowrl.policies.token_statistics import COLUMNS, OutputHead, positions_at_once, token_statistics

SCALARS = ("entropy", "square_sum", "mean_log_prob", "min_p")
FP32 = {"rtol": 1e-5, "atol": 1e-5}


def some(n: int = 11, hidden: int = 5, vocabulary: int = 17, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, a head's weight and bias, and targets."""
    g = seeded(1)
    x, w, b = (torch.randn(*shape, generator=g, dtype=dtype) for shape in ((n, hidden), (vocabulary, hidden), (vocabulary,)))
    return x.requires_grad_(), w.requires_grad_(), b.requires_grad_(), torch.randint(vocabulary, (n,), generator=g)


def naive(logits: Tensor, targets: Tensor, kappa: float = 0.02) -> dict[str, Tensor]:
    log_p = logits.log_softmax(-1)
    return {
        "log_prob": log_p.gather(-1, targets[:, None])[:, 0],
        "entropy": -(log_p.exp() * log_p).sum(-1),
        "square_sum": log_p.exp().square().sum(-1),
        "mean_log_prob": log_p.mean(-1),
        "min_p": min_p_log_prob(log_p, targets, kappa=kappa),
        "distribution": log_p,
    }


def test_values_by_hand():
    logits = row(0.5, 0.25, 0.25).log().expand(2, 3)
    found = token_statistics(nn.Identity(), logits, ids(0, 1), columns=[*SCALARS, "distribution"], kappa=0.6, at_once=1)
    assert_row(found["log_prob"], -math.log(2), -2 * math.log(2))
    assert_row(found["entropy"], 1.5 * math.log(2), 1.5 * math.log(2))
    assert_row(found["square_sum"], 0.375, 0.375)
    assert_row(found["mean_log_prob"], -5 / 3 * math.log(2), -5 / 3 * math.log(2))
    assert_row(found["min_p"], 0.0, -1e4)  # 0.25 is below 0.6 x 0.5
    torch.testing.assert_close(found["distribution"], logits, **FP64)


def test_temperature_divides_the_logits_and_scale_and_softcap_come_before_it():
    x, w, b, targets = some(dtype=torch.float64)
    head = OutputHead(lambda h: linear(h, w, b), scale=0.5, softcap=3.0)
    found = token_statistics(head, x, targets, columns=SCALARS, temperature=0.7, at_once=4)
    logits = 3 * torch.tanh(linear(x, w, b) * 0.5 / 3) / 0.7
    for name, value in naive(logits, targets).items():
        if name in found:
            torch.testing.assert_close(found[name], value, **FP64)


@pytest.mark.parametrize("at_once", [1, 4, 11, 100])
def test_it_is_the_naive_computation_in_float32_whatever_the_chunk(at_once: int):
    x, w, b, targets = some()
    found = token_statistics(lambda h: linear(h, w, b), x, targets, columns=[*SCALARS, "distribution"], kappa=0.1, at_once=at_once)
    expected = naive(linear(x, w, b), targets, 0.1)
    assert set(found) == set(expected)
    g = seeded(2)
    factors = {name: torch.randn(value.shape, generator=g) for name, value in expected.items() if name != "min_p"}
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **FP32)
    ours, theirs = (torch.autograd.grad(sum((values[name] * factors[name]).sum() for name in factors), (x, w, b)) for values in (found, expected))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, **FP32)
    assert not found["min_p"].requires_grad


@pytest.mark.parametrize("name", ["log_prob", "entropy", "square_sum", "mean_log_prob", "distribution"])
def test_gradients_by_finite_differences(name: str):
    x, w, b, targets = some(n=5, hidden=3, vocabulary=4, dtype=torch.float64)

    def value(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        head = OutputHead(lambda h: linear(h, w, b), scale=1.3, softcap=5.0)
        return token_statistics(head, x, targets, columns=[name] if name != "log_prob" else [], temperature=0.9, at_once=2)[name]

    assert torch.autograd.gradcheck(value, (x, w, b))


def test_nothing_as_large_as_all_logits_is_made_or_kept_for_the_backward_pass():
    x, w, b, targets = some(n=64, hidden=4, vocabulary=100)
    kept, made = [], []

    def head(h: Tensor) -> Tensor:
        made.append(len(h))
        return linear(h, w, b)

    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t):
        found = token_statistics(head, x, targets, columns=["entropy"], at_once=8)
    assert max(kept, default=0) <= max(x.numel(), w.numel())
    assert made == [8] * 8
    (found["log_prob"] + found["entropy"]).sum().backward()
    assert made == [8] * 16  # each part once more


def test_without_gradient_the_head_runs_once_and_no_positions_are_no_error():
    made = []
    head = lambda h: (made.append(len(h)), h)[1]  # noqa: E731
    with torch.no_grad():
        token_statistics(head, torch.zeros(6, 3), torch.zeros(6, dtype=torch.int64), at_once=4)
    assert made == [4, 2]
    empty = token_statistics(head, torch.zeros(0, 3, requires_grad=True), torch.zeros(0, dtype=torch.int64), columns=SCALARS, at_once=4)
    assert all(value.shape == (0,) for value in empty.values())


def test_logits_in_bfloat16_have_statistics_in_float32():
    x, w, b, targets = some()
    with torch.autocast("cpu", torch.bfloat16):
        found = token_statistics(lambda h: linear(h, w, b), x, targets, columns=SCALARS, at_once=4)
        logits = linear(x, w, b)
    assert logits.dtype == torch.bfloat16
    for name, value in naive(logits.detach().float(), targets).items():
        if name in found:
            torch.testing.assert_close(found[name].detach(), value, **FP32)
    found = token_statistics(nn.Identity(), torch.randn(4, 8, generator=seeded()).bfloat16(), torch.zeros(4, dtype=torch.int64), columns=SCALARS, at_once=4)
    assert {value.dtype for value in found.values()} == {torch.float32}


def test_chunks_fit_the_vocabulary_and_unknown_columns_are_named():
    assert [positions_at_once(size) for size in (1, 2**17, 2**24, 2**30)] == [2**24, 128, 1, 1]
    with pytest.raises(ValueError, match=r"^unknown column 'entropie'; known: entropy, square_sum, "):
        token_statistics(nn.Identity(), torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64), columns=["entropie"], at_once=1)
    assert list(COLUMNS) == ["entropy", "square_sum", "mean_log_prob", "min_p", "distribution", "hidden"]
