"""RiskPO and COPO: by hand, against a plain loop, special cases and edges of text.md A12 and A13."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowrl.core.bundles import Quantiles, answer_entropy, consistency_blend, paper_scores, risk_advantages, update_quantiles
from flowrl.core.estimators import centre, scale

FP64 = {"rtol": 1e-12, "atol": 1e-12}
NAN = float("nan")


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def everyone(rewards):
    return torch.ones(len(rewards), dtype=torch.bool)


def batch(seed=0, sizes=(3, 4, 3, 5, 4)):
    generator = torch.Generator().manual_seed(seed)
    group = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    group = group[torch.randperm(len(group), generator=generator)]
    return torch.randn(len(group), generator=generator, dtype=torch.float64), group


def risk(rewards, group, bundle, valid=None, **options):
    rewards, group, bundle = torch.as_tensor(rewards, dtype=torch.float64), torch.as_tensor(group), torch.as_tensor(bundle)
    valid = everyone(rewards) if valid is None else torch.as_tensor(valid)
    papers = paper_scores(rewards, group, valid, bundle, int(bundle.max()) + 1)
    options = {"quantiles": None, "eps": 0.0} | options
    return risk_advantages(papers, rewards, group, valid, len(bundle), **options)


# --- papers and quantiles --------------------------------------------------------------------------------------------------------------------------


def test_papers_by_hand():
    # prompt 0: 1, 2, 4; prompt 1: 10, 20; prompt 2: 5, 7 alone in bundle 1; prompt 3 is in none
    rewards, group = tensor([1.0, 10.0, 2.0, 5.0, 20.0, 4.0, 7.0, 9.0]), torch.tensor([0, 1, 0, 2, 1, 0, 2, 3])
    papers = paper_scores(rewards, group, everyone(rewards), torch.tensor([0, 0, 1, -1]), 2)
    assert papers.known.sum(1).tolist() == [2, 2]
    assert papers.scores[:, :2].tolist() == [[11.0, 22.0], [5.0, 7.0]]
    assert papers.used.tolist() == [True, True, True, True, True, False, True, False]  # prompt 0's third is beyond the shortest prompt


def test_a_sample_without_a_reward_gives_its_place_to_the_next():
    rewards, group = tensor([NAN, 1.0, 2.0, 10.0, 20.0, NAN]), torch.tensor([0, 0, 0, 1, 1, 2])
    papers = paper_scores(rewards, group, ~rewards.isnan(), torch.tensor([0, 0, 0]), 1)  # prompt 2 has no reward at all
    assert papers.scores[papers.known].tolist() == [11.0, 22.0]
    assert papers.used.tolist() == [False, True, True, True, True, False]


def test_a_bundle_without_prompts_has_no_papers():
    papers = paper_scores(tensor([1.0, 2.0]), torch.tensor([0, 0]), torch.ones(2, dtype=torch.bool), torch.tensor([1]), 3)
    assert papers.known.sum(1).tolist() == [0, 2, 0]


def test_the_quantiles_start_at_the_first_batch_and_then_take_steps():
    scores = tensor([0.0, 1.0, 2.0, 3.0, 4.0])
    state = update_quantiles(Quantiles(), scores, low=0.25, high=0.9)
    assert (state.low, state.high, state.seen) == (1.0, pytest.approx(3.6), True)
    state = update_quantiles(state, tensor([0.0, 0.5, 1.0, 3.7]), low=0.25, high=0.9, rate=0.1)  # half lies below 1, three quarters below 3.6
    assert (state.low, state.high) == (pytest.approx(1 + 0.1 * (0.25 - 0.5)), pytest.approx(3.6 + 0.1 * (0.9 - 0.75)))
    assert update_quantiles(state, tensor([])) == state
    assert update_quantiles(Quantiles(), tensor([])) == Quantiles()
    assert Quantiles(**json.loads(json.dumps(state.state_dict()))) == state


def test_the_tracked_quantiles_find_those_of_a_steady_stream():
    generator, state = torch.Generator().manual_seed(0), Quantiles(seen=True)
    for _ in range(2000):
        state = update_quantiles(state, torch.rand(64, generator=generator), low=0.2, high=0.9, rate=0.02)
    assert state.low == pytest.approx(0.2, abs=0.02)
    assert state.high == pytest.approx(0.9, abs=0.02)


# --- advantages of papers --------------------------------------------------------------------------------------------------------------------------


def test_the_mixed_value_at_risk_by_hand():
    # scores 0, 1, 2, 3, 4 of one prompt, quantiles 1 and 3: between 0, 0, 1, 2, 2 less 2; below -1, 0, 0, 0, 0
    result = risk([0.0, 1.0, 2.0, 3.0, 4.0], [0] * 5, [0], low=0.25, high=0.75, mixture=1.5, normalize=False, credit="uniform")
    torch.testing.assert_close(result, tensor([(1.5 * -4 - 4) / 2.5, -4 / 2.5, -2 / 2.5, 0.0, 0.0]), **FP64)
    result = risk([0.0, 1.0, 2.0, 3.0, 4.0], [0] * 5, [0], low=0.25, high=0.75, mixture=0.0, normalize=True, baseline=False, credit="uniform")
    torch.testing.assert_close(result, tensor([0.0, 0.0, 2.0, 4.0, 4.0]) / math.sqrt(2.5), **FP64)


def plain(rewards, group, bundle, quantiles, mode, low, high, mixture, baseline, normalize, credit, eps):
    """The released code's loops."""
    result = torch.zeros_like(rewards)
    for number in range(int(bundle.max()) + 1):
        members = [torch.nonzero(group == prompt)[:, 0] for prompt in torch.nonzero(bundle == number)[:, 0]]
        if not members:
            continue
        papers = [[indices[j] for indices in members] for j in range(min(len(indices) for indices in members))]
        scores = torch.stack([torch.stack([rewards[i] for i in paper]).sum() for paper in papers])
        q = [torch.quantile(scores, level) for level in (low, high)]
        if mode == "track":
            q = [quantiles.low, quantiles.high]
        elif mode == "mix":
            q = [(a + b) / 2 for a, b in zip(q, (quantiles.low, quantiles.high), strict=True)]
        std = scores.std() if len(scores) > 1 else 1.0
        for paper, score in zip(papers, scores, strict=True):
            value = (score - q[0]).clamp_min(0) - (score - q[1]).clamp_min(0) + ((q[0] - q[1]) if baseline else 0)
            value = value / (high - low + eps)
            value = (mixture * -(q[0] - score).clamp_min(0) / (low + eps) + value) / (mixture + 1)
            value = value / (std + eps) if normalize else value
            above = [rewards[i] - rewards[group == group[i]].mean() for i in paper]
            for i, part in zip(paper, above, strict=True):
                spread = rewards[group == group[i]].std()
                spread = spread if spread > 1e-3 else 1.0
                result[i] = value * {"uniform": 1.0, "std": 1 / (spread + eps), "share": part / sum(above)}[credit]
    return result


