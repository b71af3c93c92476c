"""Objectives of pairs of answers: which answers become pairs, and what the losses of flowrl/core are given of them.

Letters: B answers, N pairs of an iteration, n of a micro-batch, T tokens. The rows of a micro-batch are chosen and rejected answers in turn, 2 n.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flowrl.config import Config
from flowrl.core.pair_losses import PAIR_NEEDS
from flowrl.core.pair_tokens import after_shared_prefix, comparable, guide_weights, sum_tokens
from flowrl.core.pairing_rules import make_pairs
from flowrl.core.preference import PAIR_OBJECTIVES
from flowrl.objective_names import arguments
from flowrl.sections import ObjectiveConfig
from flowrl.seeds import derive_seed
from flowrl.text.answers import Answers
from flowrl.text.batch import Batch, ObjectiveBase
from flowrl.text.guide import Guide
from flowrl.text.lists import levels_of
from flowrl.text.samples import EXPERT
from flowrl.text.stored_pairs import StoredPairs
from flowrl.types import Completions, Objective, Pairs, Prompt, UserError

if TYPE_CHECKING:
    from flowrl.policies.causal_lm import CausalLmPolicy

__all__ = ["PairObjective", "anchors_of", "choose_pairs", "revised", "revisions", "trained_tokens"]


def anchors_of(objective: ObjectiveConfig) -> frozenset[str]:
    """Which policies a pair loss compares with, as it is configured: ``reference``, ``previous``."""
    needs = set(PAIR_NEEDS[objective.name]) & {"reference", "previous"}
    share = arguments(objective).get("reference_share")
    if objective.name == "inpo" and share in (0, 1):
        needs.discard("reference" if share == 0 else "previous")
    return frozenset(needs)


class PairObjective(ObjectiveBase):
    """A pair loss of flowrl/core on sums over the tokens of answers; `flowrl.updates.answer_pairs` trains it.

    Attributes:
        anchors: see `anchors_of`. revises: it also looks at answers that improve a draft (`srpo`).
    """

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        o = config.objective
        self.loss, self.arguments = PAIR_OBJECTIVES[o.name], arguments(o)
        self.anchors = anchors_of(o)
        self.revises = o.name == "srpo" and self.arguments.get("alpha") != 1
        self.stored: StoredPairs | None = None
        self.guide: Guide | None = None
        if o.name == "vpo":
            self.arguments.setdefault("online", config.data.pairs is None)

    def attach(self, policy: CausalLmPolicy, stored: StoredPairs | None) -> None:
        """What the objective works with, before the first iteration.

        Raises:
            UserError: the guide cannot be loaded, osp does not find out how strong a preference is, or a draft with its answer would not fit.
        """
        config, self.stored = self.config, stored
        if config.pairing.guide is not None:
            self.guide = Guide(config, policy)
        if stored is not None and config.objective.name == "osp" and stored.preference is None and not stored.has_scores:
            raise UserError("data.pairs: osp needs how strong each preference is; give `preference` or scores with every pair, or use dpo")
        if self.revises and policy.context is not None:
            longest = config.generation.max_new_tokens if stored is None else stored.longest()
            asked = len(revised(policy, Prompt("x"), "x", config.pairing.revision))
            if asked + 2 * longest > policy.context:
                raise UserError(
                    f"objective.name: srpo puts an answer of up to {longest} tokens into a prompt and answers it again, which does not fit into the model's "
                    f"context of {policy.context}; use shorter answers (generation.max_new_tokens), or objective.args: {{alpha: 1}}"
                )

    def begin(self, answers: Answers, advantages: Tensor) -> None:
        """Choose the pairs: ``answers.extra["pairs"]``, [N, 2] int64, chosen and rejected, by group."""
        found, answers.extra["preference"] = choose_pairs(answers, self.stored), None
        answers.extra["pairs"] = found
        if self.stored is not None and (chance := self.stored.preferences(answers.indices)) is not None:
            answers.extra["preference"] = chance.repeat_interleave(2)

    def __call__(self, batch: Batch, revising: Tensor | None = None) -> Objective:
        """The loss of every pair, [n, 1]; revising: [n, 2], with gradient, see `Pairs.revising_chosen`."""
        o, d, answers = self.config.objective, batch.decisions, batch.answers
        mask = trained_tokens(answers.completions.tokens[batch.rows], answers.mask[batch.rows], skip=self.config.pairing.skip_shared).to(d.mask.device)
        reference = batch.of(answers.extra["pair_reference"]) if "reference" in self.anchors else None
        weight = None if self.guide is None else self._weights(batch.of(answers.extra["guide"]), reference)

        def sums(log_prob: Tensor | None) -> tuple[Tensor, Tensor] | tuple[None, None]:
            if log_prob is None:
                return None, None
            total = sum_tokens(log_prob, mask, weight)
            return total[::2], total[1::2]

        chosen, rejected = sums(d.log_prob)
        assert chosen is not None and rejected is not None
        anchors = [sums(reference), sums(d.old_log_prob if "previous" in self.anchors else None)]
        length, reward = mask.sum(1, keepdim=True).float(), batch.of(torch.where(answers.valid, answers.rewards, 0.0).float())[:, None]
        better, worse = reward[::2], reward[1::2]
        pairs = Pairs(
            chosen=chosen,
            rejected=rejected,
            reference_chosen=anchors[0][0],
            reference_rejected=anchors[0][1],
            mask=torch.ones_like(chosen, dtype=torch.bool),
            chosen_length=length[::2],
            rejected_length=length[1::2],
            previous_chosen=anchors[1][0],
            previous_rejected=anchors[1][1],
            chosen_reward=better,
            rejected_reward=worse,
            preference=self._strength(batch, better - worse) if o.name == "osp" else None,
            calibration=self._calibration(chosen, rejected, anchors[0]) if o.name == "vpo" and self.arguments["online"] else None,
            revising_chosen=None if revising is None else revising[:, :1],
            revising_rejected=None if revising is None else revising[:, 1:],
        )
        settings = {"beta": o.beta, "margin": o.margin, "sft_weight": o.sft_weight, "label_smoothing": o.label_smoothing}
        return self.loss(pairs, **settings, **self.arguments)

    def _weights(self, guide: Tensor, reference: Tensor | None) -> Tensor:
        """[2 n, T], TGDPO's."""
        section = self.config.pairing.guide
        assert section is not None and reference is not None
        weight = torch.ones_like(guide)
        settings: dict[str, Any] = {"alpha": section.alpha, "beta": self.config.objective.beta, "limits": section.limits}
        weight[::2] = guide_weights(guide[::2], reference[::2], side="chosen", **settings)
        weight[1::2] = guide_weights(guide[1::2], reference[1::2], side="rejected", **settings)
        return weight

    def _strength(self, batch: Batch, gap: Tensor) -> Tensor:
        """[n, 1], the chance that the chosen answer is the better one: the data's, or Bradley and Terry's from the rewards."""
        given: Tensor | None = batch.answers.extra["preference"]
        return torch.sigmoid(gap) if given is None else batch.of(given)[::2, None]

    @staticmethod
    def _calibration(chosen: Tensor, rejected: Tensor, reference: tuple[Tensor, Tensor] | tuple[None, None]) -> Tensor:
        """[n, 1], the mean log-ratio of the two answers, both of which are samples of the policy."""
        assert reference[0] is not None and reference[1] is not None
        return 0.5 * (chosen - reference[0] + rejected - reference[1])


