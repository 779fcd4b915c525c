"""What a region says of itself, put together from what its workers said. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Literal

import msgspec

from origin_gpu.place import Candidate, options
from routing.region import ModelReport, ProcessReport, RegionReport


def region_report(
    front: ProcessReport,
    workers: Sequence[ProcessReport],
    ready: Sequence[Candidate],
    *,
    most: Mapping[str, int] = MappingProxyType({}),
) -> RegionReport:
    """The report of the region whose front says `front` of itself, and would take `most` more
    requests for a model."""
    models = tuple(_bounded(it, most.get(it.model)) for it in served_models(ready))
    served = {it.model for it in models}
    loading = sorted({name for it in workers for name in it.loading} - served)
    return RegionReport(
        region=front.region,
        epoch=front.epoch,
        room=min((room(ready), *most.values())),
        models=models,
        processes=(msgspec.structs.replace(front, models=models), *workers),
        loading=tuple(loading),
    )


def _bounded(model: ModelReport, most: int | None) -> ModelReport:
    if most is None or model.room is None:
        return model
    return msgspec.structs.replace(model, room=min(most, model.room))


def serving(ready: Sequence[Candidate], model: str) -> list[Candidate]:
    return [it for it in ready if any(served.model == model for served in it.models)]


def room(ready: Sequence[Candidate], what: Literal["room", "idle"] = "room") -> int:
    """Requests that would still be taken, or begin at once: a split one needs that at both its
    ends."""
    by_role: dict[str, int] = {}
    for it in ready:
        by_role[it.role] = by_role.get(it.role, 0) + getattr(it, what)
    both = by_role.pop("both", None)
    split = min(by_role.values(), default=0)
    if len(by_role) == 1 and both is not None:  # half of a pair is used where nothing else is
        split = 0
    return split + (both or 0)


def served_models(ready: Sequence[Candidate]) -> tuple[ModelReport, ...]:
    """The models that a request could ask for now, each with what all its workers can hold."""
    found: dict[tuple[str, str], list[tuple[Candidate, ModelReport]]] = {}
    for it in ready:
        for model in it.models:
            found.setdefault((model.model, model.tokenizer_digest), []).append((it, model))
    return tuple(
        msgspec.structs.replace(
            having[0][1],
            context_window=min(model.context_window for _, model in having),
            max_sequence_tokens=min(model.max_sequence_tokens for _, model in having),
            room=room([it for it, _ in having]),
        )
        for _, having in sorted(found.items())
        if options([it for it, _ in having])
    )
