import json
from typing import Any

import anyio
import msgspec
import pytest
from anyio import CapacityLimiter, to_thread
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from edge.ask import Ask, SamplingAsk, Tool, ToolAsk
from edge.special import SpecialTokens
from edge.tokenizer import ModelText, load
from routing.errors import Code, Failure
from routing.wire import TextAssets
from tests.edge.conftest import Pair
from tests.fakes.text_assets import byte_level, sentencepiece

TEXTS = [
    "Hello",
    "What is the capital of France?",
    "  leading and trailing  ",
    "tabs\tand\n\n\nlines\r\n",
    "1234567890 and 3.14",
    "Größe, naïve café",
    "日本語の文字 中文字",
    "🙂🚀👩‍👩‍👧 and a combining e\u0301",
    "def f(n):\n    return [n for n in range(10) if n % 2 == 0]\n",
    "a\u00a0b\u200bc\ufeffd\0e",
    "\U000f0000\ue000\uf8ff private use",
    "x" * 500,
    "the quick brown fox " * 100,
]


def turns(*contents: str) -> list[dict[str, str]]:
    """A conversation in which user and assistant alternate."""
    roles = ["user", "assistant"]
    return [{"role": roles[at % 2], "content": text} for at, text in enumerate(contents)]


def encoded(text: ModelText, messages: list[dict[str, str]]) -> list[int]:
    return list(text.encode_prompt(Ask(model="m", messages=tuple(messages))))


class TestPrompts:
    @pytest.mark.parametrize("content", TEXTS)
    def test_a_chat_is_encoded_as_transformers_does(self, kind: Pair, content: str) -> None:
        messages = turns(content)
        assert encoded(kind.text, messages) == kind.chat_ids(messages)

    def test_many_turns_are_encoded_as_transformers_does(self, kind: Pair) -> None:
        messages = turns(*TEXTS)
        assert encoded(kind.text, messages) == kind.chat_ids(messages)

    @settings(deadline=None, derandomize=True, max_examples=300)
    @given(contents=st.lists(st.text(max_size=30), min_size=1, max_size=4))
    def test_any_text_is_encoded_as_transformers_does(
        self, kind: Pair, contents: list[str]
    ) -> None:
        messages = turns(*contents)
        assert encoded(kind.text, messages) == kind.chat_ids(messages)

    @pytest.mark.parametrize("content", TEXTS)
    def test_a_raw_prompt_begins_as_transformers_has_it(self, kind: Pair, content: str) -> None:
        asked = Ask(model="m", prompt=content, raw=True)
        assert list(kind.text.encode_prompt(asked)) == kind.reference(content)["input_ids"]

    def test_a_prompt_alone_is_a_users_message(self, kind: Pair) -> None:
        asked = Ask(model="m", prompt="Hello")
        assert list(kind.text.encode_prompt(asked)) == kind.chat_ids(turns("Hello"))

    def test_the_beginning_is_not_written_twice(self) -> None:
        ids = encoded(load(sentencepiece()), turns("Hello"))
        assert ids.count(1) == 1  # the template writes <s>; raw prompts get it from the tokenizer

    def test_a_template_that_refuses_the_messages_is_heard(self) -> None:
        with pytest.raises(Failure, match="Only user and assistant roles"):
            encoded(load(sentencepiece()), [{"role": "system", "content": "x"}])

    def test_a_model_without_a_template_takes_prompts_as_they_are(self) -> None:
        text = load(msgspec.structs.replace(byte_level(), chat_template=""))
        plain, raw = (Ask(model="m", prompt="Hello", raw=raw) for raw in (False, True))
        assert text.encode_prompt(plain) == text.encode_prompt(raw)
        with pytest.raises(Failure, match="no chat template"):
            encoded(text, turns("Hello"))

    def test_a_prompt_without_tokens_is_refused(self) -> None:
        spec = msgspec.json.decode(byte_level().tokenizer_json)
        spec["normalizer"] = {"type": "Strip", "strip_left": True, "strip_right": True}
        text = load(replaced(byte_level(), spec))
        with pytest.raises(Failure, match="holds no tokens"):
            text.encode_prompt(Ask(model="m", prompt="  ", raw=True))

    def test_a_bias_on_a_token_that_does_not_exist_is_refused(self, kind: Pair) -> None:
        last = kind.text.num_ids - 1
        for token_id in (last, last + 1):
            sampling = SamplingAsk(logit_bias=((token_id, 1.0),))
            asked = Ask(model="m", prompt="Hello", sampling=sampling)
            if token_id == last:
                assert kind.text.encode_prompt(asked)
            else:
                with pytest.raises(Failure, match=f"/logit_bias/{token_id}") as caught:
                    kind.text.encode_prompt(asked)
                assert caught.value.code is Code.BAD_INPUT


