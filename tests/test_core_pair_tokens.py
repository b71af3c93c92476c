"""Sums over tokens, TGDPO's weights, shared prefixes, pairs that cannot be compared."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flowrl.core.pair_losses import rebel
from flowrl.core.pair_tokens import after_shared_prefix, comparable, guide_weights, sum_tokens
from flowrl.core.preference import dpo, simpo
from flowrl.types import Pairs

FP64 = {"rtol": 1e-12, "atol": 1e-12}
PLAIN = {"margin": 0.0, "sft_weight": 0.0, "label_smoothing": 0.0}
MASK = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0]]).bool()


def draw(seed, *, count=4):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, 4, generator=generator, dtype=torch.float64) for _ in range(count)]


def pair(chosen, rejected, reference_chosen, reference_rejected, chosen_mask=MASK, rejected_mask=MASK, weights=(None, None)):
    """DPO's loss [3, 1] from tokens."""
    sides = ((chosen, chosen_mask, weights[0]), (rejected, rejected_mask, weights[1]))
    references = ((reference_chosen, chosen_mask, weights[0]), (reference_rejected, rejected_mask, weights[1]))
    lengths = [m.sum(1, keepdim=True).double() for m in (chosen_mask, rejected_mask)]
    return Pairs(*(sum_tokens(*side) for side in sides + references), torch.ones(3, 1, dtype=torch.bool), *lengths)


def test_sums_by_hand():
    log_prob = torch.tensor([[1.0, 2.0, 4.0, 8.0]], dtype=torch.float64)
    mask = torch.tensor([[True, False, True, True]])
    assert sum_tokens(log_prob, mask).tolist() == [[13.0]]
    assert sum_tokens(log_prob, mask, torch.tensor([[2.0, 9.0, 0.5, -1.0]], dtype=torch.float64)).tolist() == [[-4.0]]


def test_masked_tokens_do_not_matter_and_an_empty_response_is_0():
    (log_prob, weight), mask = draw(0, count=2), MASK
    clean = sum_tokens(log_prob, mask, weight)
    log_prob[~mask], weight[~mask] = math.nan, math.inf
    log_prob.requires_grad_()
    total = sum_tokens(log_prob, mask, weight)
    assert total.equal(clean)
    assert total[2].item() == 0
    (gradient,) = torch.autograd.grad(total.sum(), log_prob)
    assert gradient.equal(torch.where(mask, weight, 0.0))


def test_weights_are_constants_and_the_sum_has_finite_difference_gradients():
    log_prob, weight = (x.requires_grad_() for x in draw(1, count=2))
    assert torch.autograd.grad(sum_tokens(log_prob, MASK, weight).sum(), weight, allow_unused=True) == (None,)
    assert torch.autograd.gradcheck(lambda x: sum_tokens(x, MASK, weight), log_prob)


def test_guide_weights_by_hand():
    guide, reference = torch.tensor([[-1.0, -2.0, -5.0]], dtype=torch.float64), torch.tensor([[-3.0, -2.0, -1.0]], dtype=torch.float64)
    # q = 2, 0, -4 and alpha beta = 0.5
    assert guide_weights(guide, reference, alpha=5.0, beta=0.1, side="chosen").tolist() == [[2.0, 1.0, -1.0]]
    assert guide_weights(guide, reference, alpha=5.0, beta=0.1, side="rejected").tolist() == [[0.0, 1.0, 3.0]]
    assert guide_weights(guide, reference, alpha=5.0, beta=0.1, side="chosen", limits=(0, 2)).tolist() == [[2.0, 1.0, 0.0]]
    assert guide_weights(guide, reference, alpha=5.0, beta=0.1, side="rejected", limits=(0, 2)).tolist() == [[0.0, 1.0, 2.0]]
    with pytest.raises(ValueError, match="unknown side 'winner' of a pair; known: chosen, rejected"):
        guide_weights(guide, reference, alpha=0.5, beta=0.1, side="winner")


def test_f17_tgdpo_by_definition_and_its_gradient():
    # -log sigmoid(sum beta (1 + alpha beta q_w)(l_w - ref_w) - sum beta (1 - alpha beta q_r)(l_r - ref_r))
    w, r, ref_w, ref_r, guide_w, guide_r = draw(2, count=6)
    alpha, beta = 0.5, 0.3
    w.requires_grad_()
    r.requires_grad_()

    def loss(x, y):
        weights = guide_weights(guide_w, ref_w, alpha=alpha, beta=beta, side="chosen"), guide_weights(guide_r, ref_r, alpha=alpha, beta=beta, side="rejected")
        return dpo(pair(x, y, ref_w, ref_r, weights=weights), beta=beta, **PLAIN).loss

    keep = MASK.double()
    z = (beta * (1 + alpha * beta * (guide_w - ref_w)) * (w - ref_w) * keep).sum(1) - (beta * (1 - alpha * beta * (guide_r - ref_r)) * (r - ref_r) * keep).sum(
        1
    )
    torch.testing.assert_close(loss(w, r)[:, 0], -torch.nn.functional.logsigmoid(z), **FP64)
    assert torch.autograd.gradcheck(loss, (w, r))


