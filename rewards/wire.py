"""What travels between a remote reward and its server: batches as typed bytes, scores as JSON. Nothing is ever unpickled.

A request is one message of the content type `BATCH_TYPE`:

    bytes 0-5    b"flowrl"
    bytes 6-7    version of this form, uint16: 1
    bytes 8-11   length L of the header, uint32
    L bytes      the header, a JSON object in UTF-8, filled up with spaces so that the pixels begin at a multiple of 64
    the rest     the pixels of the pictures, little-endian, NCHW, nothing before and nothing after them

    header = {"api": 1, "request_id": str, "prompts": [{"text": str, "metadata": object}], "texts": [str] or null, "group": [int64] or null,
              "images": {"dtype": "uint8" or "float32", "shape": [B, 3, H, W]} or null}

Pictures on the 8-bit grid (each pixel is k / 255 in float32, as in training) travel as uint8 and come out bit for bit; others travel as float32.
For people with curl the same header is accepted as plain JSON, with base64 of PNG or lossless WebP files as "images" and plain strings as prompts.

A reply is JSON: values, valid and raw columns, one number per sample. A float32 is written as the shortest decimal of the same float64, so it comes back
exactly; null stands for NaN, and in raw columns "inf" and "-inf" for themselves.

Letters: B samples.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import io
import json
import math
import struct
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flowrl.types import Prompt, RewardInfo, SampleBatch, Scores, UserError

__all__ = [
    "API",
    "BATCH_TYPE",
    "JSON_TYPE",
    "WireError",
    "decode_prompts",
    "decode_request",
    "decode_scores",
    "encode_prompts",
    "encode_request",
    "info_from",
    "pack_pictures",
    "plain_info",
    "plain_scores",
    "read_json",
    "scores_from",
]

API = 1
BATCH_TYPE = "application/x-flowrl-batch"
JSON_TYPE = "application/json"

_MAGIC = b"flowrl"
_PREFIX = struct.Struct("<6sHI")
_ALIGN = 64  # bytes
_LEVELS = np.float32(255)
_CHUNK = 2**16  # pixels' values that are checked at a time, so that they stay in the processor's cache
_MAX_ID = 128  # characters
_MAX_DEPTH = 16  # of lists and objects inside each other in a header
_KEYS = frozenset({"api", "request_id", "prompts", "texts", "group", "images"})
_DTYPES = {"uint8": (torch.uint8, 1), "float32": (torch.float32, 4)}
_INFINITE = {"inf": math.inf, "-inf": -math.inf}


class WireError(Exception):
    """A message that is not in the agreed form.

    Attributes:
        status: of the HTTP answer: 400 = malformed, 413 = too large, 415 = another content type.
    """

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


def encode_request(batch: SampleBatch, request_id: str) -> bytes:
    """A batch in the binary form.

    Args:
        batch: B >= 1 samples; images [B, 3, H, W] in any floating point, or none.
    Raises:
        UserError: metadata that JSON does not know, or images of another shape or kind.
    """
    pixels, images = memoryview(b""), None
    if batch.images is not None:
        packed = pack_pictures(batch.images)
        pixels, images = _raw_bytes(packed), {"dtype": str(packed.dtype).removeprefix("torch."), "shape": list(packed.shape)}
    head = {
        "api": API,
        "request_id": request_id,
        "prompts": _plain_prompts(batch.prompts),
        "texts": None if batch.texts is None else list(batch.texts),
        "group": None if batch.group is None else batch.group.tolist(),
        "images": images,
    }
    header = _json_of(head, batch.prompts)
    header += b" " * (-(_PREFIX.size + len(header)) % _ALIGN)
    return b"".join((_PREFIX.pack(_MAGIC, API, len(header)), header, pixels))


def decode_request(body: bytearray, content_type: str, max_bytes: int) -> tuple[str, SampleBatch]:
    """The request id ("" where the message has none) and the batch of a message in either form; the images are float32 in [0, 1] where they were uint8.

    Args:
        body: is not copied: float32 pictures go on living in it.
        max_bytes: that the pictures of a JSON message may take as uint8, once they are decoded.
    Raises:
        WireError: anything that is not exactly in the agreed form.
    """
    kind = content_type.partition(";")[0].strip().lower()
    if kind == BATCH_TYPE:
        header, start = _binary_header(body)
        images = _raw_pictures(header.get("images"), body, start)
    elif kind == JSON_TYPE:
        header = read_json(body)
        images = _coded_pictures(header.get("images"), max_bytes)
    else:
        raise WireError(f"the content type is {kind or 'not given'}; send {BATCH_TYPE} or {JSON_TYPE}", 415)
    _check_api(header, _KEYS)
    request_id = header.get("request_id", "")
    if not isinstance(request_id, str) or len(request_id) > _MAX_ID or not request_id.isascii():
        raise WireError(f"request_id must be ASCII text of at most {_MAX_ID} characters")
    prompts = _prompts(header.get("prompts"))
    texts, group = header.get("texts"), header.get("group")
    if texts is not None and not (isinstance(texts, list) and all(isinstance(text, str) for text in texts)):
        raise WireError("texts must be null or a list of strings")
    if group is not None and not (isinstance(group, list) and all(type(number) is int and -(2**63) <= number < 2**63 for number in group)):
        raise WireError("group must be null or a list of 64-bit whole numbers")
    for name, part in (("texts", texts), ("group", group), ("images", images)):
        if part is not None and len(part) != len(prompts):
            raise WireError(f"{name} has {len(part)} entries for {len(prompts)} prompts")
    return request_id, SampleBatch(prompts, images, texts, None if group is None else torch.tensor(group, dtype=torch.int64))


def encode_prompts(prompts: Sequence[Prompt]) -> bytes:
    """Prompts alone, to be checked before any work starts; raises UserError as `encode_request`."""
    return _json_of({"api": API, "prompts": _plain_prompts(prompts)}, prompts)


def decode_prompts(body: bytes | bytearray) -> list[Prompt]:
    """What `encode_prompts` gave; raises WireError."""
    header = read_json(body)
    _check_api(header, frozenset({"api", "prompts"}))
    return _prompts(header.get("prompts"))


def plain_scores(scores: Scores) -> dict[str, Any]:
    """Scores as an object that JSON knows: {"values", "valid", "raw", "problems"}. Raw columns become float32."""
    return {
        "values": _numbers(scores.values),
        "valid": scores.valid.tolist(),
        "raw": {name: _numbers(column) for name, column in scores.raw.items()},
        "problems": {str(index): str(reason) for index, reason in scores.problems.items()},
    }


def scores_from(plain: object, size: int) -> Scores:
    """What `plain_scores` gave, for B = ``size`` samples.

    Raises:
        WireError: a column of another length, a number that is none, a valid sample without a value.
    """
    if not isinstance(plain, dict) or not isinstance(plain.get("raw"), dict) or not isinstance(plain.get("problems"), dict):
        raise WireError("the scores are no object with values, valid, raw and problems")
    valid = plain.get("valid")
    if not isinstance(valid, list) or len(valid) != size or not all(isinstance(flag, bool) for flag in valid):
        raise WireError(f"valid must be a list of {size} booleans")
    values = _column("values", plain.get("values"), size)
    flags = torch.tensor(valid, dtype=torch.bool)
    if not torch.equal(values.isfinite(), flags):
        raise WireError("values must be numbers where valid is true, and null elsewhere")
    raw = {name: _column(f"raw {name}", column, size) for name, column in plain["raw"].items()}
    places = {str(index): index for index in range(size) if not valid[index]}
    if not all(index in places and isinstance(reason, str) for index, reason in plain["problems"].items()):
        raise WireError("problems must map indices of samples that are not valid to texts")
    return Scores(values, flags, raw, {places[index]: reason for index, reason in plain["problems"].items()})


def decode_scores(body: bytes, request_id: str, size: int) -> tuple[dict[str, Any], Scores]:
    """The head and the scores of a reply to the request ``request_id`` of B = ``size`` samples; raises WireError."""
    reply = read_json(body)
    if reply.get("request_id") != request_id:
        raise WireError(f"the reply is to the request {reply.get('request_id')!r}, not to {request_id!r}")
    return reply, scores_from(reply, size)


def plain_info(info: RewardInfo) -> dict[str, Any]:
    """Facts about a reward as an object that JSON knows; a bound that is infinite is null."""
    bounds = {name: bound if math.isfinite(bound) else None for name, bound in (("low", info.low), ("high", info.high))}
    return {**dataclasses.asdict(info), **bounds}


def info_from(plain: object) -> RewardInfo:
    """What `plain_info` gave. Facts that this version does not know are left out, those that are missing have their defaults.

    Raises:
        WireError: a fact of another type.
    """
    if not isinstance(plain, dict):
        raise WireError("the facts about the reward are no object")
    known = RewardInfo("", "", -math.inf, math.inf)
    facts: dict[str, Any] = {}
    for field in dataclasses.fields(RewardInfo):
        default, value = getattr(known, field.name), plain.get(field.name)
        if value is None:
            continue
        if isinstance(default, tuple):
            good = isinstance(value, list) and all(isinstance(entry, str) for entry in value)
            value = tuple(value) if good else value
        else:
            good = type(value) is type(default) or (isinstance(default, float) and type(value) is int)
        if not good:
            raise WireError(f"the fact {field.name} about the reward is {type(value).__name__}")
        facts[field.name] = value
    if facts.get("batch_size", 1) < 1 or facts.get("scope", "sample") not in ("sample", "pair", "group"):
        raise WireError("the facts about the reward have a scope or a batch size that is none")
    return dataclasses.replace(known, **facts)


def read_json(body: bytes | bytearray) -> dict[str, Any]:
    """A JSON object in UTF-8: no NaN or infinity, no lone surrogates, at most 16 levels.

    Raises:
        WireError: it is none.
    """
    try:
        found = json.loads(body.decode(), parse_constant=_no_constant, parse_float=_finite)
    except UnicodeDecodeError as error:
        raise WireError("the JSON is not UTF-8") from error
    except ValueError as error:
        raise WireError(f"the JSON cannot be read ({' '.join(str(error).split())[:200]})") from error
    except RecursionError as error:
        raise WireError(f"the JSON has more than {_MAX_DEPTH} levels") from error
    if not isinstance(found, dict):
        raise WireError("the JSON is no object")
    _check_plain(found, 0)
    return found


def pack_pictures(images: Tensor) -> Tensor:
    """Pictures [B, 3, H, W] in floating point as contiguous uint8 on the CPU where every pixel is k / 255 in float32 to the bit, else as float32.

    Raises:
        UserError: another shape or dtype.
    """
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point() or 0 in images.shape:
        raise UserError(f"reward remote: needs pictures [B, 3, H, W] float in [0, 1], got {list(images.shape)} {images.dtype}; choose another reward")
    plain = images.detach().to("cpu", torch.float32).contiguous()
    levels = np.empty(plain.shape, np.uint8)
    given, found, scratch = plain.numpy().reshape(-1), levels.reshape(-1), np.empty(_CHUNK, np.float32)
    with np.errstate(invalid="ignore", over="ignore"):  # what is not in 0 to 255 becomes some level, which the comparison finds to be another
        for start in range(0, given.size, _CHUNK):
            values, level = given[start : start + _CHUNK], found[start : start + _CHUNK]
            scaled = scratch[: values.size]
            np.rint(np.multiply(values, _LEVELS, out=scaled), out=scaled)
            np.copyto(level, scaled, casting="unsafe")
            np.divide(level, _LEVELS, out=scaled)
            if not np.array_equal(scaled.view(np.int32), values.view(np.int32)):
                return plain
    return torch.from_numpy(levels)


def _raw_bytes(images: Tensor) -> memoryview:
    array = images.numpy()
    return (array if sys.byteorder == "little" else array.byteswap()).data.cast("B")


def _plain_prompts(prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
    return [{"text": prompt.text, "metadata": dict(prompt.metadata)} for prompt in prompts]


def _json_of(message: Mapping[str, Any], prompts: Sequence[Prompt]) -> bytes:
    try:
        return _json_bytes(message)
    except (TypeError, ValueError, RecursionError) as error:
        for prompt in prompts:
            try:
                _json_bytes(_plain_prompts([prompt]))
            except (TypeError, ValueError, RecursionError) as reason:
                raise UserError(f"reward remote: the prompt {prompt.text!r} or its metadata cannot be sent as JSON ({reason}); use plain values") from reason
        raise UserError(f"reward remote: the texts cannot be sent as JSON ({error})") from error


def _json_bytes(value: object) -> bytes:
    return json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":")).encode()


def _binary_header(body: bytearray) -> tuple[dict[str, Any], int]:
    if len(body) < _PREFIX.size:
        raise WireError(f"the body has {len(body)} bytes, too few for a batch")
    magic, version, length = _PREFIX.unpack_from(body)
    if magic != _MAGIC:
        raise WireError("the body does not begin as a batch does; pickles and other formats are not read")
    if version != API:
        raise WireError(f"the batch has version {version}, this server reads {API}")
    start = _PREFIX.size + length
    if start > len(body):
        raise WireError(f"the header should have {length} bytes, but only {len(body) - _PREFIX.size} follow: the body is truncated")
    return read_json(body[_PREFIX.size : start]), start


def _raw_pictures(about: object, body: bytearray, start: int) -> Tensor | None:
    found = len(body) - start
    if about is None:
        if found:
            raise WireError(f"{found} bytes follow the header of a batch without images")
        return None
    shape = about.get("shape") if isinstance(about, dict) and about.keys() == {"dtype", "shape"} else None
    if not isinstance(shape, list) or len(shape) != 4 or not all(type(side) is int and 0 < side < 2**31 for side in shape) or shape[1] != 3:
        raise WireError('images must be null or {"dtype": ..., "shape": [B, 3, H, W]}')
    name = about["dtype"] if isinstance(about, dict) else None
    if not isinstance(name, str) or name not in _DTYPES:
        raise WireError(f"images have the dtype {str(name)[:40]!r}; send {' or '.join(_DTYPES)}")
    dtype, width = _DTYPES[name]
    wanted = math.prod(shape) * width
    if found != wanted:
        raise WireError(f"images of {shape} {name} have {wanted} bytes, but {found} follow the header")
    array = np.frombuffer(body, np.dtype(name).newbyteorder("<"), offset=start)
    if dtype is torch.uint8:
        return torch.from_numpy(np.divide(array, _LEVELS)).view(shape)
    array = array if sys.byteorder == "little" and array.flags.aligned else array.astype(np.float32)  # a header that was not filled up
    return torch.from_numpy(array).view(shape)


def _coded_pictures(coded: object, max_bytes: int) -> Tensor | None:
    if coded is None:
        return None
    if not isinstance(coded, list) or not coded or not all(isinstance(file, str) for file in coded):
        raise WireError("images must be null or a list of base64 texts, each a PNG or lossless WebP file")
    pictures: list[np.ndarray[Any, np.dtype[np.uint8]]] = []
    left = max_bytes
    for place, text in enumerate(coded):
        picture = _picture(text, place, left)
        left -= picture.size
        if pictures and picture.shape != pictures[0].shape:
            raise WireError(f"picture {place} has the size {_size(picture)}, the first {_size(pictures[0])}; send pictures of one size together")
        pictures.append(picture)
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous().to(torch.float32).div_(255)


def _picture(text: str, place: int, max_bytes: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    try:
        file = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise WireError(f"picture {place} is no base64") from error
    if file[8:12] == b"WEBP" and file[12:16] != b"VP8L":
        raise WireError(f"picture {place} is no plain lossless WebP; save it losslessly, or as PNG")
    try:
        with Image.open(io.BytesIO(file), formats=("PNG", "WEBP")) as picture:
            width, height = picture.size
            if 3 * width * height > max_bytes:
                raise WireError(f"picture {place} of {width} x {height} pixels would take more memory than a request may; send fewer or smaller pictures", 413)
            if picture.mode != "RGB" or getattr(picture, "n_frames", 1) != 1:
                raise WireError(f"picture {place} has the mode {picture.mode} or several frames; send one 8-bit RGB picture")
            return np.array(picture)
    except WireError:
        raise
    except Image.DecompressionBombError as error:
        raise WireError(f"picture {place} has more pixels than any picture may have", 413) from error
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error, zlib.error and others for damaged files
        raise WireError(f"picture {place} is no whole PNG or WebP file") from error


def _size(picture: np.ndarray[Any, Any]) -> str:
    return f"{picture.shape[1]} x {picture.shape[0]}"


def _prompts(found: object) -> list[Prompt]:
    if not isinstance(found, list) or not found:
        raise WireError("prompts must be a list with at least one entry")
    prompts = []
    for place, entry in enumerate(found):
        plain = {"text": entry} if isinstance(entry, str) else entry
        if not isinstance(plain, dict) or plain.keys() - {"text", "metadata"} or not isinstance(plain.get("text"), str):
            raise WireError(f'prompt {place} must be a string or {{"text": string, "metadata": object}}')
        metadata = plain.get("metadata", {})
        if not isinstance(metadata, dict):
            raise WireError(f"the metadata of prompt {place} must be an object")
        prompts.append(Prompt(plain["text"], metadata))
    return prompts


def _check_api(header: Mapping[str, Any], keys: frozenset[str]) -> None:
    if type(header.get("api")) is not int or header["api"] != API:
        raise WireError(f'the message must say "api": {API}')
    if unknown := sorted(header.keys() - keys):
        raise WireError(f"the message has the unknown key {unknown[0][:80]!r}; known are {', '.join(sorted(keys))}")


def _check_plain(value: object, depth: int) -> None:
    """Texts that UTF-8 knows, and not too many levels."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise WireError("the JSON holds half of a surrogate pair") from error
    elif isinstance(value, dict | list):
        if depth == _MAX_DEPTH:
            raise WireError(f"the JSON has more than {_MAX_DEPTH} levels")
        for child in value:
            _check_plain(child, depth + 1)
        if isinstance(value, dict):
            for child in value.values():
                _check_plain(child, depth + 1)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:40]} is too large for a number")
    return number


def _numbers(column: Tensor) -> list[float | str | None]:
    numbers = column.detach().to("cpu", torch.float32).tolist()
    return [number if math.isfinite(number) else None if math.isnan(number) else str(number) for number in numbers]


def _column(name: str, found: object, size: int) -> Tensor:
    if not isinstance(found, list) or len(found) != size:
        raise WireError(f"{name} must be a list of {size} numbers")
    numbers = [math.nan if number is None else _INFINITE.get(number, number) if isinstance(number, str) else number for number in found]
    if not all(type(number) in (int, float) for number in numbers):
        raise WireError(f"{name} holds something that is no number")
    try:
        return torch.tensor(numbers, dtype=torch.float32)
    except (OverflowError, RuntimeError) as error:  # an integer beyond any float
        raise WireError(f"{name} holds a number that is too large") from error