def trained_tokens(tokens: Tensor, mask: Tensor, *, skip: bool) -> Tensor:
    """The mask [2 n, T] of answers in turn, without what both of a pair begin with if ``skip``."""
    if not skip:
        return mask
    return torch.stack(after_shared_prefix(tokens[::2], tokens[1::2], mask[::2], mask[1::2]), 1).flatten(0, 1)


def choose_pairs(answers: Answers, stored: StoredPairs | None) -> Tensor:
    """The pairs of an iteration on this process, [N, 2] int64 by group: the stored ones, or by the rule of `pairing`.

    An answer without a reward, an empty one, or one that is not trained is in no pair; two with the same tokens, or to different prompts, are none. An
    expert's may be chosen and never rejected. Draws depend on the seed, the iteration and the group alone.
    """
    p, c = answers.config.pairing, answers.completions
    if stored is not None:
        return torch.arange(len(answers)).view(-1, 2)
    numbers = torch.tensor(list(answers.numbers), dtype=torch.int64)  # rising; a draw must not depend on which process has a group
    content: dict[tuple[int, ...], int] = {}
    same = [content.setdefault((int(c.group[i]), *c.tokens[i, : int(c.length[i])].tolist()), len(content)) for i in range(len(answers))]
    winner, loser = make_pairs(
        levels_of(answers.rewards, p.levels) if p.rule == "levels" else answers.rewards,
        numbers[answers.group],
        answers.valid & answers.train & (answers.lengths > 0),
        rule=p.rule,
        threshold=p.threshold,
        cap=p.cap,
        seed=derive_seed(answers.config.seed, "pairs", answers.iteration),
        may_lose=None if answers.origin is None else answers.origin != EXPERT,
        content=torch.tensor(same, dtype=torch.int64),
    )
    pairs = torch.stack([winner, loser], 1)
    rows = pairs.flatten()
    mask = trained_tokens(c.tokens[rows], answers.mask[rows], skip=p.skip_shared)
    keep = comparable(c.tokens[rows[::2]], c.tokens[rows[1::2]], mask[::2], mask[1::2])[:, 0]
    return pairs[keep & (c.group[pairs[:, 0]] == c.group[pairs[:, 1]])]


def revised(policy: CausalLmPolicy, prompt: Prompt, draft: str, request: str) -> Tensor:
    """Tokens [n] int64 of a prompt that asks to improve a draft: as a conversation where the tokenizer has a chat template, else line by line."""
    if policy.tokenizer.chat_template is None:
        return policy.encode([Prompt(f"{prompt.text}\n{draft}\n{request}\n")])[0]
    before = prompt.metadata.get("messages") or [{"role": "user", "content": prompt.text}]
    messages = [*before, {"role": "assistant", "content": draft}, {"role": "user", "content": request}]
    return policy.encode([Prompt(request, {"messages": messages})])[0]


def revisions(answers: Answers, pairs: Tensor, request: str) -> Completions:
    """Both answers of each pair, as answers to the prompt with each of them as a draft: 4 N, by pair, draft and answer (chosen first)."""
    c = answers.completions
    drafts = pairs.flatten().tolist()
    prompts = tuple(revised(answers.policy, answers.prompts[int(answers.group[row])], c.texts[row], request) for row in drafts)
    rows = pairs.repeat_interleave(2, 0).flatten()
    return Completions(
        prompt_tokens=prompts,
        tokens=c.tokens[rows],
        mask=c.mask[rows],
        length=c.length[rows],
        group=torch.arange(len(drafts)).repeat_interleave(2),
        finished=c.finished[rows],
        log_prob=c.log_prob[rows],
        texts=tuple(c.texts[row] for row in rows.tolist()),
    )
