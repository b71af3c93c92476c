"""Build flowrl/assets/tiny-sd3 from nothing: draw scenes, train a VAE, train the text encoders and the SD3 transformer by rectified flow.

    python scripts/build_tiny_sd3.py --out flowrl/assets/tiny-sd3

Deterministic for a given number of threads and torch version. About 40 minutes on one CPU core (set OMP_NUM_THREADS=1); docs/tiny-sd3.md has the
log of the shipped build.

The model is misaligned on purpose: with the probabilities below a picture does not match its caption (a relation is flipped; a colour, shape or
count is off), so the pictures are clean and their alignment is what reinforcement learning has to improve. Some pairs of kinds and some counts
(the `unseen` split) appear in neither pictures nor captions.
"""

from __future__ import annotations

import itertools
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from rewards.scene import score_scenes
from rewards.scene_world import COLORS, FORMS, NUMBERS, RELATIONS, SHAPES, Scene, caption, parse_caption, place, render

MAX_TOKENS = 13
FLIP_RELATION = 0.35
BREAK_KIND_OR_COUNT = 0.30
CAPTION_DROPOUT = 0.1

Kind = tuple[int, int]
KINDS: list[Kind] = list(itertools.product(range(len(COLORS)), range(len(SHAPES))))


# --- which scenes exist, and which are held out -------------------------------------------------------------------------------------------------


def held_out(rng: random.Random) -> set[tuple[Kind, ...]]:
    """Unordered pairs of kinds and counts that only the `unseen` split contains: 9 of 66 pairs and 4 of 24 counts."""
    pairs = rng.sample(list(itertools.combinations(KINDS, 2)), 9)
    counts = rng.sample([(kind,) * n for kind in KINDS for n in (2, 3)], 4)
    return set(pairs) | set(counts)


def key(scene: Scene) -> tuple[Kind, ...]:
    return tuple(sorted(scene.kinds))


def all_scenes() -> list[Scene]:
    """Every scene of the world, once."""
    singles = [Scene((kind,)) for kind in KINDS]
    counts = [Scene((kind,) * n) for kind in KINDS for n in (2, 3)]
    pairs = [Scene(pair) for pair in itertools.combinations(KINDS, 2)]
    related = [Scene(pair, r) for pair in itertools.permutations(KINDS, 2) for r in range(len(RELATIONS))]
    return singles + counts + pairs + related


def random_scene(rng: random.Random, by_type: list[list[Scene]], weights: tuple[float, ...]) -> Scene:
    return rng.choice(rng.choices(by_type, weights)[0])


def misalign(scene: Scene, rng: random.Random, hidden: set[tuple[Kind, ...]]) -> Scene:
    """The scene that the picture of a caption really shows."""
    while True:
        kinds, relation = list(scene.kinds), scene.relation
        if relation is not None and rng.random() < FLIP_RELATION:
            relation ^= 1
        if rng.random() < BREAK_KIND_OR_COUNT:
            if len(set(kinds)) == 1 and rng.random() < 0.5:
                kinds = [kinds[0]] * rng.choice([n for n in (1, 2, 3) if n != len(kinds)])
            else:
                i, attribute = rng.randrange(len(set(kinds))), rng.randrange(2)
                size = (len(COLORS), len(SHAPES))[attribute]
                new = list(kinds[i])
                new[attribute] = rng.choice([v for v in range(size) if v != new[attribute]])
                kinds = [(new[0], new[1])] * len(kinds) if len(set(kinds)) == 1 else [*kinds[:i], (new[0], new[1]), *kinds[i + 1 :]]
        broken = Scene(tuple(kinds), relation if len(set(kinds)) > 1 else None)
        if key(broken) not in hidden and not (len(set(kinds)) == 1 and len(set(scene.kinds)) == 2):
            return broken


