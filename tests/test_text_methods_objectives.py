"""Methods of language models that differ in estimator, objective, token factors or terms: what makes each of them what it is, and two iterations of all."""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from text_runs import assert_trains, assign_rewards, text_config

from flowrl.config import Config, list_methods
from flowrl.core.token_weights import divergence_weights, masked_quantile, position_divergence, top_entropy_mask
from flowrl.policies.token_statistics import TokenOutput
from flowrl.text.batch import Batch
from flowrl.text.covariance import ClipCov, KlCov, clip_cov, kl_cov, wanted
from flowrl.text.factors import TopEntropy
from flowrl.text.gated import AnnealedMdpo, Drpo, LpReg, Rover, TokenNft, capo, next_decisions
from flowrl.text.objectives import make_objective
from flowrl.text.ranks import smallest
from flowrl.text.searched_clip import Bapo
from flowrl.text.terms import BandTerm
from flowrl.trainer import Trainer
from flowrl.types import Decisions, Scores, UserError

Configure = Callable[..., Config]

LOSSES = ["gspo", "gspo_token", "cispo", "sapo", "gmpo", "vespo", "mdpo", "kimi", "reg_grpo", "gvpo", "drpo", "rover", "nft", "bapo", "capo", "lp_reg"]
ESTIMATORS = ["reinforce", "rloo", "reinforce_pp", "dr_grpo", "lite_ppo", "opo", "pass_at_k", "dapo", "bnpo", "ngrpo"]
METHODS = [*LOSSES, *ESTIMATORS, "tw_grpo", "top_entropy", "epo", "adaptive_entropy", "clip_cov", "kl_cov"]
SMALL = ("rollout={groups_per_iteration: 3, group_size: 4}", "generation.max_new_tokens=8", "optimizer.learning_rate=1e-3", "seed=3")
CONSONANTS = ", ".join("bcdfghjklmpqrstvwxz")
"""End an answer, so that lengths differ."""
REWARDS = [1.0, 0.0, 0.25, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.5, 0.5, 1.0]
BINARY = [1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
SAME = {"rtol": 2e-4, "atol": 2e-6}


@pytest.fixture(scope="module")
def configure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Configure]:
    """(method, *overrides) -> 3 groups of 4 answers of a few tokens, of different lengths."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield lambda method, *more: text_config(
            folder, f"method={method}", *SMALL, f"generation.stop=[{CONSONANTS}]", *more, reward="even" if method == "nft" else "vowels"
        )


def gradient(config: Config, rewards: Sequence[float] = REWARDS, update: int = 1) -> torch.Tensor:
    """Of the first update over all answers, or of one after weights have moved by hand."""
    trainer = Trainer(config)
    engine, indices = trainer.engine, trainer.engine.groups(1)
    prompts, numbers = [trainer.prompts[i] for i in indices], list(range(len(indices)))
    rolled_out, _ = engine.roll_out(prompts, indices, numbers, 1)
    values = torch.tensor(rewards)
    assigned, _ = trainer.assign(rolled_out, {"total": Scores(values, ~values.isnan())}, prompts, numbers, 1)
    made, _ = engine.update(rolled_out, assigned, prompts, numbers, 1)
    units = torch.arange(len(made.unit_group))
    made.prepare([units[:0], units] if update > 1 else [units])
    if update > 1:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in trainer.parameters:
                p.add_(torch.randn(p.shape, generator=generator), alpha=0.01)
    trainer.backward(made, units, len(prompts), first=update == 1)
    return torch.cat([p.grad.flatten() for p in trainer.parameters])


def answers_of(log_prob: torch.Tensor, **more: Any) -> Any:
    """What an objective asks of an iteration: one group, all answers valid and trained."""
    count = len(log_prob)
    mask = more.pop("mask", torch.ones_like(log_prob, dtype=torch.bool))
    completions = SimpleNamespace(log_prob=log_prob, turn=None)
    given = {"group": torch.zeros(count, dtype=torch.int64), "num_groups": 1, "numbers": [0], "iteration": 1, "add": float, "extra": {}, "metrics": {}}
    known = {"valid": torch.ones(count, dtype=torch.bool), "train": torch.ones(count, dtype=torch.bool)}
    return SimpleNamespace(completions=completions, mask=mask, **{**given, **known, **more})


def batch_of(answers: Any, log_prob: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor, *, first: bool = False, **columns: torch.Tensor) -> Batch:
    rows = torch.arange(len(log_prob))
    return Batch(answers, rows, TokenOutput(log_prob, columns), Decisions(log_prob, old, advantages, answers.mask), answers.group, 1, first)


# --- all of them --------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_two_iterations_move_the_weights_and_evaluate_nothing_twice(method: str, configure: Configure) -> None:
    _, found = assert_trains(configure(method, "objective.updates_per_iteration=2"))
    assert found[0]["ratio/max_abs_log_first"] < 1e-4
    assert found[0]["updates"] == 2


@pytest.mark.parametrize("method", METHODS)
def test_a_method_says_what_it_is_where_it_comes_from_and_where_ours_differs(method: str) -> None:
    found = list_methods()[method]
    assert re.search(r"arXiv:\d{4}\.\d{5}", found.paper)
    assert found.summary.endswith(".") and len(found.summary) <= 160
    assert all(line.endswith(".") and "  " not in line for line in (*found.verified, *found.deviations))


@pytest.mark.parametrize(
    ("method", "values"),
    [
        ("dapo", {"clip_low": 0.2, "clip_high": 0.28, "reduction": "mean"}),
        ("gspo", {"clip_low": 3e-4, "clip_high": 4e-4, "ratio": "seq_mean", "reduction": "seq_mean"}),
        ("cispo", {"clip_high": 4.0}),
        ("bnpo", {"dual_clip": 10.0, "clip_high": 0.28, "reduction": "seq_mean_token_sum"}),
        ("ngrpo", {"clip_low": 0.16, "clip_high": 0.24}),
        ("gmpo", {"clip_low": 0.4, "clip_high": 0.4}),
        ("lp_reg", {"clip_low": 1.0, "clip_high": 9.0, "dual_clip": 10.0}),
        ("bapo", {"dual_clip": 3.0}),
        ("nft", {"max_length": 1000.0}),
    ],
)
def test_published_values(method: str, values: dict[str, Any], configure: Configure) -> None:
    objective = configure(method, "objective.updates_per_iteration=2").objective
    assert {name: getattr(objective, name) for name in values} == values


# --- the first update: every gate is a policy gradient there ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def grpos(configure: Configure) -> dict[str, torch.Tensor]:
    """Reduction -> GRPO's gradient of the first update."""
    kinds = ("mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm")
    return {kind: gradient(configure("grpo", f"objective.reduction={kind}")) for kind in kinds}


