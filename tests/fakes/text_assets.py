"""Two small tokenizers of the two kinds there are, trained in a second on a text everyone can read.

`byte_level` is built like GPT-2's and SmolLM2's, `sentencepiece` like Llama 2's.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import msgspec
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing

from routing.wire import TextAssets

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_2 = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported') }}{% endif %}"
    "{% endfor %}"
)

_READER = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
    "What is the capital of France? The capital of France is Paris, on the river Seine.",
    "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)\n",
    "Größe, naïve café, façade; Ελληνικά, русский, 日本語, 中文字 and 🙂🚀👩‍👩‍👧.",
] * 8


@cache
def byte_level() -> TextAssets:
    """512 tokens over bytes, ChatML, `<|im_end|>` ends a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.train_from_iterator(
        _READER,
        trainers.BpeTrainer(
            vocab_size=512,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return TextAssets(
        tokenizer_json=tokenizer.to_str().encode(),
        chat_template=CHATML,
        special_tokens={"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"},
        stop_ids=(tokenizer.token_to_id("<|im_end|>"),),
    )


@cache
def sentencepiece() -> TextAssets:
    """700 tokens over characters, unknown ones spelled in bytes; `<s>` goes before any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    special = ["<unk>", "<s>", "</s>"]
    spelled_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special + spelled_bytes, show_progress=False
    )
    tokenizer.train_from_iterator((text.replace("日", "") for text in _READER), trainer)
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    spec: dict[str, Any] = msgspec.json.decode(tokenizer.to_str())
    spec["model"] |= {"byte_fallback": True, "unk_token": "<unk>", "fuse_unk": True}
    spec["added_tokens"] = spec["added_tokens"][: len(special)]  # the bytes are ordinary tokens
    return TextAssets(
        tokenizer_json=msgspec.json.encode(spec),
        chat_template=LLAMA_2,
        special_tokens={"bos_token": "<s>", "eos_token": "</s>"},
        stop_ids=(2,),
    )