@given(
    st.integers(0, 1000),
    st.sampled_from(["track", "batch", "mix"]),
    st.sampled_from(["uniform", "std", "share"]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([[0, 0, 1, 1, 1], [0, 1, 2, 3, 4], [1, -1, 0, 1, 0]]),
)
@settings(max_examples=40)
def test_advantages_are_those_of_the_plain_loops(seed, mode, credit, baseline, normalize, bundle):
    rewards, group = batch(seed)
    options = {"mode": mode, "credit": credit, "baseline": baseline, "normalize": normalize, "low": 0.2, "high": 0.8, "mixture": 1.5, "eps": 1e-6}
    state = Quantiles(-0.5, 0.75, True)
    expected = plain(rewards, group, torch.tensor(bundle), quantiles=state, **options)
    torch.testing.assert_close(risk(rewards, group, bundle, quantiles=state, **options), expected, rtol=1e-8, atol=1e-9)


def test_a12_the_whole_range_without_a_tail_is_the_score_less_a_constant():
    rewards, group = batch()
    bundle = torch.tensor([0] * 5)
    papers = paper_scores(rewards, group, everyone(rewards), bundle, 1)
    scores = papers.scores[0]
    options = {"low": 0.0, "high": 1.0, "mixture": 0.0, "normalize": False, "credit": "uniform", "eps": 1e-9}
    expected = torch.where(papers.used, scores[papers.position] - scores[papers.known[0]].max(), 0.0)
    torch.testing.assert_close(risk(rewards, group, bundle, **options), expected, rtol=1e-8, atol=1e-8)
    expected = torch.where(papers.used, scores[papers.position] - scores[papers.known[0]].min(), 0.0)
    torch.testing.assert_close(risk(rewards, group, bundle, baseline=False, **options), expected, rtol=1e-8, atol=1e-8)


def test_a12_with_bundles_of_one_prompt_the_reward_is_the_score():
    rewards, group = batch()
    papers = paper_scores(rewards, group, everyone(rewards), torch.arange(5), 5)
    assert papers.used.all()
    assert torch.equal(papers.scores[papers.bundle, papers.position], rewards)


def test_a12_the_baseline_makes_advantages_at_most_0():
    rewards, group = batch()
    assert (risk(rewards, group, [0, 0, 1, 1, 1]) <= 0).all()


def test_a12_one_paper_has_advantage_0():
    assert risk([1.0, 0.0, 3.0], [0, 1, 1], [0, 0]).tolist() == [0.0, 0.0, 0.0]
    assert risk([1.0, 1.0, 1.0], [0, 0, 0], [0]).tolist() == [0.0, 0.0, 0.0]  # equal papers, eps 0


def test_a12_a_prompt_without_spread_counts_as_std_1():
    rewards, group = tensor([1.0, 0.0, 5.0, 5.0]), torch.tensor([0, 0, 1, 1])
    uniform, std = (risk(rewards, group, [0, 0], credit=credit) for credit in ("uniform", "std"))
    torch.testing.assert_close(std, uniform * tensor([math.sqrt(2), math.sqrt(2), 1.0, 1.0]), **FP64)  # std of 1, 0 is 1 / sqrt(2)


def test_a12_shares_of_a_paper_without_merit_are_equal():
    result = risk([1.0, 0.0, 5.0, 4.0, 4.0, 5.0], [0, 0, 1, 1, 2, 2], [0, 0, 0], credit="share")
    uniform = risk([1.0, 0.0, 5.0, 4.0, 4.0, 5.0], [0, 0, 1, 1, 2, 2], [0, 0, 0], credit="uniform")
    assert (uniform[1] != 0).item()
    torch.testing.assert_close(result, uniform * tensor([1.0, 1.0, 1.0, 1.0, -1.0, -1.0]), **FP64)  # merits 1/2, 1/2, -1/2 sum to 1/2
    result = risk([1.0, 0.0, 4.0, 5.0], [0, 0, 1, 1], [0, 0], credit="share", quantiles=Quantiles(6.0, 7.0, True))  # merits cancel
    uniform = risk([1.0, 0.0, 4.0, 5.0], [0, 0, 1, 1], [0, 0], credit="uniform", quantiles=Quantiles(6.0, 7.0, True))
    assert (uniform < 0).all()
    torch.testing.assert_close(result, uniform / 2, **FP64)


def test_a_state_that_has_seen_nothing_leaves_the_bundles_their_own_quantiles():
    rewards, group = batch()
    assert torch.equal(risk(rewards, group, [0, 0, 0, 1, 1], quantiles=Quantiles()), risk(rewards, group, [0, 0, 0, 1, 1], mode="batch"))


def test_invalid_samples_of_a_bundle_get_0_and_do_not_move_the_others():
    rewards, group = batch()
    clean = risk(rewards, group, [0, 0, 1, 1, 1])
    dirty = risk(
        torch.cat([tensor([NAN]), rewards]), torch.cat([torch.tensor([3]), group]), [0, 0, 1, 1, 1], torch.cat([torch.tensor([False]), everyone(rewards)])
    )
    torch.testing.assert_close(dirty, torch.cat([tensor([0.0]), clean]), **FP64)


def test_identity_29_the_order_of_prompts_does_not_matter():
    rewards, group = batch()
    order = torch.argsort(group, stable=True)  # keeps the order within a prompt, which makes the papers
    torch.testing.assert_close(risk(rewards[order], group[order], [0, 0, 1, 1, 1]), risk(rewards, group, [0, 0, 1, 1, 1])[order], **FP64)


def test_unknown_choices_are_named():
    with pytest.raises(ValueError, match="unknown quantiles 'ema'"):
        risk([1.0], [0], [0], mode="ema")
    with pytest.raises(ValueError, match="credit 'variance'"):
        risk([1.0], [0], [0], credit="variance")


# --- COPO ------------------------------------------------------------------------------------------------------------------------------------------


def blend(rewards, group, valid=None, **options):
    rewards, group = torch.as_tensor(rewards, dtype=torch.float64), torch.as_tensor(group)
    valid = everyone(rewards) if valid is None else torch.as_tensor(valid)
    return consistency_blend(rewards, group, valid, int(group.max()) + 1, **({"answer": None, "num_answers": 0, "eps": 0.0} | options))


def test_the_entropy_of_answers_by_hand():
    answer, group = torch.tensor([0, 0, 1, 2, 2, 1]), torch.tensor([0, 0, 0, 0, 1, 1])
    result = answer_entropy(answer, group, torch.tensor([True, True, True, True, True, False]), 3, 3)
    torch.testing.assert_close(result, tensor([1.5 * math.log(2), 0.0, 0.0]), **FP64)


def test_the_blend_by_hand():
    # prompt 0: 1, 0, p = 1/2, entropy log 2; prompt 1: 1, 1, p = 1, entropy 0
    result = blend([1.0, 0.0, 1.0, 1.0], [0, 0, 1, 1], gamma=2.0, entropy_centre=0.5, ddof=0)
    torch.testing.assert_close(result.local, tensor([1.0, -1.0, 0.0, 0.0]), **FP64)
    torch.testing.assert_close(result.world, tensor([-1.0, -1.0, 1.0, 1.0]), **FP64)
    differing, agreeing = 1 / (1 + math.exp(-2 * (math.log(2) - 0.5))), 1 / (1 + math.exp(1))
    torch.testing.assert_close(result.weight, tensor([differing, differing, agreeing, agreeing]), **FP64)


def test_the_answers_given_replace_right_and_wrong():
    result = blend([0.0, 0.0, 0.0], [0, 0, 0], answer=torch.tensor([0, 1, 2]), num_answers=3, gamma=1.0, entropy_centre=0.0)
    torch.testing.assert_close(result.weight, torch.sigmoid(tensor([math.log(3)] * 3)), **FP64)


def test_a13_with_a_steep_weight_it_is_grpo():
    rewards, group = batch()
    result = blend(rewards, group, gamma=1e9, entropy_centre=-0.1, eps=1e-6)
    valid = everyone(rewards)
    assert result.weight.tolist() == [1.0] * len(rewards)
    assert torch.equal(result.local, scale("group_std", centre("group", rewards, group, valid, 5), rewards, group, valid, 5, eps=1e-6, ddof=1))


def test_identity_27_groups_without_spread_still_teach_which_prompt_is_better():
    result = blend([1.0, 1.0, 0.0, 0.0], [0, 0, 1, 1])
    assert result.local.tolist() == [0.0] * 4
    torch.testing.assert_close(result.world, tensor([1.0, 1.0, -1.0, -1.0]) / math.sqrt(2), **FP64)
    assert (result.weight < 0.1).all()  # and that is the part that counts


@pytest.mark.parametrize(("rewards", "group"), [([1.0, 0.0], [0, 0]), ([1.0, 0.0, 1.0, 0.0], [0, 0, 1, 1])])
def test_a13_one_prompt_or_equal_prompts_have_global_advantage_0(rewards, group):
    assert blend(rewards, group).world.tolist() == [0.0] * len(rewards)


def test_a13_the_prompts_of_all_processes_may_be_compared():
    result = blend([1.0, 0.0], [0, 0], success=(0.25, 0.5))
    assert result.world.tolist() == [0.5, 0.5]


def test_a13_samples_without_a_reward_are_in_nothing():
    clean = blend([1.0, 0.0, 1.0, 1.0], [0, 0, 1, 1])
    dirty = blend([NAN, 1.0, 0.0, 1.0, 1.0, NAN], [0, 0, 0, 1, 1, 2], [False, True, True, True, True, False])
    for one, other in zip(dirty[:2], clean[:2], strict=True):
        torch.testing.assert_close(one, torch.cat([tensor([0.0]), other, tensor([0.0])]), **FP64)
    torch.testing.assert_close(dirty.weight[1:5], clean.weight, **FP64)


def test_float32_stays_float32():
    rewards, group, valid = torch.tensor([1.0, 0.0]), torch.tensor([0, 0]), torch.ones(2, dtype=torch.bool)
    papers = paper_scores(rewards, group, valid, torch.tensor([0]), 1)
    assert risk_advantages(papers, rewards, group, valid, 1, quantiles=Quantiles(0.0, 1.0, True)).dtype == torch.float32
    assert {part.dtype for part in consistency_blend(rewards, group, valid, 1, answer=None, num_answers=0)} == {torch.float32}
