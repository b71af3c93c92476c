"""A reward that another process or machine scores: the client of ``flowrl serve-reward`` (rewards/server.py), and a reward like any other.

A batch is cut into requests of at most ``samples_per_request`` samples, sent side by side to the endpoints, and put together in the order of the batch. Every
reply is checked: its request id, its lengths, and the name and the version of the reward that answered. Groups are never cut.
A sample whose request got no answer in time is not valid, with the reason; where no sample of a call got one, it is an error.
Values are those of the reward itself, bit for bit, where it gives the same bits for every batch size. Others see the batches of a run on one machine when
``samples_per_request`` is at least what the run scores at once, and the server does not merge (``--max-batch 1``).

Letters: B samples.
"""

from __future__ import annotations

import dataclasses
import json
import math
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowrl.types import Prompt, RewardInfo, SampleBatch, Scores, UserError
from rewards.disk_cache import DiskCache
from rewards.groups import groups_of
from rewards.http_client import Endpoints, Refused, Unreachable
from rewards.network import check_count
from rewards.wire import (
    BATCH_TYPE,
    JSON_TYPE,
    WireError,
    decode_scores,
    encode_prompts,
    encode_request,
    info_from,
    pack_pictures,
    plain_scores,
    read_json,
    scores_from,
)

__all__ = ["RemoteReward"]

_PROMPTS_PER_CHECK = 1000


_BODY_FOR_PIXELS = 0.9  # the rest is for prompts and metadata


_SAMPLES, _BYTES = 64, 6 * 2**20  # of a request, where nothing is said
_NO_URL = "reward remote: needs either `url`, such as http://127.0.0.1:8000, or a list of them as `urls`"


class _Identity(NamedTuple):
    """Which reward answers."""

    name: str
    version: str
    weights: str


class _Served(NamedTuple):
    """What an endpoint says of itself."""

    identity: _Identity
    info: RewardInfo
    max_body: int | None


