"""Stories by number, and what is left of one that breaks something."""

from __future__ import annotations

from typing import Any

import pytest
from pfed_benchmarks.chaos import driver
from pfed_benchmarks.chaos.driver import Story, random_sequence, run, shrunk

from pfed_server.sql_store import SqlStore


def test_a_number_is_a_story() -> None:
    stories = [random_sequence(number) for number in range(300)]
    assert stories == [random_sequence(number) for number in range(300)]
    assert len(set(stories)) == 300
    assert {order[0] for story in stories for order in story.orders} == set(driver._LIKELY)
    assert {story.kind for story in stories} == {"plain", "secure"}


@pytest.mark.parametrize("number", range(3))
def test_some_stories(number: int) -> None:
    assert run(random_sequence(number)) is None


@pytest.mark.slow
def test_what_breaks_is_found_and_shrunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: a server that begins to count versions anew after it was killed."""
    inner = SqlStore.open.__func__  # type: ignore[attr-defined]
    opened: list[object] = []

    def forgetful(cls: Any, *args: Any) -> Any:
        store = inner(cls, *args)
        opened.append(store)
        if len(opened) == 2:
            with store._transaction() as session:
                session.connection().exec_driver_sql("UPDATE meta SET version = 0")
        return store

    monkeypatch.setattr(SqlStore, "open", classmethod(forgetful))

    def broken(story: Story) -> str | None:
        opened.clear()
        return run(story)

    monkeypatch.setattr(driver, "run", broken)
    orders = (
        ("time passes", 1.0, None),
        ("cable", "ben", True),
        ("server killed", "ben", None),
        ("cable", "ben", False),
        ("server starts", "ben", None),
        ("clock jumps", 30.0, None),
    )
    found = shrunk(Story("plain", 1, orders))
    assert len(found.orders) == 3  # and something before them, after which the newest version was seen
    assert [order[0] for order in found.orders[1:]] == ["server killed", "server starts"]