GRPO = "advantage={centre: group, scale: group_std, ddof: 1, eps: 1e-6}"


@pytest.mark.parametrize(
    ("method", "overrides", "reduction", "factor"),
    [
        ("cispo", [], "mean", 1),
        ("sapo", [], "seq_mean_token_mean", 1),
        ("vespo", [], "mean", 1),
        ("mdpo", [], "mean", 1),
        ("bapo", [], "mean", 1),
        ("lp_reg", ["objective.args.share=0"], "mean", 1),
        ("capo", ["objective.args.threshold=1e9", GRPO], "mean", 1),
        ("clip_cov", ["objective.args.share=0"], "mean", 1),
        ("kl_cov", [], "mean", 1),
        ("rover", ["generation.temperature=1"], "mean", 2),
        ("gspo", [], "seq_mean_token_mean", 1),
        ("gspo_token", [], "seq_mean_token_mean", 1),
        ("gmpo", [], "seq_mean_token_mean", 1),
        ("kimi", [GRPO], "seq_mean_token_sum", 1),
        ("reg_grpo", [], "seq_mean_token_sum", 2),
        ("gvpo", [GRPO], "seq_mean_token_sum", 0.1 * 4 / 3),
        ("dr_grpo", [GRPO], "seq_mean_token_sum_norm", 1),
        ("tw_grpo", ["tokens.weights=[{name: divergence, args: {alpha: 1}}]"], "mean", 1),
        ("top_entropy", ["tokens.weights=[{name: top_entropy, args: {share: 1}}]"], "mean", 1),
        ("epo", ["entropy.weight=1e-12"], "seq_mean_token_mean", 1),
    ],
)
def test_the_first_gradient_is_a_multiple_of_grpos(
    method: str, overrides: list[str], reduction: str, factor: float, configure: Configure, grpos: dict[str, torch.Tensor]
) -> None:
    ours = gradient(configure(method, *overrides))
    torch.testing.assert_close(ours, factor * grpos[reduction], **SAME)


def test_nft_is_grpo_or_dr_grpo_in_the_first_update(configure: Configure) -> None:
    constant = ["objective.reduction=seq_mean_token_sum_norm", "objective.max_length=1000"]
    base = gradient(configure("grpo", *constant, "advantage={ddof: 0, eps: 1e-12}"), BINARY)
    torch.testing.assert_close(gradient(configure("nft"), BINARY) * 1000, base * 1000, **SAME)
    centred = gradient(configure("dr_grpo", *constant), BINARY)
    torch.testing.assert_close(gradient(configure("nft", "objective.args.omega=dr_grpo"), BINARY) * 1000, centred * 1000, **SAME)


