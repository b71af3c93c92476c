"""Updates on preferences: at the reference the loss is ln 2, gradients against formulas written out by hand, and training on stored pairs."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from drills import ODE, Drill, RowCount, assert_same_gradient, begin, by_hand, difference, errors, move, twin, weights
from PIL import Image
from torch import Tensor
from torch.nn.functional import logsigmoid

import flowrl.updates.pairs as module
from flowrl.assignment import Samples
from flowrl.config import Config
from flowrl.core.preference import PAIR_OBJECTIVES, dpo
from flowrl.engines.diffusion import Sampled
from flowrl.run import train
from flowrl.trainer import Trainer
from flowrl.types import Pairs, UserError
from flowrl.updates.pairs import PairUpdate, needs_reference

Configure = Callable[..., Config]
DPO = [ODE, "method=flow_dpo", "matching.num_times=2"]
REWARDS = [0.1, 0.9, 0.5, 0.3, 0.2, 0.2, 0.8, 0.1, 0.4, 0.0, 0.6, 0.6]
PAIRS = [[1, 0], [6, 7], [10, 9]]
"""Best and worst of the three groups; of equals the first."""


def update_of(drill: Drill) -> PairUpdate:
    update = drill.material()
    assert isinstance(update, PairUpdate)
    return update


def squared_errors(drill: Drill, trainer: Trainer) -> tuple[Tensor, Tensor]:
    """m_chosen and m_rejected [3, 2] of a trainer's policy."""
    error, _ = errors(trainer, update_of(drill).noised.batch(torch.arange(6)))
    table = error.view(3, 2, 2)
    return table[:, 0], table[:, 1]