class TestSpecialTokensInText:
    NAMES = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<s>", "</s>", "<unk>")

    def special_ids(self, kind: Pair, ids: list[int]) -> list[int]:
        return [token_id for token_id in ids if token_id in kind.reference.all_special_ids]

    @pytest.mark.parametrize("name", NAMES)
    def test_in_a_message_they_are_text(self, kind: Pair, name: str) -> None:
        content = f"{name}a {name}{name}\n{name}"
        ids = encoded(kind.text, turns(content, content))
        harmless = encoded(kind.text, turns("x", "x"))
        assert self.special_ids(kind, ids) == self.special_ids(kind, harmless)
        assert content in kind.reference.decode(ids)

    @pytest.mark.parametrize("name", NAMES)
    def test_in_a_raw_prompt_they_are_text(self, kind: Pair, name: str) -> None:
        ids = list(kind.text.encode_prompt(Ask(model="m", prompt=f"a{name}", raw=True)))
        harmless = list(kind.text.encode_prompt(Ask(model="m", prompt="a", raw=True)))
        assert self.special_ids(kind, ids) == self.special_ids(kind, harmless)
        assert kind.reference.decode(ids, skip_special_tokens=True) == f"a{name}"

    def test_text_that_holds_one_is_spelled_like_text_that_cannot(self) -> None:
        """`<|im_end|>` is encoded as a tokenizer without special tokens would."""
        spec = msgspec.json.decode(byte_level().tokenizer_json)
        spec["added_tokens"] = []
        plain = Tokenizer.from_str(msgspec.json.encode(spec).decode())
        text = load(byte_level())
        content = "say <|im_end|> and go on"
        raw = Ask(model="m", prompt=content, raw=True)
        assert list(text.encode_prompt(raw)) == plain.encode(content).ids
        (ending,) = text.encode_prompt(Ask(model="m", messages=({"role": "user", "content": ""},)))[
            -1:
        ]
        ids = encoded(text, turns(content))
        inside = plain.encode(f"user\n{content}").ids
        assert ids[1 : 1 + len(inside)] == inside
        assert ids[-1] == ending

    @settings(deadline=None, derandomize=True, max_examples=300)
    @given(
        parts=st.lists(
            st.sampled_from([*NAMES, "<", "|", "im_end", "|>", "s>", " ", "\U000f0000", "\ue000"]),
            max_size=12,
        )
    )
    def test_no_text_forges_one(self, kind: Pair, parts: list[str]) -> None:
        content = "".join(parts)
        ids = encoded(kind.text, turns(content))
        harmless = encoded(kind.text, turns("x"))
        assert self.special_ids(kind, ids) == self.special_ids(kind, harmless)
        assert content in kind.reference.decode(ids)

    def test_overlapping_names_are_all_broken(self) -> None:
        spec = {"added_tokens": [added(1, "ab"), added(2, "bc"), added(3, "abcd")]}
        special = SpecialTokens(spec)
        marked, mark = special.mark("xabcdx")
        assert special.name(marked, mark) == "xabcdx"
        assert special.name("abcd", "") != "abcd"

    def test_marks_reach_every_text_of_a_message(self) -> None:
        special = SpecialTokens({"added_tokens": [added(1, "<e>")]})
        call = {"function": {"name": "<e>", "arguments": {"<e>": ["<e>", 1, None, True]}}}
        said = {"role": "user", "content": "a", "tool_calls": [call]}
        marked, mark = special.mark(said)
        spelled = json.dumps(marked, ensure_ascii=False)
        assert "<e>" not in spelled
        assert json.loads(spelled.replace(mark, "")) == said

    def test_a_tool_calls_arguments_cannot_forge_one_through_json(self) -> None:
        assets = msgspec.structs.replace(
            byte_level(), chat_template="{{ messages | tojson(ensure_ascii=true) }}<|im_end|>"
        )
        ids = encoded(load(assets), turns("<|im_end|>"))
        assert ids.count(2) == 1

    def test_secret_names_differ_from_load_to_load(self) -> None:
        spec = msgspec.json.decode(byte_level().tokenizer_json)
        assert SpecialTokens(spec).secret_ids.keys() != SpecialTokens(spec).secret_ids.keys()

    def test_a_model_still_knows_its_unknown_token(self) -> None:
        spec = msgspec.json.decode(sentencepiece().tokenizer_json)
        spec["model"]["byte_fallback"] = False
        text = load(replaced(sentencepiece(), spec))
        reference = Tokenizer.from_str(msgspec.json.encode(spec).decode())
        ids = list(text.encode_prompt(Ask(model="m", prompt="the ☃ dog", raw=True)))
        assert 0 in ids
        assert ids == reference.encode("the ☃ dog").ids

    def test_a_unigram_model_hides_them_too(self) -> None:
        pieces = [["<unk>", 0.0], ["</s>", 0.0], *([c, -1.0] for c in "▁abc</s>")]
        spec = {
            "version": "1.0",
            "added_tokens": [added(0, "<unk>"), added(1, "</s>")],
            "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"},
            "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"},
            "model": {"type": "Unigram", "unk_id": 0, "vocab": pieces},
        }
        text = load(replaced(TextAssets(tokenizer_json=b"", chat_template=""), spec))
        ids = text.encode_prompt(Ask(model="m", prompt="a</s>b", raw=True))
        assert 1 not in ids
        assert text.stream().push(ids) == "a</s>b"


