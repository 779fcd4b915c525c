import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from edge.tokenizer import ModelText, load
from infire.pull import pull
from routing.catalogue import load_catalogue
from routing.paths import model_folder, paths
from routing.wire import TextAssets
from tests.fakes import text_assets
from tests.fakes.edge_fixtures import edge, edge_settings, region
from tests.fakes.keyring import clock, folder

__all__ = ["clock", "edge", "edge_settings", "folder", "region"]  # fixtures


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
    reference = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(assets.tokenizer_json.decode()),
        chat_template=assets.chat_template,
        clean_up_tokenization_spaces=False,
        **assets.special_tokens,
    )
    return Pair(text=load(assets), reference=reference)


def smollm2() -> TextAssets:
    """The default model's own; pulled if it is not there yet."""
    row = load_catalogue().row("@cf/huggingfacetb/smollm2-135m-instruct")
    folder = model_folder(paths(os.environ).cache, row.model)
    pull(row.source, folder, sha256=row.sha256, model_digest=row.model_digest)
    return _assets(folder)


def _assets(folder: Path) -> TextAssets:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    return TextAssets(
        tokenizer_json=(folder / "tokenizer.json").read_bytes(),
        chat_template=config["chat_template"],
        special_tokens={name: config[name] for name in ("bos_token", "eos_token")},
        stop_ids=(json.loads((folder / "generation_config.json").read_text())["eos_token_id"],),
    )


@pytest.fixture(scope="session", params=["byte_level", "sentencepiece", "smollm2"])
def kind(request: pytest.FixtureRequest) -> Pair:
    """Small tokenizers of both kinds there are, and the default model's."""
    made = {
        "byte_level": text_assets.byte_level,
        "sentencepiece": text_assets.sentencepiece,
        "smollm2": smollm2,
    }
    return pair(made[request.param]())
