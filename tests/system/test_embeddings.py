"""A fleet of one region with a worker for text and one for vectors, as its clients use it: real
processes, both default models, OpenAI's client."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from base64 import b64decode
from collections.abc import Iterator
from operator import mul
from pathlib import Path

import httpx2
import openai
import pytest
from transformers import AutoModel, AutoTokenizer

from infire.pull import pull
from routing.catalogue import load_catalogue
from routing.paths import model_folder, paths
from tests.fakes.reading import read_to

pytestmark = [pytest.mark.system, pytest.mark.slow]

CHAT = "@cf/huggingfacetb/smollm2-135m-instruct"
VECTORS = "@cf/sentence-transformers/all-minilm-l6-v2"
LAYOUT = f"""
[fleet]
model = "{CHAT}"
[edge]
port = 0
[[region]]
name = "weur"
[[region.worker]]
role = "both"
[[region.worker]]
role = "both"
model = "{VECTORS}"
"""
STOP_S = 30.0
CAT, KITTEN, BANK = "A cat sat on the mat.", "One kitten was sitting.", "Rates rose at the bank."


@pytest.fixture(scope="module")
def folders() -> dict[str, Path]:
    found = {}
    for model in (CHAT, VECTORS):
        row = load_catalogue().row(model)
        found[model] = model_folder(paths(os.environ).cache, model)
        pull(row.source, found[model], sha256=row.sha256, model_digest=row.model_digest)
    return found


@pytest.fixture(scope="module")
def fleet(
    folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, str]]:
    """The edge's address, and a key."""
    home = tmp_path_factory.mktemp("home")
    layout = home / "fleet.toml"
    layout.write_text(LAYOUT)
    models = home / "cache" / "models"
    models.mkdir(parents=True)
    for folder in folders.values():
        (models / folder.name).symlink_to(folder)
    words = ["up", "--fleet", str(layout), "--no-first-run", "--device", "cpu"]
    launcher = subprocess.Popen(
        [sys.executable, "-m", "routing", *words],
        env={**os.environ, "EDGEFIRE_HOME": str(home)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        said = read_to(launcher, "playground: ")
        url = said.split("Edge: ")[1].split()[0]
        yield url, said.split("token: ")[1].split()[0]
    finally:
        launcher.send_signal(signal.SIGINT)
        launcher.communicate(timeout=STOP_S)


def cosine(a: list[float], b: list[float]) -> float:
    lengths = math.sqrt(sum(map(mul, a, a)) * sum(map(mul, b, b)))
    return sum(map(mul, a, b)) / lengths


def test_openais_client_gets_the_vectors_of_transformers(
    fleet: tuple[str, str], folders: dict[str, Path]
) -> None:
    url, key = fleet
    texts = [CAT, KITTEN, BANK, "long " * 300]
    tokenizer = AutoTokenizer.from_pretrained(folders[VECTORS])
    model = AutoModel.from_pretrained(folders[VECTORS]).eval()
    ids = [tokenizer(text).input_ids for text in texts]
    with openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) as client:
        packed = client.embeddings.create(model=VECTORS, input=texts)  # base64, as it is by default
        plain = client.embeddings.create(model=VECTORS, input=texts, encoding_format="float")
        same = client.embeddings.create(model=VECTORS, input=ids)
        with pytest.raises(openai.BadRequestError, match=f"{CHAT} is for text-generation"):
            client.embeddings.create(model=CHAT, input="a")
        with pytest.raises(openai.BadRequestError, match=f"{VECTORS} is for text-embeddings"):
            client.chat.completions.create(
                model=VECTORS, messages=[{"role": "user", "content": "a"}]
            )
    assert plain.usage.prompt_tokens == sum(map(len, ids))
    for n, text in enumerate(texts):
        ours = packed.data[n].embedding
        hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        assert cosine(ours, hidden.mean(0).tolist()) > 0.999
        assert ours == plain.data[n].embedding
        assert cosine(ours, same.data[n].embedding) > 0.99999


def test_natively_and_beside_text(fleet: tuple[str, str]) -> None:
    url, key = fleet
    ai = f"{url}/client/v4/accounts/demo/ai"
    headers = {"authorization": f"Bearer {key}"}
    with httpx2.Client(headers=headers, timeout=60, trust_env=False) as client:

        def run(model: str, **body: object) -> httpx2.Response:
            return client.post(f"{ai}/run/{model}", json=body)

        made = run(VECTORS, text=[CAT, BANK]).json()["result"]
        assert (made["shape"], made["pooling"]) == ([2, 384], "mean")
        by_first = run(VECTORS, text=CAT, pooling="cls").json()["result"]
        assert by_first["pooling"] == "cls"
        assert 0.2 < cosine(by_first["data"][0], made["data"][0]) < 0.99
        contexts = [{"text": BANK}, {"text": KITTEN}]
        [best] = run(VECTORS, query=CAT, contexts=contexts, top_k=1).json()["result"]["response"]
        assert best["id"] == 1
        assert 0.4 < best["score"] < 1.0
        long = run(VECTORS, text="long " * 600)
        assert (long.status_code, "602 tokens exceed the 512" in long.text) == (400, True)
        assert run(CHAT, prompt="Say hello.", max_tokens=8).json()["result"]["response"]
        listed = client.get(f"{ai}/models/search").json()["result"]
        assert {it["name"]: it["task"]["name"] for it in listed} == {
            CHAT: "Text Generation",
            VECTORS: "Text Embeddings",
        }
        packed = client.post(
            f"{ai}/v1/embeddings",
            json={"model": VECTORS, "input": "a", "encoding_format": "base64"},
        )
        assert len(b64decode(packed.json()["data"][0]["embedding"])) == 4 * 384
