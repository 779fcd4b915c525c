"""Asking regions in turn, with scripted links: who is asked, with what, and what comes out."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import anyio
import pytest

from edge.upstream import generate
from routing import wire
from routing.choose import Choice
from routing.errors import Code, Failure
from routing.link import Call
from routing.region import ModelReport

Event = wire.Event
TOKENS = [wire.Tokens((n,)) for n in range(1, 6)]  # the whole answer: 1 2 3 4 5
REQUEST = wire.Generate(
    request_id="r",
    tenant_salt=b"",
    model="m",
    tokenizer_digest="t",
    token_ids=(0,),
    sampling=wire.Sampling(max_tokens=5, seed=1, stop_ids=(99,)),
    budget_s=10.0,
)
FINISH = wire.Finish("length", wire.Usage(prompt_tokens=1, completion_tokens=5))

ELSEWHERE = [code for code in Code if code.elsewhere]


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Regions come back within moments, or never."""
    monkeypatch.setattr("edge.upstream.COME_BACK_S", 0.02)
    monkeypatch.setattr("edge.upstream.LOOK_S", 0.001)


def fault(code: Code, retry_after_s: float | None = None) -> wire.Fault:
    return wire.Fault(code, f"{code}", retry_after_s)


class ScriptedLink:
    """Gives each call the next script, in one burst, and then nothing more."""

    def __init__(self, scripts: Sequence[Sequence[Event | None] | Failure]) -> None:
        self._scripts = list(scripts)
        self.asked: list[wire.Generate] = []
        self.hung_up = 0

    @property
    def is_there(self) -> bool:
        return bool(self._scripts)

    def open_nowait(self, request: wire.Generate, sink: Callable[[Event | None], None]) -> Call:
        self.asked.append(request)
        script = self._scripts.pop(0)
        if isinstance(script, Failure):
            raise script
        for event in script:
            sink(event)
        return Call(self._hang_up)

    def _hang_up(self) -> None:
        self.hung_up += 1


class Regions:
    """What `edge.watch.Watch` is to `generate`, with a record of the verdicts. A region comes back
    as often as it has scripts."""

    def __init__(self, **scripts: Sequence[Sequence[Event | None] | Failure]) -> None:
        self.links = {name: ScriptedLink(script) for name, script in scripts.items()}
        self.verdicts: list[str] = []
        self.digests = dict.fromkeys(scripts, "m")
        self.looks = 0.0  # whether one is back
        self.num_ranked = 0

    def link(self, region: str) -> Any:
        return self.links[region]

    def now(self) -> float:
        return self.looks

    def reached_since(self, region: str, moment: float) -> bool:
        self.looks += 1
        return self.looks > moment + 2 and self.links[region].is_there

    async def wait_reached(self, moment: float) -> None:
        while not any(self.reached_since(name, moment) for name in self.links):
            await anyio.sleep(0.001)

    def called(self, region: str) -> None:
        self.verdicts.append(f"{region} called")

    def succeeded(self, region: str) -> None:
        self.verdicts.append(f"{region} well")

    def failed(self, region: str) -> None:
        self.verdicts.append(f"{region} failed")

    def abandoned(self, region: str) -> None:
        self.verdicts.append(f"{region} abandoned")

    def draining(self, region: str, model: str) -> None:
        self.verdicts.append(f"{region} draining")

    def choose(self) -> list[Choice]:
        self.num_ranked += 1
        return [
            Choice(
                region=name,
                model=ModelReport(
                    model="m",
                    model_digest=self.digests[name],
                    tokenizer_digest="t",
                    context_window=9,
                    max_sequence_tokens=9,
                ),
                reasons=(),
            )
            for name in self.links
        ]

    async def answer(self, request: wire.Generate = REQUEST) -> list[Event]:
        """Every event of the answer, bursts laid end to end."""
        tries = len(self.links) + 1
        async with generate(self, self.choose, request, max_tries=tries) as answer:
            return [event async for burst in answer for event in burst]


def ids_of(events: Sequence[Event]) -> list[int]:
    return [one for event in events if isinstance(event, wire.Tokens) for one in event.ids]


class HeldLink(ScriptedLink):
    """A link whose sink the test calls."""

    def open_nowait(self, request: wire.Generate, sink: Callable[[Event | None], None]) -> Call:
        self.sink = sink
        return super().open_nowait(request, sink)


