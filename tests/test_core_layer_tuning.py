"""The supervised term towards the best leaf: weights and targets by hand, the flow-matching identity, gradients, and the rows that have no target."""

import pytest
import torch

from flowrl.core.layer_tuning import progress_weights, rows_of_best, straight_velocity, velocity_regression

FP64 = {"rtol": 1e-12, "atol": 1e-12}
NAN, INF = float("nan"), float("inf")


def weights(row_reward, row_group, *, best, worst, mean, std, guard=0.5):
    columns = [torch.tensor(x, dtype=torch.float64) for x in (best, worst, mean, std)]
    return progress_weights(torch.tensor(row_reward, dtype=torch.float64), torch.tensor(row_group), *columns, guard).tolist()


# --- weights ------------------------------------------------------------------------------------------------------------------------------------


def test_the_weight_is_the_share_of_the_way_that_a_node_is_behind():
    result = weights([2.0, 6.0, 4.0, 5.0, 0.0, 8.0], [0, 0, 0, 1, 1, 1], best=[6.0, 5.0], worst=[2.0, 0.0], mean=[3.0, 1.0], std=[1.0, 1.0])
    assert result == pytest.approx([1.0, 0.0, 0.5, 0.0, 1.0, 0.0])  # the last is better than the best leaf: clipped


def test_a_group_whose_best_leaf_does_not_stand_out_is_left_alone():
    group = {"best": [4.0, 4.0], "worst": [0.0, 0.0], "mean": [3.0, 3.0], "std": [2.0, 1.9]}
    assert weights([0.0, 0.0], [0, 1], **group) == pytest.approx([0.0, 1.0])  # 4 - 3 against 0.5 * 2 and 0.5 * 1.9
    assert weights([0.0, 0.0], [0, 1], **group, guard=0.0) == pytest.approx([1.0, 1.0])


def test_shift_and_scale_of_rewards_change_nothing():
    reward = [2.0, 3.0, 5.5]
    plain = weights(reward, [0, 0, 0], best=[6.0], worst=[2.0], mean=[3.0], std=[1.0])
    moved = weights([10 * r + 3 for r in reward], [0, 0, 0], best=[63.0], worst=[23.0], mean=[33.0], std=[10.0])
    assert moved == pytest.approx(plain)


@pytest.mark.parametrize("guard", [0.0, 0.5])
def test_equal_leaves_and_unscored_nodes_and_groups_have_weight_zero(guard):
    assert weights([1.0, 1.0], [0, 0], best=[1.0], worst=[1.0], mean=[1.0], std=[0.0], guard=guard) == [0.0, 0.0]
    assert weights([NAN, 0.0], [0, 0], best=[4.0], worst=[0.0], mean=[1.0], std=[1.0], guard=guard)[0] == 0.0
    for best, worst in ((-INF, INF), (NAN, NAN)):
        assert weights([NAN, 0.0], [0, 0], best=[best], worst=[worst], mean=[0.0], std=[0.0], guard=guard) == [0.0, 0.0]


# --- targets ------------------------------------------------------------------------------------------------------------------------------------


def test_the_rows_of_the_best_path_by_hand():
    # group 0: row 0 (step 2) above all, rows 1 and 2 (step 3), rows 3..6 (step 4), leaves 0..3; group 1: rows 7 (step 2) and 8, 9 (step 3), leaves 4, 5
    row_leaf = [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (2, 2), (2, 3), (3, 0), (4, 1), (5, 2), (6, 3), (7, 4), (7, 5), (8, 4), (9, 5)]
    row_group, row_step = torch.tensor([0] * 7 + [1] * 3), torch.tensor([2, 3, 3, 4, 4, 4, 4, 2, 3, 3])
    found = rows_of_best(torch.tensor(row_leaf), row_group, row_step, torch.tensor([2, 5]))
    assert found.tolist() == [0, 2, 2, 5, 5, 5, 5, 7, 9, 9]
    order = torch.randperm(len(row_leaf), generator=torch.Generator().manual_seed(0))
    twice = torch.tensor(row_leaf)[order].repeat(2, 1)
    assert rows_of_best(twice, row_group, row_step, torch.tensor([2, 5])).equal(found)


