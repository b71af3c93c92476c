"""AC-Flow's critic: its network, one update by hand, what its statistics mean, the gate, the resume, and two processes as one."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from test_distributed import launch
from torch import Tensor

from flowrl.critic import Critic, CriticNetwork, _Block, _sinusoidal, critic_advantages, potential_rewards
from flowrl.processes import make_accelerator
from flowrl.sections import CriticConfig
from flowrl.seeds import generator
from flowrl.types import UserError

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {"widths": (8, 8), "hidden": 16, "learning_rate": 0.01, "updates_per_iteration": 1, "batch_rows": 1000, "target_decay": 0.75}


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return make_accelerator("cpu")


def make_critic(seed: int = 0, **settings: Any) -> Critic:
    return Critic(CriticConfig(**{**SMALL, **settings}), channels=2, pooled_dim=3, device=CPU, seed=seed)


def make_rows(count: int, *key: int) -> dict[str, Tensor]:
    """Rows whose target is a function of what the critic sees: of the latent where there is little noise, of the prompt everywhere."""
    random = generator("rows", *key)
    x, sigma = torch.randn(count, 2, 4, 4, generator=random), torch.rand(count, generator=random, dtype=torch.float64)
    prompt_row, pooled = torch.randint(3, (count,), generator=random), torch.eye(3)
    mean = torch.randn(count, generator=random)
    x = 0.2 * x + ((1 - sigma) * mean)[:, None, None, None].float()
    target = (torch.tanh(mean) + prompt_row - 1).double()
    return {"x": x, "sigma": sigma, "prompt_row": prompt_row, "target": target, "valid": torch.ones(count, dtype=torch.bool), "pooled": pooled}


def fit(critic: Critic, accelerator: Accelerator, rows: dict[str, Tensor], iteration: int = 1) -> dict[str, float | None]:
    return critic.fit(**rows, generator=generator("fit", iteration), accelerator=accelerator)


def value(critic: Critic, rows: dict[str, Tensor]) -> Tensor:
    return critic.value(rows["x"], rows["sigma"], rows["prompt_row"], pooled=rows["pooled"])


def weights(critic: Critic) -> Tensor:
    return torch.cat([p.detach().flatten() for p in critic.parameters])


def average(critic: Critic) -> Tensor:
    return torch.cat([p.flatten() for p in critic.target.average])


def randomised(channels: int = 2, pooled_dim: int = 3, widths: tuple[int, ...] = (8, 8), hidden: int = 16) -> CriticNetwork:
    """A network whose last layer is no longer zero."""
    torch.manual_seed(0)
    network = CriticNetwork(channels, pooled_dim, widths, hidden)
    torch.nn.init.normal_(network.last.weight)
    return network


# --- advantages ---------------------------------------------------------------------------------------------------------------------------------


def test_the_advantage_is_the_clipped_surplus() -> None:
    shaped, values = torch.tensor([1.0, -2.0]), torch.tensor([[0.25, -3.0, 1.0], [-2.0, 0.5, -2.25]])
    assert critic_advantages(shaped, values, 1.5).tolist() == [[0.75, 1.5, 0.0], [0.0, -1.5, 0.25]]


def test_a_perfect_critic_leaves_no_advantage_and_none_leaves_the_reward() -> None:
    shaped = torch.tensor([0.5, -0.25], dtype=torch.float64)
    assert not critic_advantages(shaped, shaped[:, None].expand(2, 3), 1.0).any()
    assert torch.equal(critic_advantages(shaped, torch.zeros(2, 3), 1.0), shaped[:, None].expand(2, 3).double())


def test_potential_rewards_by_hand() -> None:
    assert potential_rewards(torch.tensor([4.0]), torch.tensor([[1.0, 3.0, 2.5]])).tolist() == [[2.0, -0.5, 1.5]]


@settings(derandomize=True, max_examples=50, deadline=None)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 1000))
def test_potential_rewards_telescope_to_the_unclipped_advantages(samples: int, steps: int, seed: int) -> None:
    random = generator("potential", seed)
    shaped, values = (torch.randn(shape, generator=random, dtype=torch.float64) for shape in ((samples,), (samples, steps)))
    rewards = potential_rewards(shaped, values)
    to_come = rewards.flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(to_come, critic_advantages(shaped, values, math.inf), rtol=0, atol=1e-12)
    torch.testing.assert_close(rewards.sum(1), shaped - values[:, 0], rtol=0, atol=1e-12)


# --- the network --------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(8, 8), (64, 64), (5, 7), (1, 1), (128, 96)])
def test_it_starts_at_zero_for_every_latent_size(size: tuple[int, int]) -> None:
    network = CriticNetwork(4, 6, (64, 128, 256, 256), 256)
    out = network(torch.randn(2, 4, *size, dtype=torch.bfloat16), torch.rand(2, dtype=torch.float64), torch.randn(2, 6, dtype=torch.bfloat16))
    assert out.dtype == torch.float32
    assert out.tolist() == [0.0, 0.0]


def test_it_is_light() -> None:
    # SD3: 16 channels, pooled embeddings of 2048. Convolutions 9 in out + out, norms 2 out, FiLM 2 out (256 + 1), four linear layers.
    network = CriticNetwork(16, 2048, (64, 128, 256, 256), 256)
    blocks = sum(9 * a * b + 3 * b + 514 * b for a, b in [(16, 64), (64, 128), (128, 256), (256, 256)])
    assert sum(p.numel() for p in network.parameters()) == blocks + 65 * 256 + 2049 * 256 + 257 * 256 + 257 == 1_938_881


def test_the_encoding_of_sigma() -> None:
    out = _sinusoidal(torch.tensor([0.0, 0.002], dtype=torch.float64))
    assert out[0].tolist() == [0.0] * 32 + [1.0] * 32
    for i in (0, 8, 31):  # frequencies 10000^(-i/32): 1, 1/10, 10000^(-31/32)
        assert out[1, i].item() == pytest.approx(math.sin(2 * 10_000 ** (-i / 32)), rel=1e-12)
        assert out[1, 32 + i].item() == pytest.approx(math.cos(2 * 10_000 ** (-i / 32)), rel=1e-12)


def test_a_block_by_hand() -> None:
    # One pixel of one channel, 2; weights 0, 1, 2, 3 give 0, 2, 4, 6, with mean 3 and variance 5; times 1 + embedding, plus 10 embedding.
    block = _Block(1, 4, 1)
    for parameter in block.parameters():
        torch.nn.init.zeros_(parameter)
    torch.nn.init.ones_(block.norm.weight)
    block.convolution.weight.data[:, 0, 1, 1] = torch.arange(4.0)
    block.film.weight.data[:, 0] = torch.tensor([1.0] * 4 + [10.0] * 4)
    out = block(torch.full((1, 1, 1, 1), 2.0), torch.tensor([[0.5]]))
    expected = 1.5 * (2 * torch.arange(4.0) - 3) / math.sqrt(5) + 5
    torch.testing.assert_close(out.flatten(), expected * torch.sigmoid(expected), rtol=0, atol=1e-4)


def test_a_block_halves_the_latent() -> None:
    assert [tuple(_Block(2, 4, 3)(torch.zeros(1, 2, *size), torch.zeros(1, 3)).shape) for size in ((8, 8), (5, 7), (1, 1))] == [
        (1, 4, 4, 4),
        (1, 4, 3, 4),
        (1, 4, 1, 1),
    ]


@pytest.mark.parametrize("width", [1, 3, 4, 6, 9, 64])
def test_a_latent_of_one_pixel_is_still_seen(width: int) -> None:
    network = randomised(widths=(width,))
    out = network(torch.tensor([[1.0, 2.0], [-3.0, 0.5]])[:, :, None, None], torch.full((2,), 0.5), torch.zeros(2, 3))
    assert ((out[0] - out[1]).abs().item() > 1e-3) == (width > 1)  # a width of one channel has nothing left after its normalisation


def test_every_input_matters_and_rows_do_not_see_each_other() -> None:
    network = randomised()
    x, sigma, pooled = torch.randn(5, 2, 8, 8), torch.rand(5), torch.randn(5, 3)
    out = network(x, sigma, pooled)
    for changed in (network(x.flip(0), sigma, pooled), network(x, sigma.flip(0), pooled), network(x, sigma, pooled.flip(0))):
        others = torch.tensor([True, True, False, True, True])
        assert ((changed - out).abs() > 1e-5).equal(others)
    one_by_one = torch.cat([network(x[i : i + 1], sigma[i : i + 1], pooled[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(one_by_one, out, rtol=0, atol=1e-5)


def test_its_gradient_is_the_finite_difference() -> None:
    network = randomised().double()
    random = generator("gradient")
    inputs = [torch.randn(shape, generator=random, dtype=torch.float64) for shape in ((3, 2, 5, 6), (3,), (3, 3))]
    parameters = list(network.parameters())
    direction = [torch.randn(p.shape, generator=random, dtype=torch.float64) for p in parameters]
    gradients = torch.autograd.grad(network(*inputs).sum(), parameters)
    slope = sum((g * d).sum() for g, d in zip(gradients, direction, strict=True))
    ends = []
    for h in (1e-6, -1e-6):
        for p, d in zip(parameters, direction, strict=True):
            p.data += h * d
        ends.append(network(*inputs).sum().item())
        for p, d in zip(parameters, direction, strict=True):
            p.data -= h * d
    assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(float(slope), rel=1e-6)
    assert all(g.abs().max() > 0 for g in gradients)


# --- fitting ------------------------------------------------------------------------------------------------------------------------------------


def test_the_first_update_by_hand(accelerator: Accelerator) -> None:
    # V = 0. Huber of 0.5 is 0.5^2 / 2, of 3 and -2 it is 3 - 1/2 and 2 - 1/2; mean 4.125 / 3. Adam's first step is the learning rate against the sign of
    # the gradient, which for the last bias is mean(-0.5, -1, +1) < 0; what is not the last layer has no gradient yet.
    critic, rows = make_critic(), make_rows(3)
    rows["target"] = torch.tensor([0.5, 3.0, -2.0], dtype=torch.float64)
    before = [p.detach().clone() for p in critic.parameters]
    metrics = fit(critic, accelerator, rows)
    assert metrics["critic/loss"] == pytest.approx(1.375)
    assert metrics["critic/value_mean"] == 0.0
    assert metrics["critic/explained_variance"] == 0.0
    assert critic.network.last.bias.item() == pytest.approx(0.01, rel=1e-5)
    gradient = critic.optimizer.state[critic.network.last.bias]["exp_avg"].item()
    assert gradient == pytest.approx(0.1 * (-0.5 / 3))
    for p, old in zip(critic.parameters[:-2], before[:-2], strict=True):
        assert torch.equal(p, old)
    assert (critic.network.last.weight != 0).all()
    for p, mean, old in zip(critic.parameters, critic.target.average, before, strict=True):
        torch.testing.assert_close(mean, 0.75 * old + 0.25 * p.detach(), rtol=0, atol=1e-7)


def test_the_actor_sees_the_average(accelerator: Accelerator) -> None:
    critic, rows = make_critic(), make_rows(50)
    rows["target"] += 2
    for iteration in range(3):
        fit(critic, accelerator, rows, iteration)
    seen = value(critic, rows)
    live = weights(critic)
    for p, mean in zip(critic.parameters, critic.target.average, strict=True):
        p.data.copy_(mean)
    with torch.no_grad():
        torch.testing.assert_close(critic.network(rows["x"], rows["sigma"], rows["pooled"][rows["prompt_row"]]), seen, rtol=0, atol=1e-6)
    assert (weights(critic) - live).abs().max() > 1e-3
    assert 0 < seen.mean() < 1


def test_it_learns_what_can_be_known(accelerator: Accelerator) -> None:
    critic = make_critic(updates_per_iteration=4, batch_rows=64, target_decay=0.9, widths=(16, 16), hidden=32)
    seen = [fit(critic, accelerator, make_rows(256, i), i)["critic/explained_variance"] for i in range(60)]  # rows that it has not been trained with
    assert seen[0] == 0.0
    last = torch.tensor(seen[-10:])
    assert last.min() > 0.75
    assert critic.explained_variance == pytest.approx(last.mean().item(), abs=0.05)
    fresh = make_rows(2000, -1)
    clear, noise = fresh["sigma"] < 0.2, fresh["sigma"] > 0.9
    error = (fresh["target"] - value(critic, fresh)).square()
    assert error[clear].mean() < 0.5 * error[noise].mean()  # the sample cannot be told from noise, its prompt can
    assert error[noise].mean() < 0.7 * fresh["target"][noise].square().mean()


def test_explained_variance_by_hand(accelerator: Accelerator) -> None:
    # Of the valid rows: targets 0, 1, 2, 3 and values 0, 1, 2, 2; variances 20/16 and 3/16 (of 0, 0, 0, 1). The running average starts at 0.
    critic, rows = make_critic(), make_rows(5)
    rows["target"] = torch.tensor([0.0, 1.0, torch.nan, 2.0, 3.0], dtype=torch.float64)
    rows["valid"][2] = False
    rows["x"][2] = torch.nan
    known = torch.tensor([0.0, 1.0, 7.0, 2.0, 2.0])
    metrics = critic.fit(**rows, generator=generator(0), accelerator=accelerator, value=known)
    assert metrics["critic/explained_variance"] == pytest.approx(0.85)
    assert metrics["critic/value_mean"] == 1.25
    assert critic.explained_variance == pytest.approx(0.085)
    critic.fit(**rows, generator=generator(0), accelerator=accelerator, value=known)
    assert critic.explained_variance == pytest.approx(0.9 * 0.085 + 0.1 * 0.85)


def test_a_value_that_is_wrong_by_a_constant_explains_everything(accelerator: Accelerator) -> None:
    critic, rows = make_critic(), make_rows(20)
    metrics = critic.fit(**rows, generator=generator(0), accelerator=accelerator, value=rows["target"] + 5)
    assert metrics["critic/explained_variance"] == pytest.approx(1)


def test_equal_targets_say_nothing_of_the_critic(accelerator: Accelerator) -> None:
    critic, rows = make_critic(), make_rows(7)
    critic.explained_variance = 0.5
    for constant in (0.1, 0.0):
        rows["target"] = torch.full((7,), constant, dtype=torch.float64)
        metrics = critic.fit(**rows, generator=generator(0), accelerator=accelerator, value=torch.arange(7.0))
        assert metrics["critic/explained_variance"] is None
        assert critic.explained_variance == 0.5
        assert metrics["critic/loss"] is not None


def test_without_a_valid_row_nothing_happens(accelerator: Accelerator) -> None:
    critic, rows = make_critic(), make_rows(4)
    rows["valid"][:] = False
    before = weights(critic)
    assert fit(critic, accelerator, rows) == {"critic/loss": None, "critic/explained_variance": None, "critic/value_mean": None}
    assert torch.equal(weights(critic), before)
    none = make_rows(0)
    assert value(critic, none).shape == (0,)
    assert fit(critic, accelerator, none)["critic/loss"] is None


def test_invalid_rows_leave_no_trace(accelerator: Accelerator) -> None:
    rows, less = make_rows(12), make_rows(12)
    valid = torch.arange(12) % 3 != 0
    less = {key: tensor if key == "pooled" else tensor[valid] for key, tensor in less.items()}
    rows["valid"] = valid
    rows["target"][~valid] = torch.nan
    rows["x"][~valid] = torch.inf
    a, b = make_critic(batch_rows=5, updates_per_iteration=3), make_critic(batch_rows=5, updates_per_iteration=3)
    a.fit(**rows, generator=generator(0), accelerator=accelerator)
    numbers = torch.arange(12)[valid]
    b.fit(**less, generator=generator(0), accelerator=accelerator, numbers=numbers)
    assert torch.equal(weights(a), weights(b))


def test_minibatches_are_random_and_follow_the_rows_numbers(accelerator: Accelerator) -> None:
    def trained(rows: dict[str, Tensor], seed: int, numbers: Tensor | None = None) -> Tensor:
        critic = make_critic(batch_rows=4, updates_per_iteration=5)
        critic.fit(**rows, generator=generator(seed), accelerator=accelerator, numbers=numbers)
        return weights(critic)

    rows, order = make_rows(20), torch.randperm(20, generator=generator("order"))
    once = trained(rows, 0)
    assert torch.equal(trained(rows, 0), once)
    assert (trained(rows, 1) - once).abs().max() > 1e-3
    dealt = {key: tensor if key == "pooled" else tensor[order] for key, tensor in rows.items()}
    assert (trained(dealt, 0, order) - once).abs().max() < 1e-5
    assert (trained(dealt, 0) - once).abs().max() > 1e-3


def test_every_row_of_a_minibatch_counts_once(accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch) -> None:
    critic, seen = make_critic(batch_rows=4, updates_per_iteration=200), []
    monkeypatch.setattr(critic, "_update", lambda *arguments: seen.append(arguments[5:7]) or 0.0)
    fit(critic, accelerator, make_rows(10))
    assert all(len(rows) == count == 4 and len(rows.unique()) == 4 for rows, count in seen)
    share = torch.cat([rows for rows, _ in seen]).bincount(minlength=10) / 200
    assert (share - 0.4).abs().max() < 0.15  # 4 standard deviations of a share
    few = make_rows(3)
    seen.clear()
    fit(critic, accelerator, few)
    assert all(rows.tolist() == [0, 1, 2] and count == 3 for rows, count in seen)


def test_values_in_batches_are_values_at_once(accelerator: Accelerator) -> None:
    rows, critic, batched = make_rows(23), make_critic(), make_critic(batch_rows=5)
    fit(critic, accelerator, rows)
    batched.load_state_dict(critic.state_dict())
    torch.testing.assert_close(value(batched, rows), value(critic, rows), rtol=0, atol=1e-6)


def test_no_gradient_leaves_the_critic(accelerator: Accelerator) -> None:
    critic, rows = make_critic(), make_rows(6)
    for key in ("x", "pooled", "target"):
        rows[key].requires_grad_()
    fit(critic, accelerator, rows)
    out = value(critic, rows)
    assert not out.requires_grad
    assert (out.dtype, out.device) == (torch.float32, CPU)
    assert all(rows[key].grad is None for key in ("x", "pooled", "target"))
    assert all(p.grad is None for p in critic.parameters)


def test_a_gradient_that_is_not_finite_is_an_error(accelerator: Accelerator) -> None:
    critic, rows = make_critic(), make_rows(6)
    rows["x"][3] = torch.inf
    before = weights(critic)
    with pytest.raises(UserError, match=r"the critic's gradient is no longer finite; .* lower critic\.learning_rate"):
        fit(critic, accelerator, rows)
    assert torch.equal(weights(critic), before)


def test_weights_follow_from_the_seed_and_nothing_else() -> None:
    state = torch.get_rng_state()
    first = weights(make_critic(seed=3))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert torch.equal(weights(make_critic(seed=3)), first)
    assert not torch.equal(weights(make_critic(seed=4)), first)


# --- the gate -----------------------------------------------------------------------------------------------------------------------------------


def test_warm_up_gate_and_ramp() -> None:
    critic, seen = make_critic(warmup_iterations=3, gate=0.1, ramp_iterations=4), []
    for iteration, explained in enumerate([0.9, 0.9, 0.9, 0.1, 0.05, 0.11, -1.0, 0.0, 0.0, 0.0], start=1):
        critic.explained_variance = explained
        critic.update_gate(iteration)
        seen.append(critic.strength(iteration))
    assert seen == [0, 0, 0, 0, 0, 0.25, 0.5, 0.75, 1, 1]  # 0.1 is not above 0.1; once open, it stays so
    assert critic.opened == 6
    assert critic.strength(5) == 0
    assert critic.strength(1000) == 1


def test_the_ramp_starts_right_after_the_warm_up_if_the_critic_is_ready() -> None:
    # min(1, (iteration - warm-up) / ramp)
    critic = make_critic(warmup_iterations=2, ramp_iterations=5, gate=-1.0)
    seen = []
    for iteration in range(1, 10):
        critic.update_gate(iteration)
        seen.append(critic.strength(iteration))
    assert seen == pytest.approx([min(1.0, max(0.0, (i - 2) / 5)) for i in range(1, 10)])


@pytest.mark.parametrize("ramp", [0, 1])
def test_without_ramp_the_advantages_have_full_size_at_once(ramp: int) -> None:
    critic = make_critic(warmup_iterations=0, ramp_iterations=ramp, gate=-1.0)
    critic.update_gate(1)
    assert critic.strength(1) == 1


def test_a_gate_that_stays_shut_stops_the_run() -> None:
    critic = make_critic(warmup_iterations=2, gate=0.5, gate_patience=3)
    critic.explained_variance = 0.25
    for iteration in range(1, 5):
        critic.update_gate(iteration)
    with pytest.raises(
        UserError, match=r"critic\.gate: 3 iterations after the warm-up the critic explains 0\.25 of .* not more than 0\.5; give it more updates"
    ):
        critic.update_gate(5)
    critic.explained_variance = 0.75  # the last try counts
    critic.update_gate(5)
    assert critic.opened == 5


def test_disabled_it_is_zero_and_only_the_schedule_is_left(accelerator: Accelerator) -> None:
    critic, rows = make_critic(enabled=False, warmup_iterations=2, ramp_iterations=2), make_rows(4)
    before = weights(critic)
    seen = []
    for iteration in range(1, 6):
        assert fit(critic, accelerator, rows, iteration) == {}
        critic.update_gate(iteration)
        seen.append(critic.strength(iteration))
    assert seen == [0, 0, 0.5, 1, 1]
    assert value(critic, rows).tolist() == [0.0] * 4
    assert torch.equal(weights(critic), before)


# --- state --------------------------------------------------------------------------------------------------------------------------------------


def saved(critic: Critic) -> dict[str, Any]:
    """The state as a checkpoint gives it back."""
    file = io.BytesIO()
    torch.save(critic.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_a_resumed_critic_goes_on_bit_by_bit(accelerator: Accelerator) -> None:
    def iterate(critic: Critic, iterations: range) -> list[dict[str, float | None]]:
        seen = []
        for i in iterations:
            seen.append(fit(critic, accelerator, make_rows(40, i), i))
            critic.update_gate(i)
            seen[-1]["strength"] = critic.strength(i)
        return seen

    settings: dict[str, Any] = {"batch_rows": 16, "updates_per_iteration": 2, "warmup_iterations": 1, "gate": -1.0, "ramp_iterations": 8}
    whole = make_critic(**settings)
    iterate(whole, range(1, 4))
    state = saved(whole)
    later = iterate(whole, range(4, 7))
    resumed = make_critic(seed=1, **settings)
    resumed.load_state_dict(state)
    assert iterate(resumed, range(4, 7)) == later
    assert torch.equal(weights(resumed), weights(whole))
    assert torch.equal(average(resumed), average(whole))
    assert (resumed.opened, resumed.explained_variance) == (2, whole.explained_variance)
    assert later[-1]["strength"] == 5 / 8


def test_the_learning_rate_is_the_configs() -> None:
    critic = make_critic(learning_rate=0.5)
    critic.load_state_dict(saved(make_critic(learning_rate=0.25)))
    assert critic.optimizer.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize("settings", [{"widths": (8, 4)}, {"widths": (8,)}, {"hidden": 8}])
def test_other_sizes_cannot_be_resumed(settings: dict[str, Any]) -> None:
    critic = make_critic(**settings)
    before = weights(critic)
    with pytest.raises(UserError, match=r"critic\.widths and critic\.hidden cannot be changed on a resume"):
        critic.load_state_dict(saved(make_critic()))
    assert torch.equal(weights(critic), before)


# --- two processes ------------------------------------------------------------------------------------------------------------------------------

SCRIPT = """
import json, sys
from pathlib import Path
import torch
import test_critic
from flowrl.processes import make_accelerator
torch.set_num_threads(1)
accelerator = make_accelerator("cpu")
assert accelerator.num_processes == 2
for name in ("dealt", "alone"):
    critic, metrics = test_critic.train(name, accelerator)
    state = {"weights": test_critic.weights(critic), "average": test_critic.average(critic), "metrics": metrics, "explained": critic.explained_variance}
    torch.save(state, Path(sys.argv[1]) / f"{name}_{accelerator.process_index}.pt")
