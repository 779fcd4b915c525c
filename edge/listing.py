"""What models there are, as both APIs list them: Workers AI's search, schemas and tasks, OpenAI's
list. Pure.

A model is listed while some region serves it; what the catalogue has no row of is listed with what
its region says.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from uuid import NAMESPACE_URL, uuid5

from edge.checks import BadField
from edge.schemas import schemas
from routing.catalogue import Catalogue, ModelRow
from routing.choose import Known
from routing.errors import Code, Failure

PER_PAGE, MOST_PER_PAGE = 50, 100
_SOURCE = 1  # Cloudflare's number for models of its own catalogue

TASKS: Mapping[str, tuple[str, str]] = {
    "text-generation": (
        "Text Generation",
        "Family of generative text models, such as large language models (LLM), that can be "
        "adapted for a variety of natural language tasks.",
    ),
    "text-embeddings": (
        "Text Embeddings",
        "Feature extraction models transform raw data into numerical features that can be "
        "processed while preserving the information in the original dataset.",
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """One model that may be asked for now."""

    name: str
    task: str
    description: str
    precision: str
    licence: str
    context_window: int  # tokens, as it is enforced
    regions: tuple[str, ...]  # that serve it


def listed(regions: Iterable[Known], catalogue: Catalogue) -> list[Listed]:
    """Every model that some region serves, by name."""
    windows: dict[str, int] = {}
    where: dict[str, list[str]] = {}
    tasks_of: dict[str, str] = {}
    for known in regions:
        for model in known.report.models if known.report else ():
            held = min(model.context_window, model.max_sequence_tokens)
            windows[model.model] = max(held, windows.get(model.model, 0))
            where.setdefault(model.model, []).append(known.region.name)
            tasks_of[model.model] = model.task
    return [
        replace(
            _described(name, catalogue.rows.get(name)),
            task=tasks_of[name],
            context_window=windows[name],
            regions=tuple(where[name]),
        )
        for name in sorted(windows)
    ]


def _described(name: str, row: ModelRow | None) -> Listed:
    """What there is to say of a model that no region is asked about."""
    return Listed(
        name=name,
        task=row.task if row else "text-generation",
        description=row.description if row else name,
        precision=row.precision if row else "unknown",
        licence=row.licence if row else "unknown",
        context_window=row.context_window if row else 0,
        regions=(),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """What `GET /ai/models/search` was asked, and which page of it."""

    words: str = ""
    author: str = ""
    task: str = ""
    page: int = 1
    per_page: int = PER_PAGE

    def finds(self, model: Listed) -> bool:
        words = f"{model.name} {model.description}".casefold()
        return (
            self.words.casefold() in words
            and self.author.casefold() in {"", author_of(model.name).casefold()}
            and self.task.casefold() in {"", model.task, TASKS[model.task][0].casefold()}
        )


def read_search(query: Mapping[str, str]) -> Search:
    """Query parameters as Cloudflare names them; those that are not known here change nothing."""
    return Search(
        words=query.get("search", ""),
        author=query.get("author", ""),
        task=query.get("task", ""),
        page=_number(query, "page", 1, 1_000_000),
        per_page=_number(query, "per_page", PER_PAGE, MOST_PER_PAGE),
    )


def _number(query: Mapping[str, str], name: str, default: int, most: int) -> int:
    said = query.get(name)
    if said is None:
        return default
    if not (said.isascii() and said.isdecimal() and 1 <= int(said[:9]) <= most):
        raise BadField(f"/{name}", f"'{name}' must be a whole number from 1 to {most}")
    return int(said[:9])


def search_page(models: Iterable[Listed], search: Search) -> dict[str, Any]:
    """The v4 envelope of one page. Past the last the result is empty, by which clients stop."""
    found = [model for model in models if search.finds(model)]
    start = (search.page - 1) * search.per_page
    return paged([model_object(it) for it in found], search.page, search.per_page, start)


def paged(rows: Sequence[Any], page: int, per_page: int, start: int = 0) -> dict[str, Any]:
    shown = list(rows[start : start + per_page])
    info = {
        "count": len(shown),
        "page": page,
        "per_page": per_page,
        "total_count": len(rows),
        "total_pages": -(-len(rows) // per_page),
    }
    envelope = {"success": True, "errors": [], "messages": []}
    return {"result": shown, "result_info": info} | envelope


def model_object(model: Listed) -> dict[str, Any]:
    """As Workers AI describes a model. `precision` says what the weights really are."""
    facts = {
        "context_window": str(model.context_window),
        "precision": model.precision,
        "license": model.licence,
        "regions": ",".join(model.regions),
    }
    return {
        "id": str(uuid5(NAMESPACE_URL, model.name)),
        "source": _SOURCE,
        "name": model.name,
        "description": model.description,
        "task": task_object(model.task),
        "tags": [],
        "properties": [{"property_id": name, "value": value} for name, value in facts.items()],
    }


def task_object(task: str) -> dict[str, str]:
    name, description = TASKS[task]
    return {"id": str(uuid5(NAMESPACE_URL, task)), "name": name, "description": description}


def author_of(model: str) -> str:
    """`@cf/meta/llama` is meta's."""
    return model.split("/")[1] if model.count("/") > 1 else ""


def authors(models: Iterable[Listed]) -> list[dict[str, str]]:
    names = sorted({author_of(model.name) for model in models} - {""})
    return [{"id": str(uuid5(NAMESPACE_URL, name)), "name": name} for name in names]


def tasks(models: Iterable[Listed]) -> list[dict[str, str]]:
    return [task_object(task) for task in sorted({model.task for model in models})]


def model_schemas(models: Iterable[Listed], name: str) -> dict[str, Any]:
    """{"input", "output"} of `name`. Raises Failure(UNKNOWN_MODEL)."""
    return schemas(_find(models, name).task)


def openai_list(models: Iterable[Listed]) -> dict[str, Any]:
    return {"object": "list", "data": [_openai_model(model) for model in models]}


def openai_model(models: Iterable[Listed], name: str) -> dict[str, Any]:
    """One model as OpenAI has it. Raises Failure(UNKNOWN_MODEL)."""
    return _openai_model(_find(models, name))


def _openai_model(model: Listed) -> dict[str, Any]:
    """OpenAI's four, and what clients and the playground look for beside them."""
    return {
        "id": model.name,
        "object": "model",
        "created": 0,
        "owned_by": author_of(model.name) or "local",
        "context_window": model.context_window,
        "task": model.task,
        "description": model.description,
        "precision": model.precision,
    }


def _find(models: Iterable[Listed], name: str) -> Listed:
    for model in models:
        if model.name == name:
            return model
    raise Failure(Code.UNKNOWN_MODEL, f"No such model {name[:100]} or task")