async def test_tokens_that_are_waited_for_need_no_burst() -> None:
    regions = Regions(a=[])
    regions.links["a"] = link = HeldLink([[wire.Started(0)]])
    taken: list[wire.Tokens] = []
    bursts: list[list[Event]] = []
    waits = anyio.Event()

    async def read() -> None:
        async for burst in answer:
            bursts.append(burst)
            waits.set()

    async with generate(regions, regions.choose, REQUEST, max_tries=1) as answer:
        answer.at_once = taken.append
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(read)
            await waits.wait()
            await anyio.wait_all_tasks_blocked()
            link.sink(TOKENS[0])
            link.sink(TOKENS[1])
            answer.wake()
            link.sink(TOKENS[2])  # the reader has been woken: its turn first
            await anyio.wait_all_tasks_blocked()
            link.sink(TOKENS[3])
            link.sink(FINISH)
    assert taken == [TOKENS[0], TOKENS[1], TOKENS[3]]
    usage = wire.Usage(prompt_tokens=1, completion_tokens=4)
    assert bursts == [[wire.Started(0)], [TOKENS[2]], [wire.Finish("length", usage)]]
    assert answer.generated_ids == [1, 2, 3, 4]


async def test_the_first_choice_answers() -> None:
    regions = Regions(a=[[wire.Started(0), *TOKENS, FINISH, None]], b=[])
    assert await regions.answer() == [wire.Started(0), *TOKENS, FINISH]
    assert regions.verdicts == ["a called", "a well"]


async def test_the_end_needs_no_last_word_on_the_link() -> None:
    regions = Regions(a=[[*TOKENS, FINISH]])
    assert ids_of(await regions.answer()) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("code", "verdict"),
    [
        (Code.LOST, "failed"),
        (Code.UNAVAILABLE, "failed"),
        (Code.INCOMPATIBLE, "failed"),
        (Code.NO_CAPACITY, "well"),
        (Code.STALE_TOKENIZER, "well"),
        (Code.DRAINING, "draining"),
    ],
)
async def test_before_the_first_token_the_next_region_is_asked(code: Code, verdict: str) -> None:
    regions = Regions(a=[[fault(code), None]], b=[[*TOKENS, FINISH, None]])
    assert ids_of(await regions.answer()) == [1, 2, 3, 4, 5]
    assert regions.verdicts == ["a called", f"a {verdict}", "b called", "b well"]
    assert regions.links["b"].asked[0].generated_ids == ()


async def test_a_link_that_is_down_is_passed_over() -> None:
    regions = Regions(a=[Failure(Code.LOST, "down")], b=[[*TOKENS, FINISH, None]])
    assert ids_of(await regions.answer()) == [1, 2, 3, 4, 5]
    assert regions.verdicts == ["a called", "a failed", "b called", "b well"]


@pytest.mark.parametrize(
    ("code", "verdict"),
    [
        (Code.BAD_INPUT, "well"),
        (Code.UNKNOWN_MODEL, "well"),
        (Code.TIMEOUT, "abandoned"),
        (Code.INTERNAL, "failed"),
    ],
)
async def test_what_no_other_region_could_better_is_final(code: Code, verdict: str) -> None:
    regions = Regions(a=[[fault(code), None]], b=[])
    with pytest.raises(Failure) as raised:
        await regions.answer()
    assert raised.value.code is code
    assert regions.verdicts == ["a called", f"a {verdict}"]


async def test_after_tokens_the_next_region_goes_on_with_them() -> None:
    usage = wire.Usage(prompt_tokens=1, completion_tokens=5, cached_tokens=7)
    regions = Regions(
        a=[[wire.Started(1), *TOKENS[:2], fault(Code.LOST), None]],
        b=[[wire.Started(3), *TOKENS[2:], wire.Finish("length", usage), None]],
    )
    events = await regions.answer()
    assert events[0] == wire.Started(1)
    assert ids_of(events) == [1, 2, 3, 4, 5]
    assert sum(isinstance(event, wire.Started) for event in events) == 1
    # one prompt, five tokens, and what the first region found cached
    told = wire.Usage(prompt_tokens=1, completion_tokens=5, cached_tokens=1)
    assert events[-1] == wire.Finish("length", told)
    assert regions.links["b"].asked[0].generated_ids == (1, 2)
    assert regions.verdicts == ["a called", "a well", "a failed", "b called", "b well"]