def test_drpo_with_one_right_and_one_wrong_answer_is_the_difference_of_their_mean_log_probabilities(configure: Configure) -> None:
    pairs, rewards = "rollout={groups_per_iteration: 3, group_size: 2}", [1.0, 0.0, 0.0, 1.0, 1.0, 0.0]
    ours = gradient(configure("drpo", pairs), rewards)
    # rewards less the mean are +-1/2, and the mean is over 2 answers of a prompt: a quarter of the prompt's loss
    base = gradient(configure("dr_grpo", pairs, "objective.reduction=seq_mean_token_mean"), rewards)
    torch.testing.assert_close(ours, 4 * base, **SAME)


@pytest.mark.parametrize(
    "method", ["gspo", "vespo", "reg_grpo", "gvpo", "rover", "bapo", "capo", "lp_reg", "clip_cov", "kl_cov", "tw_grpo", "top_entropy", "epo"]
)
def test_it_does_not_matter_how_a_later_update_is_cut_into_micro_batches(method: str, configure: Configure) -> None:
    more = ["objective.updates_per_iteration=2", *(["objective.args.share=0.2"] if method in ("lp_reg", "clip_cov", "kl_cov") else [])]
    whole, cut = (gradient(configure(method, *more, f"training.rows_per_backward={rows}"), update=2) for rows in (64, 4))
    assert float(whole.norm()) > 0
    torch.testing.assert_close(cut, whole, rtol=1e-3, atol=1e-4 * float(whole.abs().max()))


def test_gspo_moves_all_tokens_by_the_mean_log_ratio(configure: Configure) -> None:
    log_prob, old = torch.tensor([[-1.0, -1.0]]), torch.tensor([[-1.3, -1.1]])  # log-ratios 0.3 and 0.1, mean 0.2
    for method, expected in (("gspo", [0.2, 0.2]), ("gspo_token", [0.2, 0.2]), ("grpo", [0.3, 0.1])):
        objective = make_objective(configure(method, "objective.clip_high=9"))
        found = objective(batch_of(answers_of(old), log_prob, old, torch.ones(1, 2)))
        torch.testing.assert_close(found.loss, -torch.tensor([expected]).exp())


@pytest.mark.parametrize(("method", "unlike"), [("gspo", "gmpo"), ("cispo", "sapo"), ("vespo", "cispo"), ("mdpo", "kl_cov"), ("capo", "dr_grpo")])
def test_later_updates_differ(method: str, unlike: str, configure: Configure) -> None:
    found = [gradient(configure(name, GRPO, "objective.reduction=mean", "objective.updates_per_iteration=2"), update=2) for name in (method, unlike)]
    assert float((found[0] - found[1]).norm()) > 1e-3 * float(found[1].norm())


# --- estimators ---------------------------------------------------------------------------------------------------------------------------------


def advantages(config: Config, rewards: Sequence[float]) -> tuple[torch.Tensor, Any]:
    """[3, 4] of the first token, and all that was assigned."""
    assigned = assign_rewards(Trainer(config), rewards)
    return assigned.advantages[:, 0].view(3, 4).double(), assigned


def table(values: Sequence[float] = REWARDS) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).view(3, 4)


def test_advantages_of_reinforce_rloo_dr_grpo_and_lite_ppo(configure: Configure) -> None:
    r = table()
    centred = r - r.mean(1, keepdim=True)
    torch.testing.assert_close(advantages(configure("reinforce"), REWARDS)[0], r - r.mean(), **SAME)
    torch.testing.assert_close(advantages(configure("rloo", "kl.weight=0", "kl.place=loss", "shaping=[]"), REWARDS)[0], centred * 4 / 3, **SAME)
    torch.testing.assert_close(advantages(configure("dr_grpo"), REWARDS)[0], centred, **SAME)
    torch.testing.assert_close(advantages(configure("lite_ppo"), REWARDS)[0], centred / (r.std() + 1e-6), **SAME)


def test_opo_weighs_the_baseline_by_length(configure: Configure) -> None:
    found, assigned = advantages(configure("opo"), REWARDS)
    n, r = assigned.answers.lengths.view(3, 4).double(), table()
    assert len(n.unique()) > 1
    torch.testing.assert_close(found, r - (n * r).sum(1, keepdim=True) / n.sum(1, keepdim=True), **SAME)


def test_pass_at_k_has_one_advantage_in_a_group(configure: Configure) -> None:
    found, _ = advantages(configure("pass_at_k"), REWARDS)
    std = table().std(1)
    expected = torch.zeros(3, 4, dtype=torch.float64)
    expected[0, 0], expected[2, 3] = 0.75 / (std[0] + 1e-6), 0.5 / (std[2] + 1e-6)  # in the second group the best is no better than the second best
    torch.testing.assert_close(found, expected, **SAME)


def test_ngrpo_learns_from_groups_without_a_right_answer(configure: Configure) -> None:
    found, _ = advantages(configure("ngrpo"), [0.0] * 4 + [1.0] * 4 + [1.0, 0.0, 0.0, 0.0])
    torch.testing.assert_close(found[0], torch.full((4,), -1 / math.sqrt(5), dtype=torch.float64), **SAME)
    assert found[1].tolist() == [0] * 4
    assert float(found[2].sum()) < 0


