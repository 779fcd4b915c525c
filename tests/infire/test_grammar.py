"""Grammars of every kind against what they must allow; what is wrong with bad and hostile ones."""

from __future__ import annotations

import json
import random
import re
import time
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from llguidance import LLMatcher
from tokenizers import Tokenizer

from infire.grammar import BadGrammar, Templates, compiled
from infire.grammar_check import fault_of
from infire.request import Grammar
from infire.vocabulary import BadVocabulary, Vocabulary, read_vocabulary
from tests.fakes.model_folder import make_counting_folder
from tests.fakes.text_assets import byte_level, sentencepiece
from tests.infire.grammars import BYTES_SIZE, allowed, bytes_vocabulary, draw_bytes

POINT = {"type": "object", "properties": {"x": {"type": "number"}, "y": {"type": "number"}}}
CLOSED: dict[str, Any] = {"additionalProperties": False}
TREE: dict[str, Any] = {
    "$ref": "#/$defs/node",
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "value": {"enum": [1, 2]},
                "children": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2},
            },
            "required": ["value", "children"],
            **CLOSED,
        }
    },
}
SCHEMAS: dict[str, dict[str, Any]] = {
    "anything": {},
    "object": {"type": "object"},
    "string": {"type": "string"},
    "short string": {"type": "string", "minLength": 2, "maxLength": 5},
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3,5}$"},
    "pattern inside": {"type": "string", "pattern": "ab+c", "maxLength": 30},
    "integer": {"type": "integer"},
    "integer range": {"type": "integer", "minimum": -3, "maximum": 117},
    "exclusive range": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
    "multiple": {"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 1000},
    "boolean": {"type": "boolean"},
    "null": {"type": "null"},
    "several types": {"type": ["integer", "null", "boolean"]},
    "enum": {"enum": ["red", "green", 7, None, {"a": [1, 2]}]},
    "enum of unicode": {"enum": ["grün", "日本語", "🙂", 'quo"te', "back\\slash", "\n"]},
    "const": {"const": {"kind": "x", "n": [1, 2.5]}},
    "array": {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 4},
    "tuple": {
        "type": "array",
        "prefixItems": [{"type": "integer"}, {"enum": ["a"]}],
        "items": False,
        "minItems": 2,
    },
    "required": POINT | {"required": ["x", "y"]} | CLOSED,
    "optional": POINT | CLOSED,
    "other properties": POINT | {"additionalProperties": {"type": "boolean"}, "required": ["y"]},
    "pattern properties": {
        "type": "object",
        "patternProperties": {"^n_[a-z]{1,3}$": {"type": "integer"}},
        **CLOSED,
    },
    "nested": {
        "type": "object",
        "properties": {
            "a": {
                "type": "object",
                "properties": {"b": {"type": "array", "items": POINT | CLOSED, "maxItems": 2}},
                "required": ["b"],
                **CLOSED,
            }
        },
        "required": ["a"],
        **CLOSED,
    },
    "anyOf": {"anyOf": [{"type": "integer"}, {"type": "string", "maxLength": 3}, POINT]},
    "oneOf told apart": {
        "oneOf": [
            {"type": "object", "properties": {"t": {"const": t}}, "required": ["t"], **CLOSED}
            for t in ("a", "b")
        ]
    },
    "allOf": {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 40}]},
    "a recursive $ref": TREE,
    "$defs": {
        "type": "object",
        "properties": {"from": {"$ref": "#/$defs/p"}, "to": {"$ref": "#/$defs/p"}},
        "required": ["from", "to"],
        "$defs": {"p": POINT | {"required": ["x"]} | CLOSED},
        **CLOSED,
    },
    "date": {"type": "string", "format": "date"},
    "date-time": {"type": "string", "format": "date-time"},
    "uuid": {"type": "string", "format": "uuid"},
    "email": {"type": "string", "format": "email"},
    "ipv4": {"type": "string", "format": "ipv4"},
    "keys of unicode": {
        "type": "object",
        "properties": {"größe": {"type": "integer"}, "名": {"type": "null"}},
        "required": ["größe", "名"],
        **CLOSED,
    },
    "what says nothing": {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "T",
        "description": "d",
        "default": 1,
        "examples": [1],
        "type": "integer",
    },
}


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    return bytes_vocabulary(tmp_path_factory.mktemp("counting"))


@pytest.fixture(scope="module")
def templates(vocabulary: Vocabulary) -> Templates:
    return Templates(vocabulary)


def of_schema(schema: dict[str, Any]) -> Grammar:
    return Grammar("json_schema", json.dumps(schema))


@pytest.mark.parametrize("name", SCHEMAS)
def test_what_is_drawn_from_a_schema_is_valid(
    templates: Templates, vocabulary: Vocabulary, name: str
) -> None:
    schema = SCHEMAS[name]
    template = templates.get(of_schema(schema))
    checks = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())
    for seed in range(12):
        text = draw_bytes(template.matcher(), vocabulary, seed)
        checks.validate(json.loads(text))


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_check_finds_nothing_wrong_with_it(vocabulary: Vocabulary, name: str) -> None:
    assert not fault_of(of_schema(SCHEMAS[name]), vocabulary)


