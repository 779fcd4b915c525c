from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from edge.tokenizer import ModelText, load
from routing.wire import TextAssets
from tests.fakes import text_assets


@dataclass(frozen=True)
class Pair:
    """A model's text as the edge has it, and as `transformers` has it from the same files."""

    text: ModelText
    reference: Any  # transformers.PreTrainedTokenizerFast

    def chat_ids(self, messages: list[dict[str, str]]) -> list[int]:
        return list(
            self.reference.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=False
            )
        )


def pair(assets: TextAssets) -> Pair:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    reference = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(assets.tokenizer_json.decode()),
        chat_template=assets.chat_template,
        clean_up_tokenization_spaces=False,
        **assets.special_tokens,
    )
    return Pair(text=load(assets), reference=reference)


@pytest.fixture(scope="session", params=["byte_level", "sentencepiece"])
def kind(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """A small tokenizer of each kind there is."""
    return pair(getattr(text_assets, request.param)())
