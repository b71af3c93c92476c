"""The rewards of this package: name -> ``module:attribute`` of a class or factory that works without arguments. The name is also the name of the metric."""

from __future__ import annotations

__all__ = ["REWARDS"]

REWARDS: dict[str, str] = {
    # the embedded world
    "scene": "rewards.scene:SceneReward",
    "scene_strict": "rewards.registry:scene_strict",
    "ink": "rewards.ink:InkReward",
    "arithmetic": "rewards.arithmetic:ArithmeticReward",
    # files
    "jpeg_compressibility": "rewards.jpeg:jpeg_compressibility",
    "jpeg_incompressibility": "rewards.jpeg:jpeg_incompressibility",
    # does the picture show the prompt
    "clipscore": "rewards.clip_score:ClipScore",
    "vqascore": "rewards.vqa_score:VqaScore",
    "ocr": "rewards.ocr:OcrReward",
    "geneval": "rewards.geneval:GenEvalReward",
    # do people like it
    "pickscore": "rewards.pick_score:PickScore",
    "hpsv2": "rewards.hps:hpsv2",
    "hpsv2.1": "rewards.hps:hpsv2_1",
    "hpsv3": "rewards.hpsv3:HpsV3",
    "image_reward": "rewards.image_reward:ImageReward",
    "aesthetic_v1": "rewards.aesthetic:aesthetic_v1",
    "aesthetic": "rewards.aesthetic:aesthetic_v2",
    "aesthetic_v2.5": "rewards.aesthetic_siglip:AestheticSiglip",
    "deqa": "rewards.deqa:Deqa",
    # judges behind an OpenAI-compatible endpoint
    "unified_reward": "rewards.judge:unified_reward",
    "judge": "rewards.judge:JudgeReward",
    # is it like another picture, or unlike the others of its group, or better than they are
    "dino": "rewards.dino:DinoSimilarity",
    "lpips": "rewards.lpips:LpipsSimilarity",
    "diversity": "rewards.diversity:Diversity",
    "win_rate": "rewards.win_rate:WinRate",
    # is it fit to be shown
    "nsfw": "rewards.nsfw:NsfwPenalty",
    # texts
    "exact_match": "rewards.text_match:ExactMatch",
    "math": "rewards.math_equivalence:MathEquivalence",
    "format": "rewards.text_form:AnswerFormat",
    "length": "rewards.text_form:LengthPenalty",
    "repetition": "rewards.text_form:RepetitionPenalty",
    "episode": "rewards.episode:EpisodeReward",
    "code_tests": "rewards.code_tests:CodeTests",
    "reward_model": "rewards.reward_model:RewardModel",
    # of other rewards
    "ensemble": "rewards.ensemble:Ensemble",
    "remote": "rewards.remote:RemoteReward",
}
