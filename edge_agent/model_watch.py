"""Which model the cloud serves, and whether it and the drafter belong together."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from picospec.errors import CloudUnavailable, ModelMismatch, PicoSpecError
from picospec.protocol.messages import ModelCard

logger = logging.getLogger(__name__)

_RETRY_S = (0.25, 0.5, 1.0, 2.0)  # after the first, second ... failure in a row


class ModelWatch:
    """Asks the cloud at start and every `poll_interval_s`.

    So an outage, its end and a change of model are noticed without a request, and each is logged
    once. `check` raises ModelMismatch for a model this edge cannot draft for.
    """

    def __init__(
        self,
        get_model: Callable[[], Awaitable[ModelCard]],
        check: Callable[[ModelCard], None],
        *,
        timeout_s: float,
        poll_interval_s: float,
        on_reachable: Callable[[bool], None] = lambda reachable: None,
    ) -> None:
        self._get_model = get_model
        self._check = check
        self._timeout_s = timeout_s
        self._poll_interval_s = poll_interval_s
        self._on_reachable = on_reachable
        self._card: ModelCard | None = None
        self._problem: PicoSpecError | None = CloudUnavailable("The cloud was not asked yet.")

    def card(self) -> ModelCard:
        """The model served, also through an outage: whether it is over is for the link to find.

        Raises CloudUnavailable while the cloud was never reached, ModelMismatch.
        """
        if isinstance(self._problem, ModelMismatch):
            raise ModelMismatch(str(self._problem))
        if self._card is None:
            raise CloudUnavailable(str(self._problem))
        return self._card

    @property
    def model_id(self) -> str | None:
        return self._card.model_id if self._card is not None else None

    @property
    def reachable(self) -> bool:
        """A cloud with the wrong model is reachable."""
        return self._problem is None or isinstance(self._problem, ModelMismatch)

    @property
    def problem(self) -> str:
        """Why nothing can be served; empty when all is well."""
        return str(self._problem) if self._problem is not None else ""

    async def run(self) -> None:
        """Until cancelled."""
        num_failures = 0
        while True:
            await self.ask()
            if self.reachable:
                num_failures = 0
                await asyncio.sleep(self._poll_interval_s)
            else:
                retry_s = _RETRY_S[min(num_failures, len(_RETRY_S) - 1)]
                num_failures += 1
                await asyncio.sleep(min(retry_s, self._poll_interval_s))

    async def ask(self) -> None:
        """One question to the cloud; its answer, or the lack of one, is the new state."""
        before, known = self.problem, self._card
        try:
            async with asyncio.timeout(self._timeout_s):
                card = await self._get_model()
            self._card = card
            self._check(card)
            self._problem = None
        except TimeoutError:
            self._problem = CloudUnavailable(
                f"The cloud did not answer within {self._timeout_s:g} s."
            )
        except PicoSpecError as error:
            self._problem = error
        self._on_reachable(self.reachable)
        if self.problem and self.problem != before:
            level = logging.ERROR if self.reachable else logging.WARNING
            logger.log(level, "no requests can be served: %s", self.problem)
        elif not self.problem and (before or self._card != known):
            logger.info("the cloud serves %s", self.model_id)