def test_properties_come_in_the_order_of_the_schema(
    templates: Templates, vocabulary: Vocabulary
) -> None:
    names = ["z", "a", "m"]
    schema = {"type": "object", "properties": {n: {"type": "null"} for n in names}, **CLOSED}
    template = templates.get(of_schema(schema | {"required": names}))
    for seed in range(5):
        assert list(json.loads(draw_bytes(template.matcher(), vocabulary, seed))) == names


def matches(templates: Templates, grammar: Grammar, text: str) -> bool:
    """Whether the bytes of `text` are all allowed, and enough."""
    matcher = templates.get(grammar).matcher()
    ids = list(text.encode())
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


def test_spaces_are_where_people_put_them_and_have_an_end(templates: Templates) -> None:
    anything = Grammar("json_object", "")
    for text in ('{"a":1}', '{"a": 1, "b": [1, 2]}', json.dumps({"a": [{"b": 1}]}, indent=2)):
        assert matches(templates, anything, text), text
    assert not matches(templates, anything, '{"a":' + " " * 17 + "1}")
    assert not matches(templates, anything, '{"a":1}\n')
    assert not matches(templates, anything, "[1]")


def test_an_expression_is_met_from_end_to_end(templates: Templates) -> None:
    grammar = Grammar("regex", r"\d{3}-\d{4}|é+|\p{Greek}x")
    for text, expected in {
        "123-4567": True,
        "éé": True,
        "\u03b1x": True,
        "123-456": False,
        " 123-4567": False,
        "x": False,
    }.items():
        assert matches(templates, grammar, text) is expected, text


def test_choices_are_taken_as_they_are(templates: Templates) -> None:
    texts = ["yes", "yes, sir", 'a "b"', "x|y", "/z/", "é🙂", "\\d", "line\nbreak", "%if"]
    grammar = Grammar("choice", json.dumps(texts))
    assert all(matches(templates, grammar, text) for text in texts)
    for text in ("y", "yes,", "x", "z", "7", "a b"):
        assert not matches(templates, grammar, text), text


def test_a_lark_grammar(templates: Templates) -> None:
    source = 'start: "<" word ("," word)* ">"\nword: /[a-z]+/ | schema\nschema: %json {"const": 1}'
    grammar = Grammar("lark", source)
    assert matches(templates, grammar, "<ab,1,c>")
    assert not matches(templates, grammar, "<ab,2>")


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"], **CLOSED}
    return schema