def test_bnpo_divides_by_the_beta_density_of_the_success_rates(configure: Configure) -> None:
    found, _ = advantages(configure("bnpo"), BINARY)
    p = torch.tensor([0.5, 0.75, 0.0], dtype=torch.float64)
    mean, variance = float(p.mean()), float(p.var())
    common = mean * (1 - mean) / variance - 1
    a, b = (max(1.0, 1 + common * part / 3) for part in (mean, 1 - mean))
    norm = math.gamma(a) * math.gamma(b) / math.gamma(a + b)
    for g in (0, 1):
        weight = norm / (float(p[g]) ** (a - 1) * (1 - float(p[g])) ** (b - 1))
        torch.testing.assert_close(found[g], weight * (table(BINARY)[g] - p[g]), **SAME)
    assert found[2].tolist() == [0] * 4


def test_reinforce_pp_whitens_over_tokens(configure: Configure) -> None:
    _, assigned = advantages(configure("reinforce_pp"), REWARDS)
    chosen = assigned.advantages[assigned.mask].double()
    assert float(chosen.mean()) == pytest.approx(0, abs=1e-6) and float(chosen.std()) == pytest.approx(1, rel=1e-4)
    value = torch.tensor(REWARDS, dtype=torch.float64)[:, None].expand(assigned.mask.shape)[assigned.mask]  # no KL yet, and gamma 1
    torch.testing.assert_close(chosen, (value - value.mean()) / value.std(), rtol=1e-3, atol=1e-5)


def test_reinforce_pp_with_a_baseline_whitens_what_the_group_leaves(configure: Configure) -> None:
    _, assigned = advantages(configure("reinforce_pp", "advantage.centre=group"), REWARDS)
    centred = (table() - table().mean(1, keepdim=True)).flatten()[:, None].expand(assigned.mask.shape)[assigned.mask]
    chosen = assigned.advantages[assigned.mask].double()
    torch.testing.assert_close(chosen, (centred - centred.mean()) / centred.std(), rtol=1e-3, atol=1e-5)


def test_rloo_takes_the_price_of_the_whole_answer_off_its_reward(configure: Configure) -> None:
    trainer = Trainer(configure("rloo"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in trainer.parameters:
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.02)  # away from the reference
    answers = assign_rewards(trainer, REWARDS).answers
    away = torch.where(answers.mask, answers.token("log_prob") - answers.token("reference"), 0.0).double().sum(1)
    assert float(away.abs().min()) > 0
    torch.testing.assert_close(answers.rewards, torch.tensor(REWARDS, dtype=torch.float64) - 0.03 * away)


# --- objectives that choose tokens --------------------------------------------------------------------------------------------------------------


def test_the_next_decision_passes_over_tokens_of_the_environment() -> None:
    value = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0], [1.0, 2.0, 3.0, 4.0, 5.0]])
    mask = torch.tensor([[True, False, False, True, True], [True, True, False, False, False]])
    assert next_decisions(value, mask).tolist() == [[4, 4, 4, 5, 0], [2, 0, 0, 0, 0]]


def test_rover_regresses_on_the_mean_q_value_of_the_next_token(configure: Configure) -> None:
    objective = Rover(configure("rover", "objective.updates_per_iteration=2", "objective.args.kappa=0.5"))
    old_mean = torch.tensor([[-3.0, -4.0]])
    answers = answers_of(torch.zeros(1, 2), token=lambda name: {"mean_log_prob": old_mean}[name])
    log_prob = torch.tensor([[-0.5, -1.0]], requires_grad=True)
    found = objective(batch_of(answers, log_prob, torch.tensor([[-1.0, -1.0]]), torch.tensor([[1.0, 1.0]]), mean_log_prob=torch.tensor([[-2.0, -3.5]])))
    # Q = 0.5 * 0.5; y = 1 + 0.5 * (-3.5 + 4) before the last token, 1 at it
    torch.testing.assert_close(found.loss, torch.tensor([[(0.25 - 1.25) ** 2, 1.0]]))


def test_mdpo_holds_more_as_training_goes_on(configure: Configure) -> None:
    objective = AnnealedMdpo(configure("mdpo", "training.iterations=4", "objective.args.penalty=0.5"))
    log_prob = torch.tensor([[0.1]])
    for iteration, factor in ((1, 1.0), (3, 2.0), (4, 4.0)):
        found = objective(batch_of(answers_of(torch.zeros(1, 1), iteration=iteration), log_prob, torch.zeros(1, 1), torch.zeros(1, 1)))
        assert float(found.loss) == pytest.approx(0.5 * factor * (math.exp(-0.1) - 1 + 0.1), rel=1e-4)


