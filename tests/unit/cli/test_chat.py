"""The chat client, its figures, and the conversation around it."""

from __future__ import annotations

import io
from collections.abc import Iterator
from http.server import ThreadingHTTPServer

import pytest

from picospec_cli.__main__ import main
from picospec_cli.chat import Conversation
from picospec_cli.chat_client import Answer, ChatClient
from picospec_cli.console import CommandFailed
from tests.support import fake_edge
from tests.support.fake_edge import PIECES


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    with fake_edge.running() as running:
        yield running


@pytest.fixture
def url(server: ThreadingHTTPServer) -> str:
    return f"http://127.0.0.1:{server.server_port}"


def test_an_answer_streams_piece_by_piece(url: str) -> None:
    answer = Answer()
    client = ChatClient(f"{url}/v1")
    pieces = list(client.stream([{"role": "user", "content": "why"}], answer, model="fake"))
    assert tuple(pieces) == PIECES
    assert answer.text == "".join(PIECES)
    assert answer.finish_reason == "stop"
    assert answer.usage == fake_edge.USAGE


def test_the_summary_has_every_figure() -> None:
    answer = Answer("x", "stop", usage=fake_edge.USAGE, time_to_first_token_s=0.25, duration_s=0.7)
    assert answer.summary() == (
        "8 output tokens, first after 0.25 s, 10.0 tokens/s, acceptance rate 0.50 (5/10), "
        "mean accepted length 1.25, 0.50 cloud forwards/token, "
        "100 bytes up and 50 down per token, coupled mode"
    )


def test_the_summary_of_nothing_divides_by_nothing() -> None:
    zero = {"mode": "split"} | dict.fromkeys(
        ("drafted_tokens", "accepted_tokens", "verdicts", "forwards", "bytes_up", "bytes_down"), 0
    )
    assert Answer().summary() == "0 output tokens, first after 0.00 s"
    one = Answer(usage={"completion_tokens": 1, "speculation": zero}).summary()
    assert "no drafts judged" in one


@pytest.mark.parametrize(
    ("question", "said"),
    [
        ("refuse", "temperature is out of range"),
        ("fail", "the cloud went away"),
        ("break", "broke off: the stream ended before it was done"),
    ],
)
def test_failures_say_why(url: str, question: str, said: str) -> None:
    conversation = Conversation(ChatClient(url), {}, model="fake")
    with pytest.raises(CommandFailed, match=said):
        conversation.ask(question)
    assert conversation.messages == []


def test_no_edge_agent() -> None:
    client = ChatClient("127.0.0.1:9", timeout_s=1)
    assert client.health() == {}
    with pytest.raises(CommandFailed, match="no edge agent answers"):
        client.model()
    with pytest.raises(CommandFailed, match="not the address"):
        ChatClient("ftp://host")


def test_the_command_answers_one_prompt(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "--url", url, "--prompt", "why", "--seed", "3"]) == 0
    printed = capsys.readouterr()
    assert printed.out == "".join(PIECES) + "\n"
    assert "acceptance rate 0.50" in printed.err


def test_without_a_terminal_stdin_is_the_prompt(
    url: str, server: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("why\n"))
    assert main(["chat", "--url", url, "--max-tokens", "5"]) == 0
    (asked,) = server.asked  # type: ignore[attr-defined]
    assert asked["messages"] == [{"role": "user", "content": "why"}]
    assert asked["max_tokens"] == 5
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert main(["chat", "--url", url]) == 1


def test_a_chat_keeps_its_history(
    url: str,
    server: ThreadingHTTPServer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    typed = iter(["one", "", "/help", "fail", "two", "/reset", "three", "/exit"])
    monkeypatch.setattr("picospec_cli.chat.is_interactive", lambda: True)
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    assert main(["chat", "--url", url]) == 0
    histories = [
        [message["content"] for message in asked["messages"]]
        for asked in server.asked  # type: ignore[attr-defined]
    ]
    answer = "".join(PIECES)
    assert histories == [["one"], ["one", answer, "fail"], ["one", answer, "two"], ["three"]]
    assert "[the edge agent says: the cloud went away]" in capsys.readouterr().err
