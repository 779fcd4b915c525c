"""The soak: what it asks and takes for right, what its checks find, and a minute of it."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from typing import Any
from zlib import crc32

import msgspec
import pytest

from infire.admission import Limits
from infire.notes import Submit
from infire.request import SamplingParams, Sequence
from loadtest.bench.host_model import END_ID, VOCABULARY
from loadtest.bench.soak.asks import NEAR, TENANTS, Asked, Hearing, ask, judged, refusal, whole
from loadtest.bench.soak.checks import (
    Check,
    Deaths,
    answers_check,
    findings_check,
    rows_check,
    table,
    told_check,
)
from loadtest.bench.soak.clients import Answered
from loadtest.bench.soak.engine import FIRST, NUM_IDS, answer_to, checksum_engine
from loadtest.bench.soak.faults import Fault
from loadtest.bench.soak.fleet import left_files, not_idle, not_zero
from routing.reconcile import Missing, Over, Short
from routing.region import ProcessReport
from tests.routing.test_rows import told

EDGES = ["edge-0", "edge-1"]


def asked(**other: Any) -> Asked:
    fields: dict[str, Any] = {
        "tenant": "acme",
        "near": "weur",
        "edge": 0,
        "chat": False,
        "stream": True,
        "prompt": "hi",
        "max_tokens": 8,
        "stop": None,
        "act": "read",
        "leave_after": 1.0,
    }
    return Asked(**(fields | other))


class TestEngine:
    def test_the_next_character_is_read_off_a_checksum(self) -> None:
        """Of four bytes an id, least first: by hand for the first two."""
        context = bytes([104, 0, 0, 0, 105, 0, 0, 0])
        first = FIRST + crc32(context) % NUM_IDS
        second = FIRST + crc32(context + bytes([first, 0, 0, 0])) % NUM_IDS
        assert answer_to([104, 105], 2) == chr(first) + chr(second)

    def test_it_says_so_however_its_kv_came_to_be(self) -> None:
        """In chunks, with prompts that share blocks, in too little room for all at once."""
        limits = Limits(max_step_tokens=24, max_running=4, vocab_size=VOCABULARY)
        _, engine = checksum_engine(
            model="m", kv_tokens=160, block_tokens=16, limits=limits, step_s=0.0
        )
        shared = list(b"what all of these prompts begin with")
        prompts = {f"{n}": [*shared, *range(40, 40 + n * n)] for n in range(1, 6)}
        for name, ids in prompts.items():
            sampling = SamplingParams(max_tokens=30, seed=1)
            engine.do(
                Submit(
                    Sequence(
                        request_id=name,
                        model="m",
                        token_ids=list(ids),
                        num_prompt=len(ids),
                        sampling=sampling,
                    )
                )
            )
        said = dict.fromkeys(prompts, "")
        while results := engine.step():
            for step in results.steps:
                said[step.request_id] += "".join(map(chr, step.ids))
        assert said == {name: answer_to(ids, 30) for name, ids in prompts.items()}


class TestAsking:
    def test_a_seed_is_a_course_of_asking(self) -> None:
        courses = []
        for seed in ("1/0", "1/0", "1/1"):
            chance = random.Random(seed)
            courses.append([ask(chance, 2) for _ in range(200)])
        assert courses[0] == courses[1] != courses[2]
        flat = courses[0]
        assert {it.tenant for it in flat} == set(TENANTS)
        assert {it.near for it in flat} == set(NEAR)
        assert {it.act for it in flat} == {"read", "leave", "slow"}
        assert len({it.prompt[:16] for it in flat if len(it.prompt) > 100}) < 20
        for it in flat:
            assert it.stop is None or it.completion_tokens == len(it.answer) + len(it.stop)
            assert it.completion_tokens <= it.max_tokens

    def test_a_chats_prompt_is_what_the_template_makes_of_it(self) -> None:
        assert asked(chat=True).prompt_ids == [104, 105, END_ID, 64]
        assert asked().prompt_ids == [104, 105]


def line(text: str) -> str:
    return "data: " + msgspec.json.encode({"response": text}).decode()


def told_usage(tokens: int) -> str:
    used = {"prompt_tokens": 2, "completion_tokens": tokens}
    return "data: " + msgspec.json.encode({"response": "", "usage": used}).decode()


ERROR = 'event: error\ndata: {"success": false, "errors": [{"code": 7009, "message": "lost"}]}'
DONE = "data: [DONE]"


@pytest.mark.parametrize(
    ("lines", "verdict"),
    [
        ([line("{0}"), "", told_usage(8), DONE], "ok"),
        ([line("{0}"), told_usage(7), DONE], "wrong: told (2, 7) tokens"),
        ([line("{0}"), told_usage(8)], "wrong: ended without [DONE]"),
        ([line("?{0}"), told_usage(8), DONE], "wrong: '?"),
        ([line("{1}"), told_usage(8), DONE], "wrong: "),
        ([line("{0}"), told_usage(8), DONE, DONE], "wrong: after the end"),
        ([line("{1}"), ERROR], "broke off: 7009"),
        ([line("?"), ERROR], "wrong: '?' before an error"),
        ([ERROR, DONE], "wrong: after the end"),
    ],
)
def test_what_is_taken_for_right(lines: list[str], verdict: str) -> None:
    """{0} stands for the right answer, {1} for its beginning."""
    request, hearing = asked(), Hearing()
    right = request.answer
    for text in lines:
        for part in text.splitlines():
            if part.startswith('data: {"response":"'):
                body = msgspec.json.decode(part.removeprefix("data: "))
                filled = body["response"].replace("{0}", right).replace("{1}", right[:3])
                part = "data: " + msgspec.json.encode(body | {"response": filled}).decode()
            hearing.take(part)
    assert hearing.verdict(request).startswith(verdict)


def test_whole_answers_of_both_apis() -> None:
    native, chat = asked(stream=False), asked(stream=False, chat=True)
    used = {"prompt_tokens": 2, "completion_tokens": 8}
    body = {"result": {"response": native.answer, "usage": used}}
    assert whole(native, msgspec.json.encode(body)) == ("ok", used)
    used = {"prompt_tokens": 4, "completion_tokens": 8}
    body = {"choices": [{"message": {"content": chat.answer}}], "usage": used}
    assert whole(chat, msgspec.json.encode(body)) == ("ok", used)
    assert judged(chat, chat.answer[:-1], used).startswith("wrong")


def test_which_refusals_are_well_formed() -> None:
    good = b'{"success": false, "errors": [{"code": 3040}]}'
    assert refusal(429, good) == "refused: 429/3040"
    for status, content in ((500, good), (503, b"upstream"), (503, b"[]"), (503, b"{}")):
        assert refusal(status, content).startswith(f"wrong: {status}")


def answered(verdict: str, **other: Any) -> Answered:
    fields = {"asked": asked(), "began": 100.0, "ended": 110.0, "request_id": "a"}
    return Answered(verdict=verdict, **(fields | other))


def kill(kind: str, name: str, at: float) -> Fault:
    return Fault(what="kill", kind=kind, name=name, at=at)


def test_kv_that_is_left_is_found_by_the_process_that_left_it(tmp_path: Path) -> None:
    """Folders as `origin_gpu.kv_files` names them, whole and half made."""
    mine = ["edgefire-kv-77-0123abcd", ".edgefire-kv-77-0123abcd"]
    for name in (*mine, "edgefire-kv-7-0123abcd", "edgefire-kv-777-0123abcd", "other"):
        (tmp_path / name).mkdir()
    found = left_files({1, 77}, [tmp_path])
    assert sorted(found) == sorted(str(tmp_path / name) for name in mine)
    assert left_files({1}, [tmp_path]) == []


class TestChecks:
    def test_an_answer_cut_off_is_excused_by_the_death_of_its_own_edge(self) -> None:
        cut = [answered("cut: ReadError")]
        for kills, is_good in [
            ([], False),
            ([kill("edge", "edge-0", 105.0)], True),
            ([kill("edge", "edge-1", 105.0)], False),
            ([kill("edge", "edge-0", 120.0)], False),
            ([kill("front", "edge-0", 105.0)], False),
        ]:
            assert (not answers_check(cut, EDGES, Deaths(kills)).problems) == is_good
        for verdict in ("hang", "wrong: 'x'"):
            dead = Deaths([kill("edge", "edge-0", 105.0)])
            assert answers_check([answered(verdict)], EDGES, dead).problems
        well = [answered("ok"), answered("left"), answered("refused: 503/7009")]
        assert not answers_check(well, EDGES, Deaths([])).problems

    def test_findings_are_excused_by_a_kill_of_the_right_kind_and_time(self) -> None:
        row = told("a", started=100.0, ended=110.0)
        missing, short = Missing(request_id="a", row=row), Short(request_id="a", told=5, known=2)
        over = Over(request_id="a", told=5, made=6)
        for finding, kind, is_good in [
            (missing, "edge", True),
            (missing, "front", False),
            (short, "front", True),
            (short, "edge", False),
            (over, "edge", False),
            (over, "front", False),
        ]:
            for at, in_time in ((105.0, True), (90.0, False), (120.0, False)):
                deaths = Deaths([kill(kind, "x", at)])
                check = findings_check([finding], [], {"a": row}, deaths)
                assert (not check.problems) == (is_good and in_time)

    def test_what_a_paused_front_heard_when_it_woke_up_had_begun_before(self) -> None:
        """Its edge was killed meanwhile: 95 lies in a pause from 92 to 99, and the row says 100."""
        row = told("a", started=100.0, ended=100.1, source="journal")
        missing = Missing(request_id="a", row=row)
        for length_s, is_good in [(7.0, True), (4.0, False)]:
            pause = Fault(what="pause", kind="front", name="f", at=92.0, length_s=length_s)
            deaths = Deaths([pause, kill("edge", "edge-0", 95.0)])
            assert (not findings_check([missing], [], {"a": row}, deaths).problems) == is_good

    def test_usage_is_compared_with_what_was_told(self) -> None:
        usage = {"prompt_tokens": 2, "completion_tokens": 8}
        heard = [answered("ok", usage=usage)]
        right = told("a", completion_tokens=8)
        guessed = told("a", completion_tokens=9, source="journal", account="")
        for rows, is_good in [
            ([right], True),
            ([guessed], True),
            ([told("a", completion_tokens=9)], False),
            ([told("a", completion_tokens=7, source="journal")], False),
            ([told("a", completion_tokens=8, account="globex")], False),
            ([told("a", completion_tokens=8, prompt_tokens=3)], False),
            ([], False),
        ]:
            by_id = {row.request_id: row for row in rows}
            check = told_check(heard, by_id, EDGES, Deaths([]))
            assert (not check.problems) == is_good
        both = Deaths([kill("edge", "edge-0", 105.0), kill("front", "weur-front", 104.0)])
        assert not told_check(heard, {}, EDGES, both).problems
        assert not told_check([answered("refused: 503/7009")], {}, EDGES, Deaths([])).problems

    def test_rows_that_are_too_many(self) -> None:
        assert not rows_check([told("a")], [answered("ok")]).problems
        assert rows_check([told("a"), told("a")], [answered("ok")] * 2).problems
        assert rows_check([told("a"), told("b")], [answered("ok")]).problems

    def test_what_is_not_back_where_it_started_is_named(self) -> None:
        metrics = (
            "# HELP edgefire_front_in_flight Requests.\nedgefire_front_in_flight 0.0\n"
            'edgefire_front_worker_tokens{worker="w"} 7.0\nedgefire_front_requests_total 9.0\n'
        )
        assert not_zero(metrics) == ['edgefire_front_worker_tokens{worker="w"} 7.0']
        report = ProcessReport(name="w", region="r", role="both", pid=1, url="u", epoch="e")
        assert not_idle(report) == []
        busy = msgspec.structs.replace(report, held=1, free_blocks=3, total_blocks=5)
        assert not_idle(busy) == ["1 held", "2 blocks in use"]

    def test_the_table_counts_outcomes_and_faults_and_names_problems(self) -> None:
        answers = [answered("ok"), answered("ok"), answered("cut: ReadError"), answered("left")]
        check = Check(name="answers", problems=[f"number {n}" for n in range(7)], seen="4 requests")
        said = table(answers, [kill("edge", "edge-0", 1.0)], [check])
        assert "| ok | 2 |" in said
        assert "| cut | 1 |" in said
        assert "| edge | 1 | 0 |" in said
        assert "| answers | 4 requests | FAILED |" in said
        assert "answers: number 4\n" in said
        assert "answers: and 2 more\n" in said


def killed(report: str, kind: str) -> int:
    """How many of `kind` were killed, by the table of faults."""
    [row] = [it for it in report.splitlines() if it.startswith(f"| {kind} |")]
    return int(row.split("|")[2])


@pytest.mark.slow
@pytest.mark.system
@pytest.mark.timeout(600)
def test_a_minute_of_it(tmp_path: Path) -> None:
    """Everything checked, over real sockets and processes that are really killed."""
    words = ["--minutes", "1", "--seed", "2", "--folder", str(tmp_path / "soak")]
    done = subprocess.run(
        [sys.executable, "-m", "loadtest.bench.soak", *words, "--fault-every-s", "2"],
        capture_output=True,
        text=True,
        timeout=550,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "FAILED" not in done.stdout
    assert "| ok |" in done.stdout
    for kind in ("edge", "front"):  # of those the least are drawn
        assert killed(done.stdout, kind)