def test_drpo_has_a_barrier_above_a_small_kl_that_counts_by_token(configure: Configure) -> None:
    objective = Drpo(configure("drpo", "objective.args.kappa=10", "objective.args.least=0.1"))
    mask = torch.tensor([[True, False], [True, True]])
    answers = answers_of(torch.zeros(2, 2), mask=mask)
    log_prob = torch.tensor([[-1.0, 0.0], [-1.0, -1.0]], requires_grad=True)
    none = torch.zeros(2, 2)  # neither right nor wrong: the barrier alone
    found = objective(batch_of(answers, log_prob, torch.tensor([[-0.7, 0.0], [-0.7, -0.7]]), none))
    weight = torch.where(mask, 1 / mask.sum(1, keepdim=True), 0.0) / 2  # seq_mean
    loss = (weight * found.loss).sum()
    assert float(loss.detach()) == pytest.approx(10 * (0.3 - 0.1) * 0.3, rel=1e-4)  # force times the mean of 0.3 over the 3 tokens
    (slope,) = torch.autograd.grad(loss, log_prob)
    torch.testing.assert_close(slope, torch.where(mask, -2.0 / 3, 0.0))


def test_rover_asks_for_no_pass_with_one_update(configure: Configure) -> None:
    one, two = (assert_trains(configure("rover", f"objective.updates_per_iteration={n}"), 1)[1][0] for n in (1, 2))
    grpo = assert_trains(configure("grpo", "generation.temperature=0.6"), 1)[1][0]
    assert one["nfe/used"] == grpo["nfe/used"] < two["nfe/used"]


def test_nft_refuses_rewards_between_0_and_1(configure: Configure) -> None:
    objective = TokenNft(configure("nft"))
    answers = answers_of(torch.zeros(4, 3), rewards=torch.tensor([0.0, 1.0, 0.5, math.nan], dtype=torch.float64))
    answers.valid[3] = False
    with pytest.raises(UserError, match="token_nft takes rewards that are 0 or 1, and 1 of 3 are not; use one verifier"):
        objective.begin(answers, torch.zeros(4, 3))
    answers.rewards[2] = 1.0
    objective.begin(answers, torch.zeros(4, 3))
    assert answers.extra["success_rate"].tolist() == pytest.approx([2 / 3] * 4)


def test_capo_leaves_out_what_would_move_the_logits_far() -> None:
    # norms squared A^2 (1 - 2 p + sum p^2): 1 - 0.02 + 0.9 = 1.88, and 1 - 1.8 + 0.82 = 0.02; half of step^2 times them against 1e-4
    log_prob = torch.tensor([[0.01, 0.9]]).log().requires_grad_()
    decisions = Decisions(log_prob, log_prob.detach(), torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool))
    found = capo(decisions, square_sum=torch.tensor([[0.9, 0.82]]), clip_low=0.2, clip_high=0.2, step=0.0125, threshold=1e-4)
    assert found.loss.tolist() == [[0, -1]]
    assert capo(decisions, square_sum=torch.tensor([[0.9, 0.82]]), clip_low=0.2, clip_high=0.2, step=0.0125, threshold=1.0).loss.tolist() == [[-1, -1]]


def test_lp_reg_holds_the_rarest_tokens_that_the_filter_keeps(configure: Configure) -> None:
    objective = LpReg(configure("lp_reg", "objective.args.share=0.5"))
    old = torch.tensor([[-9.0, -8.0, -0.1], [-7.0, -0.2, -0.3]])
    signs = torch.tensor([[-1.0, -1.0, -1.0], [1.0, -1.0, -1.0]])  # 5 tokens with A < 0: the 2 rarest are the first of answer 0
    answers = answers_of(old)
    objective.begin(answers, signs)
    assert answers.extra["rare"].tolist() == [[True, True, False], [False, False, False]]
    log_prob = old.clone().requires_grad_()
    proxy = torch.tensor([[-8.5, -1e4, -0.05], [-6.0, -0.1, -0.2]])  # the second is noise: the filter has taken it out
    found = objective(batch_of(answers, log_prob, old, signs, first=True, min_p=proxy))
    d = 0.5
    torch.testing.assert_close(found.loss[0], torch.tensor([1 + math.exp(d) - 1 - d, 1.0, 1.0]))
    found.loss.sum().backward()
    torch.testing.assert_close(log_prob.grad[0], torch.tensor([1 - (math.exp(d) - 1), 1.0, 1.0]))  # the proxy pulls it up again


