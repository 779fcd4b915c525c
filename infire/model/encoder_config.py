"""What an encoder is made of, read from its model folder. Knows no weights and no tensors.

Encoders of BERT's family read all of a text at once and make one vector of it: no KV, no sampling.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec
from msgspec import Struct

from infire.model.config import BadModel, MissingFile, UnsupportedModel
from infire.notes import Pooling

POOLING_FILE = "pooling.json"  # as `infire pull` names 1_Pooling/config.json of its source
_MODULES_FILE = "modules.json"
_COMPUTED = ("Transformer", "Pooling", "Normalize")  # modules; one left out is another vector


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderFamily:
    """How the files of an architecture depart from those of `BertModel`."""

    prefix: str = ""  # of its tensors' names
    counts_padding: bool = False  # positions begin after that of the padding token, as RoBERTa's do


ENCODERS = {
    "BertModel": EncoderFamily(),
    "BertForMaskedLM": EncoderFamily(prefix="bert."),
    "RobertaModel": EncoderFamily(counts_padding=True),
    "RobertaForMaskedLM": EncoderFamily(prefix="roberta.", counts_padding=True),
    "XLMRobertaModel": EncoderFamily(counts_padding=True),
    "XLMRobertaForMaskedLM": EncoderFamily(prefix="roberta.", counts_padding=True),
}


class _File(Struct, frozen=True, kw_only=True):
    """The fields of `config.json` that encoders here differ by."""

    architectures: tuple[str, ...]
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    hidden_act: str = "gelu"
    pad_token_id: int | None = None
    position_embedding_type: str = "absolute"
    is_decoder: bool = False
    quantization_config: dict[str, object] | None = None


class _Architectures(Struct, frozen=True):
    architectures: tuple[str, ...] = ()


class _PoolingFile(Struct, frozen=True):
    """What sentence-transformers makes one vector of a text's by."""

    pooling_mode_cls_token: bool = False
    pooling_mode_mean_tokens: bool = False


class _Module(Struct, frozen=True):
    type: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderConfig:
    """An encoder, in full: two with equal configurations compute the same function."""

    prefix: str  # of its tensors' names
    vocab_size: int
    hidden_size: int  # and numbers of a vector
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_positions: int  # rows of the table of position embeddings
    first_position: int  # row of a text's first token
    num_types: int
    norm_eps: float
    activation: str
    pooling: Pooling  # where a request says nothing
    normalized: bool  # vectors are scaled to length 1

    @property
    def context_window(self) -> int:
        """Tokens of the longest text."""
        return self.num_positions - self.first_position


def is_encoder(folder: Path) -> bool:
    """Whether the model in `folder` makes vectors, and no text; of a folder that cannot be read,
    whoever loads it says why."""
    try:
        architectures = _read(folder / "config.json", _Architectures).architectures
    except BadModel:
        return False
    return any(name in ENCODERS for name in architectures)


def read_encoder(folder: Path) -> EncoderConfig:
    """The encoder in a model folder. Raises `MissingFile`, `UnsupportedModel`, `BadModel`."""
    file = _read(folder / "config.json", _File)
    family = _family(file.architectures)
    _refuse_unsupported(file)
    if file.hidden_size % file.num_attention_heads:
        raise BadModel(f"{file.num_attention_heads} heads cannot share {file.hidden_size} numbers")
    # https://github.com/huggingface/transformers: create_position_ids_from_input_ids
    first = 1 + (file.pad_token_id or 0) if family.counts_padding else 0
    if file.max_position_embeddings <= first:
        raise BadModel(f"max_position_embeddings {file.max_position_embeddings} leave no position")
    return EncoderConfig(
        prefix=family.prefix,
        vocab_size=file.vocab_size,
        hidden_size=file.hidden_size,
        intermediate_size=file.intermediate_size,
        num_layers=file.num_hidden_layers,
        num_heads=file.num_attention_heads,
        num_positions=file.max_position_embeddings,
        first_position=first,
        num_types=file.type_vocab_size,
        norm_eps=file.layer_norm_eps,
        activation=file.hidden_act,
        pooling=_pooling(folder),
        normalized=_normalized(folder),
    )


def _family(architectures: Seq[str]) -> EncoderFamily:
    for name in architectures:
        if name in ENCODERS:
            return ENCODERS[name]
    asked = ", ".join(architectures) or "none"
    raise UnsupportedModel(f"architecture {asked}; supported are {', '.join(ENCODERS)}")


def _refuse_unsupported(file: _File) -> None:
    if file.position_embedding_type != "absolute":
        raise UnsupportedModel(f"{file.position_embedding_type} positions; supported are absolute")
    if file.is_decoder:
        raise UnsupportedModel("is_decoder is set: this model does not read all of a text at once")
    if file.quantization_config is not None:
        raise UnsupportedModel("quantised weights; supported are bfloat16, float16 and float32")


def _pooling(folder: Path) -> Pooling:
    """As the model's makers have it; the mean where they say nothing."""
    path = folder / POOLING_FILE
    if not path.exists():
        return "mean"
    file = _read(path, _PoolingFile)
    if file.pooling_mode_mean_tokens == file.pooling_mode_cls_token:
        raise UnsupportedModel(f"{path}: pooling is neither the mean nor the first token's vector")
    return "cls" if file.pooling_mode_cls_token else "mean"


def _normalized(folder: Path) -> bool:
    """As sentence-transformers would do it; also for models that were not made with that."""
    path = folder / _MODULES_FILE
    if not path.exists():
        return True
    modules = {
        module.type: module.type.rpartition(".")[2] for module in _read(path, tuple[_Module, ...])
    }
    for name, kind in modules.items():
        if kind not in _COMPUTED:
            raise UnsupportedModel(f"{path}: {name}; supported are {', '.join(_COMPUTED)}")
    return "Normalize" in modules.values()


T = TypeVar("T")


def _read(path: Path, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except FileNotFoundError as error:
        raise MissingFile(f"{path} is missing") from error
    except msgspec.DecodeError as error:
        raise BadModel(f"{path}: {error}") from error