"""


def train(name: str, accelerator: Accelerator) -> tuple[Critic, list[dict[str, float | None]]]:
    """Five iterations on the same 30 rows each, of which a process has every other one, or ("alone") the first process has the only valid ones."""
    critic, metrics = make_critic(batch_rows=8, updates_per_iteration=3), []
    critic.optimizer.param_groups[0]["eps"] = 0.01  # Adam's step is then a smooth function of the gradient
    for iteration in range(5):
        rows, numbers = make_rows(30, iteration), 7 * torch.arange(30)
        rows["valid"] = numbers % 5 != 0
        if name == "alone":
            rows["valid"] &= numbers % 2 == 0
        mine = slice(accelerator.process_index, None, accelerator.num_processes)
        rows = {key: tensor if key == "pooled" else tensor[mine] for key, tensor in rows.items()}
        metrics.append(critic.fit(**rows, generator=generator("two", iteration), accelerator=accelerator, numbers=numbers[mine]))
    return critic, metrics


@pytest.mark.slow
def test_two_processes_train_as_one_does(tmp_path: Path, accelerator: Accelerator) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    done = launch("torch.distributed.run", [str(tmp_path / "script.py"), str(tmp_path)])
    assert done.returncode == 0, done.stderr
    for name in ("dealt", "alone"):
        critic, metrics = train(name, accelerator)
        first, second = (torch.load(tmp_path / f"{name}_{process}.pt", weights_only=True) for process in (0, 1))
        assert torch.equal(first["weights"], second["weights"])
        assert torch.equal(first["average"], second["average"])
        assert first["metrics"] == second["metrics"]
        assert (first["weights"] - weights(critic)).abs().max() < 1e-5
        assert (first["average"] - average(critic)).abs().max() < 1e-5
        assert (weights(critic) - weights(make_critic())).abs().max() > 1e-2
        assert first["explained"] == pytest.approx(critic.explained_variance, abs=1e-5)
        for theirs, ours in zip(first["metrics"], metrics, strict=True):
            assert theirs == pytest.approx(ours, abs=1e-5)