async def test_tokens_that_came_with_the_fault_are_kept() -> None:
    regions = Regions(
        a=[[wire.Tokens((1, 2)), wire.Tokens((3,)), fault(Code.LOST)]],
        b=[[wire.Tokens((4, 5)), FINISH]],
    )
    assert ids_of(await regions.answer()) == [1, 2, 3, 4, 5]


async def test_a_stream_that_ends_without_a_word_was_lost() -> None:
    regions = Regions(a=[[TOKENS[0], None]], b=[[*TOKENS[1:], FINISH]])
    assert ids_of(await regions.answer()) == [1, 2, 3, 4, 5]
    assert "a failed" in regions.verdicts


async def test_an_answer_lost_after_its_last_token_needs_no_region() -> None:
    regions = Regions(a=[[*TOKENS, fault(Code.LOST), None]], b=[])
    assert (await regions.answer())[-1] == FINISH
    stopped = [TOKENS[0], wire.Tokens((99,)), fault(Code.LOST), None]
    regions = Regions(a=[stopped], b=[])
    usage = wire.Usage(prompt_tokens=1, completion_tokens=2)
    assert (await regions.answer())[-1] == wire.Finish("stop", usage)


async def test_a_stream_goes_on_only_in_the_same_model() -> None:
    regions = Regions(
        a=[[TOKENS[0], fault(Code.LOST)]],
        b=[[TOKENS[1], FINISH]],
        c=[[*TOKENS[1:], FINISH]],
    )
    regions.digests["b"] = "other weights"
    assert ids_of(await regions.answer()) == [1, 2, 3, 4, 5]
    assert regions.links["b"].asked == []


async def test_a_stream_that_has_begun_waits_for_its_region() -> None:
    regions = Regions(a=[[TOKENS[0], fault(Code.LOST)], [*TOKENS[1:], FINISH]])
    assert ids_of(await regions.answer()) == [1, 2, 3, 4, 5]
    assert regions.looks > 2  # it had said nothing since
    regions = Regions(a=[[TOKENS[0], fault(Code.LOST)], [fault(Code.LOST)], [*TOKENS[1:], FINISH]])
    with pytest.raises(Failure, match="cannot be reached"):
        await regions.answer()
    assert len(regions.links["a"].asked) == 2  # its loss may be the request's doing


async def test_a_stream_that_has_begun_is_not_ended_by_a_refusal() -> None:
    refusals = [[fault(code)] for code in (Code.NO_CAPACITY, Code.UNAVAILABLE, Code.DRAINING)]
    regions = Regions(a=[[TOKENS[0], fault(Code.LOST)], *refusals, [*TOKENS[1:], FINISH]])
    assert ids_of(await regions.answer()) == [1, 2, 3, 4, 5]
    assert [asked.generated_ids for asked in regions.links["a"].asked[1:]] == [(1,)] * 4


async def test_it_waits_for_a_region_as_long_as_is_said() -> None:
    regions = Regions(a=[[TOKENS[0], fault(Code.LOST)]])
    with anyio.fail_after(5), pytest.raises(Failure, match="cannot be reached"):
        await regions.answer()
    assert regions.looks > 2
    assert regions.num_ranked == 2  # none while nothing was heard of any: many may wait


async def test_a_request_that_has_not_begun_asks_each_region_once() -> None:
    regions = Regions(a=[[fault(Code.LOST)]], b=[Failure(Code.LOST, "down")])
    with pytest.raises(Failure) as raised:
        await regions.answer()
    assert raised.value.code is Code.LOST
    assert [len(link.asked) for link in regions.links.values()] == [1, 1]


@pytest.mark.parametrize(
    ("codes", "told"),
    [
        ([Code.LOST, Code.NO_CAPACITY], Code.NO_CAPACITY),
        ([Code.NO_CAPACITY, Code.LOST], Code.NO_CAPACITY),
        ([Code.UNAVAILABLE, Code.LOST], Code.UNAVAILABLE),
        ([Code.NO_CAPACITY, Code.STALE_TOKENIZER], Code.STALE_TOKENIZER),
    ],
)
async def test_the_most_telling_refusal_is_told(codes: list[Code], told: Code) -> None:
    regions = Regions(a=[[fault(codes[0])]], b=[[fault(codes[1])]])
    with pytest.raises(Failure) as raised:
        await regions.answer()
    assert raised.value.code is told