def test_item_12_tgdpo_without_alpha_is_dpo():
    w, r, ref_w, ref_r, guide_w, guide_r = draw(3, count=6)
    weights = (guide_weights(guide_w, ref_w, alpha=0.0, beta=0.3, side="chosen"), guide_weights(guide_r, ref_r, alpha=0.0, beta=0.3, side="rejected"))
    ours = dpo(pair(w, r, ref_w, ref_r, weights=weights), beta=0.3, **PLAIN).loss
    assert ours.equal(dpo(pair(w, r, ref_w, ref_r), beta=0.3, **PLAIN).loss)


def test_shared_prefixes_by_hand():
    chosen = torch.tensor([[1, 2, 3, 4], [1, 2, 0, 0], [1, 2, 3, 4], [9, 2, 3, 4]])
    rejected = torch.tensor([[1, 2, 9, 4], [1, 2, 3, 0], [1, 2, 3, 4], [1, 2, 3, 4]])
    chosen_mask, rejected_mask = chosen.ne(0), rejected.ne(0)
    ours = after_shared_prefix(chosen, rejected, chosen_mask, rejected_mask)
    assert ours[0].int().tolist() == [[0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]]
    assert ours[1].int().tolist() == [[0, 0, 1, 1], [0, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]]
    assert comparable(chosen, rejected, chosen_mask, rejected_mask).tolist() == [[True], [True], [False], [True]]
    assert comparable(chosen, rejected, *ours).tolist() == [[True], [False], [False], [True]]


def test_a_shared_turn_of_the_environment_belongs_to_the_prefix():
    # position 1 was not sampled on either side: masked, and the same in both
    chosen, rejected = torch.tensor([[1, 7, 3, 4]]), torch.tensor([[1, 7, 3, 5]])
    mask = torch.tensor([[True, False, True, True]])
    assert [m.int().tolist() for m in after_shared_prefix(chosen, rejected, mask, mask)] == [[[0, 0, 0, 1]], [[0, 0, 0, 1]]]


def test_f21_an_empty_prefix_is_dpo_and_a_shared_one_changes_only_lengths():
    generator = torch.Generator().manual_seed(4)
    w, r, ref_w, ref_r = draw(4)
    first = torch.randint(1, 5, (3, 4), generator=generator)
    mask = torch.ones(3, 4, dtype=torch.bool)
    for shared in (0, 2):
        second = first + (torch.arange(4) >= shared)
        w2, ref_w2 = (torch.where(torch.arange(4) < shared, b, a) for a, b in ((w, r), (ref_w, ref_r)))  # same prefix, same log-probabilities
        masks = after_shared_prefix(first, second, mask, mask)
        assert all(m.sum().item() == 3 * (4 - shared) for m in masks)
        ours, whole = pair(w2, r, ref_w2, ref_r, *masks), pair(w2, r, ref_w2, ref_r, mask, mask)
        torch.testing.assert_close(dpo(ours, beta=0.3, **PLAIN).loss, dpo(whole, beta=0.3, **PLAIN).loss, **FP64)
        means = [simpo(p, beta=0.3, **PLAIN).loss for p in (ours, whole)]
        assert means[0].allclose(means[1]) == (shared == 0)


def test_f11_refuel_is_rebel_after_the_shared_history():
    # (d over the continuations - eta (Q_1 - Q_2))^2
    w, r, old_w, old_r = draw(5)
    first, mask = torch.arange(4).expand(3, 4), torch.ones(3, 4, dtype=torch.bool)
    second = first + torch.tensor([0, 0, 1, 1])
    masks = after_shared_prefix(first, second, mask, mask)
    q = torch.tensor([[1.0, 0.0]] * 3, dtype=torch.float64)
    pairs = pair(w, r, old_w, old_r, *masks)
    pairs = Pairs(
        pairs.chosen,
        pairs.rejected,
        None,
        None,
        pairs.mask,
        previous_chosen=pairs.reference_chosen,
        previous_rejected=pairs.reference_rejected,
        chosen_reward=q[:, :1],
        rejected_reward=q[:, 1:],
    )
    theirs = ((w - old_w)[:, 2:].sum(1) - (r - old_r)[:, 2:].sum(1) - 2.0).square()
    torch.testing.assert_close(rebel(pairs, beta=0.5).loss[:, 0], theirs, **FP64)


@given(st.lists(st.tuples(st.integers(1, 2), st.integers(1, 2)), max_size=5), st.integers(0, 5), st.integers(0, 5))
def test_what_is_comparable_and_shared_agrees_with_lists(tokens, chosen_length, rejected_length):
    length = 5
    padded = [*tokens, *([(0, 0)] * (length - len(tokens)))]
    sides = [[token[side] for token in tokens][:n] for side, n in ((0, chosen_length), (1, rejected_length))]
    ids = [torch.tensor([[token[side] for token in padded]]) for side in (0, 1)]
    masks = [torch.arange(length)[None] < len(side) for side in sides]
    assert comparable(*ids, *masks).item() == (bool(sides[0]) and bool(sides[1]) and sides[0] != sides[1])
    common = 0
    while common < min(map(len, sides)) and sides[0][common] == sides[1][common]:
        common += 1
    for mask, side in zip(after_shared_prefix(*ids, *masks), sides, strict=True):
        assert mask[0].tolist() == [common <= i < len(side) for i in range(length)]
