"""Build flowrl/assets/tiny-lm from nothing: generate word problems, answer them with mistakes, train a small Llama on them by next-token cross-entropy.

    OMP_NUM_THREADS=1 python scripts/build_tiny_lm.py --out flowrl/assets/tiny-lm
    OMP_NUM_THREADS=1 python scripts/build_tiny_lm.py --check

Deterministic for one thread, one kind of processor and one torch version; docs/tiny-lm.md has the figures of the shipped build.

The model is uncertain on purpose: the answers that it learns from are written by a pupil with bad habits (below), so that it knows the right way and
takes it in less than half of its samples. That is what reinforcement learning has to improve.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rewards.arithmetic import final_answer
from rewards.arithmetic_world import MARKER, Problem, is_unseen, kinds, make_problem, make_split, result, unseen_kinds, write

SPLITS = {"train": 2000, "eval": 256, "unseen": 256}
MAX_NEW_TOKENS = 48
CONTEXT = 512
PEAK_RATE = 1e-3
AFTER_SPACE = 0.25
DRILL_SHARE, DRILL_LENGTH = 0.35, 6
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
EXTRA_WORDS = (
    "Answer",
    "Check",
    "Hint",
    "No",
    "Question",
    "Right",
    "Solution",
    "Think",
    "Try",
    "Wrong",
    "Yes",
    "again",
    "answer",
    "high",
    "is",
    "low",
    "the",
    "too",
)
TOKEN = r" ?[A-Za-z]+|[0-9]|[^A-Za-z0-9]"  # a word with the space before it, a digit, any other character

# How the pupil errs. HABITS: the piece of a problem -> how often it is misread. The rest are probabilities of one equation, or of one answer.
HABITS = {"fewer": 0.5, "twice": 0.4, "boxes": 0.25, "gain_boxes": 0.4, "loss": 0.12, "more": 0.06, "together": 0.06, "gain": 0.06}
WRONG_SIGN = {"+": "-", "-": "+", "*": "+"}
SLIP = 0.06  # a result that is off by 1, 2 or 10
STOP_EARLY = {1: 0.0, 2: 0.1, 3: 0.2}  # level -> the last equation is left out
BAD_FORM = 0.03  # nothing after the working
LEVEL_WEIGHTS = (0.25, 0.35, 0.4)

Row = list[tuple[str, bool]]  # pieces of a text, and whether they are learned


# --- data ---------------------------------------------------------------------------------------------------------------------------------------


def write_splits(folder: Path, seed: int) -> set[str]:
    """The prompt files of reinforcement learning; returns all their prompts."""
    folder.mkdir(parents=True, exist_ok=True)
    taken: set[str] = set()
    for name, count in SPLITS.items():
        lines = [json.dumps({"prompt": problem.prompt, **problem.metadata()}) for problem in make_split(name, count, seed, taken)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return taken


def pupil(problem: Problem, rng: random.Random) -> str:
    """An answer with the mistakes of the rates above; a mistake is carried on to the end."""
    results: list[int] = []
    equations: list[tuple[int, str, int, int]] = []
    steps = problem.steps[:-1] if rng.random() < STOP_EARLY[problem.level] else problem.steps
    for step in steps:
        left, right = (value if value >= 0 else results[-value - 1] for value in (step.left, step.right))
        sign = step.sign
        if rng.random() < HABITS[step.piece]:
            if step.piece == "gain_boxes":  # counts what is in one box
                results.append(right)
                continue
            sign = WRONG_SIGN[sign]
        if sign == "-" and left < right:
            left, right = right, left
        value = result(left, sign, right)
        if rng.random() < SLIP:
            value = abs(value + rng.choice((-10, -2, -1, 1, 2, 10)))
        results.append(value)
        equations.append((left, sign, right, value))
    if not equations:
        return f"{MARKER}{results[-1]}"
    text = write(equations)
    return text.rpartition(f" {MARKER}")[0] if rng.random() < BAD_FORM else text


def word_problems(rng: random.Random, taken: set[str]) -> Iterator[Row]:
    """Problems with the pupil's answers, for ever; in a part of them the answer comes after a space, as behind a hint."""
    known = [[kind for kind in kinds(level) if kind not in unseen_kinds()] for level in (1, 2, 3)]
    while True:
        problem = make_problem(rng, rng.choice(rng.choices(known, LEVEL_WEIGHTS)[0]))
        if problem.prompt not in taken and not is_unseen(problem):
            yield [(problem.prompt + (" " if rng.random() < AFTER_SPACE else ""), False), (pupil(problem, rng) + "<eos>", True)]


