"""Thoughts and calls of tools, from tokens to pieces, and over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edge.ask import Ask, End, Piece, Said, SamplingAsk, ToolAsk
from edge.gathered import gather
from edge.texts import Loaded
from edge.tokenizer import ModelText
from edge.transcript import Transcript
from routing import wire
from routing.region import Place
from tests.edge.tool_reading import edge, events, region
from tests.fakes.counting_region import running
from tests.fakes.edge_client import EdgeClient, edge_over
from tests.fakes.model_folder import END_ID
from tests.fakes.saying_region import SayingRegion, assets_with, ids_of
from tests.fakes.tool_answers import NOW, PARIS, REQUEST, WEATHER, said
from tests.fakes.tool_templates import HARMONY, HERMES, QWEN3, SPECIAL, TEMPLATES

__all__ = ["edge", "region"]  # fixtures


TOOLS = ToolAsk(offered=(WEATHER, NOW))


class Transcribed:
    """A transcript of a model of a family, told its answer in bursts."""

    def __init__(
        self,
        family: str = "hermes",
        *,
        template: str = "",
        logprobs: int | None = None,
        **about: Any,
    ) -> None:
        self.special = SPECIAL.get(family, ())
        self.text = ModelText(assets_with(template or TEMPLATES[family], self.special))
        about = {"tools": TOOLS, "prompt": "p"} | about
        ask = Ask(model="m", sampling=SamplingAsk(logprobs=logprobs), **about)
        ids = self.text.encode_prompt(ask)
        loaded = Loaded(text=self.text, stop_ids=(END_ID,), defaults={})
        heard = self.text.read(ask, ids, REQUEST)
        self.transcript = Transcript(loaded, ask, len(ids), heard)
        self.logprobs = logprobs

    def tell(self, text: str, burst: int = 1, reason: wire.Reason = "stop") -> list[Piece]:
        ids = ids_of(text, self.special)
        pieces: list[Piece] = []
        for at in range(0, len(ids), burst):
            some = ids[at : at + burst]
            entries = () if self.logprobs is None else [wire.Logprob(one, -0.5) for one in some]
            if not self.transcript.ended:
                pieces += self.transcript.read([wire.Tokens(some, tuple(entries))])
        if not self.transcript.ended:
            used = wire.Usage(prompt_tokens=1, completion_tokens=len(ids))
            pieces += self.transcript.read([wire.Finish(reason, used)])
        return pieces


def told(pieces: list[Piece]) -> tuple[list[Said], End]:
    end = pieces[-1]
    assert isinstance(end, End)
    return [piece for piece in pieces if not isinstance(piece, End)], end  # type: ignore[misc]


WORDS = {"description": WEATHER.description, "parameters": WEATHER.parameters}


OFFERED = [
    {"name": "get_weather", **WORDS},
    {"type": "function", "function": {"name": "now"}},
]


MESSAGES = [{"role": "user", "content": "Weather?"}]


class TestTranscripts:
    @pytest.mark.parametrize("family", TEMPLATES)
    @pytest.mark.parametrize("burst", [1, 3, 1000])
    def test_calls_of_special_tokens(self, family: str, burst: int) -> None:
        pieces, end = told(Transcribed(family).tell(said(family), burst))
        made = gather(pieces)
        assert [(call.name, call.arguments) for call in made.calls] == [
            ("get_weather", PARIS),
            ("now", "{}"),
        ]
        assert made.text == ""
        assert end.reason == "tool_calls"

    def test_what_is_cut_off_was_cut_off(self) -> None:
        _, end = told(Transcribed().tell(said("hermes")[:-40], reason="length"))
        assert end.reason == "length"

    def test_an_answer_without_calls_ends_as_it_does(self) -> None:
        pieces, end = told(Transcribed().tell("Hello"))
        assert gather(pieces).text == "Hello"
        assert end.reason == "stop"

    def test_text_is_never_told_ahead_of_the_transcript(self) -> None:
        made = Transcribed().transcript
        assert made.text_of(wire.Tokens((65,))) is None
        assert Transcribed(tools=ToolAsk()).transcript.text_of(wire.Tokens((65,))) == "A"

    def test_without_tools_a_call_is_text(self) -> None:
        pieces, end = told(Transcribed(tools=ToolAsk()).tell(said("hermes")))
        assert gather(pieces).text == said("hermes")
        assert end.reason == "stop"

    def test_stop_strings_act_on_text_only(self) -> None:
        made = Transcribed(template=QWEN3, stops=("Paris", "END"))
        text = f"<think>Paris, END</think>\n\nSo.{said('hermes')}\nand END of it"
        pieces, end = told(made.tell(text))
        answer = gather(pieces)
        assert answer.reasoning == "Paris, END"
        assert answer.text == "So.\nand "
        assert [call.arguments for call in answer.calls] == [PARIS, "{}"]
        assert end.reason == "tool_calls"
        assert end.usage.completion_tokens == len(text.removesuffix(" of it").encode())

    @pytest.mark.parametrize("burst", [1, 3, 1000])
    def test_tokens_of_thoughts_are_counted(self, burst: int) -> None:
        thoughts = "<think>\nParis\n</think>"
        _, end = told(Transcribed(template=QWEN3).tell(f"{thoughts}\n\nSo.", burst))
        # With the token that completes the first mark: to models it is one.
        assert end.usage.reasoning_tokens == len(thoughts) - len("<think")
        assert end.usage.completion_tokens == len(thoughts) + 5
        _, end = told(Transcribed(template=QWEN3).tell("So.", burst))
        assert end.usage.reasoning_tokens == 0

    @pytest.mark.parametrize("burst", [1, 3, 1000])
    def test_tokens_of_a_channel_of_thoughts_are_counted(self, burst: int) -> None:
        thoughts = "<|channel|>analysis<|message|>hm<|end|>"
        text = f"{thoughts}<|start|>assistant<|channel|>final<|message|>Hi"
        made = Transcribed("harmony", template=HARMONY)
        pieces, end = told(made.tell(text, burst))
        assert (gather(pieces).reasoning, gather(pieces).text) == ("hm", "Hi")
        head = thoughts.removesuffix("<|message|>hm<|end|>")
        of_head = len(ids_of(head, made.special)) + len(ids_of("<|message|>", made.special)) - 1
        assert end.usage.reasoning_tokens == len(ids_of(thoughts, made.special)) - of_head

    def test_a_stop_string_does_not_go_on_behind_a_call(self) -> None:
        made = Transcribed(stops=("E\nND",))
        pieces, _ = told(made.tell(f"xE{said('hermes')}\nND"))
        assert gather(pieces).text == "xE\nND"

    def test_a_stop_in_what_was_held_back_counts(self) -> None:
        pieces, end = told(Transcribed(stops=("<tool",)).tell("a<tool"))
        assert gather(pieces).text == "a"
        assert end.reason == "stop"

    def test_one_call_at_a_time_ends_with_the_token_that_ends_it(self) -> None:
        tools = ToolAsk(offered=(WEATHER, NOW), most=1)
        for burst in (1, 7, 1000):
            pieces, end = told(Transcribed(tools=tools).tell(said("hermes"), burst))
            assert [call.name for call in gather(pieces).calls] == ["get_weather"]
            assert end.reason == "tool_calls"
            first = said("hermes").index("</tool_call>") + len("</tool_call>")
            assert end.usage.completion_tokens == first

    @pytest.mark.parametrize("burst", [1, 5, 1000])
    def test_every_token_has_its_log_probability(self, burst: int) -> None:
        text = f"So.{said('deepseek_v31')}"
        made = Transcribed("deepseek_v31", logprobs=0)
        pieces, _ = told(made.tell(text, burst))
        answer = gather(pieces)
        assert answer.text == "So."
        assert len(answer.calls) == 2
        assert "".join(entry.text for entry in answer.logprobs) == text


class TestOverHttp:
    async def test_openai(self, edge: EdgeClient) -> None:
        answer = (await edge.chat("Weather?", tools=OFFERED)).json()
        [choice] = answer["choices"]
        assert choice["finish_reason"] == "tool_calls"
        assert choice["message"]["content"] == "Well. "
        calls = choice["message"]["tool_calls"]
        assert [call["function"]["arguments"] for call in calls] == [PARIS, "{}"]
        assert len({call["id"] for call in calls}) == 2

    @pytest.mark.parametrize("burst", [1, 4])
    async def test_openai_streamed(
        self, edge: EdgeClient, region: SayingRegion, burst: int
    ) -> None:
        region.burst = burst
        body = {
            "model": "@cf/test/counting",
            "messages": MESSAGES,
            "stream": True,
            "tools": OFFERED,
        }
        *told, done = await events(edge, edge.chat_url, body)
        assert done == "[DONE]"
        calls: dict[int, dict[str, str]] = {}
        for frame in told:
            for delta in frame["choices"][0]["delta"].get("tool_calls", ()):
                call = calls.setdefault(delta["index"], {"arguments": ""})
                call |= {"id": delta["id"]} if "id" in delta else {}
                call |= {"name": delta["function"]["name"]} if "id" in delta else {}
                call["arguments"] += delta["function"]["arguments"]
        assert [call["name"] for call in calls.values()] == ["get_weather", "now"]
        assert [call["arguments"] for call in calls.values()] == [PARIS, "{}"]
        assert told[-1]["choices"][0]["finish_reason"] == "tool_calls"

    async def test_native(self, edge: EdgeClient) -> None:
        body = {"messages": MESSAGES, "tools": OFFERED}
        answer = await edge.http.post(edge.run_url, json=body, headers=edge.headers())
        result = answer.json()["result"]
        assert result["response"] == "Well. "
        assert result["tool_calls"][0]["arguments"] == {"city": "Paris", "days": 3}
        assert result["finish_reason"] == "tool_calls"

    async def test_native_streamed(self, edge: EdgeClient) -> None:
        body = {"messages": MESSAGES, "tools": OFFERED, "stream": True}
        *told, done = await events(edge, edge.run_url, body)
        assert done == "[DONE]"
        calls = [call for frame in told for call in frame.get("tool_calls", ())]
        assert [call["name"] for call in calls] == ["get_weather", "now"]
        assert "".join(frame["response"] for frame in told) == "Well. "

    async def test_several_choices(self, edge: EdgeClient) -> None:
        answer = (await edge.chat("Weather?", tools=OFFERED, n=2)).json()
        ids = [
            call["id"] for choice in answer["choices"] for call in choice["message"]["tool_calls"]
        ]
        assert len(set(ids)) == 4

    async def test_what_has_to_be_called_goes_to_the_region_as_a_grammar(
        self, edge: EdgeClient, region: SayingRegion
    ) -> None:
        await edge.chat("Weather?", tools=OFFERED)
        await edge.chat("Weather?", tools=OFFERED, tool_choice="required")
        free, forced = region.asked
        assert free.grammar is None
        assert forced.grammar is not None
        assert forced.grammar.kind == "lark"
        assert "get_weather" in forced.grammar.source

    async def test_a_stream_that_goes_on_elsewhere_keeps_its_calls(self, tmp_path: Path) -> None:
        """A region breaks off in the middle of a call; the next one goes on."""
        about = {"assets": assets_with(HERMES), "says": ids_of(said("hermes"))}
        first = SayingRegion(breaks_at=60, **about)
        second = SayingRegion(name="enam", place=Place(42.36, -71.06), **about)
        async with (
            running(first, second),
            edge_over(tmp_path, [first.region, second.region]) as client,
        ):
            body = {"messages": MESSAGES, "tools": OFFERED, "stream": True}
            told = await events(client, client.run_url, body)
        assert (len(first.asked), len(second.asked)) == (1, 1)
        assert len(second.asked[0].generated_ids) == 60
        calls = [call for frame in told[:-1] for call in frame.get("tool_calls", ())]
        assert [call["arguments"] for call in calls] == [{"city": "Paris", "days": 3}, {}]
