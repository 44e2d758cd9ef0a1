"""`picospec chat`: a chat prompt in the terminal, or one answer to one prompt."""

import argparse
import sys
from contextlib import closing, suppress
from dataclasses import dataclass, field
from typing import Any

from picospec_cli.chat_client import DEFAULT_URL, Answer, ChatClient, Message, configured_api_key
from picospec_cli.console import CommandFailed, is_interactive, say

HELP = "/reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", default=DEFAULT_URL, help="the edge agent (default %(default)s)")
    add_answer_arguments(parser)


def add_answer_arguments(parser: argparse.ArgumentParser) -> None:
    """What is asked, and how it is to be answered; shared with the demo."""
    parser.add_argument("--prompt", help="answer this and leave; without it, a chat is opened")
    parser.add_argument("--max-tokens", type=int, default=256, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.3)
    parser.add_argument("--seed", type=int, metavar="N")


def run(arguments: argparse.Namespace) -> int:
    client = ChatClient(arguments.url, configured_api_key())
    Conversation(client, answer_parameters(arguments)).hold(arguments.prompt)
    return 0


def answer_parameters(arguments: argparse.Namespace) -> dict[str, Any]:
    parameters = {"max_tokens": arguments.max_tokens, "temperature": arguments.temperature}
    return parameters if arguments.seed is None else parameters | {"seed": arguments.seed}


@dataclass
class Conversation:
    """Questions and answers so far; answers are printed to stdout as they come."""

    client: ChatClient
    parameters: dict[str, Any]
    messages: list[Message] = field(default_factory=list)
    model: str = ""

    def hold(self, prompt: str | None) -> None:
        """Answer `prompt`; without one, read questions from the terminal, or all of stdin."""
        self.model = self.client.model()
        if prompt is None and is_interactive():
            self._loop()
            return
        question = sys.stdin.read() if prompt is None else prompt
        if not question.strip():
            raise CommandFailed("there is no prompt: give --prompt, or write it to stdin")
        self.ask(question.strip())

    def ask(self, question: str) -> Answer:
        """Stream the answer, then one line of figures on stderr; remembers both on success."""
        asked = [*self.messages, {"role": "user", "content": question}]
        answer = Answer()
        pieces = self.client.stream(asked, answer, model=self.model, **self.parameters)
        try:
            with closing(pieces):  # type: ignore[type-var]
                for piece in pieces:
                    print(piece, end="", flush=True)
        finally:
            if answer.text:
                print(flush=True)
        say(f"[{answer.summary()}]")
        self.messages = [*asked, {"role": "assistant", "content": answer.text}]
        return answer

    def _loop(self) -> None:
        with suppress(ImportError):
            import readline  # noqa: F401  (gives input() line editing and a history)
        say(f"Chatting with {self.model}. {HELP}")
        while True:
            try:
                question = input("> ").strip()
            except EOFError:
                print()
                return
            if question == "/exit":
                return
            if question == "/reset":
                self.messages = []
                say("The conversation is forgotten.")
            elif question.startswith("/"):
                say(HELP)
            elif question:
                self._ask_undisturbed(question)

    def _ask_undisturbed(self, question: str) -> None:
        """A failure or Ctrl-C ends the answer, not the chat."""
        try:
            self.ask(question)
        except KeyboardInterrupt:
            say("[stopped]")
        except CommandFailed as error:
            say(f"[{error}]")
