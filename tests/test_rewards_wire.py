"""rewards/wire.py: bits that survive the journey, messages written by hand, and everything that must be refused."""

from __future__ import annotations

import base64
import io
import json
import math
import pickle
import struct
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from flowrl.types import Prompt, RewardInfo, SampleBatch, Scores, UserError
from rewards import wire
from rewards.wire import BATCH_TYPE, JSON_TYPE, WireError, decode_request, decode_scores, encode_request, plain_scores, scores_from

LIMIT = 2**20  # bytes


def grid(num: int = 3, height: int = 5, width: int = 7) -> Tensor:
    """[num, 3, height, width] float32, each pixel k / 255."""
    return torch.randint(0, 256, (num, 3, height, width), generator=torch.Generator().manual_seed(0)).float() / 255


def batch_of(images: Tensor | None, **parts: Any) -> SampleBatch:
    size = len(images) if images is not None else len(parts["texts"])
    return SampleBatch([Prompt(f"prompt {i}", {"index": i}) for i in range(size)], images, **parts)


def sent(batch: SampleBatch) -> SampleBatch:
    request_id, received = decode_request(bytearray(encode_request(batch, "id")), BATCH_TYPE, LIMIT)
    assert request_id == "id"
    return received


def message(header: object, pixels: bytes = b"", *, magic: bytes = b"flowrl", version: int = 1, length: int | None = None) -> bytearray:
    """The binary form, put together here from its description."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return bytearray(magic + struct.pack("<H", version) + struct.pack("<I", len(text) if length is None else length) + text + pixels)


def head(**changes: Any) -> dict[str, Any]:
    return {"api": 1, "request_id": "", "prompts": ["a"], "texts": None, "group": None, "images": None, **changes}


def file_of(picture: Image.Image, form: str = "PNG", **options: Any) -> str:
    file = io.BytesIO()
    picture.save(file, form, **options)
    return base64.b64encode(file.getvalue()).decode()


def same_bits(a: Tensor | None, b: Tensor | None) -> bool:
    assert a is not None
    assert b is not None
    return a.dtype == b.dtype == torch.float32 and a.shape == b.shape and torch.equal(a.view(torch.int32), b.view(torch.int32))


# pictures


def test_all_256_levels_travel_as_one_byte_each_and_come_out_bit_for_bit() -> None:
    levels = (torch.arange(256).float() / 255).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    encoded = encode_request(batch_of(levels), "id")
    assert encoded.endswith(bytes(range(256)) * 6)
    assert b'"dtype":"uint8","shape":[2,3,16,16]' in encoded
    assert same_bits(sent(batch_of(levels)).images, levels.contiguous())


@pytest.mark.parametrize("pixel", [0.5, -0.0, 1.5, -1.0, 256 / 255, math.nan, math.inf, -math.inf, 1e-45])
def test_pictures_off_the_grid_travel_as_float32_with_their_bits(pixel: float) -> None:
    images = grid()
    images[1, 2, 3, 4] = pixel
    assert b'"dtype":"float32"' in encode_request(batch_of(images), "id")
    assert same_bits(sent(batch_of(images)).images, images)


@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9), st.booleans(), st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_any_size_survives_the_journey(num: int, height: int, width: int, on_grid: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(num, 3, height, width, generator=generator)
    images = (images * 255).round() / 255 if on_grid else images
    assert same_bits(sent(batch_of(images)).images, images)


def test_a_picture_larger_than_a_chunk_is_checked_to_its_last_pixel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "_CHUNK", 50)
    images = grid()
    assert same_bits(sent(batch_of(images)).images, images)
    images[-1, -1, -1, -1] += 1e-6
    assert same_bits(sent(batch_of(images)).images, images)


def test_other_memory_layouts_and_precisions_are_sent_as_what_they_show() -> None:
    images = grid()
    turned = images.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2)
    assert same_bits(sent(batch_of(turned)).images, images)
    half = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(1)).half()
    assert same_bits(sent(batch_of(half)).images, half.float())


def test_a_machine_of_the_other_byte_order_sends_and_reads_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.rand(1, 3, 2, 2)
    expected = encode_request(batch_of(images), "id")
    monkeypatch.setattr(sys, "byteorder", "big")
    swapped = bytearray(encode_request(batch_of(images), "id"))  # on this machine the pixels' bytes are turned round
    assert bytes(swapped[-48:]) == images.numpy().astype(">f4").tobytes()
    assert swapped[:-48] == bytearray(expected[:-48])
    assert same_bits(decode_request(bytearray(expected), BATCH_TYPE, LIMIT)[1].images, images)


def test_prompts_metadata_texts_and_group_arrive_as_they_were() -> None:
    prompts = [Prompt("ein Öl\n\x00", {"tags": [1, 2.5, None, True, "é"], "deep": {"a": {"b": []}}}), Prompt("", {})]
    batch = SampleBatch(prompts, grid(2), None, torch.tensor([-(2**63), 2**63 - 1]))
    received = sent(batch)
    assert list(received.prompts) == prompts
    assert received.group is not None
    assert received.group.tolist() == [-(2**63), 2**63 - 1]
    assert received.texts is None
    texts = sent(batch_of(None, texts=["one", "two \U0001f600"]))
    assert texts.texts == ["one", "two \U0001f600"]
    assert texts.images is None
    assert texts.group is None


def test_pixels_begin_at_a_multiple_of_64_and_a_message_by_hand_need_not() -> None:
    images = torch.rand(2, 3, 4, 4)
    encoded = encode_request(batch_of(images), "id")
    assert (len(encoded) - images.numel() * 4) % 64 == 0
    about = {"dtype": "float32", "shape": [2, 3, 4, 4]}
    for spaces in range(4):
        body = message(json.dumps(head(prompts=["a", "b"], images=about)).encode() + b" " * spaces, images.numpy().tobytes())
        assert same_bits(decode_request(body, BATCH_TYPE, LIMIT)[1].images, images)


@pytest.mark.parametrize("images", [torch.zeros(1, 1, 4, 4), torch.zeros(3, 4, 4), torch.zeros(1, 3, 4, 4, dtype=torch.uint8), torch.zeros(1, 3, 0, 4)])
def test_anything_but_rgb_pictures_in_floating_point_is_not_sent(images: Tensor) -> None:
    with pytest.raises(UserError, match=r"reward remote: needs pictures \[B, 3, H, W\]"):
        encode_request(batch_of(images), "id")


@pytest.mark.parametrize("metadata", [{"x": math.nan}, {"x": object()}, {"x": torch.zeros(2)}, {"x": "\ud800"}])
def test_metadata_that_json_does_not_know_is_named_with_its_prompt(metadata: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="the prompt 'second' or its metadata cannot be sent as JSON"):
        encode_request(SampleBatch([Prompt("first"), Prompt("second", metadata)], grid(2)), "id")
    with pytest.raises(UserError, match="the texts cannot be sent as JSON"):
        encode_request(SampleBatch([Prompt("first")], None, ["\ud800"]), "id")


# messages that must be refused

SHAPE = {"dtype": "uint8", "shape": [1, 3, 2, 2]}
PICTURE = bytes(12)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "0 bytes, too few"),
        (b"flowrl", "6 bytes, too few"),
        (pickle.dumps({"images": [0] * 50}), "pickles and other formats are not read"),
        (message(head(), magic=b"FLOWRL"), "does not begin as a batch does"),
        (message(head(), version=2), "version 2, this server reads 1"),
        (message(head(), length=10_000), "the body is truncated"),
        (message(head(), length=2**32 - 1), "the body is truncated"),
        (message(head(), length=20), "JSON cannot be read"),
        (message(b"\xff\xfe{}"), "not UTF-8"),
        (message(b"[1]"), "no object"),
        (message(b'{"api": NaN}'), "NaN is no number"),
        (message(b'{"api": 1, "prompts": [{"text": "a", "metadata": {"x": -Infinity}}]}'), "Infinity is no number"),
        (message(b'{"api": 1, "prompts": [{"text": "a", "metadata": {"x": 1e999}}]}'), "too large for a number"),
        (message(b'{"api": ' + b"9" * 5000 + b"}"), "cannot be read"),
        (message(b'{"api": 1, "prompts": ["\\ud800"]}'), "surrogate"),
        (message(b'{"api": 1, "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "more than 16 levels"),
        (message(b'{"api": 1, "x": ' + b'{"a":' * 16 + b"1" + b"}" * 17), "more than 16 levels"),
        (message(head(api=2)), '"api": 1'),
        (message(head(api=True)), '"api": 1'),
        (message(head(reward="x")), "unknown key 'reward'"),
        (message(head(request_id=5)), "request_id must be"),
        (message(head(request_id="x" * 129)), "request_id must be"),
        (message(head(request_id="é")), "request_id must be"),
        (message(head(prompts=[])), "prompts must be a list"),
        (message(head(prompts="a")), "prompts must be a list"),
        (message(head(prompts=[5])), "prompt 0 must be"),
        (message(head(prompts=["a", {"text": 5}])), "prompt 1 must be"),
        (message(head(prompts=[{"text": "a", "meta": {}}])), "prompt 0 must be"),
        (message(head(prompts=[{"text": "a", "metadata": []}])), "the metadata of prompt 0"),
        (message(head(texts="a")), "texts must be"),
        (message(head(texts=[1])), "texts must be"),
        (message(head(texts=["a", "b"])), "texts has 2 entries for 1 prompts"),
        (message(head(group=[1.5])), "group must be"),
        (message(head(group=[True])), "group must be"),
        (message(head(group=[2**63])), "group must be"),
        (message(head(group=[])), "group has 0 entries"),
        (message(head(), b"x"), "1 bytes follow the header of a batch without images"),
        (message(head(images=[1]), PICTURE), "images must be null or"),
        (message(head(images={**SHAPE, "more": 1}), PICTURE), "images must be null or"),
        (message(head(images={"dtype": "uint8", "shape": [3, 2, 2]}), PICTURE), "images must be null or"),
        (message(head(images={"dtype": "uint8", "shape": [1, 2, 2, 3]}), PICTURE), "images must be null or"),
        (message(head(images={"dtype": "uint8", "shape": [1, 3, -2, -2]}), PICTURE), "images must be null or"),
        (message(head(images={"dtype": "uint8", "shape": [1, 3, 0, 2]})), "images must be null or"),
        (message(head(images={"dtype": "uint8", "shape": [1, 3, 2.0, 2]}), PICTURE), "images must be null or"),
        (message(head(images={"dtype": "uint8", "shape": [1, 3, True, 4]}), PICTURE), "images must be null or"),
        (message(head(images={"dtype": "uint8", "shape": [2**30, 3, 2**30, 2**30]}), PICTURE), "but 12 follow"),
        (message(head(images={"dtype": "object", "shape": [1, 3, 2, 2]}), PICTURE), "dtype 'object'"),
        (message(head(images={"dtype": None, "shape": [1, 3, 2, 2]}), PICTURE), "dtype 'None'"),
        (message(head(images={"dtype": "float32", "shape": [1, 3, 2, 2]}), PICTURE), "have 48 bytes, but 12 follow"),
        (message(head(images=SHAPE), PICTURE[:-1]), "have 12 bytes, but 11 follow"),
        (message(head(images=SHAPE), PICTURE + b"x"), "have 12 bytes, but 13 follow"),
        (message(head(images=SHAPE, prompts=["a", "b"]), PICTURE), "images has 1 entries for 2 prompts"),
    ],
)
def test_a_malformed_message_is_refused_by_name(body: bytes, says: str) -> None:
    with pytest.raises(WireError) as error:
        decode_request(bytearray(body), BATCH_TYPE, LIMIT)
    assert says in str(error.value)
    assert error.value.status == 400


@pytest.mark.parametrize("kind", ["", "application/octet-stream", "text/plain; charset=utf-8", "multipart/form-data", "application/python-pickle"])
def test_another_content_type_is_refused_whatever_the_body(kind: str) -> None:
    with pytest.raises(WireError, match="the content type is") as error:
        decode_request(bytearray(encode_request(batch_of(grid()), "id")), kind, LIMIT)
    assert error.value.status == 415


def test_the_content_type_may_have_parameters_and_capitals() -> None:
    body = bytearray(encode_request(batch_of(grid()), "id"))
    assert same_bits(decode_request(body, "Application/X-flowrl-batch; x=y", LIMIT)[1].images, grid())


# the form for people


def by_hand(images: list[Any], prompts: list[Any] | None = None) -> SampleBatch:
    body = json.dumps({"api": 1, "prompts": prompts or ["a"] * len(images), "images": images}).encode()
    return decode_request(bytearray(body), JSON_TYPE, LIMIT)[1]


@pytest.mark.parametrize(("form", "options"), [("PNG", {}), ("WEBP", {"lossless": True})])
def test_png_and_lossless_webp_give_the_same_pixels_as_the_binary_form(form: str, options: dict[str, Any]) -> None:
    images = grid(2, 16, 20)
    arrays = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    received = by_hand([file_of(Image.fromarray(array), form, **options) for array in arrays], ["a", {"text": "b", "metadata": {"k": 1}}])
    assert same_bits(received.images, images)
    assert list(received.prompts) == [Prompt("a"), Prompt("b", {"k": 1})]


def test_json_without_pictures_is_a_batch_of_texts() -> None:
    body = bytearray(json.dumps({"api": 1, "prompts": ["2 + 2"], "texts": ["4"], "group": [7]}).encode())
    request_id, batch = decode_request(body, JSON_TYPE, LIMIT)
    assert (request_id, batch.texts, batch.images) == ("", ["4"], None)


def animated() -> str:
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    return file_of(frames[0], "PNG", save_all=True, append_images=frames[1:])


@pytest.mark.parametrize(
    ("images", "status", "says"),
    [
        (list, 400, "images must be null or a list"),
        (lambda: [5], 400, "images must be null or a list"),
        (lambda: ["???"], 400, "picture 0 is no base64"),
        (lambda: ["é"], 400, "picture 0 is no base64"),
        (lambda: [""], 400, "picture 0 is no whole PNG or WebP"),
        (lambda: [base64.b64encode(pickle.dumps([1])).decode()], 400, "picture 0 is no whole PNG or WebP"),
        (lambda: [file_of(Image.new("RGB", (4, 4)), "BMP")], 400, "picture 0 is no whole PNG or WebP"),
        (lambda: [file_of(Image.new("RGB", (4, 4)), "JPEG")], 400, "picture 0 is no whole PNG or WebP"),
        (lambda: [file_of(Image.fromarray(np.arange(3072, dtype=np.uint8).reshape(32, 32, 3)))[:80]], 400, "picture 0 is no whole PNG or WebP"),
        (lambda: [file_of(Image.new("RGB", (4, 4)), "WEBP", quality=50)], 400, "no plain lossless WebP"),
        (lambda: [file_of(Image.new("RGBA", (4, 4)))], 400, "the mode RGBA"),
        (lambda: [file_of(Image.new("L", (4, 4)))], 400, "the mode L"),
        (lambda: [animated()], 400, "several frames"),
        (lambda: [file_of(Image.new("RGB", (4, 4))), file_of(Image.new("RGB", (4, 5)))], 400, "picture 1 has the size 4 x 5, the first 4 x 4"),
        (lambda: [file_of(Image.new("RGB", (600, 600)))], 413, "600 x 600 pixels would take more memory"),
        (lambda: [file_of(Image.new("RGB", (400, 400)))] * 3, 413, "picture 2 of 400 x 400 pixels would take more memory"),
    ],
)
def test_pictures_that_are_none_or_too_large_are_refused(images: Any, status: int, says: str) -> None:
    with pytest.raises(WireError) as error:
        by_hand(images())
    assert says in str(error.value)
    assert error.value.status == status


def test_a_decompression_bomb_is_refused_before_it_is_decoded() -> None:
    plain = base64.b64decode(file_of(Image.new("RGB", (4, 4))))
    bomb = plain[:16] + struct.pack(">II", 40_000, 40_000) + plain[24:]  # the header alone says 1.6 billion pixels
    with pytest.raises(WireError) as error:
        by_hand([base64.b64encode(bomb).decode()])
    assert error.value.status in (400, 413)  # the header's checksum no longer fits, which some versions of Pillow see first
    from zlib import crc32

    bomb = bomb[:29] + struct.pack(">I", crc32(bomb[12:29])) + bomb[33:]
    with pytest.raises(WireError, match="more pixels than any picture may have") as error:
        by_hand([base64.b64encode(bomb).decode()])
    assert error.value.status == 413


# replies


def scores(**changes: Any) -> Scores:
    parts: dict[str, Any] = {
        "values": torch.tensor([0.1, math.nan, -2.5]),
        "valid": torch.tensor([True, False, True]),
        "raw": {"kB": torch.tensor([1 / 3, math.nan, math.inf]), "more": torch.tensor([-math.inf, 1e-45, 16777217.0])},
        "problems": {1: "no verdict"},
    }
    return Scores(**{**parts, **changes})


def test_scores_come_back_bit_for_bit_with_their_problems() -> None:
    before = scores()
    body = json.dumps({"request_id": "id", **plain_scores(before)}, allow_nan=False).encode()
    reply, after = decode_scores(body, "id", 3)
    assert reply["values"] == [0.10000000149011612, None, -2.5]  # 0.1 in float32, by hand: 13421773 / 2^27
    assert same_bits(after.values, before.values)
    assert after.valid.tolist() == [True, False, True]
    assert list(after.raw) == ["kB", "more"]
    assert all(torch.equal(after.raw[name].nan_to_num(7), before.raw[name].nan_to_num(7)) for name in before.raw)
    assert after.problems == {1: "no verdict"}


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=50))
@settings(deadline=None)
def test_every_float32_survives_as_a_decimal(numbers: list[float]) -> None:
    values = torch.tensor(numbers, dtype=torch.float32)
    plain = json.loads(json.dumps(plain_scores(Scores(values, torch.ones(len(values), dtype=torch.bool)))))
    assert same_bits(scores_from(plain, len(values)).values, values)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"values": [1.0, None]}, "values must be a list of 3"),
        ({"values": None}, "values must be a list of 3"),
        ({"values": [1.0, None, None]}, "null elsewhere"),
        ({"values": [1.0, 2.0, 3.0]}, "null elsewhere"),
        ({"values": [1.0, None, "inf"]}, "null elsewhere"),
        ({"values": [1.0, None, 1e39]}, "null elsewhere"),
        ({"values": [1.0, None, "nan"]}, "no number"),
        ({"values": [1.0, None, True]}, "no number"),
        ({"values": [1.0, None, [1]]}, "no number"),
        ({"values": [1.0, None, 10**400]}, "too large"),
        ({"valid": [1, 0, 1]}, "3 booleans"),
        ({"valid": [True, False]}, "3 booleans"),
        ({"raw": []}, "no object with values"),
        ({"raw": {"x": [1]}}, "raw x must be a list of 3"),
        ({"problems": None}, "no object with values"),
        ({"problems": {"0": "is valid"}}, "problems must map"),
        ({"problems": {"3": "is not there"}}, "problems must map"),
        ({"problems": {"1": 5}}, "problems must map"),
    ],
)
def test_a_malformed_reply_is_refused_by_name(changes: dict[str, Any], says: str) -> None:
    plain = plain_scores(scores())
    assert scores_from(plain, 3).valid.tolist() == [True, False, True]
    with pytest.raises(WireError, match=says):
        scores_from({**plain, **changes}, 3)


def test_a_reply_to_another_request_is_refused() -> None:
    body = json.dumps({"request_id": "other", **plain_scores(scores())}).encode()
    with pytest.raises(WireError, match="is to the request 'other', not to 'id'"):
        decode_scores(body, "id", 3)
    with pytest.raises(WireError, match="no object"):
        scores_from([], 3)


# prompts and facts


def test_prompts_alone_arrive_as_they_were() -> None:
    prompts = [Prompt("a", {"k": [1]}), Prompt("b")]
    assert wire.decode_prompts(wire.encode_prompts(prompts)) == prompts
    with pytest.raises(WireError, match="unknown key 'images'"):
        wire.decode_prompts(b'{"api": 1, "prompts": ["a"], "images": null}')


def test_facts_arrive_as_they_were_and_strange_ones_are_refused() -> None:
    info = RewardInfo("x", "text", -math.inf, 2.0, scope="group", reads=("texts", "metadata"), metadata=("answer",), batch_size=7, parameters=3)
    plain = json.loads(json.dumps(wire.plain_info(info), allow_nan=False))
    assert wire.info_from(plain) == info
    assert wire.info_from({**plain, "later": 1, "high": 3}).high == 3
    for name, value in [("scope", "world"), ("batch_size", 0), ("batch_size", True), ("name", 5), ("reads", "images"), ("reads", [1]), ("low", "x")]:
        with pytest.raises(WireError, match="facts? .*about the reward"):
            wire.info_from({**plain, name: value})
    with pytest.raises(WireError, match="no object"):
        wire.info_from(None)
