"""A run's weights as files for others: a LoRA, a network or a whole pipeline that plain diffusers (of a language model: transformers and peft) loads, with a
model card that says what they are.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import distribution
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jinja2
import torch
import yaml

from flowrl.checkpoint import find_checkpoints, load_policy
from flowrl.config import Config, dump_config, list_methods, load_config
from flowrl.data import load_prompts
from flowrl.figures import write_readme_figures, write_reward_curve
from flowrl.gallery import load_pairs
from flowrl.policies.base import DiffusionPolicy
from flowrl.policies.families import make_policy
from flowrl.policies.language_models import located
from flowrl.policies.pipelines import DTYPE_KEYWORD, resolve_model_path
from flowrl.results import headline_tiles, score_text
from flowrl.run_records import Run, evaluated_policy, half_width, is_evaluated, load_run, unique
from flowrl.sections import ModelConfig
from flowrl.tracking import explain_full_disk, replace_file
from flowrl.types import Prompt, UserError
from rewards.registry import load_reward

if TYPE_CHECKING:
    from flowrl.policies.causal_lm import CausalLmPolicy

__all__ = ["Form", "base_licence", "export_run", "loading_snippet", "text_snippet"]

Form = Literal["lora", "merged", "transformer", "network", "pipeline"]
_PARTS: dict[str, Literal["lora", "network", "pipeline"]] = {
    "lora": "lora",
    "merged": "network",
    "transformer": "network",
    "network": "network",
    "pipeline": "pipeline",
}
_ANY_PROMPT = {False: "a photo of a cat", True: "What is 2 + 3?"}
_ANSWERS = 4
"""Shown in the card of a language model."""
_LONGEST = 300
"""Characters of an answer there."""


@dataclass(frozen=True, slots=True)
class _Export:
    """What was asked for, resolved."""

    config: Config
    run: Run
    form: Form
    dtype: str
    averaged: bool
    iteration: int

    @property
    def is_text(self) -> bool:
        return _is_text(self.config)


def _is_text(config: Config) -> bool:
    return config.likelihood == "token"


def export_run(
    run: Path,
    out: Path,
    *,
    checkpoint: str = "last",
    weights: Literal["ema", "raw"] | None = None,
    form: Form | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    force: bool = False,
) -> int:
    """Write a checkpoint of a run in one of the forms, with a model card. The folder appears under its name only once it is whole.

    Args:
        run: a run directory with a checkpoint, finished or not.
        out: where it goes; must be new or empty, but for ``force``: then files and folders of the same names are replaced and all others stay.
        checkpoint: ``last`` or an iteration number.
        weights: the average that was evaluated, or the weights as they were trained; None = the average, where the run keeps one.
        form: None = ``lora``, or under full fine-tuning ``transformer``, of a language model ``network``.
        dtype: None = float32 for a LoRA, ``model.dtype`` for the others.
    Returns:
        The iteration of the checkpoint.
    Raises:
        UserError: no such run or checkpoint, the folder is in use, the form does not fit the run, a weight does not fit the dtype, or the disk is full.
    """
    loaded = load_run(run)
    config = load_config(run / "config.yaml")
    form = form or ("lora" if config.model.adapter == "lora" else _whole(config))
    _refuse_wrong_form(run, config, form, weights)
    _refuse_folder(run, out, force)
    if not find_checkpoints(run):
        raise UserError(f"{run} has no checkpoint yet; train it first")
    plain = {"compile": "off", "attention_backend": None, "text_encoders": "keep", "prompt_storage": "device", "prompt_folder": None}
    policy = make_policy(config.model.model_copy(update=plain), torch.device("cpu"))
    averaged = config.ema is not None and weights != "raw"
    iteration = load_policy(run, policy, checkpoint, averaged=averaged)
    kind = dtype or ("float32" if form == "lora" else config.model.dtype)
    asked = _Export(config, loaded, form, kind, averaged, iteration)
    with explain_full_disk(out, next_step="export again"), _whole_folder(out, force) as folder:
        shown = _example_prompt(loaded, asked.is_text)
        snippet = text_snippet(policy, config, form, kind, _asked(config, shown)) if asked.is_text else loading_snippet(policy, config, form, kind, shown)
        policy.export(folder, _PARTS[form], getattr(torch, kind))
        network = "" if asked.is_text else policy.network_name
        figures, missing = _figures(run, folder, asked.is_text)
        replace_file(folder / "README.md", _card(asked, policy.title, network, snippet, figures, missing).encode())
    return iteration


# --- what is refused ----------------------------------------------------------------------------------------------------------------------------


def _whole(config: Config) -> Form:
    """What the network of full fine-tuning is called."""
    return "network" if _is_text(config) else "transformer"


def _refuse_wrong_form(run: Path, config: Config, form: Form, weights: str | None) -> None:
    whole = _whole(config)
    if config.model.adapter == "full" and form in ("lora", "merged"):
        what = "there is no LoRA" if form == "lora" else "there is nothing to merge"
        raise UserError(f"--form {form}: {run} trained all weights, so {what}; use --form {whole}")
    if config.model.adapter == "lora" and form == whole:
        raise UserError(f"--form {whole}: {run} trained a LoRA; use --form merged for the network with the LoRA in its weights")
    fitting = whole if config.model.adapter == "full" else "merged"
    if form == "pipeline" and _is_text(config):
        raise UserError(f"--form pipeline: {run} trained a language model, which is a network and its tokenizer; use --form {fitting}")
    if form in ("transformer", "network") and form != whole:
        kind = "a language model" if _is_text(config) else "an image generator"
        raise UserError(f"--form {form}: {run} trained {kind}; use --form {fitting}")
    if weights == "ema" and config.ema is None:
        raise UserError(f"--weights ema: {run} keeps no average (ema: null); use --weights raw")


def _refuse_folder(run: Path, out: Path, force: bool) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is not a folder; choose another --out")
    if out.exists() and any(out.iterdir()) and not force:
        raise UserError(f"{out} is not empty; choose another --out, or replace what is in it with --force")
    if out.resolve() == run.resolve() or run.resolve().is_relative_to(out.resolve()):
        raise UserError(f"{out} holds the run; choose another --out")


@contextmanager
def _whole_folder(out: Path, force: bool) -> Iterator[Path]:
    """A folder to write into, which becomes ``out`` at the end; after an error nothing of it is left."""
    temporary = out.with_name(f".{out.name}.partial") if out.name else out.resolve().with_name(f".{out.resolve().name}.partial")
    out.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
    try:
        temporary.mkdir()
        yield temporary
        if not (out.exists() and any(out.iterdir())):
            temporary.replace(out)
            return
        for new in sorted(temporary.iterdir()):
            old = out / new.name
            if old.is_dir() and not old.is_symlink():
                shutil.rmtree(old)
            elif new.is_dir():
                old.unlink(missing_ok=True)
            new.replace(old)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# --- how it is loaded ---------------------------------------------------------------------------------------------------------------------------


def loading_snippet(policy: DiffusionPolicy, config: Config, form: Form, dtype: str, prompt: str) -> str:
    """Python lines that draw a picture from an export in the current folder with plain diffusers, as `flowrl sample --run` would from the same noise."""
    pipeline, network = type(policy.pipeline), type(policy.network)
    kind = dtype if form != "lora" else config.model.dtype
    absent = _absent(policy, config.model.path if form != "pipeline" else "")
    options = [f"{DTYPE_KEYWORD}=torch.{kind}", *(f"{name}=None" for name in absent)]  # diffusers wants to be told of parts that a pipeline does not have
    call, before, names = _call(policy, config)
    names |= {"DiffusionPipeline"} if form == "pipeline" else {pipeline.__name__}
    names |= {network.__name__} if form in ("merged", "transformer") else set()
    lines = ["import torch", f"from diffusers import {', '.join(sorted(names))}", ""]
    source = "here"
    if form != "pipeline":
        source = "base"
        lines = _with_base(lines, config.model.path)
    lines.append(_HERE)
    if form in ("merged", "transformer"):
        lines.append(f'network = {network.__name__}.from_pretrained(here, subfolder="{policy.network_name}", {options[0]})')
        options = [f"{policy.network_name}=network", *options]
    lines.append(f"pipe = {'DiffusionPipeline' if form == 'pipeline' else pipeline.__name__}.from_pretrained({source}, {', '.join(options)})")
    if form == "lora":
        lines.append("pipe.load_lora_weights(here)")
    lines += [*before, 'pipe.to("cuda" if torch.cuda.is_available() else "cpu")']
    lines += [f"image = pipe(prompt={prompt!r}, {', '.join(call)}).images[0]", 'image.save("picture.png")']
    return "\n".join(lines)


_HERE = 'here = "."  # this folder, or its id on a hub'


def _with_base(lines: list[str], path: str) -> list[str]:
    """Imports and a line that says where the base model is."""
    if path.startswith("flowrl:"):
        place = f'base = Path(flowrl.__file__).parent / "assets" / "{path.removeprefix("flowrl:")}"'
        return ["from pathlib import Path", "", "import flowrl", *lines, place]
    if path.startswith("package:"):
        name = path.removeprefix("package:")
        inside = Path(located(path)).relative_to(str(distribution(name).locate_file("")))
        return ["from importlib.metadata import distribution", "", *lines, f"base = str(distribution({name!r}).locate_file({inside.as_posix()!r}))"]
    known = Path(path).expanduser()
    return [*lines, f"base = {str(known.resolve()) if known.exists() else path!r}"]


def text_snippet(policy: CausalLmPolicy, config: Config, form: Form, dtype: str, prompt: Prompt) -> str:
    """Python lines that answer a prompt from an export in the current folder with plain transformers and peft, as the run's evaluations do."""
    g, is_lora = config.generation, form == "lora"
    tokens, found = policy.encode([prompt])[0], policy.tokenizer
    lines = ["import torch", *(["from peft import PeftModel"] if is_lora else []), "from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    source, options = "here", [f"dtype=torch.{config.model.dtype if is_lora else dtype}"]
    if is_lora:
        source, lines = "base", _with_base(lines, config.model.path)
        place = Path(policy.where)
        options += [f"gguf_file={file.name!r}" for file in place.glob("*.gguf") if not (place / "config.json").is_file()]
    lines += [_HERE, "tokenizer = AutoTokenizer.from_pretrained(here)", f"model = AutoModelForCausalLM.from_pretrained({source}, {', '.join(options)})"]
    lines += ["model = PeftModel.from_pretrained(model, here)"] if is_lora else []
    lines.append('model.to("cuda" if torch.cuda.is_available() else "cpu")')
    if found.chat_template is not None:
        lines.append(f"messages = {prompt.metadata.get('messages') or [{'role': 'user', 'content': prompt.text}]!r}")
        lines.append('ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)["input_ids"]')
    else:
        after = len(found(prompt.text)["input_ids"]) - len(tokens)  # end tokens that some tokenizers put behind every text
        lines.append(f'ids = tokenizer({prompt.text!r}, return_tensors="pt")["input_ids"]' + (f"[:, :-{after}]" if after else ""))
    call = [f"max_new_tokens={g.max_new_tokens}", *([f"min_new_tokens={g.min_new_tokens}"] if g.min_new_tokens else [])]
    if config.evaluation.greedy:
        call.append("do_sample=False")
    else:
        call += ["do_sample=True", f"temperature={g.temperature}", f"top_p={g.top_p}", f"top_k={g.top_k}", *([f"min_p={g.min_p}"] if g.min_p else [])]
    if getattr(policy.network.model.generation_config, "repetition_penalty", None) not in (None, 1.0):
        call.append("repetition_penalty=1.0")
    call += [f"eos_token_id={sorted(policy.ends)}"] if policy.ends else []
    call += [f"pad_token_id={policy.pad}", *([f"stop_strings={list(g.stop)!r}", "tokenizer=tokenizer"] if g.stop else [])]
    lines += [
        "ids = ids.to(model.device)",
        f"answer = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), {', '.join(call)})",
        "print(tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True))",
    ]
    return "\n".join(lines)


def _absent(policy: DiffusionPolicy, base: str) -> list[str]:
    """Parts that diffusers looks for in vain if it is not told: ones that it wants and the pipeline lacks, and ones that only the index of a folder has."""
    index = Path(resolve_model_path(base)) / "model_index.json" if base else None
    named = json.loads(index.read_text(encoding="utf-8")) if index is not None and index.is_file() else {}
    missing = {name for name, part in policy.pipeline.components.items() if part is None}
    lost = {name for name in missing if index is not None and (named.get(name) or [None])[0] and not (index.parent / name).is_dir()}
    return sorted(missing - set(type(policy.pipeline)._optional_components) | lost)


def _call(policy: DiffusionPolicy, config: Config) -> tuple[list[str], list[str], set[str]]:
    """Arguments of the pipeline's call, lines before it, and what they import: the size, grid and guidance of the run's evaluations."""
    known, evaluation, steps = signature(type(policy.pipeline).__call__).parameters, config.evaluation, config.evaluation.num_steps
    call, before, names = [f"num_inference_steps={steps}"], [], set()
    if config.model.height or config.model.width:
        call += [f"{name}={size}" for name, size in zip(("height", "width"), policy.image_size, strict=True)]
    if "max_sequence_length" in known and hasattr(policy, "max_sequence_length"):
        call.append(f"max_sequence_length={policy.max_sequence_length}")
    scale = evaluation.guidance_scale
    if policy.takes_guidance:
        call.append(f"guidance_scale={3.5 if config.model.guidance is None else config.model.guidance}")
    if "true_cfg_scale" in known:
        call += [f"true_cfg_scale={scale}", 'negative_prompt=""'] if scale > 1 else []
    elif not policy.takes_guidance:
        call.append(f"guidance_scale={scale}")
    if policy.prediction != "flow":
        names.add("DDIMScheduler")
        settings = 'timestep_spacing="leading", clip_sample=False, set_alpha_to_one=True'
        before.append(f"pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, {settings})")
        return call, before, names
    if config.rollout.shift is not None:
        scheduler = type(policy.pipeline.scheduler).__name__
        names.add(scheduler)
        before.append(f"pipe.scheduler = {scheduler}.from_config(pipe.scheduler.config, shift={config.rollout.shift}, use_dynamic_shifting=False)")
    if policy.pipeline_grid == "diffusers" and config.rollout.grid != "diffusers":  # else the pipeline makes these by itself
        call.append(f"sigmas=[1 - k / {steps} for k in range({steps})]")
    return call, before, names


def _example_prompt(run: Run, is_text: bool) -> str:
    gallery, _ = load_pairs(run)
    return next((pairs[0].prompt for pairs in gallery.values() if pairs), _ANY_PROMPT[is_text])


def _asked(config: Config, text: str) -> Prompt:
    """The prompt as the run's evaluations ask it, with the conversation before it; the text alone where the data has moved away."""
    for path in config.data.eval.values():
        try:
            prompts = load_prompts(path)
        except UserError:
            continue
        if found := next((prompt for prompt in prompts if prompt.text == text), None):
            return found
    return Prompt(text)


# --- the card -----------------------------------------------------------------------------------------------------------------------------------


def base_licence(path: str) -> dict[str, str]:
    """``license``, and where they are known ``license_name`` and ``license_link``, as the model card of a base model says them; empty = not known.

    Args:
        path: a folder, a hub id (its card is asked for, from the cache where there is no network) or ``flowrl:NAME``.
    """
    if path.startswith("flowrl:"):
        return {"license": "apache-2.0"}
    card = Path(path).expanduser() / "README.md"
    try:
        if _hub_id(path):
            from huggingface_hub import hf_hub_download

            card = Path(hf_hub_download(path, "README.md", etag_timeout=5))
        front = re.match(r"---\r?\n(.*?)\r?\n---", card.read_text(encoding="utf-8"), re.DOTALL)
        facts = yaml.safe_load(front[1]) if front else {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    keys = ("license", "license_name", "license_link")
    found = {key: str(facts[key]) for key in keys if isinstance(facts, Mapping) and isinstance(facts.get(key), str)}
    if "://" not in found.get("license_link", "://") and _hub_id(path):
        found["license_link"] = f"https://huggingface.co/{path}/blob/main/{found['license_link']}"
    return found if "license" in found else {}


def _hub_id(path: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", path) is not None and not Path(path).exists()


def _figures(run: Path, folder: Path, is_text: bool) -> tuple[list[str], str]:
    """Names of the pictures that could be drawn, the reward's curve last, or why there are none."""
    try:
        if is_text:
            return [write_reward_curve(run, folder).name], ""
        return [path.name for path in write_readme_figures(run, folder)], ""
    except UserError as error:
        if isinstance(error.__cause__, OSError):
            raise
        return [], str(error).removeprefix(f"{run}: ")


def _answers(run: Run) -> list[tuple[str, str, str]]:
    """The first (prompt, answer before, answer after) of a prompt set."""
    gallery, _ = load_pairs(run)
    pairs = gallery.get("eval") or next(iter(gallery.values()), [])
    texts = [(pair.prompt, str(pair.before), str(pair.after)) for pair in pairs[:_ANSWERS]]
    return [tuple(text if len(text) <= _LONGEST else text[: _LONGEST - 4] + " ..." for text in row) for row in texts]  # type: ignore[misc]


def _card(asked: _Export, family: str, network: str, snippet: str, figures: list[str], missing: str) -> str:
    config = asked.config
    licence = base_licence(config.model.path)
    seen = _until(asked.run, asked.iteration)
    evaluations = _evaluations(seen)
    loader = jinja2.PackageLoader("flowrl")
    templates = jinja2.Environment(loader=loader, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined)
    templates.filters.update(cell=_cell)
    names = config.method.split("+")
    methods = list_methods()
    return templates.get_template("model_card.md").render(
        front=yaml.safe_dump(_front_matter(asked, licence), sort_keys=False, allow_unicode=True),
        title=f"{_base_name(config.model)} fine-tuned with {' and '.join(names)}",
        base=_base_name(config.model),
        base_is_on_hub=_hub_id(config.model.path),
        is_text=asked.is_text,
        family=family,
        network=network,
        form=asked.form,
        dtype=asked.dtype,
        adapter=config.model.adapter,
        lora=config.model.lora,
        averaged=asked.averaged,
        keeps_average=config.ema is not None,
        iteration=asked.iteration,
        methods=[(name, methods[name].summary, methods[name].paper) for name in names],
        rewards=[_reward_row(reward.key, reward.name, reward.weight, reward.args) for reward in config.rewards],
        figures=_training_figures(seen),
        evaluations=evaluations,
        evaluated_at=max((row["iteration"] for row in evaluations), default=0),
        steps=config.evaluation.num_steps,
        generation=config.generation,
        greedy=config.evaluation.greedy,
        answers=_answers(asked.run) if asked.is_text else [],
        pictures=figures,
        pictures_missing=missing,
        shown=(min(asked.run.samples, default=0), max(asked.run.samples, default=0)),
        snippet=snippet,
        licence=licence,
        config_text=dump_config(config).rstrip(),
    )


def _base_name(model: ModelConfig) -> str:
    """A hub id or ``flowrl:NAME`` as it is; of a folder its last part, for the rest says more about a machine than about a model."""
    return model.path if _hub_id(model.path) or model.path.startswith("flowrl:") else Path(resolve_model_path(model.path)).resolve().name


def _front_matter(asked: _Export, licence: Mapping[str, str]) -> dict[str, Any]:
    """What hubs read. A base model that is on no hub has no place there."""
    path = asked.config.model.path
    library, task = ("transformers", "text-generation") if _is_text(asked.config) else ("diffusers", "text-to-image")
    front: dict[str, Any] = {"library_name": library, "pipeline_tag": task, "license": "unknown", **licence}
    if _hub_id(path):
        front |= {"base_model": path, "base_model_relation": "adapter" if asked.form == "lora" else "finetune"}
    tags = [task, library, "reinforcement-learning", "flowrl", *asked.config.method.split("+")]
    lora = (["peft", "lora"] if _is_text(asked.config) else ["lora"]) if asked.form == "lora" else []
    return front | {"tags": [*tags, *lora]}


def _until(run: Run, iteration: int) -> Run:
    """The records up to an iteration."""
    metrics, timings, evals = ([row for row in rows if row["iteration"] <= iteration] for rows in (run.metrics, run.timings, run.evals))
    return replace(run, metrics=metrics, timings=timings, evals=evals)


def _reward_row(key: str, name: str, weight: float, args: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """(name, weight, what it loads, its licence)."""
    title = name if key == name else f"{key} ({name})"
    try:
        info = load_reward(name, args).info
    except UserError:  # a file or a plug-in that is not on this machine
        return title, f"{weight:g}", "not known here", "not known here"
    return title, f"{weight:g}", ", ".join(info.weights) or "none", (info.weights_license or "not stated") if info.weights else "–"


def _training_figures(run: Run) -> list[tuple[str, str]]:
    titles, found, versions = {"NFE": "Network rows", "Wall-clock": "Time"}, {}, run.versions
    for label, value, small in headline_tiles(run, []):
        found[titles.get(label, label)] = f"{value} ({small})" if small else value
    unused = ("diffusers",) if run.setting("likelihood") == "token" else ()
    packages = [name for name in ("flowrl", "torch", "diffusers", "transformers", "peft", "accelerate", "python") if name not in unused]
    found["Versions"] = ", ".join(f"{name} {versions[name]}" for name in packages if versions.get(name))
    found |= {label: str(versions[name]) for label, name in (("Commit", "commit"), ("Device", "device")) if versions.get(name)}
    return [(label, text) for label, text in found.items() if text]


def _evaluations(run: Run) -> list[dict[str, Any]]:
    """A row for every reward, prompt set and guidance scale: the latest evaluations of the base and of the tuned weights."""
    pairs: dict[tuple[Any, ...], dict[str, Mapping[str, Any]]] = {}
    for record in filter(is_evaluated, run.evals):
        policy = evaluated_policy(record)
        pairs.setdefault((record["reward"], record["split"], policy.guidance), {})[policy.name] = record
    rows = []
    for reward, split, guidance in unique(pairs):
        base, tuned = (pairs[reward, split, guidance].get(name) for name in ("base", "tuned"))
        row = {"reward": reward, "split": split, "guidance": f"{guidance:g}", "base": _interval(base), "tuned": _interval(tuned), "change": "–"}
        if base and tuned:
            change, halves = tuned["mean"] - base["mean"], half_width(base) + half_width(tuned)
            row["change"] = score_text(change, signed=True) + (" *" if not math.isnan(halves) and abs(change) > halves else "")
        rows.append(row | {"images": str((tuned or base or {}).get("n", "–")), "iteration": tuned["iteration"] if tuned else 0})
    return rows


def _interval(record: Mapping[str, Any] | None) -> str:
    return "–" if record is None else f"{score_text(record['mean'])} ± {score_text(half_width(record))}"


def _cell(text: Any) -> str:
    """Text for a cell of a Markdown table."""
    return " ".join(str(text).split()).replace("|", "\\|")