# --- at the reference ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [[], ["model.adapter=full"], ["matching.guidance_scale=3", "matching.combine=sum_first"]], ids=str)
@pytest.mark.parametrize("objective", ["dpo", "rpo"])
def test_before_training_the_loss_is_ln_2_and_nobody_wins(configure: Configure, objective: str, settings: list[str]) -> None:
    trainer = Trainer(configure(*DPO, f"objective.name={objective}", *settings))
    metrics, _ = trainer.iterate(1)
    assert metrics["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert (metrics["pair/margin"], metrics["pair/accuracy"]) == (0.0, 0.5)
    assert (metrics["pair/chosen_log_ratio"], metrics["pair/rejected_log_ratio"]) == (0.0, 0.0)
    assert (metrics["pair/count"], metrics["updates"]) == (3, 1)
    assert metrics["grad_norm"] > 0
    assert "ratio/mean" not in metrics and "kl/mean" not in metrics
    later, _ = trainer.iterate(2)
    assert later["loss"] != pytest.approx(math.log(2), rel=1e-6)
    assert later["pair/chosen_log_ratio"] != 0.0


def test_ipo_starts_at_the_square_of_its_target(configure: Configure) -> None:
    metrics, _ = Trainer(configure(*DPO, "objective={name: ipo, beta: 5}")).iterate(1)
    assert metrics["loss"] == pytest.approx((1 / (2 * 5)) ** 2)


def test_beta_multiplies_the_first_gradient_and_swapping_the_two_turns_it_round(configure: Configure) -> None:
    drill = begin(Trainer(configure(*DPO, "objective.beta=10")), rewards=REWARDS)
    found = drill.gradient()
    stronger = begin(Trainer(configure(*DPO, "objective.beta=30")), rewards=REWARDS).gradient()
    assert_same_gradient(stronger, [3 * g for g in found])
    assert isinstance(drill.assignment, Samples) and drill.assignment.pairs is not None
    assert drill.assignment.pairs.tolist() == PAIRS
    swapped = dataclasses.replace(drill, assignment=dataclasses.replace(drill.assignment, pairs=drill.assignment.pairs.flip(1)))
    assert_same_gradient(swapped.gradient(), [-g for g in found])


# --- the gradient -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_the_gradient_is_that_of_flow_dpo(configure: Configure, scale: float) -> None:
    settings = [*DPO, "objective.beta=3", f"matching.guidance_scale={scale}", "training.rows_per_backward=4"]
    trainer = move(Trainer(configure(*settings)), size=0.1)
    drill = begin(trainer, rewards=REWARDS)
    found = drill.gradient()
    chosen, rejected = squared_errors(drill, trainer)
    with torch.no_grad():
        reference_chosen, reference_rejected = squared_errors(drill, twin(drill, configure(*settings)))
    beta = 2 * 3.0  # flow.md 10.2: their beta is twice ours
    loss = -logsigmoid(-beta / 2 * ((chosen - reference_chosen) - (rejected - reference_rejected)))
    assert loss.std() > 1e-3
    assert_same_gradient(found, by_hand(trainer, loss.mean()))
    metrics = drill.update()
    assert metrics["loss"] == pytest.approx(loss.mean().item(), rel=1e-5)
    assert metrics["pair/chosen_log_ratio"] == pytest.approx((reference_chosen - chosen).mean().item(), rel=1e-4)


@pytest.mark.parametrize("combine", ["exp_first", "sum_first"])
@pytest.mark.parametrize("name", ["ipo", "simpo", "rpo"])
def test_the_other_losses_with_a_pull_to_the_reference(configure: Configure, name: str, combine: str) -> None:
    objective = f"objective={{name: {name}, beta: 2, margin: 0.5, sft_weight: 0.3, label_smoothing: 0.1}}"
    settings = [*DPO, objective, f"matching={{combine: {combine}, weighting: t}}", "kl={weight: 0.7, form: v_mse}"]
    trainer = move(Trainer(configure(*settings)), size=0.1)
    drill = begin(trainer, rewards=REWARDS)
    found = drill.gradient()
    batch = update_of(drill).noised.batch(torch.arange(6))

    def of(policy: Trainer) -> tuple[Tensor, Tensor, Tensor]:
        error, velocity = errors(policy, batch)
        table = -(batch.sigma.float() * error).view(3, 2, 2)
        table = table.mean(2, keepdim=True) if combine == "sum_first" else table
        return table[:, 0], table[:, 1], velocity

    chosen, rejected, velocity = of(trainer)
    with torch.no_grad():
        reference_chosen, reference_rejected, reference = of(twin(drill, configure(*settings)))
    h = (chosen - reference_chosen) - (rejected - reference_rejected)
    loss = {
        "ipo": (h - 1 / 4).square(),
        "simpo": -logsigmoid(2 * (chosen - rejected) - 0.5),
        "rpo": -0.9 * logsigmoid(2 * h) - 0.1 * logsigmoid(-2 * h) - 0.3 * chosen,
    }[name]
    kl = (velocity - reference).square().flatten(1).mean(1)  # over both samples of a pair
    assert_same_gradient(found, by_hand(trainer, loss.mean() + 0.7 * kl.mean()))
    metrics = drill.update()
    assert metrics["kl/mean"] == pytest.approx(kl.mean().item(), rel=1e-4)
    assert metrics["loss"] == pytest.approx((loss.mean() + 0.7 * kl.mean()).item(), rel=1e-4)


def test_pictures_and_text_go_through_one_function(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    assert module.PAIR_OBJECTIVES is PAIR_OBJECTIVES
    assert PAIR_OBJECTIVES["dpo"] is dpo
    seen: list[Pairs] = []

    def spy(pairs: Pairs, **keywords: float) -> object:
        seen.append(pairs)
        return dpo(pairs, **keywords)

    monkeypatch.setitem(PAIR_OBJECTIVES, "dpo", spy)
    drill = begin(move(Trainer(configure(*DPO))), rewards=REWARDS)
    drill.gradient()
    (pictures,) = seen
    assert pictures.chosen.shape == (6, 1)
    # the same numbers as sums over the tokens of six texts
    keywords = {"beta": 50.0, "margin": 0.0, "sft_weight": 0.0, "label_smoothing": 0.0}
    columns = [getattr(pictures, name).detach().reshape(6, 1) for name in ("chosen", "rejected", "reference_chosen", "reference_rejected", "mask")]
    text = dpo(Pairs(*columns, chosen_length=torch.full((6, 1), 9.0), rejected_length=torch.full((6, 1), 4.0)), **keywords)
    torch.testing.assert_close(text.loss.flatten(), dpo(pictures, **keywords).loss.detach().flatten())


def test_only_losses_that_compare_with_a_reference_ask_for_one(configure: Configure) -> None:
    for name, needed in (("dpo", True), ("ipo", True), ("rpo", True), ("simpo", False)):
        config = configure(*DPO, f"objective.name={name}")
        assert needs_reference(config) is needed
        trainer = Trainer(config)
        count, (metrics, _) = RowCount(trainer), trainer.iterate(1)
        assert count.forward == metrics["nfe/forward"] == 3 * 4 * 4 + 12 * (2 if needed else 1)
    assert needs_reference(configure(*DPO, "objective.name=simpo", "kl={weight: 0.1, form: v_mse}"))


# --- groups without a preference ----------------------------------------------------------------------------------------------------------------


def test_without_any_preference_nothing_changes(configure: Configure) -> None:
    trainer = Trainer(configure(*DPO, "rewards=[toys:constant]"))
    before = weights(trainer)
    metrics, _ = trainer.iterate(1)
    assert difference(before, weights(trainer)) == 0
    assert (metrics["pair/count"], metrics["updates"], metrics["loss"], trainer.num_updates) == (0, 0, 0.0, 0)
    assert metrics["nfe/used"] == metrics["nfe/minimum"]


def test_a_group_without_a_preference_is_left_out(configure: Configure) -> None:
    nan = float("nan")
    rewards = [0.5, 0.5, 0.5, nan, *REWARDS[4:]]
    trainer = move(Trainer(configure(*DPO, "objective.updates_per_iteration=3")), size=0.1)
    drill = begin(trainer, rewards=rewards)
    assert isinstance(drill.assignment, Samples) and drill.assignment.pairs is not None
    assert drill.assignment.pairs.tolist() == PAIRS[1:]
    assert len(drill.gradients()) == 3
    trainer.config = trainer.engine.config = configure(*DPO, "objective.updates_per_iteration=3", "matching.combine=sum_first")
    assert len(drill.gradients()) == 2  # two pairs for three updates: one has nothing to learn from
    trainer.config = trainer.engine.config = configure(*DPO, "objective.updates_per_iteration=3")
    noised = update_of(drill).noised
    whole = update_of(begin(trainer, rewards=REWARDS)).noised
    assert torch.equal(noised.batch(torch.arange(4)).x, whole.batch(torch.arange(2, 6)).x)  # the other pairs keep their noise


# --- stored pairs -------------------------------------------------------------------------------------------------------------------------------

STORED = ["rollout={group_size: 2, plan: ode, num_steps: 4}", "matching.num_times=2", "old_policy=null"]


def store_latents(folder: Path, count: int = 5) -> Path:
    folder.mkdir(exist_ok=True)
    lines = []
    for i in range(count):
        for side, latent in zip(("chosen", "rejected"), torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(i)).numpy(), strict=True):
            np.save(folder / f"{i}-{side}.npy", latent)
        lines.append({"prompt": f"prompt {i}", "chosen": f"{i}-chosen.npy", "rejected": f"{i}-rejected.npy"})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "pairs.jsonl"


def stored(trainer: Trainer, iteration: int = 1) -> Drill:
    indices = trainer.engine.sampler.groups(iteration - 1)
    rollout, scores = trainer.engine.read_pairs(indices)
    plan, prompts = trainer.engine.plan(iteration), [trainer.prompts[i] for i in indices]
    assignment, _ = trainer.assign(Sampled(plan, rollout, 0), scores, prompts, [0, 1, 2], iteration)
    return Drill(trainer, iteration, plan, rollout, assignment, prompts)


@pytest.mark.parametrize(
    ("settings", "rows"),
    [
        (["method=flow_dpo"], 3 * 2 * 2 * 3),  # forward with gradient, its backward, and the reference, of 3 pairs at 2 levels
        (["method=flow_dpo", "matching.guidance_scale=2", "objective.inner_epochs=2"], 3 * 2 * 2 * (2 * (2 + 1) + 2)),
        (["method=flow_simpo", "kl.weight=0"], 3 * 2 * 2 * 2),
        (["method=flow_sft"], 3 * 2 * 2 * 2),
    ],
    ids=str,
)
def test_a_run_on_stored_pairs_samples_nothing(configure: Configure, tmp_path: Path, settings: list[str], rows: int) -> None:
    file = store_latents(tmp_path / "pairs")
    run = train(configure(*settings, *STORED, f"data.pairs={file}", "training={iterations: 2, checkpoint_every: 2}"))
    for line in (run / "metrics.jsonl").read_text().splitlines():
        metrics = json.loads(line)
        assert metrics["nfe/used"] == metrics["nfe/minimum"] == rows
        assert (metrics["images"], metrics["reward/total/mean"]) == (0, 0.5)
        assert metrics["grad_norm"] > 0
    assert (run / "report.html").is_file()


def test_the_stored_latents_are_what_is_compared(configure: Configure, tmp_path: Path) -> None:
    trainer = Trainer(configure("method=flow_dpo", *STORED, f"data.pairs={store_latents(tmp_path / 'pairs')}"))
    drill = stored(trainer)
    noised = update_of(drill).noised
    for i, index in enumerate(trainer.engine.sampler.groups(0)):
        latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(index))
        assert torch.equal(noised.x0[2 * i : 2 * i + 2], latents)
        assert drill.prompts[i].text == f"prompt {index}"
    assert noised.prompt_row.tolist() == trainer.policy.prompt_rows([p.text for p in drill.prompts]).repeat_interleave(2).tolist()