def test_covariances_choose_tokens_over_the_iteration(configure: Configure) -> None:
    log_prob = torch.tensor([[-4.0, -1.0, 0.0], [-1.0, -2.0, -1.0]])  # mean -1.5
    up_down = torch.tensor([[1.0] * 3, [0.0] * 3])  # mean 1/2; covariances -1.25, 0.25, 0.75 and -0.25, 0.25, -0.25
    held = answers_of(log_prob)
    KlCov(configure("kl_cov", "objective.args.share=0.34")).begin(held, up_down)
    assert held.extra["held"].tolist() == [[False, True, True], [False, True, False]]  # 2 tokens, and the one equal to the second
    KlCov(configure("kl_cov")).begin(held, up_down)
    assert held.extra["held"].tolist() == [[False, False, True], [False] * 3]  # at least one
    dropped = answers_of(log_prob)
    ClipCov(configure("clip_cov", "objective.args={share: 0.9, least: 0.2, most: 0.7}")).begin(dropped, up_down)
    assert dropped.extra["dropped"].tolist() == [[False, True, False], [False, True, False]]
    ClipCov(configure("clip_cov", "objective.args={share: 0.1, least: 0.2, most: 0.7}")).begin(dropped, up_down)
    assert int(dropped.extra["dropped"].sum()) == 1
    assert [wanted(0.0, 100), wanted(2e-4, 100), wanted(0.1, 99)] == [0, 1, 9]


def test_what_chosen_tokens_cost() -> None:
    log_prob = torch.tensor([[-1.0, -1.0]], requires_grad=True)
    decisions = Decisions(log_prob, torch.tensor([[-1.5, -1.5]]), torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool))
    second = torch.tensor([[False, True]])
    r = math.exp(0.5)
    torch.testing.assert_close(kl_cov(decisions, held=second, coefficient=2.0).loss, torch.tensor([[-r, -r + 1.0]]))
    torch.testing.assert_close(clip_cov(decisions, dropped=second, clip_low=0.2, clip_high=0.3).loss, torch.tensor([[-1.3, 0.0]]))


# --- BAPO ---------------------------------------------------------------------------------------------------------------------------------------


def test_bapo_searches_with_the_shares_of_the_iteration_before(configure: Configure) -> None:
    args = "{low_start: 0.8, low_end: 0.9, high_start: 1.2, high_end: 1.5, low_step: 0.1, high_step: 0.15}"
    objective = Bapo(configure("bapo", f"objective.args={args}"))
    old = torch.zeros(2, 2)
    log_prob = torch.tensor([[math.log(1.1), math.log(1.3)], [math.log(0.85), math.log(1.0)]])
    signs = torch.tensor([[1.0, 1.0], [-1.0, -1.0]])
    answers = answers_of(old)
    objective.begin(answers, signs)
    assert (objective.low, objective.high) == (0.8, 1.2)  # as much up as down: the first candidate
    objective(batch_of(answers, old, old, signs, first=True))  # its ratios are 1 and are not asked
    objective(batch_of(answers, log_prob, old, signs))
    objective.finish(answers)
    state = objective.state_dict()
    # left of P = 2.4: 1.1 until high 1.35 holds 1.3; left of N = 1.85: all until low 0.9 drops 0.85
    objective.begin(answers, torch.tensor([[1.0, 1.0], [-0.8, -0.8]]))
    assert objective.all.tolist() == pytest.approx([2.4, 1.85])
    # P / N: (0.8, 1.2) 2 * 1.1 / 2.4 = 0.917 against 1.6 -> below 1; (0.9, 1.2) 0.917 against 1.6 / 1.85 = 0.865 -> enough
    assert (objective.low, objective.high) == (0.9, 1.2)
    objective.finish(answers)
    objective.begin(answers, torch.tensor([[0.0, 1.0], [-1.0, -1.0]]))
    assert (objective.low, objective.high) == (0.9, 1.5)  # there was no update after the first: all shares are 1, and 1 < 2 everywhere
    again = Bapo(configure("bapo", f"objective.args={args}"))
    again.load_state_dict(state)
    again.begin(answers, torch.tensor([[1.0, 1.0], [-0.8, -0.8]]))
    assert (again.low, again.high) == (0.9, 1.2)


def test_bapo_with_target_0_is_the_first_candidate_and_its_bounds_act(configure: Configure) -> None:
    objective = Bapo(configure("bapo", "objective.args={target: 0}"))
    answers, old = answers_of(torch.zeros(1, 2)), torch.zeros(1, 2)
    objective.begin(answers, torch.tensor([[-1.0, -1.0]]))
    found = objective(batch_of(answers, torch.tensor([[math.log(1.25), math.log(1.15)]]), old, torch.ones(1, 2)))
    torch.testing.assert_close(found.loss, torch.tensor([[-1.2, -1.15]]))


# --- tokens of all processes --------------------------------------------------------------------------------------------------------------------


class Processes:
    """Two threads that add as two processes do."""

    def __init__(self) -> None:
        self.barrier, self.values = threading.Barrier(2, timeout=20), [0.0, 0.0]

    def run(self, work: Callable[[int, Callable[[float], float]], Any]) -> list[Any]:
        def add(rank: int, value: float) -> float:
            self.values[rank] = value
            self.barrier.wait()
            total = sum(self.values)
            self.barrier.wait()
            return total

        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(lambda rank: work(rank, lambda value: add(rank, value)), range(2)))


