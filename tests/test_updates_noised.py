"""Noised samples: the states follow from seed, iteration and group, are shared within a slot, and are one network row each."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from flowrl.config import Config
from flowrl.seeds import generator
from flowrl.updates.noised import NoisedSamples
from samplers.forest import leaves_only
from samplers.schedules import shifted_grid

SHAPE = (2, 3, 3)
SIGMAS = shifted_grid(5, 3.0)


@dataclass
class Policy:
    """All that a noised sample asks of one."""

    rows_per_forward: int = 100
    latent_shape: tuple[int, ...] = SHAPE
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    calls: list[int] = field(default_factory=list)

    def velocity(self, x: Tensor, sigma: Tensor, prompt_row: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        self.calls.append(len(x))
        return x * 2 + prompt_row.float().view(-1, 1, 1, 1) + sigma.float().view(-1, 1, 1, 1)


def config_of(seed: int = 5, **matching: object) -> Config:
    sections = {"likelihood": "matching", "rollout": {"plan": "ode", "num_steps": 5, "group_size": 4}, "matching": {"num_times": 3, **matching}}
    return Config.model_validate({"run_dir": "unused", "rewards": ["scene"], "seed": seed, **sections})


def leaves_of(numbers: list[int], size: int = 4) -> Tensor:
    """The same latents for a group whoever else is there."""
    return torch.cat([torch.randn(size, *SHAPE, generator=torch.Generator().manual_seed(n)) for n in numbers])


def noised_of(numbers: list[int], *, iteration: int = 2, policy: Policy | None = None, config: Config | None = None, shift: float = 3.0) -> NoisedSamples:
    """All four samples of some groups, whose prompts are rows 10, 11, ... of the cache."""
    group = torch.arange(len(numbers)).repeat_interleave(4)
    return NoisedSamples(
        config or config_of(),
        policy or Policy(),  # type: ignore[arg-type]
        leaves_only(leaves_of(numbers), group),
        torch.arange(len(group)),
        torch.arange(len(group)),
        prompt_rows=torch.tensor([10 + n for n in numbers]),
        numbers=numbers,
        iteration=iteration,
        sigmas=SIGMAS,
        shift=shift,
    )


@pytest.mark.parametrize("shared", [True, False])
def test_a_state_is_the_sample_and_the_noise_of_its_group(shared: bool) -> None:
    noised = noised_of([4, 7], config=config_of(shared_times=shared))
    batch = noised.batch(torch.tensor([1, 6]))  # of groups 4 and 7
    assert batch.prompt_row.tolist() == [11 + 3] * 3 + [11 + 6] * 3
    for row, (number, place) in enumerate([(4, 1)] * 3 + [(7, 2)] * 3):
        noise = torch.randn(4, 3, *SHAPE, generator=generator(5, "noising", 2, number))[place, row % 3]
        x0, sigma = leaves_of([number])[place], batch.sigma[row].item()
        torch.testing.assert_close(batch.x[row], (1 - sigma) * x0 + sigma * noise)
        torch.testing.assert_close(batch.target[row], noise - x0)
    assert set(batch.sigma.tolist()) <= set(SIGMAS[1:4])  # from step 1 to below int(5 x 0.9)
    assert (batch.sigma[:3].diff() < 0).all()  # one in each stratum
    assert batch.sigma.dtype == torch.float64


def test_a_groups_draws_do_not_depend_on_the_other_groups_of_the_process() -> None:
    config = config_of(times="logit_normal", shared_times=False)
    together, alone = noised_of([0, 1, 2], config=config).batch(torch.arange(4, 8)), noised_of([1], config=config).batch(torch.arange(4))
    for name in ("x", "sigma", "target", "prompt_row"):
        assert torch.equal(getattr(together, name), getattr(alone, name)), name


def test_groups_iterations_and_runs_draw_differently() -> None:
    config = config_of(times="uniform", shared_times=False)
    base = noised_of([0, 1], config=config)
    assert (base.noise[:4] != base.noise[4:]).all()
    assert (base.sigma[:4] != base.sigma[4:]).all()
    for other in (noised_of([0, 1], config=config, iteration=3), noised_of([0, 1], config=config_of(6, times="uniform", shared_times=False))):
        assert (other.noise != base.noise).all()
        assert (other.sigma != base.sigma).all()
    again = noised_of([0, 1], config=config)
    assert torch.equal(again.noise, base.noise)
    assert torch.equal(again.sigma, base.sigma)


def test_shared_times_are_those_of_all_processes_and_others_are_each_samples_own() -> None:
    shared = config_of(times="uniform")
    sigma = noised_of([0, 1], config=shared).sigma
    assert len(sigma.unique(dim=0)) == 1
    assert torch.equal(noised_of([2], config=shared).sigma[0], sigma[0])
    assert len(noised_of([0, 1], config=config_of(times="uniform", shared_times=False)).sigma.unique(dim=0)) == 8


def test_continuous_times_follow_the_shift_of_the_grid_unless_they_have_their_own() -> None:
    plain = noised_of([0], config=config_of(times="uniform", shift=1.0)).sigma
    assert torch.equal(noised_of([0], config=config_of(times="uniform"), shift=1.0).sigma, plain)
    torch.testing.assert_close(noised_of([0], config=config_of(times="uniform"), shift=3.0).sigma, 3 * plain / (1 + 2 * plain))


def test_samples_of_a_slot_share_noise_and_levels_and_slots_do_not() -> None:
    rollout = leaves_only(leaves_of([0, 1]), torch.arange(2).repeat_interleave(4))
    pairs = torch.tensor([[3, 0], [5, 6]])
    noised = NoisedSamples(
        config_of(times="uniform", shared_times=False),
        Policy(),  # type: ignore[arg-type]
        rollout,
        pairs.flatten(),
        torch.tensor([0, 0, 1, 1]),
        prompt_rows=torch.tensor([7, 8]),
        numbers=[2, 5],
        iteration=1,
        sigmas=SIGMAS,
        shift=3.0,
    )
    batch = noised.batch(torch.arange(4))
    sigma, noise = batch.sigma.view(4, 3), (batch.target + noised.x0.repeat_interleave(3, 0)).view(4, 3, *SHAPE)
    assert torch.equal(sigma[0], sigma[1]) and torch.equal(sigma[2], sigma[3]) and (sigma[0] != sigma[2]).all()
    torch.testing.assert_close(noise[0], noise[1])
    torch.testing.assert_close(noise[2], torch.randn(1, 3, *SHAPE, generator=generator(5, "noising", 1, 5))[0])
    assert torch.equal(noised.x0, rollout.leaves[[3, 0, 5, 6]])
    assert noised.group.tolist() == [0, 0, 1, 1]
    assert batch.prompt_row.tolist() == [7] * 6 + [8] * 6


def test_a_group_without_a_slot_is_no_trouble() -> None:
    rollout = leaves_only(leaves_of([0, 1]), torch.arange(2).repeat_interleave(4))
    given = {"prompt_rows": torch.tensor([7, 8]), "numbers": [0, 1], "iteration": 2, "sigmas": SIGMAS, "shift": 3.0}
    config = config_of(times="uniform", shared_times=False)
    noised = NoisedSamples(config, Policy(), rollout, torch.tensor([5, 4]), torch.tensor([0, 0]), **given)  # type: ignore[arg-type]
    expected = torch.randn(1, 3, *SHAPE, generator=generator(5, "noising", 2, 1))
    assert torch.equal(noised.noise, expected)


@pytest.mark.parametrize(("most", "calls"), [(100, [24]), (7, [7, 7, 7, 3]), (2, [2] * 12)])
def test_a_policys_velocities_are_asked_for_once_each(most: int, calls: list[int]) -> None:
    policy = Policy(most)
    noised = noised_of([0, 1], policy=policy)
    found = noised.velocity(policy.velocity)
    assert policy.calls == calls
    batch = noised.batch(torch.arange(8))
    assert found.shape == (24, *SHAPE)
    with torch.no_grad():
        assert torch.equal(found, policy.velocity(batch.x, batch.sigma, batch.prompt_row))


def test_the_global_generator_is_left_alone() -> None:
    state = torch.get_rng_state()
    noised_of([0, 1], config=config_of(times="logit_normal", shared_times=False))
    assert torch.equal(torch.get_rng_state(), state)
