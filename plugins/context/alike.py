"""Makes one context for all who ask for it at the same time, and for all agent types that are given the same: their
answers differ in the type's name alone.

What the bundled plugins put into a context depends on an agent's type by its category, by whether it builds and runs
projects, and by the languages that it writes of those that the project has. With another plugin that ranks files, gives
sections, fits contexts or derives from Contexts, each type has a context of its own.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable

import msgspec

from cco_sidecar import PACKAGE, BuiltContext, ContextKey, Contexts, ProjectState, hookimpl
from cco_sidecar_plugins.context._kinds import reading_of
from cco_sidecar_plugins.context._languages import ANY_LANGUAGE, spoken_by

AT_ONCE = 4  # answers in a turn of the event loop


@hookimpl(tryfirst=True)
def part_class(base: type) -> type | None:
    return type("AlikeContexts", (AlikeContexts, base), {}) if issubclass(base, Contexts) else None


class AlikeContexts(Contexts):
    """Waits for the context that is being made, and renames that of the first agent type that is given the same. Such a
    copy is made anew for each answer: keeping it would cost several times as much, and the cache its room.
    """

    def kept(self, key: ContextKey, state: ProjectState, etag: str) -> bytes:
        first = self._first(key, state)
        if first == key:
            return super().kept(key, state, etag)
        return renamed(super().kept(first, state, self._etag(first, state)), first, key)

    async def made(self, key: ContextKey, state: ProjectState, etag: str) -> BuiltContext:
        """The same, made once for all who ask at the same time, also where the first of them hangs up."""
        first = self._first(key, state)
        if first != key:
            return await self._copied(key, first, state, etag)
        making = self._making.get(etag)
        if making is None:
            making = self._making[etag] = asyncio.create_task(super().made(key, state, etag))
            making.add_done_callback(lambda _: self._making.pop(etag))
        return await asyncio.shield(making)

    async def _copied(self, key: ContextKey, first: ContextKey, state: ProjectState, etag: str) -> BuiltContext:
        self._misses += 1
        wanted = self._etag(first, state)
        fresh, shared, found = await self.made(first, state, wanted)
        async with self._turns:  # those who waited for it are answered by and by, so that others get their turn
            await asyncio.sleep(0)
        # A copy, which nothing was built for, says cache_hit; but not where the context is one that is not kept.
        copy = renamed(shared if found == wanted else fresh, first, key)
        return copy, copy, etag if found == wanted else found

    def _first(self, key: ContextKey, state: ProjectState) -> ContextKey:
        """The parameters of the context that this one is a copy of, ``key`` where it is none."""
        if key.reader or not self._alone:  # a brief is its reader's own
            return key
        there, spoken = getattr(state, "languages", ANY_LANGUAGE), spoken_by(key.agent_type)
        reading = reading_of(key.agent_type, key.category)
        alike = (there, key.category, reading, bool(spoken), there.intersection(spoken))
        first = self._sources[key.agent_type] = self._firsts.setdefault(alike, key.agent_type)
        return msgspec.structs.replace(key, agent_type=first)

    def clear(self, chosen: Callable[[ContextKey], bool]) -> tuple[int, int]:
        """Also those of which a chosen one is a copy."""

        def is_source(key: ContextKey) -> bool:
            copies = [name for name, source in self._sources.items() if source == key.agent_type]
            return any(chosen(msgspec.structs.replace(key, agent_type=name)) for name in copies)

        return super().clear(lambda key: chosen(key) or is_source(key))

    @functools.cached_property
    def _making(self) -> dict[str, asyncio.Task[BuiltContext]]:
        """What is being made, by its ETag."""
        return {}

    @functools.cached_property
    def _turns(self) -> asyncio.Semaphore:
        return asyncio.Semaphore(AT_ONCE)

    @functools.cached_property
    def _firsts(self) -> dict[tuple[frozenset[str], str, str, bool, frozenset[str]], str]:
        """The agent type that was the first to ask, by the languages that are there and what it is given by."""
        return {}

    @functools.cached_property
    def _sources(self) -> dict[str, str]:
        """The agent type whose context is given, renamed, by the type that is given it."""
        return {}

    @functools.cached_property
    def _alone(self) -> bool:
        """Whether nobody else's code has a say in what contexts hold."""
        hooks = ("rank_files", "context_section")
        code = [row.function for hook in hooks for row in self._hooks.implementations[hook]]
        modules = {each.__module__ for each in (*code, *type(self).__mro__[:-1])} - {Contexts.__module__}
        return all(module.startswith(f"{PACKAGE}.") for module in modules)


def renamed(content: bytes, first: ContextKey, key: ContextKey) -> bytes:
    """The context of one agent type as that of another."""
    before, after = (b'"agent_type":%b' % msgspec.json.encode(each.agent_type) for each in (first, key))
    return content.replace(before, after, 1)
