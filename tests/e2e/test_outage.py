"""What a client sees while the cloud is away, and when the edge has the wrong cloud."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.support.chat import usage_of, user_says
from tests.support.daemons import Cloud, Daemons, Edge, until

QUESTION = user_says("Why do leaves turn red in autumn?")


async def test_an_outage_is_told_and_its_end_is_noticed(edge: Edge) -> None:
    """Mid-stream an error event, then 503 with Retry-After, then answers again."""
    num_chunks = 0

    async def read_and_cut(stream: Any) -> None:
        nonlocal num_chunks
        async for _ in stream:
            num_chunks += 1
            if num_chunks == 4:
                edge.relay.cut()

    async with edge.client() as client:
        create = functools.partial(
            client.chat.completions.create, model=edge.model, messages=QUESTION, temperature=0
        )
        try:
            stream = await create(stream=True)
            with pytest.raises(openai.APIError, match="cloud") as broken:
                await read_and_cut(stream)
            assert num_chunks >= 4
            assert broken.value.code == "cloud_unavailable"
            until(lambda: not edge.is_healthy())
            status, body = edge.health()
            assert (status, body["status"]) == (503, "unavailable")
            assert not body["cloud"]["reachable"]
            assert "cloud" in body["problem"]
            for streaming in (False, True):
                with pytest.raises(openai.InternalServerError) as refused:
                    await create(stream=streaming)
                assert refused.value.status_code == 503
                assert refused.value.code == "cloud_unavailable"
                assert int(refused.value.response.headers["Retry-After"]) >= 1
        finally:
            edge.relay.mend()
        until(edge.is_healthy)
        assert edge.health()[1]["cloud"] == {"reachable": True, "model": edge.model}
        answer = await create(max_tokens=4)
        assert usage_of(answer).completion_tokens == 4


def other_tokenizer(folder: Path) -> None:
    """Two words change their ids, as between two versions of a model."""
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(tokenizer), encoding="utf-8")


def other_template(folder: Path) -> None:
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text() + "Answer in rhymes.")


@pytest.mark.parametrize(
    ("change", "named", "not_named"),
    [
        (other_tokenizer, "tokenizer.json", "chat_template.jinja"),
        (other_template, "chat_template.jinja", "tokenizer.json"),
    ],
)
async def test_a_wrong_pair_is_refused_and_says_which_files_differ(
    daemons: Daemons,
    cloud: Cloud,
    models: Path,
    tmp_path: Path,
    change: Callable[[Path], None],
    named: str,
    not_named: str,
) -> None:
    for path in (models / "draft-int4").iterdir():
        if not path.name.startswith("model.onnx"):
            shutil.copy(path, tmp_path)
    change(tmp_path)
    edge = daemons.start_edge(
        f"edge-{change.__name__}", cloud,
        "--drafter.backend", "ngram", "--drafter.tokenizer", str(tmp_path),
    )  # fmt: skip
    try:
        status, body = until(lambda: _refusal(edge))
        assert status == 503
        assert body["cloud"] == {"reachable": True, "model": cloud.model}
        problem = body["problem"]
        assert named in problem
        assert f"differ in {not_named}" not in problem
        async with edge.client() as client:
            with pytest.raises(openai.InternalServerError) as refused:
                await client.chat.completions.create(model=cloud.model, messages=QUESTION)
        assert refused.value.status_code == 503
        assert refused.value.code == "model_mismatch"
        assert problem in refused.value.message
    finally:
        daemons.stop(edge.daemon)


def _refusal(edge: Edge) -> tuple[int, dict[str, Any]] | None:
    status, body = edge.health()
    return (status, body) if body["cloud"]["model"] is not None else None