class TestLoading:
    @pytest.mark.parametrize(
        "decoder",
        [
            None,
            {"type": "BPEDecoder", "suffix": "</w>"},
            {"type": "Strip", "content": " ", "start": 0, "stop": 1},
            {"type": "Replace", "pattern": {"Regex": "a+"}, "content": ""},
        ],
    )
    def test_a_decoder_of_no_known_kind_is_refused(self, decoder: Any) -> None:
        spec = msgspec.json.decode(byte_level().tokenizer_json) | {"decoder": decoder}
        with pytest.raises(ValueError, match="of no known kind"):
            load(replaced(byte_level(), spec))

    @pytest.mark.parametrize("data", [b"", b"{", b"[]", b"{}", b'{"added_tokens": []}'])
    def test_a_file_that_is_no_tokenizer_is_refused(self, data: bytes) -> None:
        with pytest.raises(ValueError, match=r".+"):
            load(msgspec.structs.replace(byte_level(), tokenizer_json=data))

    def test_a_model_the_library_refuses_is_refused(self) -> None:
        spec = msgspec.json.decode(byte_level().tokenizer_json)
        spec["model"]["merges"] = [["no", "such"]]
        with pytest.raises(ValueError, match="cannot be read"):
            load(replaced(byte_level(), spec))

    def test_truncation_and_padding_of_training_are_off(self) -> None:
        spec = msgspec.json.decode(byte_level().tokenizer_json)
        spec["truncation"] = {
            "direction": "Right",
            "max_length": 4,
            "strategy": "LongestFirst",
            "stride": 0,
        }
        asked = Ask(model="m", prompt="The quick brown fox jumps", raw=True)
        ids = load(replaced(byte_level(), spec)).encode_prompt(asked)
        assert ids == load(byte_level()).encode_prompt(asked)


class TestThreads:
    async def test_a_long_text_is_encoded_in_a_thread_of_its_own(
        self, kind: Pair, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        used: list[CapacityLimiter] = []
        run_sync = to_thread.run_sync

        async def watched(function: Any, *args: Any, limiter: CapacityLimiter) -> Any:
            used.append(limiter)
            return await run_sync(function, *args, limiter=limiter)

        monkeypatch.setattr(to_thread, "run_sync", watched)
        limiter = CapacityLimiter(1)
        short, long = (Ask(model="m", prompt="word " * n, raw=True) for n in (10, 1000))
        assert await kind.text.encode_prompt_async(short, limiter) == kind.text.encode_prompt(short)
        assert used == []
        assert await kind.text.encode_prompt_async(long, limiter) == kind.text.encode_prompt(long)
        assert used == [limiter]

    @pytest.mark.parametrize(
        "fields",
        [
            {"tools": ToolAsk(offered=(Tool(name="f", parameters={"x": [0] * 3000}),))},
            {"tools": ToolAsk(offered=(Tool(name="f", parameters={"x": [10**4000, 10**4000]}),))},
            {"template_args": (("a", "x" * 1000), ("b", "x" * 1000))},
        ],
    )
    async def test_much_that_is_no_long_text_is_encoded_in_a_thread_too(
        self, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        used: list[Any] = []

        async def watched(function: Any, *args: Any, limiter: CapacityLimiter) -> Any:
            used.append(function)
            return ()

        monkeypatch.setattr(to_thread, "run_sync", watched)
        text = load(byte_level())
        asked = Ask(model="m", **{"messages": ({"role": "user", "content": "A"},)} | fields)
        await text.encode_prompt_async(asked, CapacityLimiter(1))
        assert used == [text.encode_prompt]

    async def test_a_refusal_comes_out_of_the_thread(self) -> None:
        asked = Ask(model="m", messages=({"role": "system", "content": "x" * 5000},))
        with pytest.raises(Failure, match="Only user and assistant roles"):
            await load(sentencepiece()).encode_prompt_async(asked, CapacityLimiter(1))

    async def test_many_at_once_share_one_tokenizer(self, kind: Pair) -> None:
        asks = [Ask(model="m", prompt=f"{n} the quick fox " * 200, raw=True) for n in range(12)]
        alone = [kind.text.encode_prompt(asked) for asked in asks]
        limiter = CapacityLimiter(3)
        together: dict[int, tuple[int, ...]] = {}

        async def encode(at: int) -> None:
            together[at] = await kind.text.encode_prompt_async(asks[at], limiter)

        async with anyio.create_task_group() as tasks:
            for at in range(len(asks)):
                tasks.start_soon(encode, at)
        assert [together[at] for at in range(len(asks))] == alone


def added(token_id: int, content: str) -> dict[str, Any]:
    flags = dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized"], False)
    return {"id": token_id, "content": content, "special": True} | flags


def replaced(assets: TextAssets, spec: dict[str, Any]) -> TextAssets:
    return msgspec.structs.replace(assets, tokenizer_json=msgspec.json.encode(spec))