async def test_the_soonest_retry_is_told() -> None:
    regions = Regions(a=[[fault(Code.NO_CAPACITY, 9.0)]], b=[[fault(Code.NO_CAPACITY, 4.0)]])
    with pytest.raises(Failure) as raised:
        await regions.answer()
    assert raised.value.retry_after_s == 4.0


async def test_a_regions_addresses_are_not_told() -> None:
    said = "http://10.0.0.7:9001: closed by the peer"
    for code in (Code.LOST, Code.UNAVAILABLE, Code.INCOMPATIBLE, Code.INTERNAL):
        regions = Regions(a=[[wire.Fault(code, said)]])
        with pytest.raises(Failure) as raised:
            await regions.answer()
        assert raised.value.code is code
        assert "10.0.0.7" not in raised.value.detail


async def test_no_region_at_all() -> None:
    with pytest.raises(Failure) as raised:
        await Regions().answer()
    assert raised.value.code is Code.UNAVAILABLE


async def test_leaving_the_block_hangs_up() -> None:
    regions = Regions(a=[[TOKENS[0]]])
    async with generate(regions, regions.choose, REQUEST, max_tries=2) as answer:
        assert await anext(answer) == [TOKENS[0]]
    assert regions.links["a"].hung_up == 1
    assert regions.verdicts == ["a called", "a well"]


async def test_leaving_before_anything_came_says_nothing_of_the_region() -> None:
    regions = Regions(a=[[]])
    with anyio.move_on_after(0.01):
        await regions.answer()
    assert regions.links["a"].hung_up == 1
    assert regions.verdicts == ["a called", "a abandoned"]


async def test_time_that_passed_is_taken_off_the_budget() -> None:
    regions = Regions(a=[[TOKENS[0]], []], b=[[*TOKENS[1:], FINISH]])
    async with generate(regions, regions.choose, REQUEST, max_tries=3) as answer:
        await anext(answer)
        await anyio.sleep(0.05)
        answer._try.inbox.put(fault(Code.LOST))  # type: ignore[union-attr]
        await anext(answer)
    first, second = regions.links["a"].asked[0], regions.links["b"].asked[0]
    assert 5.0 < first.budget_s <= 10.0
    assert second.budget_s <= first.budget_s - 0.05


def broken_regions(rng: random.Random) -> tuple[Regions, bool]:
    """Regions that break anywhere, in any way that lets another go on; whether all five tokens
    are made between them. Those that come back do so in vain."""
    scripts: dict[str, list[Sequence[Event | None]]] = {}
    made = 0
    for name in "abcd"[: rng.randint(1, 4)]:
        script: list[Event | None] = [wire.Started(0)]
        upto = rng.randint(made, 5)
        while made < upto:
            size = rng.randint(1, upto - made)
            script.append(wire.Tokens(tuple(range(made + 1, made + size + 1))))
            made += size
        whole = made == 5 and rng.random() < 0.7
        script.append(FINISH if whole else fault(rng.choice(ELSEWHERE)))
        scripts[name] = [script, [wire.Started(0), fault(Code.LOST)]]
    return Regions(**scripts), made == 5


async def test_any_chain_of_losses_yields_the_same_answer() -> None:
    rng = random.Random(5)
    outcomes: Counter[bool] = Counter()
    for _ in range(300):
        regions, whole = broken_regions(rng)
        outcomes[whole] += 1
        if whole:
            events = await regions.answer()
            assert ids_of(events) == [1, 2, 3, 4, 5]
            assert [event for event in events if isinstance(event, wire.Finish)] == events[-1:]
            assert events[-1] == FINISH
        else:
            with pytest.raises(Failure) as raised:
                await regions.answer()
            assert raised.value.code.elsewhere
        asked = sum(len(link.asked) for link in regions.links.values())
        assert asked <= 2 * len(regions.links)
    assert min(outcomes.values()) > 20
