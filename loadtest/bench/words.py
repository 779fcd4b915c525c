"""Prompts of a wanted length, no two alike, so that no server finds one in a prefix cache. Pure.

Every word is one token, with the space before it, to the byte-pair tokenizers of Llama, GPT-2,
SmolLM2, Qwen and their kin; what a server counted is checked by whoever asks.
"""

from __future__ import annotations

import random

_WORDS = """
time year people way day man thing woman life child world school state family student group
country problem hand part place case week company system program question work government
number night point home water room mother area money story fact month lot right study book eye
job word business issue side kind head house service friend father power hour game line end
member law car city community name president team minute idea body information back parent face
others level office door health person art war history party result change morning reason
research girl guy moment air teacher force education foot boy age policy music market sense
"""
WORDS = tuple(_WORDS.split())


def prompt(seed: int, num_words: int) -> str:
    """`num_words` words, the same for the same seed."""
    return " ".join(random.Random(seed).choices(WORDS, k=num_words))
