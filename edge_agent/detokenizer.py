"""Token ids to text as they come: no split characters, no leaked stop strings, linear time."""

from collections.abc import Callable, Collection, Sequence

_REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are not (yet) a character
_MAX_CHARACTER_TOKENS = 4  # UTF-8 has at most 4 bytes per character, a token has at least one
_WINDOW = 16  # tokens decoded at a time before the oldest are let go
_PROMPT_TAIL = 5


class Detokenizer:
    """Turns token ids into text deltas whose concatenation is the text of all of them.

    A decoder's text for a token depends on its neighbours (a character's bytes, the space that
    some tokenizers drop at the start), so a short window of tokens is decoded again at each
    step, and what is new is returned. `prompt_tail` is the context of the first token.

        push(ids of "caf\\xc3") -> "caf"     push(id of "\\xa9") -> "é"
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        special_ids: Collection[int] = frozenset(),
        prompt_tail: Sequence[int] = (),
    ) -> None:
        self._decode = decode
        self._special_ids = special_ids
        self._window = self._context(prompt_tail)
        self._boundary = len(self._window)  # tokens of the window that end with a character
        self._shown = len(self._text())  # characters of the window's text already returned

    def push(self, token_id: int) -> str:
        """The text that became certain with this token; empty inside of a character."""
        if token_id in self._special_ids:
            return ""
        self._window.append(token_id)
        text = self._text()
        if not text.endswith(_REPLACEMENT):
            delta = text[self._shown :]
            self._shown = len(text)
            if len(self._window) > _WINDOW:
                self._keep_from(self._boundary)
            self._boundary = len(self._window)
            return delta
        if len(self._window) - self._boundary <= _MAX_CHARACTER_TOKENS:
            return ""
        # Not one character's bytes: only the last mark can still become something else.
        delta = text[self._shown : -1]
        self._shown += len(delta)
        if len(self._window) > 2 * _WINDOW:
            self._keep_from(len(self._window) - 2 * _MAX_CHARACTER_TOKENS)
            self._shown -= 1
            self._boundary = 0
        return delta

    def finish(self) -> str:
        """What was held back: the marks of a character that never became whole."""
        text = self._text()
        delta = text[self._shown :]
        self._shown = len(text)
        return delta

    def _keep_from(self, index: int) -> None:
        del self._window[:index]
        self._shown = len(self._text())

    def _text(self) -> str:
        return self._decode(self._window) if self._window else ""

    def _context(self, prompt_tail: Sequence[int]) -> list[int]:
        """The prompt's last few tokens, if they decode to whole characters."""
        ids = [token_id for token_id in prompt_tail if token_id not in self._special_ids]
        for length in range(_PROMPT_TAIL, _PROMPT_TAIL + _MAX_CHARACTER_TOKENS):
            context = ids[-length:]
            if context and _REPLACEMENT not in self._decode(context):
                return context
        return []


class StopScanner:
    """Cuts a text at the first stop string, however it is divided into deltas.

    The text ends at the first character that completes a stop string, and is cut where that
    string begins (the longest one, if several are completed). Text that may be the beginning
    of a stop string is held back until it is known.

        StopScanner(["END"]): feed("the E") -> "the ", feed("NDLESS") -> "", stopped
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.stopped = False

    def feed(self, delta: str) -> str:
        """The text now safe to show. After `stopped` there is no more."""
        if self.stopped:
            return ""
        text = self._held + delta
        found = [
            (begin + len(stop), begin) for stop in self._stops if (begin := text.find(stop)) >= 0
        ]
        if found:
            self.stopped = True
            self._held = ""
            return text[: min(found)[1]]
        shown = min((_beginning(stop, text) for stop in self._stops), default=len(text))
        self._held = text[shown:]
        return text[:shown]

    def finish(self) -> str:
        """The text held back, when the generation ends for another reason."""
        held, self._held = self._held, ""
        return held


def _beginning(stop: str, text: str) -> int:
    """Where an end of `text` begins that is a beginning of `stop`; its length if none does."""
    begin = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while begin >= 0 and not stop.startswith(text[begin:]):
        begin = text.find(stop[0], begin + 1)
    return begin if begin >= 0 else len(text)