WRONG: dict[str, tuple[Grammar, str]] = {
    "no JSON": (Grammar("json_schema", "{"), "EOF while parsing"),
    "no object": (Grammar("json_schema", "[]"), "Expecting object schema"),
    "true": (Grammar("json_schema", "true"), "Expecting object schema"),
    "deep JSON": (Grammar("json_schema", '{"not":' * 5000 + "{}" + "}" * 5000), "recursion limit"),
    "no such type": (of_schema({"type": "strin"}), "Invalid type: strin"),
    "no such format": (of_schema({"format": "nonsense", "type": "string"}), "Unknown format"),
    "unsupported": (of_schema({"type": "array", "uniqueItems": True}), '"uniqueItems"'),
    "not": (of_schema({"not": {"type": "string"}}), '"not"'),
    "if": (of_schema({"if": {"type": "string"}, "then": {"minLength": 3}}), '"if"'),
    "unsupported, said to be let pass": (
        of_schema({"uniqueItems": True, "x-guidance": {"lenient": True}}),
        '"uniqueItems"',
    ),
    "no such place": (of_schema({"$ref": "#/nope"}), "does not exist"),
    "another host": (of_schema({"$ref": "http://127.0.0.1:1/x.json"}), "does not fetch"),
    "a file": (of_schema({"$ref": "file:///etc/passwd"}), "does not fetch"),
    "a circle": (of_schema({"$ref": "#"}), "nothing can match"),
    "a long circle": (
        of_schema(
            {"$ref": "#/$defs/a", "$defs": {n: {"$ref": f"#/$defs/{m}"} for n, m in ("ab", "ba")}}
        ),
        "nothing can match",
    ),
    "nothing fits": (of_schema({"type": "integer", "minimum": 5, "maximum": 3}), "Unsatisfiable"),
    "an exponential allOf": (
        of_schema(
            {
                "allOf": [
                    {"anyOf": [{"properties": {f"p{i}": {"minLength": j}}} for j in range(6)]}
                    for i in range(8)
                ]
            }
        ),
        "schema too large",
    ),
    "a bad pattern": (of_schema({"type": "string", "pattern": "["}), "regex"),
    "an open class": (Grammar("regex", "[a-z"), "unclosed character class"),
    "looking ahead": (Grammar("regex", "(?=a)b"), "look-around"),
    "an edge of a word": (Grammar("regex", r"\bab"), "not supported"),
    "looking back": (Grammar("regex", r"(a)\1"), "backreferences"),
    "no choice": (Grammar("choice", "[]"), "no choice"),
    "no texts": (Grammar("choice", "[1]"), "not an array of texts"),
    "no Lark": (Grammar("lark", "garbage"), "Expected token"),
    "no rule": (Grammar("lark", "start: a"), "unknown name"),
    "a rule of itself": (Grammar("lark", "start: start"), "nothing can match"),
    "a megabyte": (of_schema({"const": "x" * 2**20}), "more than 65536 bytes"),
    "a megabyte of expression": (Grammar("regex", "a" * 2**20), "more than 65536 bytes"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_used_says_why(vocabulary: Vocabulary, name: str) -> None:
    grammar, why = WRONG[name]
    with pytest.raises(BadGrammar) as caught:
        compiled(grammar, vocabulary)
    assert why in str(caught.value)
    assert len(str(caught.value)) <= 500
    assert "\n" not in str(caught.value)
    assert fault_of(grammar, vocabulary) == str(caught.value)


HEAVY: dict[str, Grammar] = {
    "an enum of 3,000": of_schema({"enum": [f"value {n} {n * 7919 % 10007}" for n in range(3000)]}),
    "60 levels": of_schema(nested(60)),
    "a million characters": of_schema({"type": "string", "maxLength": 10**6}),
    "100,000 items": of_schema({"type": "array", "items": {"type": "integer"}, "minItems": 10**5}),
    "big numbers": of_schema({"type": "integer", "minimum": 0, "maximum": 10**300}),
    "an endless object": of_schema(
        {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}
    ),
    "a million repeats": Grammar("regex", "((a{100}){100}){100}"),
    "(a+)+b": Grammar("regex", "(a+)+b"),
    "(x+x+)+y": Grammar("regex", "(x+x+)+y"),
    "(a*)* 1000": Grammar("regex", "(a*)*" * 1000),
    "exponential states": Grammar("regex", "(a|b)*a(a|b){20}"),
    "a million dots": Grammar("regex", ".{1000000}"),
    "(.*a){1000}": Grammar("regex", "(.*a){1000}"),
    "twenty times two hundred": of_schema({"type": "string", "pattern": "^(.*a.{200}){20}$"}),
    "letters of all scripts": Grammar("regex", r"\p{L}{1,300}.{0,400}q"),
    "an ambiguous grammar": Grammar("lark", "start: x+\nx: /a+/ | x x | x x x"),
}


@pytest.mark.parametrize("name", HEAVY)
def test_heavy_ones_are_cheap_or_refused(smollm2_vocabulary: Vocabulary, name: str) -> None:
    """With a vocabulary of 49,152. In CPU, which others do not take from it: with room to spare."""
    began = time.process_time()
    fault_of(HEAVY[name], smollm2_vocabulary)
    assert time.process_time() - began < 2.0


@pytest.fixture(scope="module")
def smollm2_vocabulary(smollm2_folder: Path) -> Vocabulary:
    return read_vocabulary(smollm2_folder, 49152)


@pytest.mark.parametrize("assets", [byte_level, sentencepiece])
def test_tokens_of_both_kinds_spell_what_they_mean(assets: Any, tmp_path: Path) -> None:
    """Every way through the masks spells a text that matches."""
    (tmp_path / "tokenizer.json").write_bytes(assets().tokenizer_json)
    size = Tokenizer.from_buffer(assets().tokenizer_json).get_vocab_size()
    vocabulary = read_vocabulary(tmp_path, size + 5)  # a model may have more
    pattern = "(the|größe|日本|🙂| quick brown){1,4}!"
    matcher = compiled(Grammar("regex", pattern), vocabulary)
    texts = texts_of_ways(matcher, vocabulary)
    assert len(texts) > 5
    assert all(re.fullmatch(pattern, text) for text in texts)


def texts_of_ways(matcher: LLMatcher, vocabulary: Vocabulary) -> set[str]:
    """What is said by always taking any id that may follow."""
    found = set()
    mask = np.zeros(vocabulary.num_words, np.int32)
    for seed in range(20):
        chance, way = random.Random(seed), matcher.deep_copy()
        ids: list[int] = []
        while not way.is_stopped():
            way.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
            ids.append(chance.choice(allowed(mask)))
            assert way.consume_token(ids[-1])
        found.add(vocabulary.tokenizer.decode_bytes(ids).decode())
    return found


@pytest.mark.parametrize("content", [None, "", "{}", "no JSON"])
def test_a_tokenizer_that_cannot_be_read_says_so(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(BadVocabulary):
        read_vocabulary(tmp_path, 100)


def test_so_does_one_of_more_tokens_than_the_model_has(tmp_path: Path) -> None:
    make_counting_folder(tmp_path)
    with pytest.raises(BadVocabulary, match="vocab size too small"):
        read_vocabulary(tmp_path, BYTES_SIZE - 1)
