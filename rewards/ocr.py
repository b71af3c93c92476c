"""Text in the picture: how close what an OCR engine reads comes to the quoted words of the prompt. Flow-GRPO's edit-distance form.

r = 1 - d / |t|,  d = 0 if t stands in s, else min(levenshtein(s, t), |t|)

t is the target and s all recognised lines in reading order, joined; both without spaces and in lower case. r is in [0, 1]. Several targets: the mean of r.

Source: Flow-GRPO, arXiv:2505.05470, and its published scorer. Verified in public copies of that scorer: the formula, the substring rule, spaces and case, lines
joined without a separator, PaddleOCR with the angle classifier off. Not verified: the text of the paper.
What we do otherwise: the engine is RapidOCR, whose PP-OCR models lie inside its package, given BGR pictures as it expects; curly quotes count as straight ones;
all quoted spans are targets, not the first alone; a picture on which the engine fails, or whose prompt has no target, is invalid and not 0.
PaddleOCR drops lines below a confidence of 0.5 by itself; here that is ``min_confidence``.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from flowrl.types import Prompt, RewardInfo, SampleBatch, Scores, UserError
from rewards.checkpoints import require
from rewards.network import check_count
from rewards.pictures import pictures_of, to_uint8

__all__ = ["Engine", "Line", "OcrReward", "edit_reward", "rapid_engine", "reading_order", "targets_of"]

_QUOTED: Final = re.compile(r'"([^"]*)"|[“„]([^“”„]*)[”“]')
_COLUMNS: Final = ("ocr_exact", "ocr_confidence", "ocr_surplus")


@dataclass(frozen=True, slots=True)
class Line:
    """A recognised piece of text.

    Attributes:
        confidence: in [0, 1].
        left, top, right, bottom: of its box, in pixels.
    """

    text: str
    confidence: float
    left: float = 0.0
    top: float = 0.0
    right: float = 1.0
    bottom: float = 1.0


Engine = Callable[[NDArray[np.uint8]], Sequence[Line]]
"""Picture [H, W, 3] uint8, in the order blue, green, red -> its lines, in any order; empty where there is no text."""


class OcrReward:
    """How closely the picture shows the quoted text of its prompt. See the module's text.

    Args:
        min_confidence: lines below are not read, in [0, 1].
        extra_penalty: >= 0; what is taken off r for each character beside the target, as a share of the target's length; r stays at least 0. 0 = as published,
            where a wall of text that holds the target scores 1.
        ignore_punctuation: compare letters and digits only, after Unicode compatibility folding (NFKC).
        skip_without_target: call pictures without a target invalid, instead of refusing their prompts before the run.
        detector_side: shorter side in pixels to which the engine brings a smaller picture before it looks for text; less is faster and misses small text.
        threads: of the engine, per worker.
        workers: pictures read at the same time, each by an engine of its own.
        engine: another engine; None = RapidOCR, made by ``load``. One that is given is used by one worker.
    Raises:
        UserError: a value out of range.
    """

    def __init__(
        self,
        min_confidence: float = 0.5,
        extra_penalty: float = 0.0,
        ignore_punctuation: bool = False,
        skip_without_target: bool = False,
        detector_side: int = 736,
        threads: int = 1,
        workers: int = 1,
        engine: Engine | None = None,
    ) -> None:
        if not 0 <= min_confidence <= 1:
            raise UserError(f"reward ocr: min_confidence must be in [0, 1], not {min_confidence!r}")
        if not 0 <= extra_penalty < float("inf"):
            raise UserError(f"reward ocr: extra_penalty must be a number of at least 0, not {extra_penalty!r}")
        for name, value, low in [("detector_side", detector_side, 32), ("threads", threads, 1), ("workers", workers, 1)]:
            check_count("ocr", name, value, low)
        self.min_confidence = min_confidence
        self.extra_penalty = extra_penalty
        self.ignore_punctuation = ignore_punctuation
        self.skip_without_target = skip_without_target
        self.detector_side = detector_side
        self.threads = threads
        self.workers = workers
        self.engine = engine
        self._engines: list[Engine] = []
        self.info = RewardInfo(
            name="ocr",
            description="closeness of the text read in the picture to the quoted words of the prompt",
            low=0.0,
            high=1.0,
            source="Flow-GRPO, arXiv:2505.05470",
            weights=("rapidocr (PP-OCRv6 small, inside the package)",),
            weights_license="Apache-2.0",
            parameters=7_800_000,
            reads=("prompt", "images", "metadata"),
            runs_on="cpu",
            batch_size=32,
            extra="ocr",
        )

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        """Start the engines, on the CPU whatever the device is, in float32.

        Raises:
            UserError: an optional package is missing, or the engine's package lacks its models.
        """
        require("ocr", "rapidfuzz", "ocr")
        if not self._engines:
            self._engines = [self.engine] if self.engine else [rapid_engine(self.threads, self.detector_side) for _ in range(self.workers)]

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Refuse prompts that could never be scored.

        Raises:
            UserError: a prompt has no target, unless ``skip_without_target``; or ``target_text`` is neither a text nor a list of texts.
        """
        for prompt in prompts:
            if not self._targets(prompt) and not self.skip_without_target:
                raise UserError(
                    f"reward ocr: the prompt '{prompt.text}' has no text to look for; put it in quotes, give `target_text` in the prompt's metadata, "
                    "or set skip_without_target: true"
                )

    def score(self, batch: SampleBatch) -> Scores:
        """Scores of pictures [B, 3, H, W] float in [0, 1] of any size.

        Returns:
            values [B] float32 in [0, 1]. A picture without a target, with NaN or infinite pixels, or on which the engine fails is invalid. raw, each [B]:
            ocr_exact, 1 where all targets stand in the text; ocr_confidence, mean over the lines that were read (NaN without any); ocr_surplus, characters
            that are read beyond the targets' number, over that number.
        Raises:
            UserError: the batch has no RGB pictures in floating point, or ``target_text`` is neither a text nor a list of texts.
            ValueError: B = 0.
            RuntimeError: ``load`` was not called.
        """
        if not self._engines:
            raise RuntimeError("reward ocr: load must be called before score")
        images, finite = pictures_of("ocr", batch)
        targets = [self._targets(prompt) for prompt in batch.prompts]
        problems: dict[int, str] = {}
        for i, whole in enumerate(finite.tolist()):
            if not whole:
                problems[i] = "the picture has NaN or infinite pixels"
            elif not targets[i]:
                problems[i] = "the prompt has no text to look for"
        values = torch.full((len(batch),), torch.nan)
        raw = {name: torch.full((len(batch),), torch.nan) for name in _COLUMNS}
        pictures = to_uint8(images).flip(1).permute(0, 2, 3, 1).contiguous().cpu().numpy()
        todo = [i for i in range(len(batch)) if i not in problems]
        for i, found in zip(todo, self._read([pictures[i] for i in todo]), strict=True):
            if isinstance(found, str):
                problems[i] = found
                continue
            lines = [line for line in reading_order(found) if line.confidence >= self.min_confidence]
            text, wanted = self._fold("".join(line.text for line in lines)), targets[i]
            length = sum(map(len, wanted))
            surplus = max(0, len(text) - length) / length
            closeness = sum(edit_reward(text, target) for target in wanted) / len(wanted)
            values[i] = max(0.0, closeness - self.extra_penalty * surplus)
            raw["ocr_exact"][i] = float(all(target in text for target in wanted))
            raw["ocr_surplus"][i] = surplus
            if lines:
                raw["ocr_confidence"][i] = sum(line.confidence for line in lines) / len(lines)
        valid = torch.tensor([i not in problems for i in range(len(batch))])
        return Scores(values, valid, raw, problems)

    def _read(self, pictures: list[NDArray[np.uint8]]) -> list[Sequence[Line] | str]:
        """The lines of each picture, or why there are none; worker k takes every picture k + n ``workers``, so the order is kept."""
        found: list[Sequence[Line] | str] = [""] * len(pictures)

        def work(worker: int) -> None:
            for i in range(worker, len(pictures), len(self._engines)):
                try:
                    found[i] = self._engines[worker](pictures[i])
                except Exception as error:  # noqa: BLE001 (whatever a foreign engine raises makes this one picture invalid)
                    found[i] = " ".join(f"the OCR engine failed with {type(error).__name__}: {error}".split())[:200]

        with ThreadPoolExecutor(len(self._engines)) as pool:
            list(pool.map(work, range(len(self._engines))))
        return found

    def _fold(self, text: str) -> str:
        if self.ignore_punctuation:
            text = "".join(letter for letter in unicodedata.normalize("NFKC", text) if letter.isalnum())
        return "".join(text.split()).lower()

    def _targets(self, prompt: Prompt) -> list[str]:
        return [folded for target in targets_of(prompt) if (folded := self._fold(target))]


