"""Several rewards through the trainer: labels, columns, samples without a score, hard constraints, weights that change, groups in evaluation."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from drills import RowCount, begin
from toys import PROMPTS

from flowrl.agreement import settings_without_effect
from flowrl.assignment import Assigner
from flowrl.config import Config
from flowrl.evaluation import build_rewards
from flowrl.run import train
from flowrl.trainer import Trainer
from flowrl.types import RewardInfo, SampleBatch, Scores, UserError
from samplers.forest import leaves_only

Configure = Callable[..., Config]


class Picky:
    """Brightness, but of prompts with ``word`` only every ``every``-th sample has a score. The class counts what is loaded."""

    loads = 0

    def __init__(self, word: str = "", every: int = 2, scope: str = "sample") -> None:
        self.info = RewardInfo("picky", "for tests", 0.0, 1.0, scope=scope)  # type: ignore[arg-type]
        self.word, self.every = word, every
        self.groups: list[list[int]] = []

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        Picky.loads += 1

    def score(self, batch: SampleBatch) -> Scores:
        assert batch.images is not None
        self.groups.append([] if batch.group is None else batch.group.tolist())
        values = batch.images.flatten(1).mean(1)
        valid = torch.tensor([self.word not in prompt.text or i % self.every == 0 for i, prompt in enumerate(batch.prompts)])
        problems = dict.fromkeys(torch.nonzero(~valid).flatten().tolist(), "too picky")
        return Scores(torch.where(valid, values, torch.nan), valid, {"doubled": 2 * values}, problems)


PICKY = "name: 'test_several_rewards:Picky', label: picky"


def test_labels_and_columns_of_rewards_are_metrics(configure: Configure) -> None:
    rewards = f"rewards=[{{{PICKY}}}, {{name: 'toys:brightness', label: light, weight: 0.5}}]"
    metrics, _ = Trainer(configure(rewards, "training.max_invalid_share=0.5")).iterate(1)
    assert metrics["reward/total/mean"] == pytest.approx(1.5 * metrics["reward/picky/mean"])
    assert metrics["reward/picky/doubled"] == pytest.approx(2 * metrics["reward/light/mean"])  # of every sample that has one
    assert (metrics["reward/picky/invalid"], metrics["reward/light/invalid"], metrics["reward/invalid"]) == (6, 0, 6)


def test_the_same_reward_can_be_used_twice_under_labels(configure: Configure) -> None:
    with pytest.raises(UserError, match="rewards: ink is listed twice; keep one and set its weight, or give each a label"):
        configure("rewards=[ink, {name: ink, args: {}}]")
    both = "rewards=[{name: 'toys:Warmth', label: warm}, {name: 'toys:Warmth', label: blue, args: {word: red}}]"
    assert list(build_rewards(configure(both).rewards).names) == ["warm", "blue"]


# --- samples without a score


def test_few_samples_without_a_score_are_left_out_and_many_stop_the_run(configure: Configure) -> None:
    rewards = f"rewards=[{{{PICKY}, args: {{every: 4}}}}]"
    half = Trainer(configure(rewards, "training.max_invalid_share=0.75"))
    metrics, _ = half.iterate(1)
    assert metrics["reward/invalid"] == 9
    with pytest.raises(UserError) as caught:
        Trainer(configure(rewards, "training.max_invalid_share=0.74")).iterate(1)
    line = str(caught.value)
    assert line.startswith("9 of the 12 samples of iteration 1 could not be scored, more than training.max_invalid_share = 0.74 allows. The first: ")
    assert any(f"reward picky on the prompt '{prompt}': too picky." in line for prompt in PROMPTS)


def test_a_run_that_stops_for_this_keeps_its_checkpoint(configure: Configure, tmp_path: Path) -> None:
    run = train(configure("rewards=['toys:brightness']", "training.iterations=2"))
    config = configure(f"rewards=[{{{PICKY}}}]", "training.iterations=4", "training.max_invalid_share=0.05")
    with pytest.raises(UserError, match="samples of iteration 3 could not be scored"):
        train(config, resume=run)
    assert sorted(path.name for path in (run / "checkpoints").iterdir())[-1].endswith("2")


# --- hard constraints


def test_a_constraint_is_counted_and_makes_violations_the_worst(configure: Configure) -> None:
    trainer = Trainer(configure("rewards=[{name: 'toys:brightness', weight: 1.0}, {name: 'toys:redness', weight: 0.0, minimum: -0.09}]"))
    drill = begin(trainer)
    metrics, _ = trainer.iterate(1)
    share = metrics["reward/toys:redness/satisfied"]
    assert 0 < share < 1
    shown = [prompt for prompt in drill.prompts for _ in range(4)]
    values = trainer.rewards.score(SampleBatch(shown, trainer.policy.decode(drill.rollout.leaves)))["toys:redness"].values.view(3, 4)
    advantages = torch.zeros(12).index_put_((drill.rollout.leaf_edge[:, 1],), drill.assignment.advantages[drill.rollout.leaf_edge[:, 0]]).view(3, 4)
    for group in range(3):
        good, bad = values[group] >= -0.09, values[group] < -0.09
        if good.any() and bad.any():
            assert advantages[group][bad].max() < advantages[group][good].min()
    assert share == (values >= -0.09).double().mean().item()


# --- weights that change


@pytest.mark.parametrize("method", ["flow_grpo_fast", "awm"])
def test_measured_gradients_are_those_of_runs_with_one_reward(configure: Configure, method: str) -> None:
    base = ["ema=null", f"method={method}", "objective.updates_per_iteration=1"]
    base += ["rollout={plan: ode, num_steps: 4}", "matching.num_times=2", "kl.weight=0"] if method == "awm" else []
    both = Trainer(configure(*base, "rewards={'toys:brightness': 1.0, 'toys:redness': 2.0}", "reward_weights={kind: gradient, every: 1, rate: 0.5}"))
    drill = begin(both)
    scores = both.engine.sample(drill.plan, drill.prompts, drill.numbers, 1)[1][0].result()
    found = both._reward_gradients(drill.sampled, scores, drill.prompts, drill.numbers, 1)
    for row, name in zip(found, ("toys:brightness", "toys:redness"), strict=True):
        alone = begin(Trainer(configure(*base, f"rewards=['{name}']"))).gradient()
        flat = torch.cat([g.flatten() for g in alone])
        assert flat.abs().max() > 1e-6
        torch.testing.assert_close(row, flat, rtol=1e-4, atol=1e-4 * flat.abs().max().item())


def test_gradients_move_the_weights_after_their_iteration_and_their_rows_are_counted(configure: Configure) -> None:
    rewards = "rewards={'toys:brightness': 1.0, 'toys:redness': 3.0, 'toys:constant': 0.0}"
    trainer = Trainer(configure(rewards, "reward_weights={kind: gradient, every: 2, rate: 1e4}"))
    rows = RowCount(trainer)
    first, _ = trainer.iterate(1)
    assert (first["nfe/reward_weights"], first["nfe/used"]) == (0, first["nfe/minimum"])
    seen = rows.forward + rows.backward
    second, _ = trainer.iterate(2)
    assert second["nfe/used"] == second["nfe/minimum"] == first["nfe/used"]
    assert second["nfe/reward_weights"] == 2 * 2 * first["nfe/backward"]  # two rewards, forward and backward
    assert rows.forward + rows.backward - seen == second["nfe/used"] + second["nfe/reward_weights"]
    assert second["nfe/total"] == rows.forward + rows.backward
    weights = trainer.rewards.weights
    assert weights["toys:brightness"] + weights["toys:redness"] == pytest.approx(4)
    assert weights != {"toys:brightness": 1.0, "toys:redness": 3.0, "toys:constant": 0.0}
    assert weights["toys:constant"] == 0
    third, _ = trainer.iterate(3)
    mean = sum(weights[name] * third[f"reward/{name}/mean"] for name in weights)
    assert third["reward/total/mean"] == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize(("minimum", "more"), [("", "advantage.aggregate=gdpo"), (", minimum: -0.05", "seed=0")])
def test_gradients_are_measured_of_each_reward_whatever_they_are_put_together_by(configure: Configure, minimum: str, more: str) -> None:
    rewards = f"rewards=[{{name: 'toys:brightness'{minimum}}}, {{name: 'toys:redness', weight: 3.0}}]"
    trainer = Trainer(configure(rewards, "reward_weights={kind: gradient, every: 1, rate: 1e4}", more))
    trainer.iterate(1)
    assert sum(trainer.rewards.weights.values()) == pytest.approx(4)
    assert trainer.rewards.weights["toys:redness"] != 3.0


def test_an_optional_reward_without_a_score_has_no_gradient(configure: Configure) -> None:
    rewards = f"rewards=[{{name: 'toys:brightness'}}, {{{PICKY}, required: false, args: {{every: 1000}}}}]"
    trainer = Trainer(configure(rewards, "reward_weights={kind: gradient, every: 1}"))
    drill = begin(trainer)
    scores = trainer.engine.sample(drill.plan, drill.prompts, drill.numbers, 1)[1][0].result()
    nothing = torch.zeros(12, dtype=torch.bool)
    scores["picky"] = Scores(torch.full((12,), math.nan), nothing)
    found = trainer._reward_gradients(drill.sampled, scores, drill.prompts, drill.numbers, 1)
    assert found[0].abs().max() > 0
    assert (found[1] == 0).all()


def test_pictures_do_not_pile_up_while_rewards_are_slow(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(configure("training.rows_per_forward=4", "rollout.groups_per_iteration=9"))
    waiting, most = [0], [0]
    real = trainer.rewards.submit

    class Slow:
        def __init__(self, pending: object) -> None:
            self.pending, self.done = pending, False
            waiting[0] += 1
            most[0] = max(most[0], waiting[0])

        def result(self) -> object:
            waiting[0] -= not self.done
            self.done = True
            return self.pending.result()  # type: ignore[attr-defined]

    monkeypatch.setattr(trainer.rewards, "submit", lambda batch: Slow(real(batch)))
    trainer.iterate(1)
    assert most == [5]  # the one that was just decoded, and four before it


@pytest.mark.parametrize("kind", ["hypervolume", "gradient"])
def test_weights_survive_a_resume(configure: Configure, kind: str, one_thread: None) -> None:
    more = ", every: 2, rate: 1e4" if kind == "gradient" else ""
    sections = ["rewards={'toys:brightness': 1.0, 'toys:redness': 3.0}", f"reward_weights={{kind: {kind}{more}}}", "evaluation.num_images=8"]
    whole = train(configure(*sections, "run_dir=whole"))
    train(configure(*sections, "run_dir=parts", "training.iterations=3"))
    parts = train(configure(*sections, "run_dir=parts"), resume=Path("parts"))
    last = [json.loads((run / "metrics.jsonl").read_text().splitlines()[-1]) for run in (whole, parts)]
    assert last[0] == last[1]
    column = "advantage/factor" if kind == "hypervolume" else "reward/toys:redness/weight"
    assert last[0][column] != (1.0 if kind == "hypervolume" else 3.0)


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["reward_weights.kind=gradient"], "reward_weights.kind: gradient needs at least two rewards that have a weight; use fixed"),
        (
            ["reward_weights.kind=gradient", "rewards={ink: 1, scene: -1}"],
            "reward_weights.kind: gradient keeps weights positive; give positive weights, or use fixed",
        ),
        (
            ["reward_weights.kind=hypervolume", "rewards={ink: 1, scene: 1}", "evaluation.rewards=[ink]"],
            "reward_weights.kind: hypervolume needs every reward in the evaluation; add scene to evaluation.rewards",
        ),
        (
            ["reward_weights={kind: hypervolume, split: test}", "rewards={ink: 1, scene: 1}"],
            "reward_weights.split: test is no prompt set of data.eval; use one of eval",
        ),
        (
            ["reward_weights={kind: hypervolume, reference: {ink: 0.0}}", "rewards={ink: 1, scene: 1}"],
            "reward_weights.reference: lacks scene; give a value for every reward that has a weight",
        ),
        (
            ["method=flow_dpo", "reward_weights.kind=hypervolume", "rewards={ink: 1, scene: 1}"],
            "reward_weights.kind: hypervolume changes advantages, which objective dpo does not use; use fixed",
        ),
        (
            ["rewards=[{name: ink, required: false}]"],
            "rewards: none that has a weight is required, so a sample might have no reward at all; make one of them required",
        ),
        (
            ["method=refl", "rewards=[{name: ink, minimum: 0.1}]"],
            "rewards: ink has a minimum, and objective refl follows gradients of rewards, which know no constraint; leave it out",
        ),
    ],
)
def test_combinations_that_make_no_sense(configure: Configure, overrides: list[str], line: str) -> None:
    with pytest.raises(UserError) as caught:
        configure(*overrides)
    assert line in str(caught.value)


def test_a_critic_and_learnt_weights_exclude_each_other(configure: Configure) -> None:
    with pytest.raises(UserError, match="takes the gradient of each reward alone, which a critic or a history of totals cannot give"):
        configure("method=ac_flow", "reward_weights.kind=gradient", "rewards={ink: 1, scene: 1}")


# --- where rewards are, and what evaluation shows them


@pytest.mark.parametrize(("device", "line"), [("gpu0", "'gpu0' is no device; write cpu, cuda or cuda:1"), ("cuda:9", "this machine has no cuda:9")])
def test_a_device_that_is_none_is_named(configure: Configure, device: str, line: str) -> None:
    with pytest.raises(UserError, match=f"reward light: {line}"):
        build_rewards(configure(f"rewards=[{{name: 'toys:brightness', label: light, device: '{device}'}}]").rewards)


def test_training_and_evaluation_share_what_is_the_same(configure: Configure) -> None:
    Picky.loads = 0
    rewards = f"rewards=[{{{PICKY}}}]"
    same = f"evaluation.rewards=[{{{PICKY.replace('picky', 'again')}, weight: 3}}, {{{PICKY.replace('label: picky', 'label: other')}, args: {{every: 1}}}}]"
    trainer = Trainer(configure(rewards, same.replace("test_several_rewards:again", "test_several_rewards:Picky")))
    assert Picky.loads == 2  # the second evaluation reward has other arguments
    assert trainer.engine.evaluator.rewards.names == ("again", "other")
    assert trainer.engine.evaluator.rewards.entry_of("again").reward is trainer.rewards.entry_of("picky").reward


def test_a_shared_reward_waits_where_training_says(configure: Configure) -> None:
    rewards = f"rewards=[{{{PICKY}}}, {{{PICKY.replace('label: picky', 'label: light')}, args: {{every: 1}}, offload: true}}]"
    others = f"evaluation.rewards=[{{{PICKY}, offload: true}}, {{{PICKY.replace('label: picky', 'label: light')}, args: {{every: 1}}}}]"
    trainer = Trainer(configure(rewards, others, "training.max_invalid_share=0.5"))
    assert [trainer.engine.evaluator.rewards.entry_of(name).offload for name in ("picky", "light")] == [False, True]


def test_stored_pairs_and_constraints(configure: Configure) -> None:
    """A minimum of a reward that nobody scores is a warning, and no crash."""
    config = configure("method=flow_dpo", "data.pairs=pairs.jsonl", "rollout.group_size=2", "old_policy=null", "rewards=[{name: ink, minimum: 0.1}]")
    assert "rewards: the minimum of ink has no effect with stored pairs" in list(settings_without_effect(config))
    scores = {"total": Scores(torch.tensor([1.0, 0.0]), torch.ones(2, dtype=torch.bool))}
    rollout = leaves_only(torch.zeros(2, 1), torch.zeros(2, dtype=torch.int64))
    found = Assigner(config).samples(rollout, scores, scores, prompts=(torch.zeros(2), torch.zeros(2)))
    assert found.pairs is not None
    assert found.pairs.tolist() == [[0, 1]]


def test_evaluation_keeps_the_pictures_of_a_prompt_together_for_rewards_that_compare(configure: Configure) -> None:
    config = configure("rewards=[{name: 'test_several_rewards:Picky', label: picky, args: {every: 1, scope: group}}, {name: 'toys:brightness'}]")
    trainer = Trainer(config)
    apart = Trainer(configure("rewards=['toys:brightness']"))
    for each in (trainer, apart):
        each.policy.rows_per_forward = 5
    found, expected = trainer.engine.evaluator("eval", 8, 1.0, 8), apart.engine.evaluator("eval", 8, 1.0, 8)
    reward = trainer.rewards.entry_of("picky").reward
    assert isinstance(reward, Picky)
    count = len(trainer.splits["eval"])
    assert reward.groups == {3: [[0] * 3, [1] * 3, [2] * 2], 5: [[0] * 2 + [1] * 2, [2] * 2 + [3] + [4]]}.get(count, reward.groups)
    flat = [group for call in reward.groups for group in call]
    assert flat == sorted(flat) and len(flat) == 8
    assert torch.equal(found.images, expected.images)  # the same pictures in the same order
    torch.testing.assert_close(found.scores["picky"], found.scores["toys:brightness"])
    assert torch.equal(found.scores["toys:brightness"], expected.scores["toys:brightness"])


def test_a_prompt_that_can_never_be_scored_is_found_before_the_model_is_loaded(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowrl.trainer.make_policy", lambda *args, **kwargs: pytest.fail("the model was loaded"))
    monkeypatch.setattr(Picky, "check_prompts", lambda self, prompts: (_ for _ in ()).throw(UserError(f"'{prompts[0].text}' is nothing for me")), raising=False)
    with pytest.raises(UserError, match="is nothing for me"):
        Trainer(configure(f"rewards=[{{{PICKY}}}]"))


def test_pictures_are_rounded_once_to_what_a_file_holds(configure: Configure) -> None:
    trainer = Trainer(configure())
    pictures = trainer.policy.decode(torch.randn(3, *trainer.policy.latent_shape, generator=torch.Generator().manual_seed(0)))
    levels = (pictures * 255).round()
    assert torch.equal(levels / 255, pictures)
    assert len(levels.unique()) > 20
    exact = trainer.policy._pixels(torch.randn(3, *trainer.policy.latent_shape, generator=torch.Generator().manual_seed(0)))
    assert (exact.detach() - pictures).abs().max() <= 0.5 / 255 + 1e-7
    assert not math.isclose(float((exact.detach() - pictures).abs().max()), 0.0)