def test_the_smallest_of_two_processes() -> None:
    generator = torch.Generator().manual_seed(1)
    value = torch.randn(4, 9, generator=generator)
    value[0, 0], value[3, 3] = 0.0, -0.0
    among = torch.rand(4, 9, generator=generator) < 0.8
    assert smallest(torch.tensor([[0.0, -0.0, 1.0]]), torch.ones(1, 3, dtype=torch.bool), 1, float).tolist() == [[True, True, False]]
    for count in (0, 1, 7, int(among.sum())):
        expected = torch.zeros_like(among)
        place = torch.where(among, value, torch.inf).flatten().argsort()[:count]
        expected.view(-1)[place] = True
        assert torch.equal(smallest(value, among, count, float), expected)
        parts = Processes().run(lambda rank, add, count=count: smallest(value[2 * rank : 2 * rank + 2], among[2 * rank : 2 * rank + 2], count, add))
        assert torch.equal(torch.cat(parts), expected)


@pytest.mark.parametrize("share", [0.2, 0.5, 1.0, 0.01])
def test_top_entropy_keeps_what_lies_above_the_quantile_of_all_processes(share: float) -> None:
    generator = torch.Generator().manual_seed(2)
    entropy, mask = torch.rand(4, 11, generator=generator), torch.rand(4, 11, generator=generator) < 0.7

    def part(rank: int, add: Callable[[float], float]) -> torch.Tensor:
        rows = slice(2 * rank, 2 * rank + 2)
        answers = answers_of(torch.zeros(2, 11), mask=mask[rows], add=add, token=lambda name: entropy[rows])
        return TopEntropy(share)(answers, torch.zeros(2, 11))

    expected = top_entropy_mask(entropy, mask, share=share, threshold=masked_quantile(entropy, mask, 1 - share))
    assert torch.equal(torch.cat(Processes().run(part)), expected.float())


def test_divergence_weights_are_those_of_whole_distributions(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowrl.text.divergence.positions_at_once", lambda vocabulary: 9)  # 2 positions of 4 answers
    trainer = Trainer(configure("tw_grpo", "generation.temperature=0.7"))
    assigned = assign_rewards(trainer, REWARDS)
    answers = assigned.answers
    with torch.no_grad():
        out = trainer.policy.token_output(answers.completions, torch.arange(12), columns=["distribution"], temperature=0.7)
    whole = position_divergence(out.columns["distribution"], answers.mask, answers.group, 3)
    expected = divergence_weights(whole, answers.mask, answers.group, alpha=1.4)
    torch.testing.assert_close(assigned.factor, expected, rtol=1e-4, atol=1e-4)
    assert float(expected.max()) == pytest.approx(1.4)


# --- entropy ------------------------------------------------------------------------------------------------------------------------------------


def test_the_band_is_about_the_history_of_each_turn_and_begins_late(configure: Configure) -> None:
    term = BandTerm(configure("epo", "training.iterations=4", "entropy={weight: 0.5, band: 0.1}"))
    turn = torch.tensor([[0, 0, 1], [0, 1, 40]])
    answers = answers_of(torch.zeros(2, 3))
    answers.completions.turn = turn
    answers.mask[0, 2] = False

    def ask(iteration: int, entropy: list[list[float]]) -> torch.Tensor:
        answers.iteration = iteration
        zero = torch.zeros(2, 3)
        loss, _ = term(batch_of(answers, zero, zero, zero, entropy=torch.tensor(entropy)))
        return loss

    assert ask(1, [[1.0, 3.0, 9.0], [2.0, 4.0, 6.0]]).eq(0).all()
    term.finish(answers)
    assert term.history.means()[[0, 1, 15]].tolist() == [2.0, 4.0, 6.0]
    assert ask(2, [[9.0] * 3] * 2).eq(0).all()  # not before half of the iterations
    term.load_state_dict(term.state_dict())
    # turn 0: 2.4 is the upper bound, 1.6 the lower; distances over the mean, times 0.5 and 0.1; turn 40 counts as the last
    torch.testing.assert_close(ask(3, [[2.0, 3.4, 4.0], [0.6, 4.0, 6.0]]), 0.05 * torch.tensor([[0.0, 0.5, 0.0], [0.5, 0.0, 0.0]]))
    term.finish(answers)
    assert float(term.history.means()[0]) == pytest.approx((6 + 27 + 6) / 9)  # of all three iterations


def test_the_entropy_bonus_stops_above_the_target_and_its_weight_moves(configure: Configure) -> None:
    for target, weight, next_weight in ((1e-3, 0.005, 0.0), (50.0, 0.015, 0.015)):
        trainer, _ = assert_trains(configure("adaptive_entropy", f"entropy.target={target}"), 1)
        controller = trainer.engine.terms[0].controller
        assert (controller.coefficient, controller.weight) == (pytest.approx(weight), pytest.approx(next_weight))


@pytest.mark.parametrize("method", ["bapo", "epo", "adaptive_entropy", "clip_cov"])
def test_a_resumed_run_goes_on_as_if_nothing_had_been(method: str, configure: Configure) -> None:
    config = configure(method, "objective.updates_per_iteration=2", "training.iterations=2")
    whole, _ = assert_trains(config, 2)
    first, _ = assert_trains(config, 1)
    second = Trainer(config)
    second.load_state(first.state())
    second.iterate(2)
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters, second.parameters, strict=True))