class RemoteReward:
    """A reward behind one or several endpoints, which all serve the same.

    Args:
        url: of the endpoint, ``http://host:port``; only a listing needs none.
        urls: of several, in place of ``url``; a request goes to the one with the fewest outstanding.
        token_env: the environment variable that holds the bearer token; None = no token is sent.
        timeout: seconds that one try may take, scoring included. deadline: seconds for all tries of a request. tries: of a request.
        concurrency: requests to one endpoint at a time.
        samples_per_request: at most, fewer where the server takes less; None = 64, or as many as make 6 MiB, so that large pictures are coded, sent and scored
            side by side. A group goes in one request whatever its size.
        cache: a folder of scores by the hash of all that the reward looks at, its version and its weights; None = no cache.
        expect: the name of the reward that must answer, or ``name@version``; None = any.
    Raises:
        UserError: an argument that cannot be. What the endpoints are is found out by `load`.
    """

    def __init__(
        self,
        url: str | None = None,
        urls: Sequence[str] | None = None,
        token_env: str | None = None,
        timeout: float = 60.0,
        deadline: float = 180.0,
        tries: int = 4,
        concurrency: int = 8,
        samples_per_request: int | None = None,
        cache: str | None = None,
        expect: str | None = None,
    ) -> None:
        if (url is not None and urls is not None) or isinstance(urls, str):
            raise UserError(_NO_URL)
        for name, number in (("samples_per_request", 64 if samples_per_request is None else samples_per_request), ("concurrency", concurrency)):
            check_count("remote", name, number, 1)
        self._urls = [url] if url is not None else list(urls or ())
        self._options: dict[str, Any] = {"token_env": token_env, "timeout": timeout, "deadline": deadline, "tries": tries, "concurrency": concurrency}
        self._samples, self._expect, self._folder = samples_per_request, expect, cache
        self._endpoints: Endpoints | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._cache: DiskCache | None = None
        self._identity = _Identity("", "", "")
        self._max_body: int | None = None  # bytes
        self.info = RewardInfo(
            name="remote",
            description="a reward that another process or machine scores (flowrl serve-reward)",
            source="that of the served reward",
            low=-math.inf,
            high=math.inf,
            batch_size=(samples_per_request or _SAMPLES) * concurrency * max(1, len(self._urls)),
            reads=(),
            runs_on="network",
            extra="remote",
        )

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        """Ask every endpoint what it serves; ``info`` then has its scope, range and needs. Device and precision are the server's business.

        Raises:
            UserError: an endpoint does not answer, refuses the token or is none; they serve different rewards or versions, or not the expected one; the
                cache folder cannot be used.
        """
        del device, dtype
        if self._endpoints is not None:
            return
        if not self._urls:
            raise UserError(_NO_URL)
        found = [self._ask_info(url) for url in self._urls]
        for url, other in zip(self._urls, found, strict=True):
            if other.identity != found[0].identity:
                shown = f"{self._urls[0]} serves {_shown(found[0].identity)}, but {url} serves {_shown(other.identity)}"
                raise UserError(f"reward remote: {shown}; serve one reward everywhere")
        identity, info, _ = found[0]
        if self._expect is not None and self._expect not in (identity.name, f"{identity.name}@{identity.version}"):
            raise UserError(f"reward remote: {self._urls[0]} serves {identity.name}@{identity.version}, but `expect` is {self._expect}")
        self._cache = None if self._folder is None else DiskCache(Path(self._folder))
        endpoints = Endpoints("remote", self._urls, **self._options)
        self._identity = identity
        self._max_body = min((served.max_body for served in found if served.max_body is not None), default=None)
        self.info = dataclasses.replace(
            info,
            name="remote",
            description=f"{identity.name} {identity.version} at {', '.join(self._urls)}: {info.description}",
            batch_size=self.info.batch_size,
            differentiable=False,
            runs_on="network",
            extra="remote",
        )
        self._pool = ThreadPoolExecutor(self._options["concurrency"] * len(self._urls), thread_name_prefix="reward-remote")
        self._endpoints = endpoints

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Let the server say whether it could score these prompts, before any work starts.

        Raises:
            UserError: as `load`; or a prompt that the reward could never score, in the server's words.
        """
        self.load(torch.device("cpu"), torch.float32)
        assert self._endpoints is not None
        for start in range(0, len(prompts), _PROMPTS_PER_CHECK):
            body = encode_prompts(prompts[start : start + _PROMPTS_PER_CHECK])
            try:
                self._endpoints.post("/v1/check", content=body, headers={"Content-Type": JSON_TYPE})
            except (Refused, Unreachable) as error:
                raise self._named(error) from error

    def score(self, batch: SampleBatch) -> Scores:
        """Scores [B] of a batch in its order.

        Returns:
            as the served reward, with raw columns in float32. A sample whose request got no answer is not valid; ``problems`` has the reason.
        Raises:
            UserError: no request got an answer; a server refused one, or its reply is none; the reward or its version is no longer that of `load`;
                the samples cannot be sent.
            ValueError: B = 0.
            RuntimeError: ``load`` was not called.
        """
        if self._endpoints is None or self._pool is None:
            raise RuntimeError("reward remote: load must be called before score")
        if len(batch) == 0:
            raise ValueError("reward remote: cannot score an empty batch")
        units = [[i] for i in range(len(batch))] if self.info.scope == "sample" else [group.tolist() for group in groups_of(batch)]
        keys = ["" for _ in units] if self._cache is None else [self._key(_select(batch, unit)) for unit in units]
        joined = _Joined(len(batch))
        missing = []
        for unit, key in zip(units, keys, strict=True):
            known = self._recall(key, len(unit))
            if known is None:
                missing.append((unit, key))
            else:
                joined.put(unit, known)
        parts = self._parts(missing, self._per_request(batch))
        places = [[i for unit, _ in part for i in unit] for part in parts]
        answers = self._ask_all([_select(batch, place) for place in places])
        lost = [answer for answer in answers if isinstance(answer, Unreachable)]
        if lost and len(lost) == len(answers) and len(missing) == len(units):
            raise self._named(lost[0]) from lost[0]
        for part, place, answer in zip(parts, places, answers, strict=True):
            if isinstance(answer, Unreachable):
                joined.problems.update((i, str(answer)) for i in place)
                continue
            joined.put(place, answer)
            self._remember(part, answer)
        return joined.scores()

    def close(self) -> None:
        """Give back threads and connections; `load` makes new ones."""
        if self._endpoints is not None and self._pool is not None:
            self._endpoints.close()
            self._pool.shutdown(wait=False, cancel_futures=True)
        self._endpoints = self._pool = None

    def _per_request(self, batch: SampleBatch) -> int:
        """Samples that a request may have: as many as the user wants and the server takes, in pictures of 8 bits."""
        if batch.images is None:
            return self._samples or _SAMPLES
        bytes_each = max(1, batch.images[0].numel())
        wanted = self._samples or max(1, min(_SAMPLES, _BYTES // bytes_each))
        return wanted if self._max_body is None else max(1, min(wanted, int(_BODY_FOR_PIXELS * self._max_body) // bytes_each))

    def _parts(self, units: list[tuple[list[int], str]], at_most: int) -> list[list[tuple[list[int], str]]]:
        """The units of each request, in order: as many as fit, and at least one."""
        parts: list[list[tuple[list[int], str]]] = []
        room = 0
        for unit in units:
            if not parts or len(unit[0]) > room:
                parts.append([])
                room = at_most
            parts[-1].append(unit)
            room -= len(unit[0])
        return parts

    def _ask_all(self, batches: list[SampleBatch]) -> list[Scores | Unreachable]:
        assert self._pool is not None
        if len(batches) == 1:
            return [self._ask(batches[0])]
        futures = [self._pool.submit(self._ask, batch) for batch in batches]
        try:
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()

    def _ask(self, batch: SampleBatch) -> Scores | Unreachable:
        assert self._endpoints is not None
        request_id = uuid.uuid4().hex
        group = None if self.info.scope == "sample" else batch.group
        content = encode_request(SampleBatch(batch.prompts, batch.images, batch.texts, group), request_id)
        try:
            response = self._endpoints.post("/v1/score", content=content, headers={"Content-Type": BATCH_TYPE})
        except Unreachable as error:
            return error
        except Refused as error:
            raise self._named(error) from error
        try:
            reply, scores = decode_scores(response.content, request_id, len(batch))
        except WireError as error:
            raise UserError(
                f"reward remote: {response.request.url} gave a reply that cannot be used ({error}); serve with the same version of flowrl"
            ) from error
        answered = self._identity._replace(name=str(reply.get("reward")), version=str(reply.get("version")))
        if answered != self._identity:
            raise UserError(
                f"reward remote: {response.request.url} served {_shown(self._identity)} at the start and {_shown(answered)} now; scores of two versions "
                "must not be mixed, so serve the first one again"
            )
        return scores

    def _ask_info(self, url: str) -> _Served:
        endpoint = Endpoints("remote", [url], **self._options)
        try:
            answer = read_json(endpoint.get("/v1/info").content)
            info = info_from(answer.get("info"))
        except (Refused, Unreachable) as error:
            raise self._named(error) from error
        except WireError as error:
            raise UserError(f"reward remote: {url}/v1/info is not what a server of flowrl serve-reward answers ({error})") from error
        finally:
            endpoint.close()
        identity = _Identity(str(answer.get("reward")), str(answer.get("version")), str(answer.get("weights_sha256") or ""))
        limit = answer.get("max_body_bytes")
        return _Served(identity, info, limit if isinstance(limit, int) else None)

    def _named(self, error: Refused | Unreachable) -> UserError:
        if isinstance(error, Unreachable):
            return UserError(f"reward remote: no endpoint answered, {error}; start the server (flowrl serve-reward), or correct the address")
        try:
            text = str(json.loads(error.text)["message"])
        except (ValueError, KeyError, TypeError):
            text = error.text
        advice = {
            401: "; give the name of the variable with the right token as `token_env`",
            404: "; is that a server of flowrl serve-reward?",
            413: f"; lower `samples_per_request` ({self._samples or _SAMPLES}), or serve with a larger --max-body-mib",
        }.get(error.status, "")
        return UserError(f"reward remote: {error.url} refused the request with {error.status}: {text}{advice}")

    def _key(self, batch: SampleBatch) -> str:
        parts: list[bytes | str] = [*self._identity]
        for i, prompt in enumerate(batch.prompts):
            if batch.images is not None:
                packed = pack_pictures(batch.images[i : i + 1])
                parts += [packed.numpy().tobytes(), f"{packed.dtype} {list(packed.shape)}"]
            parts += [prompt.text, json.dumps(dict(prompt.metadata), sort_keys=True, default=repr), "" if batch.texts is None else batch.texts[i]]
        return DiskCache.key(*parts)

    def _recall(self, key: str, size: int) -> Scores | None:
        entry = None if self._cache is None else self._cache.get(key)
        if entry is None:
            return None
        try:
            return scores_from(entry, size)
        except WireError:
            return None

    def _remember(self, part: list[tuple[list[int], str]], scores: Scores) -> None:
        """Keep what is valid: what was not may be tomorrow."""
        start = 0
        for unit, key in part:
            stop = start + len(unit)
            if self._cache is not None and bool(scores.valid[start:stop].all()):
                raw = {name: column[start:stop] for name, column in scores.raw.items()}
                self._cache.put(key, plain_scores(Scores(scores.values[start:stop], scores.valid[start:stop], raw)))
            start = stop


class _Joined:
    """The scores of B samples, from parts that come in any order; what no part brings is not valid."""

    def __init__(self, size: int) -> None:
        self._values, self._valid = torch.full((size,), torch.nan), torch.zeros(size, dtype=torch.bool)
        self._raw: dict[str, Tensor] = {}
        self.problems: dict[int, str] = {}

    def put(self, place: Sequence[int], scores: Scores) -> None:
        index = torch.tensor(place)
        self._values[index], self._valid[index] = scores.values, scores.valid
        for name, column in scores.raw.items():
            self._raw.setdefault(name, torch.full_like(self._values, torch.nan))[index] = column
        self.problems.update((place[i], reason) for i, reason in scores.problems.items())

    def scores(self) -> Scores:
        return Scores(self._values, self._valid, self._raw, dict(sorted(self.problems.items())))


def _select(batch: SampleBatch, place: Sequence[int]) -> SampleBatch:
    """Some samples, in ascending or any order; no copy where they stand side by side."""
    adjacent = list(place) == list(range(place[0], place[0] + len(place)))
    index: slice | Tensor = slice(place[0], place[0] + len(place)) if adjacent else torch.tensor(place)
    return SampleBatch(
        [batch.prompts[i] for i in place],
        None if batch.images is None else batch.images[index],
        None if batch.texts is None else [batch.texts[i] for i in place],
        None if batch.group is None else batch.group[index],
    )


def _shown(identity: _Identity) -> str:
    return f"{identity.name} {identity.version}{f' with weights {identity.weights[:8]}' if identity.weights else ''}"
