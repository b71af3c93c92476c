"""What a run of a language model will cost before it starts, from its config, its prompts and the tokenizer alone: tokens through the network, at most.

Answers end when they end, so every answer is counted with all of ``generation.max_new_tokens``. An answer of n prompt tokens and m of its own costs n + m - 1
tokens in a pass of the network over it; while sampling, a prompt is read once for its group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from flowrl.data import GroupSampler, load_prompts
from flowrl.estimate import Spread

if TYPE_CHECKING:
    from flowrl.config import Config

__all__ = ["TOKEN_HEAD", "TextEstimate", "estimate_text", "passes_of", "token_lines", "uncounted"]

TOKEN_HEAD = ("", "iteration, at most", "run, at most")


@dataclass(frozen=True, slots=True)
class TextEstimate:
    """Upper bounds of tokens, of one iteration; ``run_*`` are sums over all iterations, evaluations not among them.

    Attributes:
        rollout, measured, forward, backward: tokens through the network: sampling; passes over finished answers that are not trained with (the reference,
            log-probabilities of the policy that sampled); all that go forward; and backward. None where the config does not say how many there are.
        not_counted: why they are None, empty otherwise. remarks: what else is not in the numbers.
        answers, scores: of an iteration; None where the rewards or the answers themselves decide. evaluation_answers, evaluation_tokens: of all evaluations;
            tokens None in an environment.
        prompt_tokens: of one prompt of the run.
    """

    method: str
    iterations: int
    prompts: int
    answers: int | None
    scores: int | None
    prompt_tokens: Spread
    max_new_tokens: int
    rollout: Spread | None
    measured: Spread | None
    forward: Spread | None
    backward: Spread | None
    run_forward: int | None
    run_backward: int | None
    evaluations: int
    evaluation_answers: int
    evaluation_tokens: int | None
    not_counted: str
    remarks: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def uncounted(config: Config) -> str:
    """Why the tokens of an iteration do not follow from a config; empty where they do."""
    from flowrl.text.objectives import make_objective
    from flowrl.text.pairs import PairObjective

    if config.data.pairs is not None:
        return "stored pairs: answers have the lengths that they have"
    if config.environment is not None:
        return "environment: how long its words are is not known before"
    for name in ("tree", "partial"):
        if getattr(config, name) is not None:
            return f"{name}: what is read again depends on where answers end"
    if config.token_credit.name == "segments":
        return "token_credit: segments samples from the middle of answers"
    if config.allocation.name != "uniform":
        return f"allocation: {config.allocation.name} decides by the rewards what is sampled and trained"
    if config.allocation.samples:
        return f"allocation.samples: {', '.join(part.name for part in config.allocation.samples)} put in answers of other lengths"
    if isinstance(make_objective(config), PairObjective):
        return f"objective.name: {config.objective.name} trains the pairs that rewards make"
    if any(part.name == "reference_value" for part in config.shaping):
        return "shaping: reference_value asks the reference for answers too"
    if config.anchor.weight > 0 or config.reward_weights.kind == "gradient":
        return "anchor and reward_weights: gradient take passes of their own"
    return ""


def _answers(config: Config) -> int | None:
    """Answers that an iteration samples, at most."""
    from flowrl.allocation import ALLOCATORS

    if config.data.pairs is not None:
        return 0
    more = {part.name for part in (*config.allocation.samples, *config.shaping)} & {"hints", "reference_value"}
    gathers = getattr(ALLOCATORS[config.allocation.name], "gathers", False)
    unknown = more or gathers or config.token_credit.name == "segments"
    return None if unknown else config.rollout.groups_per_iteration * config.rollout.group_size


def _remarks(config: Config) -> tuple[str, ...]:
    found = []
    if config.generation.engine == "vllm":
        found.append("vllm: what it evaluates again when its memory runs out is not counted, and neither are its own network and cache")
    if config.environment is not None:
        found.append("environment: an answer is an episode of several turns, whose tokens are not estimated; nor are those of evaluations")
    if config.pairing.guide is not None:
        found.append("pairing.guide: what the second model evaluates is not counted")
    return tuple(found)


def passes_of(config: Config) -> tuple[bool, bool]:
    """Whether an iteration has a pass over all answers by (the policy that sampled, the reference), before it trains."""
    from flowrl.engines.text import TextEngine
    from flowrl.text.credit import CREDITS
    from flowrl.text.factors import FACTORS
    from flowrl.text.objectives import make_objective
    from flowrl.text.parts import make_part
    from flowrl.text.shaping import SHAPERS
    from flowrl.text.terms import make_terms

    credit = make_part("token_credit", CREDITS, config.token_credit.name, config.token_credit.args)
    shapers = [make_part("shaping", SHAPERS, part.name, part.args) for part in config.shaping]
    factors = [make_part("tokens.weights", FACTORS, part.name, part.args) for part in config.tokens.weights]
    needs = frozenset[str]().union(*(part.needs for part in (*shapers, credit, *factors, make_objective(config), *make_terms(config))))
    if config.kl.weight > 0 and config.kl.place == "reward":
        needs |= {"log_prob", "reference"}
    if config.old_policy is not None and config.old_policy.rollout:
        needs |= {"log_prob"}
    g = config.generation
    if g.engine != "transformers" or g.importance not in (None, "none") or config.value is not None:
        needs |= {"log_prob"}
    return bool(needs - {"reference"}), "reference" in needs or TextEngine.needs_reference(config)


def estimate_text(config: Config) -> TextEstimate:
    """Everything about a run of a language model that needs no network.

    Raises:
        UserError: a file of prompts cannot be read, or the tokenizer cannot be loaded.
    """
    from flowrl.policies.prompt_lengths import prompt_lengths

    reason, e, answers = uncounted(config), config.evaluation, _answers(config)
    groups, iterations = config.rollout.groups_per_iteration, config.training.iterations
    splits = {name: load_prompts(path) for name, path in config.data.eval.items()}
    of_splits = {name: prompt_lengths(config.model.path, prompts) for name, prompts in splits.items()}
    lengths: dict[int, int] = {}
    sampler = None
    if config.data.pairs is None:
        prompts = load_prompts(config.data.train)
        sampler = GroupSampler(len(prompts), groups, config.seed)
        met = sorted(sampler.met(iterations))
        lengths = dict(zip(met, prompt_lengths(config.model.path, [prompts[index] for index in met]), strict=True))
    spent = list(_iterations(config, sampler, lengths)) if sampler is not None and not reason else []
    forward, backward = [sum(parts) for parts in spent], [parts[2] for parts in spent]
    between = (iterations - 1) // e.every
    longest = config.generation.max_new_tokens - 1
    counts = [(number, times * (1 + len(e.compare_guidance_scales) * (times == 2))) for number, times in ((e.final_num_images, 2), (e.num_images, between))]
    evaluated = sum(times * (known[i % len(known)] + longest) for known in of_splits.values() for number, times in counts for i in range(number))
    return TextEstimate(
        method=config.method,
        iterations=iterations,
        prompts=groups,
        answers=answers,
        scores=None if answers is None else answers * len(config.rewards),
        prompt_tokens=Spread.of(lengths.values() or [length for known in of_splits.values() for length in known]),
        max_new_tokens=config.generation.max_new_tokens,
        rollout=Spread.of(parts[0] for parts in spent) if spent else None,
        measured=Spread.of(parts[1] for parts in spent) if spent else None,
        forward=Spread.of(forward) if spent else None,
        backward=Spread.of(backward) if spent else None,
        run_forward=sum(forward) if spent else None,
        run_backward=sum(backward) if spent else None,
        evaluations=2 + between,
        evaluation_answers=len(splits) * sum(number * times for number, times in counts),
        evaluation_tokens=None if config.environment is not None else evaluated,
        not_counted=reason,
        remarks=_remarks(config),
    )


def _iterations(config: Config, sampler: GroupSampler, lengths: dict[int, int]) -> Iterator[tuple[int, int, int]]:
    """Tokens (sampling, measuring, training forward) of each iteration; as many go backward as are trained."""
    from flowrl.text.objectives import make_objective

    o, size, longest = config.objective, config.rollout.group_size, config.generation.max_new_tokens - 1
    policy, reference = passes_of(config)
    whole_groups = make_objective(config).whole_groups
    later = [_later(number, size, o.updates_per_iteration, whole_groups) for number in range(config.rollout.groups_per_iteration)]
    for iteration in range(config.training.iterations):
        known = [lengths[index] for index in sampler.groups(iteration)]
        every = sum(size * (length + longest) for length in known)
        measured = (policy + reference) * every
        if not policy:
            measured += sum(count * (length + longest) for count, length in zip(later, known, strict=True))
        yield sum(known) + len(known) * size * longest, measured, o.inner_epochs * every


def _later(number: int, size: int, updates: int, whole_groups: bool) -> int:
    """Answers of a group whose turn comes after the first update, see `Trainer.split`."""
    if whole_groups:
        return size if number % updates else 0
    return sum((place + number) % updates != 0 for place in range(size))


# --- table --------------------------------------------------------------------------------------------------------------------------------------


def token_lines(expected: TextEstimate) -> tuple[list[tuple[str, ...]], list[str]]:
    """(rows of a table under `TOKEN_HEAD`, notes)."""
    iterations = expected.iterations

    def plain(name: str, each: int | None) -> tuple[str, ...]:
        return (name, "-", "-") if each is None else (name, f"{each:,}", f"{each * iterations:,}")

    def line(name: str, spread: Spread) -> tuple[str, ...]:
        shown = f"{spread.mean:,.0f}" if spread.least == spread.most else f"{spread.mean:,.0f} ({spread.least:,.0f} .. {spread.most:,.0f})"
        return name, shown, f"{spread.mean * iterations:,.0f}"

    rows = [plain("prompts", expected.prompts), plain("answers", expected.answers)]
    if expected.forward is not None and expected.backward is not None and expected.rollout is not None and expected.measured is not None:
        f, b = expected.forward, expected.backward
        rows += [line("tokens forward", f), line("  sampling", expected.rollout)]
        rows += [line("  measuring", expected.measured)] if expected.measured.most else []
        rows += [line("  training", b), line("tokens backward", b), line("tokens", Spread(f.mean + b.mean, f.least + b.least, f.most + b.most))]
    rows += [plain("reward scores", expected.scores), ("evaluated answers", "-", f"{expected.evaluation_answers:,}")]
    rows += [("evaluation tokens", "-", f"{expected.evaluation_tokens:,}")] if expected.evaluation_tokens else []
    n = expected.prompt_tokens
    notes = [
        f"{expected.method}, {iterations:,} iterations, {expected.evaluations} evaluations; prompts of {n.least:,.0f} to {n.most:,.0f} tokens, mean "
        f"{n.mean:.1f}; answers counted with all {expected.max_new_tokens:,} tokens that they may have"
    ]
    if expected.not_counted:
        notes.append(f"tokens of an iteration are not estimated: {expected.not_counted}")
    if expected.answers is None:
        notes.append("-: how many answers are sampled and scored is decided on the way")
    return rows, [*notes, *expected.remarks]
