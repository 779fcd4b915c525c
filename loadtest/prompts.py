"""Questions to ask, the same ones for the same seed. Knows no client and no model."""

from __future__ import annotations

import random
from collections.abc import Iterator

OPENINGS = (
    "Explain in three sentences what {subject} is.",
    "Name five facts about {subject}.",
    "Write a short letter to a friend about {subject}.",
    "What would a child want to know about {subject}?",
    "Compare {subject} with {other}.",
)
SUBJECTS = (
    "a lighthouse",
    "the tides",
    "bread",
    "a compass",
    "the number zero",
    "volcanoes",
    "a bicycle",
    "honey bees",
    "glass",
    "the moon",
    "paper",
    "a river delta",
)
NOTE = "Note {number}: {subject} was looked at once more, and {other} was set beside it."
LONG_SHARE = 0.25  # of prompts, with notes to read first
MAX_NOTES = 20  # about 400 tokens


def prompts(seed: int) -> Iterator[str]:
    """An endless supply: mostly short, some with a page of notes in front."""
    rng = random.Random(seed)
    while True:
        subject, other = rng.sample(SUBJECTS, 2)
        lines = _notes(rng) if rng.random() < LONG_SHARE else []
        yield "\n".join([*lines, rng.choice(OPENINGS).format(subject=subject, other=other)])


def _notes(rng: random.Random) -> list[str]:
    count = rng.randint(2, MAX_NOTES)
    pairs = (rng.sample(SUBJECTS, 2) for _ in range(count))
    return [NOTE.format(number=i, subject=a, other=b) for i, (a, b) in enumerate(pairs, 1)]
