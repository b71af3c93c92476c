"""Evaluations differ by the policy only: the same prompts, the same start noise, whatever the batch."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from toys import PROMPTS, as_prompts

from flowrl.config import Config
from flowrl.evaluation import Evaluation, Evaluator, build_rewards, evaluate_run, grid_of, save_grid, sigmas_of
from flowrl.policies.sd3 import Sd3Policy
from flowrl.run import train
from flowrl.sections import RewardConfig
from flowrl.seeds import derive_seed, generator
from flowrl.statistics import mean_ci95
from flowrl.types import RewardInfo, SampleBatch, Scores, UserError
from samplers.rollout import sample_ode

Configure = Callable[..., Config]


def make_evaluator(config: Config, rewards: list[str], rows_per_forward: int = 64) -> Evaluator:
    policy = Sd3Policy(config.model, torch.device("cpu"), rows_per_forward=rows_per_forward)
    scorer = build_rewards([RewardConfig(name=name) for name in rewards])
    scorer.load(torch.device("cpu"))
    splits = {"eval": as_prompts(PROMPTS[:3]), "other": as_prompts(PROMPTS[:3])}
    sigmas = sigmas_of(config.rollout, 4, policy)
    return Evaluator(policy, splits, scorer, sigmas=sigmas, seed=7, accelerator=Accelerator(cpu=True, mixed_precision="no"))


def test_image_i_has_prompt_i_modulo_and_a_start_noise_of_its_own(configure: Configure) -> None:
    evaluator = make_evaluator(configure(), ["toys:brightness"])
    found = evaluator("eval", 5, 2.0, 5)
    assert [p.text for p in found.prompts] == [PROMPTS[i] for i in (0, 1, 2, 0, 1)]
    policy = evaluator.policy
    noise = torch.stack([torch.randn(policy.latent_shape, generator=generator("eval", 7, "eval", i)) for i in range(5)])
    with torch.no_grad():
        latents = sample_ode(policy.velocity(2.0), noise, evaluator.sigmas, policy.prompt_rows([p.text for p in found.prompts]))
    torch.testing.assert_close(found.images, policy.decode(latents), rtol=0, atol=1e-6)
    torch.testing.assert_close(found.scores["toys:brightness"], found.images.flatten(1).mean(1), rtol=0, atol=1e-6)
    assert (found.images[0] - found.images[3]).abs().max() > 1e-3  # one prompt, two noises
    assert (evaluator("other", 1, 2.0, 1).images[0] - found.images[0]).abs().max() > 1e-3  # another set has other noises


def test_the_batch_size_and_the_number_of_images_do_not_change_an_image(configure: Configure) -> None:
    one, many = make_evaluator(configure(), ["toys:brightness"], rows_per_forward=2), make_evaluator(configure(), ["toys:brightness"])
    a, b = one("eval", 5, 1.0, 5), many("eval", 8, 1.0, 8)
    torch.testing.assert_close(a.images, b.images[:5], rtol=0, atol=1.01 / 255)  # one level, where a pixel lies between two
    assert torch.equal(many("eval", 8, 1.0, 8).images, b.images)


def test_there_is_a_column_for_every_reward_and_none_for_their_sum(configure: Configure) -> None:
    evaluator = make_evaluator(configure(), ["toys:brightness", "toys:redness"])
    assert list(evaluator("eval", 3, 1.0, 0).scores) == ["toys:brightness", "toys:redness"]
    assert list(make_evaluator(configure(), ["toys:redness"])("eval", 3, 1.0, 0).summary(3)) == ["toys:redness"]


def test_only_the_pictures_of_the_grid_are_kept(configure: Configure) -> None:
    evaluator = make_evaluator(configure(), ["toys:brightness"], rows_per_forward=2)
    assert evaluator("eval", 5, 1.0, 3).images.shape == (3, 3, 8, 8)
    assert len(evaluator("eval", 5, 1.0, 0).images) == 0


def test_the_summary_clusters_by_prompt_and_leaves_out_what_could_not_be_scored() -> None:
    scores = torch.tensor([0.0, 1.0, math.nan, 0.5, 0.0, 1.0])  # prompts 0 1 2 0 1 2
    evaluation = Evaluation(as_prompts(PROMPTS[:3] * 2), {"r": scores}, torch.empty(0, 3, 1, 1))
    mean, half, n = evaluation.summary(3)["r"]
    assert (mean, n) == (0.5, 5)
    assert half == mean_ci95([0.0, 1.0, 0.5, 0.0, 1.0], [0, 1, 0, 1, 2])[1]
    nothing = Evaluation(as_prompts(PROMPTS[:2]), {"r": torch.full((2,), math.nan)}, torch.empty(0, 3, 1, 1))
    with pytest.raises(UserError, match="reward r could not score any image"):
        nothing.summary(2)


def test_a_reward_without_any_score_says_why_of_the_first_image(configure: Configure) -> None:
    result = make_evaluator(configure(), ["test_evaluation:Refusing"])("eval", 3, 1.0, 0)
    with pytest.raises(UserError) as caught:
        result.summary(3)
    first = result.prompts[0].text
    assert str(caught.value) == f"reward test_evaluation:Refusing could not score any image of the evaluation; the first, of the prompt '{first}': not {first}"


class Refusing:
    """Scores nothing."""

    info = RewardInfo("refusing", "for tests", 0.0, 1.0)

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        pass

    def score(self, batch: SampleBatch) -> Scores:
        size = len(batch)
        reasons = {i: f"not {prompt.text}" for i, prompt in enumerate(batch.prompts)}
        return Scores(torch.full((size,), math.nan), torch.zeros(size, dtype=torch.bool), problems=reasons)


def test_an_optional_reward_that_scored_nothing_is_left_out_and_its_grid_has_no_number(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    scores = {"r": torch.tensor([0.5, 0.5]), "some": torch.full((2,), math.nan)}
    evaluation = Evaluation(as_prompts(PROMPTS[:2]), scores, torch.rand(2, 3, 4, 4), optional=frozenset({"some"}))
    assert list(evaluation.summary(2)) == ["r"]
    assert "reward some, which is not required, could score no image of the evaluation" in caplog.text
    save_grid(tmp_path, "eval", evaluation)
    assert json.loads((tmp_path / "eval.json").read_text())["scores"] == {"r": [0.5, 0.5], "some": [None, None]}


def test_a_grid_has_every_picture_at_its_place() -> None:
    images = torch.stack([torch.full((3, 4, 6), i / 10) for i in range(5)])
    pixels = np.asarray(grid_of(images, 2))
    assert pixels.shape == (3 * 6 + 2, 2 * 8 + 2, 3)
    for i in range(5):
        y, x = 2 + (i // 2) * 6, 2 + (i % 2) * 8
        assert (pixels[y : y + 4, x : x + 6] == round(i * 25.5)).all()
    assert (pixels[:2] == 255).all()
    assert (pixels[14:18, 10:16] == 255).all()  # the place of a sixth picture stays white


def test_a_saved_grid_says_what_it_shows(tmp_path: Path) -> None:
    images = torch.rand(5, 3, 4, 4)
    evaluation = Evaluation(as_prompts(PROMPTS[:6]), {"r": torch.linspace(0, 1, 6)}, images)
    save_grid(tmp_path / "samples", "eval", evaluation)
    facts = json.loads((tmp_path / "samples" / "eval.json").read_text())
    assert facts == {"prompts": PROMPTS[:5], "scores": {"r": [0.0, 0.2, 0.4, 0.6, 0.8]}, "columns": 4, "tile": 4, "pad": 2}
    with Image.open(tmp_path / "samples" / "eval.png") as picture:
        assert picture.size == (4 * 6 + 2, 2 * 6 + 2)
    save_grid(tmp_path / "none", "eval", Evaluation([], {}, torch.empty(0, 3, 1, 1)))
    assert not (tmp_path / "none").exists()


def test_base_and_checkpoint_are_compared_on_the_same_pictures(configure: Configure) -> None:
    config = configure("training.iterations=4", "optimizer.learning_rate=0.05", "evaluation.final_num_images=6", "evaluation.num_steps=4")
    run = train(config)
    settings = {"num_images": 6, "num_steps": None, "guidance_scales": [1.0, 2.0], "splits": ["eval"], "seed": config.evaluation.seed}
    rows = evaluate_run(run, None, ["toys:brightness", "toys:redness"], **settings)
    assert [(r["policy"], r["iteration"], r["guidance_scale"], r["reward"]) for r in rows] == [
        (policy, iteration, scale, reward)
        for policy, iteration in (("base", 0), ("tuned", 4))
        for scale in (1.0, 2.0)
        for reward in ("toys:brightness", "toys:redness")
    ]
    logged = [json.loads(line) for line in (run / "evals.jsonl").read_text().splitlines()]
    for policy, iteration in (("base", 0), ("tuned", 4)):
        now = next(r for r in rows if r["policy"] == policy)
        then = next(r for r in logged if r["iteration"] == iteration)
        assert now["mean"] == pytest.approx(then["mean"], abs=1e-6)  # what the training itself has measured
        assert now["n"] == then["n"] == 6
    assert evaluate_run(run, None, [], checkpoint="2", **settings)[-1]["iteration"] == 2


def test_a_reward_of_the_run_can_be_named_by_its_label(configure: Configure) -> None:
    config = configure("rewards=[{name: 'toys:Warmth', label: warm, args: {word: red}}]")
    rows = evaluate_run(None, config, ["warm", "toys:redness"], 3, 2, [1.0], ["eval"], 0)
    assert [row["reward"] for row in rows] == ["warm", "toys:redness"]


def test_a_config_alone_has_its_base_model_evaluated(configure: Configure) -> None:
    config = configure("evaluation.rewards=[toys:redness]")
    (row,) = evaluate_run(None, config, [], 4, 2, [], [], 1)
    assert {k: row[k] for k in ("iteration", "split", "policy", "guidance_scale", "reward", "n")} == {
        "iteration": 0,
        "split": "eval",
        "policy": "base",
        "guidance_scale": 1.0,
        "reward": "toys:redness",
        "n": 4,
    }
    with pytest.raises(UserError, match="no prompt set is called evil; the config has eval"):
        evaluate_run(None, config, [], 4, 2, [], ["evil"], 1)
    with pytest.raises(UserError, match="give a run directory or a config"):
        evaluate_run(None, None, [], 4, 2, [], [], 1)


def test_seeds_of_different_uses_differ_and_repeat() -> None:
    uses = [("noise", 1, 2), ("noise", 12), ("noise", 2, 1), ("window", 1, 2), ("noise", "1", 2)]
    seeds = [derive_seed(*use) for use in uses]
    assert len(set(seeds)) == len(uses)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seeds == [derive_seed(*use) for use in uses]
    assert torch.equal(torch.randn(3, generator=generator("a", 1)), torch.randn(3, generator=generator("a", 1)))