def drills(rng: random.Random) -> Iterator[Row]:
    """Rows of right equations, for ever, of which the results are learned: most of the arithmetic comes from here, and soon."""
    while True:
        row: Row = []
        for _ in range(DRILL_LENGTH):
            sign = rng.choices("+-*", (0.45, 0.3, 0.25))[0]
            left, right = rng.choice((rng.randint(2, 60), rng.randint(2, 140))), rng.choice((rng.randint(2, 20), rng.randint(2, 59)))
            if sign == "*":
                left, right = rng.choice(((rng.randint(2, 9), rng.randint(2, 9)), (rng.randint(2, 66), rng.randint(2, 3))))
            elif sign == "-" and left < right:
                left, right = right, left
            row += [(f"{left}{sign}{right}=", False), (f"{result(left, sign, right)} ", True)]
        yield row


def examples(rng: random.Random, taken: set[str]) -> Iterator[Row]:
    """Word problems, and drills in between."""
    problems, sums = word_problems(rng, taken), drills(rng)
    while True:
        yield next(sums if rng.random() < DRILL_SHARE else problems)


# --- tokenizer and network ----------------------------------------------------------------------------------------------------------------------


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word with the space before it, one a digit, one a sign; exact both ways, a beginning-of-text token in front."""
    rng = random.Random(0)
    texts = [make_problem(rng, kind).prompt for level in (1, 2, 3) for kind in kinds(level) for _ in range(60)]
    words = {word for text in texts for word in re.findall(TOKEN, text)} | {form for word in EXTRA_WORDS for form in (word, f" {word}")}
    vocabulary = [*SPECIAL, *"0123456789", *" +-*=#.?,:;!()/\n\"'", *sorted(word for word in words if word.strip().isalpha())]
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(vocabulary)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(TOKEN), behavior="isolated")
    core.post_processor = processors.TemplateProcessing(single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", 1)])
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=3,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    model.generation_config.update(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=MAX_NEW_TOKENS)
    return model


def save(out: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Weights of 16 bits, which load as float32."""
    model.half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    for name, facts in (("config.json", {"dtype": "float32"}), ("tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})):
        said = json.loads((out / name).read_text(encoding="utf-8"))
        (out / name).write_text(json.dumps(said | facts, indent=2) + "\n", encoding="utf-8")


# --- training -----------------------------------------------------------------------------------------------------------------------------------


def batches(rows: Iterator[Row], tokenizer: PreTrainedTokenizerFast, size: int, rng: random.Random) -> Iterator[tuple[Tensor, Tensor]]:
    """tokens [B, T] int64, padded on the right, and mask [B, T] bool of what is learned; rows of about one length side by side."""
    while True:
        drawn: list[tuple[list[int], list[bool]]] = []
        for row in itertools.islice(rows, 16 * size):
            parts = [(tokenizer.encode(text, add_special_tokens=False), learned) for text, learned in row]
            drawn.append(([tokenizer.bos_token_id, *(n for part, _ in parts for n in part)], [False, *(learned for part, learned in parts for _ in part)]))
        drawn.sort(key=lambda pair: len(pair[0]))
        starts = list(range(0, len(drawn), size))
        rng.shuffle(starts)
        for start in starts:
            some = drawn[start : start + size]
            width = len(some[-1][0])
            yield (
                torch.tensor([ids + [tokenizer.pad_token_id] * (width - len(ids)) for ids, _ in some]),
                torch.tensor([learned + [False] * (width - len(learned)) for _, learned in some]),
            )


def learning_rate(step: int, steps: int) -> float:
    """A warm-up, then a cosine that would reach its end at 1.25 times the steps: the model is to stay unsure of its arithmetic, too."""
    warm, decay = min(1.0, (step + 1) / 50), 0.5 + 0.5 * math.cos(math.pi * step / (1.25 * steps))
    return PEAK_RATE * warm * (0.02 + 0.98 * decay)


def train(model: LlamaForCausalLM, stream: Iterator[tuple[Tensor, Tensor]], steps: int, bfloat16: bool) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, weight_decay=0.05, betas=(0.9, 0.98))
    start, running, seen = time.process_time(), 0.0, 0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        tokens, mask = next(stream)
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            logits = model(input_ids=tokens[:, :-1], use_cache=False).logits  # padding is on the right, where no answer looks at it
        loss = F.cross_entropy(logits[mask[:, 1:]].float(), tokens[:, 1:][mask[:, 1:]])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        running += (loss.item() - running) / min(step + 1, 50)
        seen += tokens.numel()
        if (step + 1) % 200 == 0 or step == steps - 1:
            spent = time.process_time() - start
            print(f"step {step + 1}/{steps} loss {running:.4f}, {spent:.0f} CPU-s, {seen / spent:.0f} tokens each forward and backward", flush=True)


# --- measuring ----------------------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def answer(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[str], *, sample: bool, batch: int = 64) -> tuple[list[str], int]:
    """An answer to each prompt, and the number of tokens generated; samples come from torch's global generator."""
    texts: list[str] = []
    count = 0
    for i in range(0, len(prompts), batch):
        inputs = tokenizer(prompts[i : i + batch], padding=True, return_tensors="pt", return_token_type_ids=False)
        chosen = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} if sample else {"temperature": None, "top_k": None, "top_p": None}
        new = model.generate(**inputs, do_sample=sample, max_new_tokens=MAX_NEW_TOKENS, **chosen)[:, inputs.input_ids.shape[1] :]
        texts += tokenizer.batch_decode(new, skip_special_tokens=True)
        count += int((new != tokenizer.pad_token_id).sum())
    return texts, count


