"""The global prompts that rounds begin with: everybody of a cohort asks for the same one."""

from __future__ import annotations

import asyncio
from functools import partial

from pfed_server.federation import Federation


class GlobalPrompts:
    """Those of a federation. The last one that was asked for is read once, however many ask."""

    def __init__(self, federation: Federation) -> None:
        self._federation = federation
        self._known: tuple[int, bytes] | None = None

    async def before(self, number: int) -> bytes:
        """The newest one made before round `number`, serialised; empty where there is none."""
        if self._known is not None and self._known[0] == number:
            return self._known[1]
        return await self._federation.exclusively(partial(self._read, number))

    async def _read(self, number: int) -> bytes:
        if self._known is not None and self._known[0] == number:  # while this one waited for its turn
            return self._known[1]
        prompt = await asyncio.to_thread(self._federation.store.global_prompt, number)
        open_round = self._federation.state.open_round
        if open_round is None or number <= open_round.number:  # all rounds before it are over
            self._known = number, prompt
        return prompt