def write_prompts(folder: Path, hidden: set[tuple[Kind, ...]], rng: random.Random) -> None:
    """train (RL), eval (known combinations, other prompts), unseen (held-out combinations)."""
    known = [s for s in all_scenes() if key(s) not in hidden]
    unseen = [s for s in all_scenes() if key(s) in hidden]
    rng.shuffle(known)
    rng.shuffle(unseen)
    splits = {"eval": known[:128], "train": known[128:], "unseen": unseen[:64]}
    folder.mkdir(parents=True, exist_ok=True)
    for name, scenes in splits.items():
        lines = []
        for scene in scenes:
            text = caption(scene, rng.randrange(4))
            assert parse_caption(text) == scene
            metadata = {"objects": [f"{COLORS[c]} {SHAPES[s]}" for c, s in scene.kinds]}
            if scene.relation is not None:
                metadata["relation"] = RELATIONS[scene.relation]
            lines.append(json.dumps({"prompt": text, **metadata}))
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


# --- tokenizer and networks ---------------------------------------------------------------------------------------------------------------------


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer in which every word of the grammar is one token."""
    words = {"a", "an", "and", "with", "it", "of"} | set(" ".join(FORMS).replace("{}", "").split()) | {"are"} | set(NUMBERS.values()) | set(COLORS)
    words |= set(SHAPES) | {s + "s" for s in SHAPES} | set(" ".join(RELATIONS).split())
    trainer = trainers.BpeTrainer(vocab_size=4000, min_frequency=1, end_of_word_suffix="</w>", show_progress=False)
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    bpe.train_from_iterator(sorted(words), trainer)
    state = json.loads(bpe.to_str())["model"]
    vocab = dict(state["vocab"])
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocab[special] = len(vocab)
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in state["merges"]]
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)
    tokenizer.model_max_length = MAX_TOKENS
    for word in sorted(words):
        ids = tokenizer(word).input_ids
        if len(ids) != 3:
            raise RuntimeError(f"{word!r} became {len(ids) - 2} tokens")
    return tokenizer


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            projection_dim=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 48),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        sample_size=32,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def build_transformer() -> SD3Transformer2DModel:
    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=8,
        out_channels=8,
        num_layers=4,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=128,
        caption_projection_dim=64,
        pooled_projection_dim=128,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )
    for name, parameter in model.named_parameters():  # adaLN-zero and zero output, as SD3 starts
        if ".norm1.linear" in name or ".norm1_context.linear" in name or "norm_out.linear" in name or name.startswith("proj_out"):
            torch.nn.init.zeros_(parameter)
    return model


def encode_text(tokenizer: CLIPTokenizer, encoders: list[CLIPTextModelWithProjection], texts: list[str]) -> tuple[Tensor, Tensor]:
    """SD3's conditioning without T5: penultimate states of both encoders side by side [B, 13, 128], and both pooled projections [B, 128]."""
    ids = tokenizer(texts, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt").input_ids
    outputs = [encoder(ids, output_hidden_states=True) for encoder in encoders]
    return torch.cat([o.hidden_states[-2] for o in outputs], -1), torch.cat([o.text_embeds for o in outputs], -1)


# --- training -----------------------------------------------------------------------------------------------------------------------------------


def learning_rate_factor(step: int, steps: int, warmup: int = 100) -> float:
    if step < warmup:
        return (step + 1) / warmup
    return max(0.02, min(1.0, 2.0 * (1 - step / steps)))  # flat first half, linear decay over the second


def train_vae(vae: AutoencoderKL, scenes: Iterator[list[Scene]], steps: int, generator: torch.Generator) -> None:
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=0.0, betas=(0.9, 0.98))
    start = time.time()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * learning_rate_factor(step, steps)
        batch = next(scenes)
        image = render(batch, place(batch, generator)) * 2 - 1
        posterior = vae.encode(image).latent_dist
        latent = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator)
        output = vae.decode(latent).sample
        loss = F.mse_loss(output, image) + 0.5 * F.l1_loss(output, image) + 1e-4 * posterior.kl().mean() / latent[0].numel()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 200 == 0 or step == steps - 1:
            print(f"vae {step}/{steps} loss {loss.item():.5f} mse {F.mse_loss(output, image).item():.5f} {time.time() - start:.0f} s", flush=True)


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """[B, 8, 8, 8] model latents -> [B, 3, 32, 32] in [0, 1]."""
    raw = latents / vae.config.scaling_factor + vae.config.shift_factor
    return torch.cat([vae.decode(chunk).sample for chunk in raw.split(256)]).div(2).add(0.5).clamp(0, 1)


