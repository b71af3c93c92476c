"""VQAScore on a general vision-language model: the probability of "yes" to the question whether the picture shows the prompt.

question:     Does this figure show "{prompt}"? Please answer yes or no.
probability = p(yes)                      [0, 1]
yes_no      = p(yes) / (p(yes) + p(no))   [0, 1]
logit       = log p(yes) - log p(no)

p(yes) is the probability that the answer begins with the first token of Yes, " Yes", yes or " yes", p(no) alike; see rewards/vision_language.py.

Source: VQAScore, arXiv:2404.01291. Verified in its authors' code (linzhiqiu/t2v_metrics at 1bec390): the question, and that the published score is exp of minus
the mean cross-entropy of the answer's tokens under CLIP-FlanT5. Those weights need custom code, so this is the form for models that write from left to right:
its numbers cannot be compared with published ones. Not verified: the text of the paper. The forms yes_no and logit are ours. Letters: B samples.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from flowrl.types import Prompt, RewardInfo, UserError
from rewards.network import check_choice
from rewards.vision_language import DEFAULT_MODEL, FirstTokenReward, known_weights

__all__ = ["VqaScore"]

_QUESTION = 'Does this figure show "{prompt}"? Please answer yes or no.'


class VqaScore(FirstTokenReward):
    """How sure a vision-language model is that a picture shows its prompt.

    Args:
        model: hub id or folder of a vision-language model that follows instructions.
        form: "probability", "yes_no" or "logit"; see the module's text.
        question: with the place ``{prompt}``.
    Raises:
        UserError: another form, or a question without ``{prompt}``.
    """

    def __init__(self, model: str = DEFAULT_MODEL, form: Literal["probability", "yes_no", "logit"] = "probability", question: str = _QUESTION) -> None:
        check_choice("vqascore", "form", form, ("probability", "yes_no", "logit"))
        if not isinstance(question, str) or "{prompt}" not in question:
            raise UserError(f"reward vqascore: the question {question!r} has no place {{prompt}}; write it where the prompt belongs")
        self.model, self.form, self.template = model, form, question
        self.answers = (("Yes", "yes"), ("No", "no"))
        bounds = (float("-inf"), float("inf")) if form == "logit" else (0.0, 1.0)
        self.info = RewardInfo(
            name="vqascore",
            description="probability that a vision-language model says yes, the picture shows the prompt"
            + {"probability": "", "yes_no": ", against no", "logit": ", log-odds"}[form],
            low=bounds[0],
            high=bounds[1],
            source="VQAScore, arXiv:2404.01291; on another model, so not comparable with published numbers",
            batch_size=8,
            dtype="bfloat16",
            extra="clip",
            **known_weights(model),
        )

    def question(self, prompt: Prompt) -> str:
        """The question with the prompt in its place."""
        return self.template.replace("{prompt}", prompt.text)

    def verdict(self, log_p: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Values [B] of the chosen form; raw["vqascore_yes"] and raw["vqascore_no"] [B], the two probabilities."""
        yes, no = log_p.unbind(1)
        values = {"probability": yes.exp(), "yes_no": torch.sigmoid(yes - no), "logit": yes - no}[self.form]
        return values, {"vqascore_yes": yes.exp(), "vqascore_no": no.exp()}
