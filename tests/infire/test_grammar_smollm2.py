"""The default model under grammars: every answer parses and is valid, greedy or drawn."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest
from tokenizers import Tokenizer

from infire.admission import Limits
from infire.blocks import BlockPool
from infire.engine import Engine
from infire.grammar_check import Checker
from infire.grammars import Grammars
from infire.notes import Refused
from infire.request import Grammar, Sequence
from infire.scheduler import Scheduler
from tests.infire.driving import loaded_native, sequence

END_ID = 2  # <|im_end|>
WITHIN_S = 200.0
CLOSED: dict[str, Any] = {"additionalProperties": False}
TEXT = {"type": "string", "maxLength": 24}
SCHEMAS: dict[str, dict[str, Any]] = {
    "Describe a person.": {
        "type": "object",
        "properties": {
            "name": TEXT,
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "hobbies": {"type": "array", "items": TEXT, "minItems": 1, "maxItems": 2},
        },
        "required": ["name", "age", "hobbies"],
        **CLOSED,
    },
    "Where is the Eiffel tower, and since when?": {
        "type": "object",
        "properties": {
            "city": {"enum": ["Paris", "München", "東京"]},
            "since": {"type": "string", "format": "date"},
            "at": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/point"}]},
        },
        "required": ["city", "since", "at"],
        "$defs": {
            "point": {
                "type": "object",
                "properties": {"x": {"type": "integer", "maximum": 99}, "y": {"const": 1.5}},
                "required": ["x", "y"],
                **CLOSED,
            }
        },
        **CLOSED,
    },
}
OTHERS = {
    "When does the shop open?": Grammar("regex", "([01][0-9]|2[0-3]):[0-5][0-9]"),
    "Is water wet?": Grammar("choice", json.dumps(["Yes", "No", "Größtenteils"])),
}
KNOBS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.8, "seed": 1},
    {"temperature": 1.5, "seed": 2, "top_p": 0.9},
]


def engine_of(folder: Path) -> Engine:
    model = loaded_native(folder, threads=2)
    assert model.templates is not None
    scheduler = Scheduler(
        [BlockPool(count) for count in model.num_blocks],
        model.layout.groups,
        Limits(max_running=16, vocab_size=model.vocab_size),
    )
    grammars = Grammars(model.templates, [Checker(folder, model.vocab_size)])
    return Engine(scheduler, model.runner, grammars=grammars)


def answers(engine: Engine, asked: list[Sequence]) -> tuple[dict[str, list[int]], dict[str, str]]:
    """Ids, and why they end; all at once."""
    ids: dict[str, list[int]] = {one.request_id: [] for one in asked}
    finished: dict[str, str] = {}
    for one in asked:
        engine.submit(one)
    until = time.monotonic() + WITHIN_S
    while len(finished) < len(ids):
        assert time.monotonic() < until
        results = engine.step()
        assert not [it for it in (results.answers if results else ()) if isinstance(it, Refused)]
        for step in results.steps if results else ():
            ids[step.request_id] += step.ids
            if step.finish:
                finished[step.request_id] = step.finish
    engine.close()
    return ids, finished


@pytest.mark.timeout(400)
def test_every_answer_is_what_was_asked_for(smollm2_folder: Path) -> None:
    """With one that has no grammar among them."""
    tokenizer = Tokenizer.from_file(str(smollm2_folder / "tokenizer.json"))
    of_schemas = {
        question: Grammar("json_schema", json.dumps(schema)) for question, schema in SCHEMAS.items()
    }
    asked = [sequence("plain", tokenizer.encode("Once upon a time").ids, 20)]
    for question, grammar in (of_schemas | OTHERS).items():
        prompt = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        ids = tokenizer.encode(prompt).ids
        for n, knobs in enumerate(KNOBS):
            one = sequence(f"{n} {question}", ids, 200, stop_ids=(END_ID,), **knobs)
            asked.append(msgspec.structs.replace(one, grammar=grammar))
    said, finished = answers(engine_of(smollm2_folder), asked)
    texts = {name: tokenizer.decode(ids) for name, ids in said.items()}
    assert finished.pop("plain") == "length"
    assert set(finished.values()) == {"stop"}, texts
    checker = jsonschema.FormatChecker()
    for n in range(len(KNOBS)):
        for question, schema in SCHEMAS.items():
            found = json.loads(texts[f"{n} {question}"])
            jsonschema.validate(found, schema, format_checker=checker)
        assert re.fullmatch("[0-2][0-9]:[0-5][0-9]", texts[f"{n} When does the shop open?"])
        assert texts[f"{n} Is water wet?"] in json.loads(OTHERS["Is water wet?"].source)
