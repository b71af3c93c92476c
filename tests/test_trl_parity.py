"""The losses and gradients of TRL's GRPO trainer, at the pinned version, equal ours on random tensors with masks. TRL is a test-only dependency.

Its loss is one method that asks a model for log-probabilities alone; a stand-in without a model hands it random ones. Every sequence has a decision that
counts: TRL counts empty sequences in its means, we do not.

All its loss types are ours too. Two have something to say at the level of sequences: VESPO makes a ratio of its own whatever the level, and CISPO's value is
there ours less a constant.
"""

import importlib.metadata
import inspect
import re
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from flowrl.core.objectives import OBJECTIVES
from flowrl.core.ratio_levels import at_level, importance_weights, off_policy_sequence_mask
from flowrl.core.reductions import sequence_weights
from flowrl.core.regularizers import EntropyController, categorical_kl_estimate, entropy_bonus, off_policy_kl
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
CLIPPED = [name for name, row in OURS.items() if row[0] == "clipped_surrogate"]
LEVELS = ["token", "sequence"]


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
        advantages = self.advantages if self.advantages.ndim == 2 else self.advantages[:, None].expand(5, 8)
        return Decisions(self.log_prob, self.old, advantages, self.mask)


def stand_in(trainer, batch, loss_type, *, level="token", beta=0.0, corrected=False, delta=None, off_policy=None, weights=None, quantile=1.0, bonus=0.0):
    """A trainer of one process without a model."""
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
    return stub


def shown(batch, weights=None):
    """What it is given of a batch, which is the whole batch."""
    ids, mask = torch.zeros(batch.mask.shape, dtype=torch.int64), batch.mask.to(torch.int64)
    inputs = {"prompt_ids": ids[:, :2], "prompt_mask": ids[:, :2] + 1, "completion_ids": ids, "completion_mask": mask, "num_items_in_batch": mask.sum()}
    inputs |= {"advantages": batch.advantages, "old_per_token_logps": batch.old, "ref_per_token_logps": batch.ref, "sampling_per_token_logps": batch.sampled}
    if weights is not None:
        inputs["importance_sampling_ratio"] = weights
    return inputs


def theirs(trainer, batch, loss_type, **options):
    """TRL's loss of a batch."""
    return trainer._compute_loss(stand_in(trainer, batch, loss_type, **options), None, shown(batch, options.get("weights")))


def ours(batch, loss_type, *, level="token", beta=0.0, corrected=False, delta=None, off_policy=None, weights=None, quantile=1.0, bonus=0.0):
    name, arguments, reduction, more = OURS[loss_type]
    if delta is not None:
        arguments = arguments | {"ratio_max": delta}
    decisions = plain = batch.decisions()
    if level == "sequence":
        decisions = at_level(plain, "seq_mean")
    objective = OBJECTIVES[name](plain if name == "vespo" else decisions, **arguments)
    loss = objective.loss
    if name == "cispo" and level == "sequence":  # ours holds the sequence's mean log-ratio where TRL has each log-probability: the old ones are constants
        loss = loss - objective.metrics["ratio"].clamp(max=CAP) * plain.advantages * batch.old
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
    assert_same(ours(batch, loss_type, **options), theirs(trainer, batch, loss_type, **options), batch)


def assert_same(found, wanted, batch):
    torch.testing.assert_close(found, wanted, **TIGHT)
    (gradient,), (expected,) = (torch.autograd.grad(loss, batch.log_prob, retain_graph=True) for loss in (found, wanted))
    torch.testing.assert_close(gradient, expected, **TIGHT)
    assert gradient[~batch.mask].eq(0).all()
    assert gradient.abs().max() > 1e-4


def test_every_loss_type_of_trl_is_compared(trainer):
    source = inspect.getsource(trainer._compute_loss)
    named = [re.findall(r'"(\w+)"', line) for line in re.findall(r"self\.loss_type (?:==|in) (.*):", source)]
    assert {name for names in named for name in names} == set(OURS)


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("loss_type", OURS)
def test_every_loss_type_at_the_level_of_tokens(trainer, loss_type, seed, beta):
    assert_equal(trainer, Batch(seed), loss_type, beta=beta)


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("loss_type", OURS)
def test_every_loss_type_at_the_level_of_sequences(trainer, loss_type, beta):
    # grpo is GSPO, luspo is LUSPO
    for seed, spread in ((3, 0.6), (4, 2.0)):
        assert_equal(trainer, Batch(seed, spread), loss_type, level="sequence", beta=beta)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", OURS)
def test_the_first_update_in_which_trl_has_no_old_log_probabilities(trainer, loss_type, level):
    batch = Batch(11)
    given = shown(batch)
    del given["old_per_token_logps"]
    expected = trainer._compute_loss(stand_in(trainer, batch, loss_type, level=level, beta=0.04), None, given)
    batch.old = batch.log_prob.detach()
    assert_same(ours(batch, loss_type, level=level, beta=0.04), expected, batch)


@pytest.mark.parametrize("loss_type", OURS)
def test_an_advantage_for_every_token(trainer, loss_type):
    batch = Batch(12)
    batch.advantages = torch.randn(5, 8, generator=torch.Generator().manual_seed(12))
    assert_equal(trainer, batch, loss_type, beta=0.04)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", [name for name in OURS if name != "bnpo"])
