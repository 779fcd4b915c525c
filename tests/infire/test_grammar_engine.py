"""Grammars through the engine with small real models: every answer matches, and nobody else's
changes."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest
import torch

from infire.admission import Limits
from infire.blocks import BlockPool
from infire.engine import Engine
from infire.grammar_check import Checker
from infire.grammars import Grammars
from infire.loaded import Loaded
from infire.notes import Drop, Refused, Submit
from infire.plan import StepPlan
from infire.request import Grammar, Step
from infire.request import Sequence as Asked
from infire.scheduler import Scheduler
from tests.fakes.model_folder import END_ID, make_counting_folder
from tests.infire.driving import answers, engine, loaded, loaded_native, neighbours, sequence
from tests.infire.grammars import BYTES_SIZE
from tests.infire.small_models import make_folder

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "bc", "é"]}, "maxItems": 3},
        "at": {"anyOf": [{"type": "null"}, {"type": "boolean"}]},
    },
    "required": ["name", "age", "tags", "at"],
    "additionalProperties": False,
}
OF_PERSON = Grammar("json_schema", json.dumps(PERSON))
CODE = Grammar("regex", "[a-f]{3}-[0-9]{2,4}")
CHOICE = Grammar("choice", '["yes", "no", "perhaps"]')
BAD = Grammar("regex", "[")
PROMPTS = [[random.Random(n).randrange(256) for _ in range(n)] for n in (3, 20, 41, 77)]
WAIT_S = 60.0


@pytest.fixture(scope="module", params=["torch", "native"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """Of random weights, which says bytes: float32 with torch, bfloat16 with the kernels."""
    folder = tmp_path_factory.mktemp("model")
    dtype = torch.float32 if request.param == "torch" else torch.bfloat16
    make_counting_folder(folder)
    make_folder("llama", folder, dtype=dtype, vocab_size=BYTES_SIZE)
    made = loaded(folder) if request.param == "torch" else loaded_native(folder)
    assert made.templates is not None
    return made


class Rig:
    """An engine that has grammars, and what it has said."""

    def __init__(  # one at a time, as they use the same KV
        self, model: Loaded, folder: Path, *, num_blocks: int | None = None
    ) -> None:
        limits = Limits(
            max_step_tokens=512,
            max_running=16,
            context_window=model.context_window,
            vocab_size=model.vocab_size,
        )
        counts = [num_blocks or count for count in model.num_blocks]
        model.runner.tags.reset()
        assert model.templates is not None
        scheduler = Scheduler([BlockPool(n) for n in counts], model.layout.groups, limits)
        self.grammars = Grammars(model.templates, [Checker(folder, BYTES_SIZE)])
        self.engine = Engine(scheduler, model.runner, grammars=self.grammars)
        self.ids: dict[str, list[int]] = {}
        self.finish: dict[str, str] = {}
        self.refused: dict[str, Refused] = {}

    def step(self) -> bool:
        """Whether there is more to do."""
        results = self.engine.step()
        for answer in results.answers if results else ():
            if isinstance(answer, Refused):
                self.refused[answer.request_id] = answer
        for step in results.steps if results else ():
            self._take(step)
        return results is not None or self.engine.rest()

    def run_out(self) -> None:
        until = time.monotonic() + WAIT_S
        while self.step():
            assert time.monotonic() < until

    def text(self, request_id: str) -> str:
        ids = self.ids[request_id]
        return bytes(ids[: ids.index(END_ID)] if END_ID in ids else ids).decode()

    def _take(self, step: Step) -> None:
        self.ids.setdefault(step.request_id, []).extend(step.ids)
        if step.finish:
            self.finish[step.request_id] = step.finish


@pytest.fixture
def rig(model: Loaded, tmp_path: Path) -> Iterator[Callable[..., Rig]]:
    made: list[Rig] = []
    make_counting_folder(tmp_path)

    def make(**sizes: int) -> Rig:
        made.append(Rig(model, tmp_path, **sizes))
        return made[-1]

    yield make
    for one in made:
        one.engine.close()


def asked(name: str, grammar: Grammar | None, n: int = 0, **sampling: Any) -> Asked:
    knobs = {"stop_ids": (END_ID,), "seed": n} | sampling
    made = sequence(name, PROMPTS[n % len(PROMPTS)], knobs.pop("max_tokens", 300), **knobs)
    return msgspec.structs.replace(made, grammar=grammar)


_KNOBS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0},
    {"temperature": 5.0},
    {"temperature": 0.7, "top_k": 3},
    {"temperature": 1.5, "top_p": 0.5, "min_p": 0.1},
    {"temperature": 1.0, "repetition_penalty": 1.3, "frequency_penalty": 0.5},
    {"temperature": 1.0, "logit_bias": ((65, 100.0), (END_ID, 50.0))},
    {"temperature": 1.0, "logprobs": 2},
]


def test_every_answer_matches_whatever_the_sampling(rig: Callable[..., Rig]) -> None:
    one = rig()
    for n, knobs in enumerate(_KNOBS):
        for kind, grammar in (("person", OF_PERSON), ("code", CODE), ("choice", CHOICE)):
            one.engine.submit(asked(f"{kind} {n}", grammar, n, **knobs))
    one.run_out()
    assert set(one.finish.values()) == {"stop"}
    for n in range(len(_KNOBS)):
        jsonschema.validate(json.loads(one.text(f"person {n}")), PERSON)
        assert re.fullmatch(CODE.source, one.text(f"code {n}"))
        assert one.text(f"choice {n}") in json.loads(CHOICE.source)
        assert all(one.ids[f"{kind} {n}"][-1] == END_ID for kind in ("person", "code", "choice"))
    assert len({one.text(f"person {n}") for n in range(len(_KNOBS))}) > 5


def test_without_an_end_of_text_an_answer_ends_where_nothing_can_follow(
    rig: Callable[..., Rig],
) -> None:
    ended = []
    for stop_ids in ((END_ID,), ()):
        one = rig()
        ended.append(one)
        for n, grammar in enumerate((OF_PERSON, CODE, CHOICE)):
            one.engine.submit(asked(str(n), grammar, n, temperature=0.8, stop_ids=stop_ids))
        one.run_out()
    with_end, without = ended
    assert set(without.finish.values()) == {"stop"}
    jsonschema.validate(json.loads(without.text("0")), PERSON)
    assert without.text("2") in json.loads(CHOICE.source)
    for n in range(3):  # the same numbers for the same places
        assert without.ids[str(n)] == with_end.ids[str(n)][: len(without.ids[str(n)])]


def test_max_tokens_ends_an_answer_anywhere(rig: Callable[..., Rig]) -> None:
    one = rig()
    one.engine.submit(asked("a", OF_PERSON, max_tokens=7))
    one.run_out()
    assert one.finish["a"] == "length"
    assert len(one.ids["a"]) == 7


def test_log_probabilities_stay_the_models_own(model: Loaded, rig: Callable[..., Rig]) -> None:
    """Of the first token: as without a grammar, though the likeliest may not be said."""
    plain = answers_with_logprobs(rig(), None)
    masked = answers_with_logprobs(rig(), CODE)
    assert masked[0].top == plain[0].top
    assert chr(masked[0].token_id) in "abcdef"
    assert masked[0].logprob < plain[0].top[0][1]


def answers_with_logprobs(one: Rig, grammar: Grammar | None) -> Any:
    one.engine.submit(asked("a", grammar, 1, max_tokens=2, logprobs=3))
    while True:
        results = one.engine.step()
        if results and results.steps:
            one.run_out()
            return results.steps[0].logprobs


def test_nobody_else_is_changed(model: Loaded, rig: Callable[..., Rig]) -> None:
    others = neighbours(8, 256, 40)
    alone = answers(engine(model), *others)
    one = rig()
    for n, other in enumerate(neighbours(8, 256, 40)):
        one.engine.submit(other)
        one.engine.submit(asked(f"g{n}", (OF_PERSON, CODE, CHOICE)[n % 3], n, temperature=1.0))
    one.engine.submit(asked("bad", BAD))
    one.run_out()
    assert {it.request_id: one.ids[it.request_id] for it in others} == alone
    mixed = {name: ids for name, ids in one.ids.items() if name.startswith("g")}
    for n in range(8):
        each = rig()
        each.engine.submit(asked(f"g{n}", (OF_PERSON, CODE, CHOICE)[n % 3], n, temperature=1.0))
        each.run_out()
        assert each.ids[f"g{n}"] == mixed[f"g{n}"]


def test_preempted_ones_go_on_where_they_were(rig: Callable[..., Rig]) -> None:
    names = [str(n) for n in range(6)]
    alone = {}
    for n, name in enumerate(names):
        one = rig()
        one.engine.submit(asked(name, OF_PERSON, n, temperature=1.0, max_tokens=120))
        one.run_out()
        alone[name] = one.ids[name]
    crowded = rig(num_blocks=14)
    for n, name in enumerate(names):
        crowded.engine.submit(asked(name, OF_PERSON, n, temperature=1.0, max_tokens=120))
    crowded.run_out()
    assert crowded.engine.gauges().preemptions > 0
    assert crowded.ids == alone


@pytest.mark.parametrize("stop_ids", [(END_ID,), ()])
def test_a_stream_resumed_anywhere_says_the_rest(
    rig: Callable[..., Rig], stop_ids: Sequence[int]
) -> None:
    """As when its region is lost: at each of its tokens, also at the last."""
    one = rig()
    for grammar in (OF_PERSON, CODE):
        first = asked("whole", grammar, 1, temperature=1.0, stop_ids=stop_ids)
        one.engine.submit(first)
        one.run_out()
        ids = one.ids.pop("whole")
        for count in range(len(ids) + (not stop_ids)):
            again = asked(f"from {count}", grammar, 1, temperature=1.0, stop_ids=stop_ids)
            again.token_ids += ids[:count]
            one.engine.submit(again)
        one.run_out()
        for count in range(len(ids) + (not stop_ids)):
            assert one.ids[f"from {count}"] == ids[count:]
            assert one.finish[f"from {count}"] == "stop"
        one.ids.clear()


def test_what_does_not_match_cannot_be_resumed(rig: Callable[..., Rig]) -> None:
    one = rig()
    wrong = asked("wrong", CODE)
    wrong.token_ids += b"xyz"
    one.engine.submit(wrong)
    one.run_out()
    assert "the answer so far does not match it" in one.refused["wrong"].detail


@pytest.mark.parametrize(
    ("grammar", "field"),
    [
        (BAD, "'/grammar': "),
        (Grammar("json_schema", '{"type": "nope"}'), "'/grammar': "),
        (Grammar("choice", "[]"), "'/grammar': no choice"),
        (Grammar("lark", "start: start"), "'/grammar': nothing can match it"),
        (Grammar("regex", "a" * 70_000), "'/grammar': it is longer than 65536 bytes"),
        (Grammar("regex", "é" * 40_000), "'/grammar': more than 65536 bytes"),
    ],
)
def test_a_bad_grammar_is_refused_before_anything_is_computed(
    rig: Callable[..., Rig], grammar: Grammar, field: str
) -> None:
    """The second time at once, from memory."""
    one = rig()
    for n in range(2):
        one.engine.submit(asked(str(n), grammar))
        if n:
            assert one.step()
            assert "1" in one.refused
        one.run_out()
        assert one.refused[str(n)].code == "bad_input"
        assert f"Bad input: Error: {field}" in one.refused[str(n)].detail
    assert one.engine.gauges().step == 0
    assert one.engine.gauges().waiting == 0


def test_steps_go_on_while_a_grammar_is_made_ready(rig: Callable[..., Rig]) -> None:
    """Its child alone takes as long to start as dozens of steps."""
    one = rig()
    one.engine.submit(asked("plain", None, max_tokens=200, stop_ids=()))
    one.engine.submit(asked("a", Grammar("regex", "x{3}y{2}")))
    assert one.engine.gauges().waiting == 2
    one.step()
    steps = 0
    while "a" not in one.ids:
        one.step()
        steps += 1
    assert steps > 1
    one.run_out()
    assert one.text("a") == "xxxyy"
    assert len(one.ids["plain"]) == 200


def test_one_that_is_dropped_meanwhile_is_forgotten(rig: Callable[..., Rig]) -> None:
    one = rig()
    one.engine.do(Submit(asked("a", Grammar("regex", "x{3}y{3}"))))
    one.engine.do(Drop("a"))
    assert one.engine.gauges().waiting == 0
    one.engine.submit(asked("b", Grammar("regex", "x{3}y{3}")))
    one.run_out()
    assert set(one.ids) == {"b"}


def test_a_grammar_that_fails_later_ends_its_request_alone(
    model: Loaded, rig: Callable[..., Rig]
) -> None:
    """The matcher of one of three is broken between two steps, as by a limit that it meets."""
    one = rig()
    for name in "abc":
        one.engine.submit(asked(name, OF_PERSON, ord(name), temperature=1.0))
    while not all(len(one.ids.get(name, ())) > 3 for name in "abc"):
        one.step()
    # The one that began last has just 4 tokens; others may have ended, if it waited for long.
    victim = list(model.runner._masks._states.values())[-1]
    assert victim.matcher is not None
    victim.renewed = True  # a second chance it has had
    victim.matcher.consume_token(END_ID)  # which may not follow yet
    one.run_out()
    assert len(one.refused) == 1
    (refused,) = one.refused.values()
    assert refused.code == "bad_input"
    assert "its grammar cannot be followed" in refused.detail
    for name in {*"abc"} - {refused.request_id}:
        jsonschema.validate(json.loads(one.text(name)), PERSON)
    assert one.engine.gauges().free_blocks == one.engine.gauges().total_blocks
    one.engine.submit(asked("d", OF_PERSON, temperature=1.0))
    one.run_out()
    jsonschema.validate(json.loads(one.text("d")), PERSON)


def test_a_rank_that_is_told_a_plan_only_does_the_same(
    model: Loaded, rig: Callable[..., Rig]
) -> None:
    """Plans are values: another runner of the model, given the same ones, samples the same."""
    one = rig()
    plans: list[bytes] = []
    run = one.engine._runner.run
    found: list[Any] = []

    class Watched:
        def __getattr__(self, name: str) -> Any:
            return getattr(model.runner, name)

        def run(self, plan: StepPlan) -> Any:
            plans.append(msgspec.msgpack.encode(plan))
            found.append(run(plan))
            return found[-1]

    one.engine._runner = Watched()
    one.engine.submit(asked("a", OF_PERSON, temperature=1.0))
    one.engine.submit(asked("b", CODE, 1, temperature=1.0))
    one.run_out()
    model.runner.tags.reset()
    again = [model.runner.run(msgspec.msgpack.decode(it, type=StepPlan)) for it in plans]
    assert again == found


def test_an_engine_without_a_vocabulary_refuses(model: Loaded) -> None:
    one = engine(model)
    one.submit(asked("a", CODE))
    results = one.step()
    assert results is not None
    (refused,) = results.answers
    assert isinstance(refused, Refused)
    assert (refused.code, refused.detail) == ("bad_input", "grammars are not offered here")