def test_a_step_that_the_best_path_skips_and_a_group_without_a_best_leaf_have_no_row():
    # leaf 1's path has a row at step 0 only; group 1 has no valid leaf
    row_leaf, row_group = torch.tensor([[0, 0], [0, 1], [1, 0], [2, 2]]), torch.tensor([0, 0, 1])
    assert rows_of_best(row_leaf, row_group, torch.tensor([0, 1, 0]), torch.tensor([1, -1])).tolist() == [0, -1, -1]
    assert rows_of_best(row_leaf, row_group, torch.tensor([0, 1, 0]), torch.tensor([0, -1])).tolist() == [0, 1, -1]


def test_another_groups_leaf_is_nobodys_best():
    row_leaf, row_group = torch.tensor([[0, 0], [1, 1]]), torch.tensor([0, 1])
    assert rows_of_best(row_leaf, row_group, torch.zeros(2, dtype=torch.int64), torch.tensor([1, 0])).tolist() == [-1, -1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_straight_velocity_of_an_interpolated_latent_is_noise_minus_clean(dtype):
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(5, 2, 3, generator=generator, dtype=dtype) for _ in range(2))
    sigma = torch.tensor([1.0, 0.8, 0.5, 0.3, 0.25], dtype=torch.float64)
    s = sigma.to(dtype).view(5, 1, 1)
    velocity = straight_velocity((1 - s) * x0 + s * noise, sigma, x0)
    assert velocity.dtype == dtype
    torch.testing.assert_close(velocity, noise - x0, rtol=1e-5, atol=1e-5)


def test_one_euler_step_along_the_straight_velocity_ends_at_the_best_leaf():
    generator = torch.Generator().manual_seed(1)
    x, x0 = (torch.randn(4, 2, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    sigma = torch.tensor([0.9, 0.6, 0.4, 0.1], dtype=torch.float64)
    torch.testing.assert_close(x - sigma.view(4, 1, 1) * straight_velocity(x, sigma, x0), x0, **FP64)


def test_a_clean_latent_has_no_straight_velocity():
    with pytest.raises(ValueError, match="sigma 0"):
        straight_velocity(torch.zeros(2, 3), torch.tensor([0.5, 0.0]), torch.zeros(2, 3))


# --- the regression -----------------------------------------------------------------------------------------------------------------------------


def test_the_regression_by_hand():
    velocity, target = torch.tensor([[1.0, 2.0], [0.0, 4.0]]), torch.tensor([[0.0, 0.0], [0.0, 1.0]])
    assert velocity_regression(velocity, target, torch.tensor([1.0, 0.5], dtype=torch.float64)).tolist() == [2.5, 2.25]


def test_the_gradient_is_the_flow_matching_one_and_the_target_has_none():
    generator = torch.Generator().manual_seed(2)
    velocity, target = (torch.randn(3, 2, 4, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2))
    weight = torch.tensor([1.0, 0.3, 0.7], dtype=torch.float64)
    ours, theirs = torch.autograd.grad(velocity_regression(velocity, target, weight).sum(), (velocity, target), allow_unused=True)
    assert theirs is None
    torch.testing.assert_close(ours, 2 * weight.view(3, 1, 1) * (velocity - target).detach() / 8, **FP64)
    assert torch.autograd.gradcheck(lambda v: velocity_regression(v, target.detach(), weight), velocity)


def test_with_weight_one_it_is_the_mean_squared_error_and_at_the_target_zero():
    velocity, target = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(3)).unbind(0)
    torch.testing.assert_close(velocity_regression(velocity, target, torch.ones(5)).mean(), torch.nn.functional.mse_loss(velocity, target))
    assert velocity_regression(velocity, velocity.clone(), torch.ones(5)).eq(0).all()


def test_a_row_of_weight_zero_has_no_loss_and_no_gradient_whatever_its_target():
    velocity, target = torch.ones(3, 2, requires_grad=True), torch.tensor([[NAN, 0.0], [INF, 1.0], [0.0, 0.0]])
    loss = velocity_regression(velocity, target, torch.tensor([0.0, 0.0, 1.0]))
    assert loss.tolist() == [0.0, 0.0, 1.0]
    assert torch.autograd.grad(loss.sum(), velocity)[0].tolist() == [[0.0, 0.0], [0.0, 0.0], [1.0, 1.0]]