def targets_of(prompt: Prompt) -> list[str]:
    """The texts that a picture should show: ``target_text`` of the metadata, a text or a list of them, or else all that stands in straight or curly quotes.

    Raises:
        UserError: ``target_text`` is something else.
    """
    given: Any = prompt.metadata.get("target_text")
    if given is None:
        return [straight or curly for straight, curly in _QUOTED.findall(prompt.text)]
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"reward ocr: target_text of the prompt '{prompt.text}' must be a text or a list of texts, not {given!r}")
    return list(texts)


def edit_reward(text: str, target: str) -> float:
    """1 - d / |target|, with d = 0 where the target stands in the text, else their Levenshtein distance, but at most |target|; see the module's text."""
    if target in text:
        return 1.0
    from rapidfuzz.distance import Levenshtein

    return 1 - min(Levenshtein.distance(text, target), len(target)) / len(target)


def reading_order(lines: Sequence[Line]) -> list[Line]:
    """Lines of text from top to bottom, and pieces of one line from left to right.

    A piece belongs to the line above when its centre is higher than that line's first piece reaches down.
    """
    rows: list[list[Line]] = []
    for line in sorted(lines, key=lambda line: (line.top + line.bottom, line.left)):
        if rows and (line.top + line.bottom) / 2 < rows[-1][0].bottom:
            rows[-1].append(line)
        else:
            rows.append([line])
    return [line for row in rows for line in sorted(row, key=lambda line: line.left)]