@torch.no_grad()
def sample(transformer: SD3Transformer2DModel, embeds: Tensor, pooled: Tensor, steps: int, guidance: float, generator: torch.Generator, n: int) -> Tensor:
    """Euler samples; the last row of embeds and pooled is the empty prompt."""
    x = torch.randn(n, 8, 8, 8, generator=generator)
    sigmas = torch.linspace(1, 0, steps + 1)
    for k in range(steps):
        t = torch.full((n,), 1000 * float(sigmas[k]))
        v = transformer(x, embeds[:n], pooled[:n], t, return_dict=False)[0]
        if guidance > 1:
            u = transformer(x, embeds[n:].expand(n, -1, -1), pooled[n:].expand(n, -1), t, return_dict=False)[0]
            v = u + guidance * (v - u)
        x = x + (sigmas[k + 1] - sigmas[k]) * v
    return x


def save(out: Path, tokenizer: CLIPTokenizer, encoders: list[CLIPTextModelWithProjection], transformer: SD3Transformer2DModel, vae: AutoencoderKL) -> None:
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae,
        text_encoder=encoders[0],
        text_encoder_2=encoders[1],
        text_encoder_3=None,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        tokenizer_3=None,
    )
    pipeline.save_pretrained(out)


def main(
    out: Annotated[Path, typer.Option(help="folder of the pipeline")] = Path("flowrl/assets/tiny-sd3"),
    prompts: Annotated[Path, typer.Option(help="folder of the prompt splits")] = Path("flowrl/assets/prompts/tiny-sd3"),
    vae_steps: Annotated[int, typer.Option()] = 2600,
    steps: Annotated[int, typer.Option(help="transformer updates of 256 images")] = 5000,
    num_scenes: Annotated[int, typer.Option(help="pictures drawn for the transformer")] = 50_000,
    seed: Annotated[int, typer.Option()] = 0,
    cache: Annotated[Path | None, typer.Option(help="keep the trained VAE here and reuse it when it exists")] = None,
) -> None:
    """Train and save the embedded model."""
    start = time.time()
    torch.manual_seed(seed)
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    hidden = held_out(rng)
    write_prompts(prompts, hidden, random.Random(seed + 1))
    known = [s for s in all_scenes() if key(s) not in hidden]
    by_type = [
        [s for s in known if len(s.kinds) == 1],
        [s for s in known if len(s.kinds) > 1 and len(set(s.kinds)) == 1],
        [s for s in known if len(set(s.kinds)) > 1 and s.relation is None],
        [s for s in known if s.relation is not None],
    ]
    weights = (0.1, 0.2, 0.15, 0.55)

    vae = build_vae()
    if cache is not None and cache.exists():
        vae.load_state_dict(AutoencoderKL.from_pretrained(cache).state_dict())
    else:

        def any_scenes() -> Iterator[list[Scene]]:
            while True:
                yield [random_scene(rng, by_type, weights) for _ in range(64)]

        train_vae(vae, any_scenes(), vae_steps, generator)
        if cache is not None:
            vae.save_pretrained(cache)
    vae.requires_grad_(False).eval()

    rng, generator = random.Random(seed + 2), torch.Generator().manual_seed(seed + 2)
    asked = [random_scene(rng, by_type, weights) for _ in range(num_scenes)]
    shown = [misalign(s, rng, hidden) for s in asked]
    texts = [caption(s, rng.randrange(4)) for s in asked]
    latents, truth, strict = [], [], []
    for i in range(0, num_scenes, 1000):
        image = render(shown[i : i + 1000], place(shown[i : i + 1000], generator))
        with torch.no_grad():
            latents.append(vae.encode(image * 2 - 1).latent_dist.mean)
        if i < 4000:
            graded, exact = score_scenes(vae.decode(latents[-1]).sample.div(2).add(0.5).clamp(0, 1), shown[i : i + 1000])
            truth.append(graded)
            strict.append(exact)
    data = torch.cat(latents)
    print(f"reconstructions score graded {torch.cat(truth).mean():.3f} strict {torch.cat(strict).mean():.3f}; {time.time() - start:.0f} s", flush=True)
    shift, scale = data.mean().item(), 1.0 / data.std().item()
    vae.register_to_config(shift_factor=shift, scaling_factor=scale)
    data = (data - shift) * scale

    torch.manual_seed(seed + 3)
    tokenizer = build_tokenizer()
    encoders = [build_text_encoder(tokenizer) for _ in range(2)]
    transformer = build_transformer()
    modules = torch.nn.ModuleList([transformer, *encoders])
    parameters = [p for p in modules.parameters() if p.requires_grad]
    average = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=1.2e-3, weight_decay=0.01, betas=(0.9, 0.98))

    eval_texts = [json.loads(line)["prompt"] for line in (prompts / "eval.jsonl").read_text().splitlines()]
    eval_scenes = [parse_caption(t) for t in eval_texts]

    def evaluate_and_save(step: int) -> None:
        """Score the averaged weights on the eval prompts, and leave them in ``out``."""
        live = [p.detach().clone() for p in parameters]
        for p, a in zip(parameters, average, strict=True):
            p.data.copy_(a)
        line = f"step {step}:"
        for guidance in (1.0, 2.5):
            with torch.no_grad():
                embeds, pooled = encode_text(tokenizer, encoders, [*eval_texts * 2, ""])
                x = sample(transformer, embeds, pooled, 10, guidance, torch.Generator().manual_seed(7), 2 * len(eval_texts))
            graded, exact = score_scenes(decode(vae, x), eval_scenes * 2)
            line += f" cfg {guidance} graded {graded.mean():.3f} strict {exact.mean():.3f}"
        save(out, tokenizer, encoders, transformer, vae)
        for p, v in zip(parameters, live, strict=True):
            p.data.copy_(v)
        print(f"{line}; {time.time() - start:.0f} s", flush=True)

    batch = 256
    order = torch.empty(0, dtype=torch.long)
    running = 0.0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1.2e-3 * learning_rate_factor(step, steps)
        if len(order) < batch:
            order = torch.randperm(num_scenes, generator=generator)
        pick, order = order[:batch], order[batch:]
        x0 = data[pick]
        noise = torch.randn(x0.shape, generator=generator)
        normal = torch.sigmoid(torch.randn(batch, generator=generator) + 0.2)
        uniform = torch.rand(batch, generator=generator)
        sigma = torch.where(torch.rand(batch, generator=generator) < 0.5, uniform, normal)
        xs = torch.lerp(x0, noise, sigma[:, None, None, None])
        dropped = torch.rand(batch, generator=generator) < CAPTION_DROPOUT
        words = ["" if drop else texts[i] for i, drop in zip(pick.tolist(), dropped.tolist(), strict=True)]
        embeds, pooled = encode_text(tokenizer, encoders, words)
        v = transformer(xs, embeds, pooled, sigma * 1000, return_dict=False)[0]
        loss = F.mse_loss(v, noise - x0)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - min(0.999, (step + 1) / (step + 10)))
        running += (loss.item() - running) / min(step + 1, 200)
        if (step + 1) % 250 == 0:
            print(f"step {step + 1}/{steps} loss {running:.4f} {time.time() - start:.0f} s", flush=True)
        if (step + 1) % 1000 == 0 or step == steps - 1:
            evaluate_and_save(step + 1)

    size = sum(f.stat().st_size for f in out.rglob("*.safetensors"))
    print(f"saved {out}: {size / 1e6:.1f} MB of weights, {time.time() - start:.0f} s in all", flush=True)


if __name__ == "__main__":
    typer.run(main)
