"""The history of each prompt's rewards: by hand, as a group's z-score, in any order, and through a checkpoint."""

import json
import statistics

import pytest
import torch

from flowrl.core.history import PromptHistory

NAN = float("nan")


def update(history, prompt, rewards, valid=None):
    valid = torch.ones(len(prompt), dtype=torch.bool) if valid is None else torch.tensor(valid)
    history.update(torch.tensor(prompt), torch.tensor(rewards, dtype=torch.float64), valid)


def looked_up(history, *prompt):
    mean, std = history.statistics(torch.tensor(prompt))
    return list(zip(mean.tolist(), std.tolist(), strict=True))


def test_a_prompt_with_enough_rewards_has_its_own_statistics_and_another_the_iterations():
    history = PromptHistory(size=4, least=3)
    update(history, [7, 7, 2, 7, 2], [1.0, 2.0, 10.0, 3.0, 14.0])
    everything = (6.0, statistics.pstdev([1, 2, 10, 3, 14]))
    assert looked_up(history, 2, 7, 2) == [pytest.approx(everything), pytest.approx((2.0, (2 / 3) ** 0.5)), pytest.approx(everything)]
    update(history, [2, 5], [18.0, 0.0])  # prompt 2 now remembers 10, 14, 18; the iteration's rewards are 18 and 0
    assert looked_up(history, 2, 5) == [pytest.approx((14.0, (32 / 3) ** 0.5)), (9.0, 9.0)]


def test_only_the_newest_rewards_are_remembered():
    history = PromptHistory(size=2, least=2)
    for reward in (100.0, 1.0, 3.0):
        update(history, [0], [reward])
    assert looked_up(history, 0) == [(2.0, 1.0)]
    update(history, [0] * 5, [9.0, 9.0, 9.0, 5.0, 7.0])
    assert looked_up(history, 0) == [(6.0, 1.0)]


def test_with_a_history_as_long_as_a_group_it_is_the_groups_zscore():
    history, rewards = PromptHistory(size=4, least=4), torch.rand(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for _ in range(2):  # whatever was there before is forgotten
        rewards = rewards + 1
        prompt = torch.arange(3).repeat_interleave(4)
        history.update(prompt, rewards.flatten(), torch.ones(12, dtype=torch.bool))
        mean, std = history.statistics(prompt)
        torch.testing.assert_close(mean.view(3, 4)[:, 0], rewards.mean(1), rtol=1e-12, atol=0)
        torch.testing.assert_close(std.view(3, 4)[:, 0], rewards.std(1, correction=0), rtol=1e-12, atol=0)


def test_unscored_samples_are_not_remembered_and_not_in_the_iterations_statistics():
    history = PromptHistory(size=4, least=2)
    update(history, [0, 0, 0, 1], [1.0, NAN, 5.0, NAN], [True, False, True, False])
    assert looked_up(history, 0, 1) == [(3.0, 2.0), (3.0, 2.0)]
    update(history, [1], [NAN], [False])
    assert looked_up(history, 0, 1) == [(3.0, 2.0), (0.0, 0.0)]  # nothing to compare with


@pytest.mark.parametrize("least", [1, 5])
def test_equal_rewards_have_exactly_their_value_and_no_spread(least):
    history = PromptHistory(size=7, least=least)
    update(history, [0] * 4, [0.7] * 4)
    update(history, [0] * 3, [0.7] * 3)
    assert looked_up(history, 0, 1) == [(0.7, 0.0)] * 2


def test_the_order_of_prompts_changes_no_bit():
    generator = torch.Generator().manual_seed(1)
    forward, backward = PromptHistory(size=5, least=3), PromptHistory(size=5, least=3)
    for _ in range(3):
        prompt, rewards = torch.randint(0, 6, (20,), generator=generator), torch.rand(20, generator=generator, dtype=torch.float64)
        order = (5 - prompt).argsort(stable=True)  # other prompts first, one prompt's samples in their order
        valid = rewards > 0.1
        forward.update(prompt, rewards, valid)
        backward.update(prompt[order], rewards[order], valid[order])
        for ours, theirs in zip(forward.statistics(prompt), backward.statistics(prompt[order]), strict=True):
            assert ours[order].equal(theirs)
    assert json.dumps(forward.state_dict()) == json.dumps(backward.state_dict())


def test_a_history_survives_json_bit_for_bit():
    history, prompt = PromptHistory(size=3, least=2), torch.tensor([3, 11, 3, 3, 3])
    history.update(prompt, torch.rand(5, generator=torch.Generator().manual_seed(2), dtype=torch.float64), torch.ones(5, dtype=torch.bool))
    resumed = PromptHistory(size=3, least=2)
    update(resumed, [99], [1.0])  # is replaced
    resumed.load_state_dict(json.loads(json.dumps(history.state_dict())))
    assert resumed.state_dict() == history.state_dict()
    for number in (3, 11, 99):
        assert looked_up(resumed, number) == looked_up(history, number)
    for one in (history, resumed):
        update(one, [3, 11], [0.25, 0.5])
    assert looked_up(resumed, 3, 11) == looked_up(history, 3, 11)


def test_a_longer_saved_history_is_cut_to_its_newest_rewards():
    long, short = PromptHistory(size=4, least=1), PromptHistory(size=2, least=1)
    update(long, [0] * 4, [10.0, 20.0, 1.0, 3.0])
    short.load_state_dict(long.state_dict())
    assert looked_up(short, 0) == [(2.0, 1.0)]


@pytest.mark.parametrize("least", [0, 5])
def test_a_number_of_rewards_that_is_never_reached_is_refused(least):
    with pytest.raises(ValueError, match=r"least must be in 1\.\.size"):
        PromptHistory(size=4, least=least)