def rapid_engine(threads: int, detector_side: int) -> Engine:
    """RapidOCR with the models inside its package: text detector and recogniser, no angle classifier. Nothing is downloaded.

    It brings pictures whose shorter side is below ``detector_side`` to that size by itself before it looks for text.

    Raises:
        UserError: a package is missing, or has no models inside.
    """
    require("ocr", "onnxruntime", "ocr")
    rapidocr = require("ocr", "rapidocr", "ocr")
    folder = Path(str(rapidocr.__file__)).parent / "models"
    models: dict[str, str] = {}
    for part in ("det", "rec"):
        found = sorted(folder.glob(f"*_{part}[_.]*onnx"))
        if len(found) != 1:
            raise UserError(f"reward ocr: rapidocr has {len(found)} models of the kind {part} in {folder}, where 1 is expected; install rapidocr again")
        models[f"{part.capitalize()}.model_path"] = str(found[0])  # a path that is given is never downloaded
    options = {
        "Global.use_cls": False,
        "Global.text_score": 0.0,
        "Global.log_level": "error",
        "Det.limit_side_len": detector_side,
        "EngineConfig.onnxruntime.intra_op_num_threads": threads,
        "EngineConfig.onnxruntime.inter_op_num_threads": 1,
    }
    read = rapidocr.RapidOCR(params=models | options)  # the log level: a picture without text is no reason for a warning
    blank = np.full((32, 32, 3), 255, dtype=np.uint8)
    try:
        read(blank, use_det=False)  # what it loads late, a missing or damaged model is found out now
        read(blank, use_det=True)
    except Exception as error:
        raise UserError(f"reward ocr: rapidocr could not start its models in {folder} ({type(error).__name__}: {error})") from error

    def engine(picture: NDArray[np.uint8]) -> list[Line]:
        output = read(picture)
        if output.boxes is None or output.txts is None:
            return []
        corners = [np.asarray(box) for box in output.boxes]
        return [Line(text, float(score), *map(float, (*box.min(0), *box.max(0)))) for text, score, box in zip(output.txts, output.scores, corners, strict=True)]

    return engine
