"""The losses and gradients of TRL's GRPO trainer, at the pinned version, equal ours on random tensors with masks. TRL is a test-only dependency.

Its loss is one method that asks a model for log-probabilities alone; a stand-in without a model hands it random ones. Every sequence has a decision that
counts: TRL counts empty sequences in its means, we do not.
"""

import importlib.metadata
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from flowrl.core.objectives import OBJECTIVES
from flowrl.core.ratio_levels import at_level, importance_weights, off_policy_sequence_mask
from flowrl.core.reductions import sequence_weights
from flowrl.core.regularizers import categorical_kl_estimate, entropy_bonus, off_policy_kl
from flowrl.core.token_weights import top_entropy_mask
from flowrl.types import Decisions

pytestmark = pytest.mark.slow  # importing TRL takes most of the time

PIN = "1.16.0"
TIGHT = {"rtol": 1e-8, "atol": 1e-10}
MAX_LENGTH = 11
LOW, HIGH, CAP = 0.2, 0.28, 1.5
SAPO = {"temperature_positive": 1.0, "temperature_negative": 1.05}

# loss type of TRL -> our objective with its arguments, our reduction with its arguments
OURS = {
    "grpo": ("clipped_surrogate", {"clip_low": LOW, "clip_high": HIGH}, "seq_mean_token_mean", {}),
    "bnpo": ("clipped_surrogate", {"clip_low": LOW, "clip_high": HIGH}, "mean", {}),  # not Beta normalisation: the token mean, text.md 15.1
    "dapo": ("clipped_surrogate", {"clip_low": LOW, "clip_high": HIGH}, "mean", {}),
    "dr_grpo": ("clipped_surrogate", {"clip_low": LOW, "clip_high": HIGH}, "seq_mean_token_sum_norm", {"max_length": MAX_LENGTH}),
    "luspo": ("clipped_surrogate", {"clip_low": LOW, "clip_high": HIGH}, "seq_mean_token_sum", {}),
    "cispo": ("cispo", {"clip_low": 1.0, "clip_high": CAP - 1}, "mean", {}),
    "sapo": ("sapo", SAPO, "seq_mean_token_mean", {}),
    "vespo": ("vespo", {}, "mean", {}),
}


@pytest.fixture(scope="module")
def trainer():
    pytest.importorskip("trl", reason="TRL is a test-only dependency")
    if importlib.metadata.version("trl") != PIN:
        pytest.skip(f"parity is pinned to TRL {PIN}")
    from trl.trainer.grpo_trainer import GRPOTrainer

    return GRPOTrainer


@pytest.fixture(autouse=True)
def double():
    """TRL makes SAPO's temperatures in the default dtype; in float32 they would be off by 1e-8."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Batch:
    """Random tensors of 5 sequences of up to 8 decisions; ratios on both sides of all bounds."""

    def __init__(self, seed, spread=0.6):
        generator = torch.Generator().manual_seed(seed)
        shape = (5, 8)
        self.old = -0.2 - 2 * torch.rand(shape, generator=generator)
        self.log_prob = (self.old + spread * torch.randn(shape, generator=generator)).requires_grad_()
        self.ref, self.sampled = (self.old + 0.4 * torch.randn(shape, generator=generator) for _ in range(2))
        self.advantages = torch.randn(5, generator=generator)
        self.entropy = torch.rand(shape, generator=generator)
        self.mask = torch.arange(8) < torch.tensor([8, 1, 5, 3, 7])[:, None]
        self.mask[0, 2] = self.mask[4, 0] = False  # what a tool wrote

    def decisions(self):
        return Decisions(self.log_prob, self.old, self.advantages[:, None].expand(5, 8), self.mask)


def theirs(trainer, batch, loss_type, *, level="token", beta=0.0, corrected=False, delta=None, off_policy=None, weights=None, quantile=1.0, bonus=0.0):
    """TRL's loss of one batch, which is the whole batch of one process."""
    same = SimpleNamespace(
        num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x, pad_across_processes=lambda x, dim, pad_index: x, sync_gradients=False
    )
    settings = SimpleNamespace(use_bias_correction_kl=corrected, delta=delta, steps_per_generation=1)
    settings.sapo_temperature_pos, settings.sapo_temperature_neg = SAPO["temperature_positive"], SAPO["temperature_negative"]
    settings.vespo_k_pos, settings.vespo_lambda_pos, settings.vespo_k_neg, settings.vespo_lambda_neg = 2.0, 3.0, 3.0, 2.0
    stub = SimpleNamespace(
        accelerator=same,
        args=settings,
        loss_type=loss_type,
        importance_sampling_level=level,
        epsilon_low=LOW,
        epsilon_high=CAP if loss_type == "cispo" else HIGH,
        beta=beta,
        max_completion_length=MAX_LENGTH,
        off_policy_mask_threshold=off_policy,
        use_vllm=weights is not None,
        vllm_importance_sampling_correction=weights is not None,
        top_entropy_quantile=quantile,
        aux_loss_enabled=False,
        use_adaptive_entropy=False,
        entropy_coef=bonus,
        _entropy_bonus_enabled=bonus > 0,
        current_gradient_accumulation_steps=1,
        model=SimpleNamespace(training=True),
        _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (batch.log_prob, batch.entropy, None),
        get_off_policy_mask=trainer.get_off_policy_mask,
        get_gamma_weights=trainer.get_gamma_weights,
    )
    stub.get_high_entropy_mask = lambda *args: trainer.get_high_entropy_mask(stub, *args)
    ids, mask = torch.zeros(5, 8, dtype=torch.int64), batch.mask.to(torch.int64)
    inputs = {"prompt_ids": ids[:, :2], "prompt_mask": ids[:, :2] + 1, "completion_ids": ids, "completion_mask": mask, "num_items_in_batch": mask.sum()}
    inputs |= {"advantages": batch.advantages, "old_per_token_logps": batch.old, "ref_per_token_logps": batch.ref, "sampling_per_token_logps": batch.sampled}
    if weights is not None:
        inputs["importance_sampling_ratio"] = weights
    return trainer._compute_loss(stub, None, inputs)


