"""Write flowrl/assets/prompts/sentiment: one-line reviews to be called positive or negative, for runs of a small instruct model that half-solves them.

    python scripts/build_sentiment_prompts.py [--out FOLDER]

Every prompt is a dialogue of a system line, two shown reviews with their answers, and a third review; its metadata `answer` is the word that the reward
exact_match with extract: whole compares. No thing and no adjective of eval.jsonl occurs in train.jsonl. Half of each file is positive. The bytes are the same
every time.
"""

from __future__ import annotations

import argparse
import json
import random
from itertools import product
from pathlib import Path

FOLDER = Path(__file__).parent.parent / "flowrl" / "assets" / "prompts" / "sentiment"
SHOWN = [
    {"role": "system", "content": "positive or negative?"},
    {"role": "user", "content": "A lovely song."},
    {"role": "assistant", "content": "positive"},
    {"role": "user", "content": "A terrible song."},
    {"role": "assistant", "content": "negative"},
]
FORMS = ("The {thing} was {word}.", "I found the {thing} {word}.", "What {a} {word} {thing}!", "My friends called the {thing} {word}.", "{A} {word} {thing}.")
THINGS = {
    "train": "film book hotel phone soup coffee pizza museum concert teacher waiter garden train lesson beach jacket chair laptop cake bridge",
    "eval": "novel restaurant camera play tour dessert bicycle doctor album sofa park game",
}
WORDS = {
    "train": {
        "positive": "wonderful great excellent delightful superb beautiful perfect charming amazing splendid impressive pleasant",
        "negative": "awful bad horrible dreadful boring disappointing useless ugly poor dull annoying unpleasant",
    },
    "eval": {
        "positive": "fantastic brilliant marvellous magnificent enjoyable outstanding",
        "negative": "nasty disgusting miserable appalling mediocre pathetic",
    },
}
SIZES = {"train": 192, "eval": 128}


def reviews(split: str) -> list[tuple[str, str]]:
    """(review, answer) of a split, in a fixed random order; the answers take turns."""
    choice = random.Random(split)
    of_answer = {}
    for answer, words in WORDS[split].items():
        found = []
        for form, thing, word in product(FORMS, THINGS[split].split(), words.split()):
            article = "an" if word[0] in "aeiou" and word != "useless" else "a"
            found.append(form.format(thing=thing, word=word, a=article, A=article.capitalize()))
        of_answer[answer] = choice.sample(found, SIZES[split] // 2)
    return [(text, answer) for texts in zip(*of_answer.values(), strict=True) for text, answer in zip(texts, of_answer, strict=True)]


def lines(split: str) -> str:
    """The file of a split: one JSON object a line."""
    return "".join(json.dumps({"messages": [*SHOWN, {"role": "user", "content": text}], "answer": answer}) + "\n" for text, answer in reviews(split))


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of train.jsonl and eval.jsonl")
    folder = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    for split in SIZES:
        (folder / f"{split}.jsonl").write_text(lines(split), encoding="utf-8")


if __name__ == "__main__":
    main()