# --- mistakes -----------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "overrides", "expected"),
    [
        ("nft", ["advantage.centre=group"], "advantage: token_nft takes rewards as they are, not centre group and scale none"),
        ("nft", ["token_credit.name=token_returns"], "token_credit: token_nft asks whether an answer is right, and token_returns differs within it"),
        ("gvpo", ["objective.clip_low=0.2"], "objective.clip_low: gvpo is a squared loss and has nothing to clip; leave clip_low and clip_high out"),
        ("rover", ["objective.ratio=seq_mean_token"], "objective.ratio: rover reads the log-probability of each token; use plain"),
        ("cispo", ["objective.ratio=none"], "objective.ratio: cispo caps ratios, and with none every ratio is 1"),
        ("kimi", ["objective.ratio=seq_mean"], "objective.ratio: kimi makes its own ratio of the whole sample"),
        ("kimi", ["token_credit.name=token_returns"], "objective.name: kimi judges whole answers, and token_credit: token_returns differs within them"),
        ("gspo", ["token_credit.name=token_returns"], "objective.ratio: seq_mean moves whole answers, and token_credit: token_returns differs within them"),
        ("drpo", ["training.rows_per_backward=3"], "rows_per_backward: 3 is less than the 4 answers of a group, which drpo trains together; use at least 4"),
        ("bapo", ["objective.args.low_end=1.5"], "objective.args: bounds of the ratio must satisfy 0 <= 0.6 <= 1.5 <= 1"),
        ("bapo", ["objective.args.targt=2"], "not targt; did you mean target?"),
        ("sapo", ["objective.dual_clip=3"], "objective.dual_clip: it bounds the clipped surrogate, not sapo"),
        ("lp_reg", ["objective.args.share=-1"], "objective.args: share = -1 of lp_reg is not a number of at least 0"),
        ("rloo", ["kl.place=loss"], "shaping: kl_price takes kl.weight off rewards; set kl: {weight: 0.03, place: reward}"),
        ("rloo", ["shaping=[]"], "kl.place: a price for every token needs a credit of tokens"),
        ("rloo", ["token_credit.name=token_returns"], "shaping: kl_price and token_credit: token_returns would both take the price"),
        ("epo", ["entropy.target=1.0"], "entropy.band: it and target each have bounds under entropy.args; use one of them"),
        ("epo", ["entropy.weight=0"], "entropy.band: it is multiplied with entropy.weight, which is 0; set a weight above 0"),
        ("epo", ["entropy.args.low=1.1"], "entropy.args: the band 1.1 to 1.2 times the mean does not hold the mean"),
        ("epo", ["entropy.args.widht=1"], "entropy.args: there is no argument widht"),
        ("epo", ["entropy.args.form=soft"], "entropy.args: unknown form soft; use hinge or step"),
        ("epo", ["entropy.args.start=1"], "entropy.args: start is 1, and the share of the iterations before the band is in [0, 1)"),
        ("adaptive_entropy", ["entropy.args.step=0"], "entropy.args: step 0 must be above 0"),
        ("grpo", ["entropy.args.step=1"], "entropy.args: step belong to target or band, and there is neither; leave them out"),
        ("tw_grpo", ["training.sharding=fsdp2"], "tokens.weights: divergence needs the output head whole, and training.sharding is fsdp2; set none"),
        ("capo", ["objective.args.step=0"], "objective.args: step = 0 of capo is not a number above 0"),
    ],
)
def test_what_cannot_work_is_one_line(method: str, overrides: list[str], expected: str, configure: Configure) -> None:
    with pytest.raises(UserError) as caught:
        configure(method, *overrides)
    assert any(expected in line for line in str(caught.value).splitlines()), str(caught.value)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ("top_entropy: {share: 0}", "tokens.weights: top_entropy: share is 0, and a share of tokens is in (0, 1]"),
        ("divergence: {alpha: 0.5}", "tokens.weights: divergence: alpha is 0.5, and the largest weight is at least 1"),
    ],
)
def test_a_factor_out_of_range_is_one_line(weights: str, expected: str, configure: Configure) -> None:
    with pytest.raises(UserError, match=re.escape(expected)):
        Trainer(configure("grpo", f"tokens={{weights: {{{weights}}}}}"))