def test_micro_batches_of_one_sequence_add_to_the_batch(trainer, loss_type, level):
    # bnpo takes the token mean of each micro-batch, and so depends on how the batch is cut
    whole, total = Batch(13), torch.zeros(())
    for row in range(5):
        part = Batch(13)
        for name in ("old", "log_prob", "ref", "sampled", "advantages", "entropy", "mask"):
            setattr(part, name, getattr(whole, name)[row : row + 1])
        stub = stand_in(trainer, part, loss_type, level=level, beta=0.04)
        stub.current_gradient_accumulation_steps = stub.args.steps_per_generation = 5
        given = shown(part) | {"num_items_in_batch": whole.mask.sum()}
        total = total + trainer._compute_loss(stub, None, given)
    assert_same(ours(whole, loss_type, level=level, beta=0.04), total, whole)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", OURS)
def test_the_kl_that_is_corrected_off_policy(trainer, loss_type, level):
    assert_equal(trainer, Batch(5), loss_type, level=level, beta=0.04, corrected=True)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("delta", [1.1, 1.6, 4.0])
@pytest.mark.parametrize("loss_type", CLIPPED)
def test_two_sided_clipping(trainer, loss_type, delta, level):
    assert_equal(trainer, Batch(6, 1.5), loss_type, delta=delta, beta=0.04, level=level)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", OURS)
def test_sequences_that_left_the_policy(trainer, loss_type, level):
    batch = Batch(7, 1.0)
    kept = off_policy_sequence_mask(batch.decisions().advantages, batch.log_prob, batch.sampled, batch.mask, threshold=0.1)
    assert 0 < int(kept.any(1).sum()) < 5
    assert_equal(trainer, batch, loss_type, off_policy=0.1, beta=0.04, level=level)


@pytest.mark.parametrize("kind", ["truncated", "masked"])
@pytest.mark.parametrize("of", LEVELS)
@pytest.mark.parametrize("loss_type", [name for name in OURS if name != "vespo"])
def test_weights_for_another_engine_multiply_the_loss_alike(trainer, loss_type, of, kind):
    batch = Batch(8)
    weights = importance_weights(batch.old, batch.sampled, batch.mask, kind, of, low=0.5, high=2.0)
    assert_equal(trainer, batch, loss_type, weights=weights, beta=0.04)
    if loss_type != "cispo" or of == "sequence":  # CISPO at the level of sequences has no loss of single tokens here, which weights of tokens could tell apart
        assert_equal(trainer, batch, loss_type, weights=weights, beta=0.04, level="sequence")


@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_vespo_takes_the_weights_for_another_engine_into_its_own_ratio(trainer, beta):
    """As if the old log-probabilities were the engine's, as far as its bounds let them be."""
    batch = Batch(14, 0.3)
    weights = importance_weights(batch.old, batch.sampled, batch.mask, "truncated", "token", low=0.5, high=2.0)
    expected = theirs(trainer, batch, "vespo", weights=weights, beta=beta)
    batch.old = batch.old - weights.log()
    assert_same(ours(batch, "vespo", beta=beta), expected, batch)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", [name for name in OURS if name != "cispo"])
@pytest.mark.parametrize("share", [0.2, 0.5])
def test_high_entropy_decisions(trainer, loss_type, share, level):
    assert_equal(trainer, Batch(9), loss_type, quantile=share, level=level, beta=0.04)


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_high_entropy_decisions_and_the_entropy_bonus(trainer, share):
    assert_equal(trainer, Batch(9), "cispo", quantile=share)
    batch = Batch(10)
    batch.entropy = (batch.log_prob.exp() * -batch.log_prob).clamp_min(0)  # so that the bonus has a gradient
    assert_equal(trainer, batch, "grpo", quantile=share, bonus=0.01)
    assert_equal(trainer, batch, "grpo", bonus=0.01)


def test_the_entropy_bonus_that_follows_a_target(trainer):
    batch, controller = Batch(15), EntropyController(target=0.45, coefficient=0.01, step=0.004, low=0.001, high=0.016)
    stub = stand_in(trainer, batch, "grpo", bonus=0.01)
    stub.use_adaptive_entropy, stub.accelerator.sync_gradients = True, True
    stub._entropy_window_stats, stub._last_world_entropy = None, -1.0
    for name, value in {"target": 0.45, "coef_delta": 0.004, "coef_min": 0.001, "coef_max": 0.016}.items():
        setattr(stub.args, f"entropy_{name}", value)
    seen = set()
    for mean in (0.4, 0.3, 0.4, 0.6, 0.7, 0.5, 0.6, 0.45, 0.2, 0.9):
        batch.entropy = batch.log_prob.sigmoid()
        batch.entropy = batch.entropy + mean - batch.entropy[batch.mask].mean().detach()
        expected = trainer._compute_loss(stub, None, shown(batch))
        assert_same(ours(batch, "grpo", bonus=controller.weight), expected, batch)
        controller = controller.updated(batch.entropy[batch.mask].mean().item())
        assert controller.coefficient == pytest.approx(stub.entropy_coef, rel=1e-12)
        seen.add(controller.weight)
    assert {0.0, 0.016} < seen


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("seed", range(3))
def test_gmpo_of_trls_experimental_trainer(trainer, seed, beta):
    from trl.experimental.gmpo.gmpo_trainer import GMPOTrainer

    batch = Batch(seed, 0.8)
    stub = stand_in(trainer, batch, "grpo", beta=beta)
    stub.epsilon_low, stub.epsilon_high = 0.4, 0.3
    loss = OBJECTIVES["gmpo"](batch.decisions(), clip_low=0.4, clip_high=0.3).loss
    loss = loss + beta * categorical_kl_estimate("k3", batch.log_prob, batch.ref)
    weight, total = sequence_weights("seq_mean", batch.mask, dtype=torch.float64)
    assert_same((weight * loss).sum() / total, GMPOTrainer._compute_loss(stub, None, shown(batch)), batch)