def ours(batch, loss_type, *, level="token", beta=0.0, corrected=False, delta=None, off_policy=None, weights=None, quantile=1.0, bonus=0.0):
    name, arguments, reduction, more = OURS[loss_type]
    if delta is not None:
        arguments = arguments | {"ratio_max": delta}
    decisions = batch.decisions()
    if level == "sequence":
        decisions = at_level(decisions, "seq_mean")
    loss = OBJECTIVES[name](decisions, **arguments).loss
    if off_policy is not None:
        loss = loss * off_policy_sequence_mask(decisions.advantages, batch.log_prob, batch.sampled, batch.mask, threshold=off_policy)
    if quantile < 1:
        loss = loss * top_entropy_mask(batch.entropy, batch.mask, share=quantile)
    if weights is not None:
        loss = loss * weights
    if beta:
        log_ratio = decisions.log_prob - decisions.old_log_prob
        kl = off_policy_kl("k3", batch.log_prob, batch.ref, log_ratio) if corrected else categorical_kl_estimate("k3", batch.log_prob, batch.ref)
        loss = loss + beta * kl
    weight, total = sequence_weights(reduction, batch.mask, dtype=torch.float64, **more)
    value = (weight * loss).sum() / total
    if bonus:
        acts = top_entropy_mask(batch.entropy, batch.mask, share=quantile) if quantile < 1 else batch.mask
        value = value + (entropy_bonus(batch.entropy, weight=bonus) * acts).sum() / acts.sum()
    return value


def assert_equal(trainer, batch, loss_type, **options):
    one, other = theirs(trainer, batch, loss_type, **options), ours(batch, loss_type, **options)
    torch.testing.assert_close(other, one, **TIGHT)
    (gradient,), (expected,) = (torch.autograd.grad(loss, batch.log_prob, retain_graph=True) for loss in (other, one))
    torch.testing.assert_close(gradient, expected, **TIGHT)
    assert gradient[~batch.mask].eq(0).all()
    assert gradient.abs().max() > 1e-4


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("loss_type", OURS)
def test_every_loss_type_at_the_level_of_tokens(trainer, loss_type, seed, beta):
    assert_equal(trainer, Batch(seed), loss_type, beta=beta)


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dapo", "dr_grpo", "luspo", "sapo"])
def test_every_loss_type_at_the_level_of_sequences(trainer, loss_type, beta):
    # grpo is GSPO, luspo is LUSPO
    for seed, spread in ((3, 0.6), (4, 2.0)):
        assert_equal(trainer, Batch(seed, spread), loss_type, level="sequence", beta=beta)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "sapo"])
def test_the_kl_that_is_corrected_off_policy(trainer, loss_type, level):
    assert_equal(trainer, Batch(5), loss_type, level=level, beta=0.04, corrected=True)


@pytest.mark.parametrize("delta", [1.1, 1.6, 4.0])
@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_two_sided_clipping(trainer, loss_type, delta):
    assert_equal(trainer, Batch(6, 1.5), loss_type, delta=delta, beta=0.04)


@pytest.mark.parametrize("loss_type", ["grpo", "cispo", "sapo", "vespo"])
def test_sequences_that_left_the_policy(trainer, loss_type):
    batch = Batch(7, 1.0)
    kept = off_policy_sequence_mask(batch.decisions().advantages, batch.log_prob, batch.sampled, batch.mask, threshold=0.1)
    assert 0 < int(kept.any(1).sum()) < 5
    assert_equal(trainer, batch, loss_type, off_policy=0.1, beta=0.04)


@pytest.mark.parametrize("kind", ["truncated", "masked"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_weights_for_another_engine_multiply_the_loss_alike(trainer, kind, level):
    batch = Batch(8)
    weights = importance_weights(batch.old, batch.sampled, batch.mask, kind, level, low=0.5, high=2.0)
    assert_equal(trainer, batch, "dapo", weights=weights, beta=0.04)


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_high_entropy_decisions_and_the_entropy_bonus(trainer, share):
    assert_equal(trainer, Batch(9), "dapo", quantile=share)
    batch = Batch(10)
    batch.entropy = (batch.log_prob.exp() * -batch.log_prob).clamp_min(0)  # so that the bonus has a gradient
    assert_equal(trainer, batch, "grpo", quantile=share, bonus=0.01)
    assert_equal(trainer, batch, "grpo", bonus=0.01)