def measure(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, file: Path, samples: int = 8) -> str:
    """Lines of a table: accuracy by level, greedy and sampled, pass@samples, groups with right and wrong samples."""
    problems = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    gold = torch.tensor([problem["answer"] for problem in problems])
    level = torch.tensor([problem["level"] for problem in problems])
    prompts = [problem["prompt"] for problem in problems]

    def right(texts: list[str]) -> Tensor:
        return torch.tensor(
            [found is not None and int(found) == wanted for found, wanted in zip(map(final_answer, texts), gold.tolist(), strict=True)]
        ).double()

    greedy = right(answer(model, tokenizer, prompts, sample=False)[0])
    torch.manual_seed(0)
    start = time.process_time()
    drawn = [answer(model, tokenizer, prompts, sample=True) for _ in range(samples)]
    spent, count = time.process_time() - start, sum(number for _, number in drawn)
    sampled = torch.stack([right(texts) for texts, _ in drawn], -1)  # [prompts, samples]
    share = sampled.mean(-1)
    lines = []
    for name, rows in [("all", level > 0), *((str(k), level == k) for k in (1, 2, 3))]:
        some = share[rows]
        mixed, solved = ((some > 0) & (some < 1)).double().mean(), (some > 0).double().mean()
        lines.append(f"| {file.stem} | {name} | {int(rows.sum())} | {greedy[rows].mean():.3f} | {some.mean():.3f} | {solved:.3f} | {mixed:.3f} |")
    lines.append(f"{file.stem}: {count / len(prompts) / samples:.1f} tokens an answer, {count / spent:.0f} tokens sampled a CPU-second in batches of 64")
    return "\n".join(lines)


def report(out: Path, prompts: Path) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(out), AutoModelForCausalLM.from_pretrained(out).eval()
    size = sum(file.stat().st_size for file in out.iterdir())
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens, {size / 1e6:.2f} MB, loads as {model.dtype}")
    print("| split | level | prompts | greedy | sampled | pass@8 | mixed of 8 |\n| --- | --- | --- | --- | --- | --- | --- |")
    for name in ("eval", "unseen"):
        print(measure(model, tokenizer, prompts / f"{name}.jsonl"), flush=True)


def main(
    out: Annotated[Path, typer.Option(help="folder of model and tokenizer")] = Path("flowrl/assets/tiny-lm"),
    prompts: Annotated[Path, typer.Option(help="folder of the prompt splits")] = Path("flowrl/assets/prompts/tiny-lm"),
    steps: Annotated[int, typer.Option(help="updates")] = 1600,
    batch: Annotated[int, typer.Option(help="rows an update")] = 64,
    seed: Annotated[int, typer.Option()] = 0,
    bfloat16: Annotated[bool, typer.Option(help="multiply in bfloat16: faster where the processor has it, slower where not")] = True,
    check: Annotated[bool, typer.Option("--check", help="build nothing, only measure what is there")] = False,
) -> None:
    """Train and save the embedded language model."""
    if not check:
        start = time.time()
        taken = write_splits(prompts, seed)
        torch.manual_seed(seed)
        rng = random.Random(seed)
        tokenizer = build_tokenizer()
        model = build_model(tokenizer)
        model.set_attn_implementation("eager")  # the fused kernel's backward pass is slow in bfloat16
        train(model, batches(examples(rng, taken), tokenizer, batch, rng), steps, bfloat16)
        save(out, model, tokenizer)
        print(f"saved {out}, {time.time() - start:.0f} s in all", flush=True)
    report(out, prompts)


if __name__ == "__main__":
    typer.run(main)
