"""Questions with pictures to a model behind an OpenAI-compatible endpoint (``POST /v1/chat/completions``), for rewards and judges.

Pictures travel as PNG, without loss: JPEG would change what the model sees. A question is sent once, whatever the number of samples that ask it, and its reply
can be kept on disk.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import difflib
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from flowrl.types import UserError
from rewards.disk_cache import DiskCache
from rewards.http_client import Endpoints, Refused, Request, Unreachable
from rewards.replies import quote

if TYPE_CHECKING:
    import httpx

__all__ = ["Answer", "Chat", "ChatSettings", "Question", "is_number", "png"]

_TOP = 20  # alternatives of the first token, the most that the protocol allows
_NO_LIST = (404, 405, 501)  # of an endpoint that serves a model, but not the list of its models
_WRONG_TOKEN, _NOT_THERE = (401, 403), (404,)


@dataclass(frozen=True, slots=True)
class ChatSettings:
    """Where the model is and how it is asked.

    Attributes:
        url: address of the endpoint, such as http://host:8000, with or without /v1. urls: of several that serve the same model, instead.
        model: its name there.
        token_env: the environment variable with the bearer token, if one is needed.
        temperature, seed: of its sampling. max_tokens: of a reply.
        cache: folder where replies are kept by the hash of the whole question, model name included; None = nowhere.
        transcript: file to which every judgement is appended as a line of JSON; None = none.
        timeout, deadline, tries, concurrency: see rewards/http_client.py; concurrency is per endpoint.
    """

    url: str | None = None
    urls: Sequence[str] = ()
    model: str = ""
    token_env: str | None = None
    temperature: float = 0.0
    seed: int = 0
    max_tokens: int = 512
    cache: str | Path | None = None
    transcript: str | Path | None = None
    timeout: float = 60.0
    deadline: float = 180.0
    tries: int = 4
    concurrency: int = 32

    @classmethod
    def of(cls, owner: str, options: Mapping[str, Any]) -> ChatSettings:
        """From a config's arguments.

        Raises:
            UserError: a name or a value that does not fit.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        for name in options:
            if name not in names:
                near = difflib.get_close_matches(name, names, 1)
                raise UserError(f"reward {owner}: unknown argument {name!r}{f', did you mean {near[0]}' if near else ''}; there are also {', '.join(names)}")
        made = cls(**options)
        if made.url is not None and made.urls:
            raise UserError(f"reward {owner}: both url and urls are given; give one of them")
        if isinstance(made.urls, str):
            raise UserError(f"reward {owner}: urls must be a list; use url for one address")
        if not is_number(made.temperature) or made.temperature < 0:
            raise UserError(f"reward {owner}: temperature must be a number of at least 0, not {made.temperature!r}")
        for name in ("max_tokens", "seed"):
            value = getattr(made, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < (name == "max_tokens"):
                raise UserError(f"reward {owner}: {name} must be a whole number of at least {int(name == 'max_tokens')}, not {value!r}")
        return made


@dataclass(frozen=True, slots=True)
class Question:
    """A text and the PNG files that stand before it."""

    text: str
    pictures: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class Answer:
    """A reply, whole. first_tokens: the likeliest tokens in its first place with their natural log-probabilities; empty if they were not asked for."""

    text: str
    first_tokens: tuple[tuple[str, float], ...] = ()


class Chat:
    """A model that answers questions.

    Args:
        owner: name of the reward, for messages.
        settings: where and how.
        first_token: ask for one token and the log-probabilities of its alternatives, instead of a text.
    Raises:
        UserError: no endpoint or model is given, none answers, the token is wrong, the model is not served there, or a file cannot be written.
    """

    def __init__(self, owner: str, settings: ChatSettings, first_token: bool = False) -> None:
        self._owner, self._settings, self._first_token = owner, settings, first_token
        urls = [settings.url] if settings.url is not None else list(settings.urls)
        if not urls or not settings.model:
            lacking = "the address of its endpoint as url" if not urls else "the name of its model as model"
            raise UserError(f"reward {owner}: needs {lacking}; start a server, such as `vllm serve MODEL`, and give both")
        self._cache = None if settings.cache is None else DiskCache(Path(settings.cache))
        self._endpoints = Endpoints(
            owner,
            [url.rstrip("/").removesuffix("/v1") if isinstance(url, str) else url for url in urls],
            token_env=settings.token_env,
            timeout=settings.timeout,
            deadline=settings.deadline,
            tries=settings.tries,
            concurrency=settings.concurrency,
        )
        try:
            self._check_model()
            self.note([])
        except BaseException:
            self._endpoints.close()
            raise

    def ask(self, questions: Sequence[Question]) -> list[Answer | str]:
        """Answers in the order of the questions; in place of one that did not come, or is not whole, a str that says why.

        Raises:
            UserError: the endpoint refuses the token, or no longer has the model.
        """
        bodies = [self._body(question) for question in questions]
        keys = [DiskCache.key("chat", body) for body in bodies]
        found: dict[str, Answer | str] = {}
        for key in keys:
            kept = self._cache.get(key) if self._cache is not None and key not in found else None
            if kept is not None:
                with contextlib.suppress(ValueError):
                    found[key] = self._answer(kept)
        new = {key: body for key, body in zip(keys, bodies, strict=True) if key not in found}
        replies = self._endpoints.post_many([Request("/v1/chat/completions", body, {"content-type": "application/json"}) for body in new.values()])
        for key, reply in zip(new, replies, strict=True):
            found[key] = self._read(key, reply)
        return [found[key] for key in keys]

    def note(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Append lines to the transcript, if there is one.

        Raises:
            UserError: the file cannot be written.
        """
        if self._settings.transcript is None:
            return
        path = Path(self._settings.transcript).expanduser()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(line) + "\n" for line in lines))
        except OSError as error:
            raise UserError(f"reward {self._owner}: the transcript {path} cannot be written ({error.strerror}); choose another file") from error

    def close(self) -> None:
        """Give back connections and threads."""
        self._endpoints.close()

    def _check_model(self) -> None:
        owner, model, where = self._owner, self._settings.model, " or ".join(self._endpoints.urls)
        try:
            served = json.loads(self._endpoints.get("/v1/models").content)["data"]
            names = [str(entry["id"]) for entry in served]
        except Unreachable as error:
            raise UserError(f"reward {owner}: no endpoint answers at {where}: {error}; start the server, or correct the address") from error
        except Refused as error:
            if error.status in _NO_LIST:
                return
            raise self._refusal(error) from error
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"reward {owner}: what answers at {where}/v1/models is no OpenAI-compatible endpoint; correct the address") from error
        if names and model not in names:
            raise UserError(f"reward {owner}: the model {model} is not served at {where}; there are {', '.join(names[:10])}")

    def _refusal(self, error: Refused) -> UserError:
        if error.status in _WRONG_TOKEN:
            variable = self._settings.token_env
            held = f"the token in {variable}" if variable else "a request without a token; name the variable that holds one as token_env"
            return UserError(f"reward {self._owner}: the endpoint refuses {held} ({error})")
        return UserError(f"reward {self._owner}: the endpoint does not answer as one with the model {self._settings.model} would ({error})")

    def _body(self, question: Question) -> bytes:
        content: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(picture).decode()}"}} for picture in question.pictures
        ]
        settings = self._settings
        body: dict[str, Any] = {
            "model": settings.model,
            "messages": [{"role": "user", "content": [*content, {"type": "text", "text": question.text}]}],
            "temperature": settings.temperature,
            "seed": settings.seed,
            "max_tokens": 1 if self._first_token else settings.max_tokens,
        }
        if self._first_token:
            body |= {"logprobs": True, "top_logprobs": _TOP}
        return json.dumps(body).encode()

    def _read(self, key: str, reply: httpx.Response | Refused | Unreachable) -> Answer | str:
        if isinstance(reply, Refused) and reply.status in (*_WRONG_TOKEN, *_NOT_THERE):
            raise self._refusal(reply) from reply
        if isinstance(reply, Exception):
            return str(reply)
        try:
            kept = _choice(reply.content)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
            return f"the endpoint's reply is no chat completion: {quote(reply.text)}"
        try:
            answer = self._answer(kept)
        except ValueError as error:
            return str(error)
        if self._cache is not None:
            self._cache.put(key, kept)
        return answer

    def _answer(self, choice: Mapping[str, Any]) -> Answer:
        """What `_choice` gave. Raises ValueError where it cannot be judged; the message says why."""
        text, finish = choice["text"], choice["finish"]
        if choice["refusal"] or finish == "content_filter":
            raise ValueError(f"the model refused: {quote(choice['refusal'] or text)}")
        if self._first_token:
            if not choice["first_tokens"]:
                raise ValueError("the endpoint gave no log-probabilities; use the mode score, or a server that gives them")
            if any(math.isnan(value) or value > 1e-3 for _, value in choice["first_tokens"]):
                raise ValueError("the endpoint's log-probabilities are none")
            return Answer(text, tuple((token, value) for token, value in choice["first_tokens"]))
        if finish == "length":
            raise ValueError(f"the reply was cut off after {self._settings.max_tokens} tokens: {quote(text)}")
        return Answer(text)


def _choice(content: bytes) -> dict[str, Any]:
    """What matters of a chat completion: text, refusal, finish, first_tokens, a list of [token, log-probability] or None. Raises where it is none."""
    choice = json.loads(content)["choices"][0]
    message, logprobs = choice["message"], choice.get("logprobs")
    top = [[str(entry["token"]), float(entry["logprob"])] for entry in logprobs["content"][0]["top_logprobs"]] if logprobs and logprobs.get("content") else None
    text, refusal = message.get("content") or "", message.get("refusal") or ""
    if not isinstance(text, str) or not isinstance(refusal, str):
        raise TypeError("a text is none")
    return {"text": text, "refusal": refusal, "finish": choice.get("finish_reason"), "first_tokens": top}


def png(picture: Image.Image, size: int | tuple[int, int] | None) -> bytes:
    """A picture as a PNG file, resized by Pillow's bicubic filter. size: of the longer side, if it is longer; or width and height; None = as it is."""
    if isinstance(size, tuple):
        picture = picture.resize(size, Image.Resampling.BICUBIC)
    elif size is not None and max(picture.size) > size:
        scale = size / max(picture.size)
        picture = picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=1)
    return file.getvalue()


def is_number(value: object) -> bool:
    """Whether a config's value is a finite number, which True is not."""
    return not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value)