def test_supervised_training_on_stored_pairs_is_the_flow_matching_loss_of_the_chosen(configure: Configure, tmp_path: Path) -> None:
    trainer = move(Trainer(configure("method=flow_sft", *STORED, f"data.pairs={store_latents(tmp_path / 'pairs')}")))
    drill = stored(trainer)
    found = drill.gradient()
    noised = drill.material().noised  # type: ignore[attr-defined]
    assert_same_gradient(found, by_hand(trainer, errors(trainer, noised.batch(torch.tensor([0, 2, 4])))[0].mean()))


def test_pictures_are_encoded(configure: Configure, tmp_path: Path) -> None:
    folder = tmp_path / "pairs"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    for name, array in zip(("a.png", "b.png"), pixels, strict=True):
        Image.fromarray(array).save(folder / name)
    (folder / "pairs.jsonl").write_text(json.dumps({"prompt": "a red circle", "chosen": "a.png", "rejected": "b.png"}) + "\n")
    trainer = Trainer(configure("method=flow_dpo", *STORED, f"data.pairs={folder}"))
    rollout, scores = trainer.engine.read_pairs([0, 0, 0])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    torch.testing.assert_close(rollout.leaves, trainer.policy.encode(images).repeat(3, 1, 1, 1))
    assert scores["total"].values.tolist() == [1.0, 0.0] * 3
    assert rollout.leaf_group.tolist() == [0, 0, 1, 1, 2, 2]
    metrics, _ = trainer.iterate(1)
    assert metrics["pair/count"] == 3


def test_a_stored_latent_of_another_shape_is_found_before_training(configure: Configure, tmp_path: Path) -> None:
    file = store_latents(tmp_path / "pairs")
    for name in ("3-chosen.npy", "3-rejected.npy"):
        np.save(file.parent / name, np.random.default_rng(0).normal(size=(4, 2, 2)))
    with pytest.raises(UserError, match=r"line 4: chosen .*3-chosen.npy has the shape"):
        Trainer(configure("method=flow_dpo", *STORED, f"data.pairs={file}"))
    for name in ("3-chosen.npy", "3-rejected.npy"):
        np.save(file.parent / name, np.full((4, 4, 4), np.nan if "chosen" in name else 0.0))
    with pytest.raises(UserError, match=r"line 4: chosen .*3-chosen.npy"):
        Trainer(configure("method=flow_dpo", *STORED, f"data.pairs={file}"))
