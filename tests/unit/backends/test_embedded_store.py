"""The embedded broker's state: what each step does to messages, queues and parties."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qbridge.backends.embedded import presence
from qbridge.backends.embedded import store as store_module
from qbridge.backends.embedded.errors import FileReplaced
from qbridge.backends.embedded.presence import Presence
from qbridge.backends.embedded.routing import ExchangeMissing, matches
from qbridge.backends.embedded.store import Claim, Outgoing, Store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "bridge.db", timeout=2.0)
    store.database.open()
    yield store
    store.database.close()


class Party:
    """A consuming process, as the store sees it."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.presence = Presence(store.folder)
        self.id = self.presence.id
        store.join(self.id)

    def claim(self, queue: str = "work", *, keep: bool = True) -> Claim | None:
        return self.store.claim(queue, self.id, keep=keep)

    def bodies(self, queue: str = "work") -> list[str]:
        return [(claim.body or b"").decode() for claim in iter(lambda: self.claim(queue), None)]

    def die(self) -> None:
        """Drop the lock as the kernel does, without a word to the store."""
        self.presence.close()


@pytest.fixture
def party(store: Store) -> Iterator[Party]:
    party = Party(store)
    yield party
    party.presence.close()


def send(
    store: Store,
    *bodies: str,
    queue: str = "work",
    priority: int = 5,
    ttl: float | None = None,
    not_before: float | None = None,
) -> None:
    store.publish([Outgoing("", queue, "{}", body, priority, ttl=ttl, not_before=not_before) for body in bodies])


def tags(*claims: Claim | None) -> list[tuple[int, int]]:
    return [(claim.id, claim.deliveries) for claim in claims if claim is not None]


def test_messages_come_highest_priority_first_then_in_order(store: Store, party: Party) -> None:
    """Priority decides, then age."""
    send(store, "low 1", "low 2", priority=1)
    send(store, "normal 1", "normal 2")
    send(store, "high 1", "high 2", priority=9)
    assert ["high 1", "high 2", "normal 1", "normal 2", "low 1", "low 2"] == party.bodies()


def test_a_claimed_message_is_nobody_elses_and_is_deleted_when_acknowledged(store: Store, party: Party) -> None:
    """A claim hides the message, an acknowledgement deletes it, once."""
    send(store, "a")
    other = Party(store)
    claim = party.claim()
    assert other.claim() is None
    assert store.size("work") == 0
    assert store.acknowledge(other.id, tags(claim)) == 0
    assert store.acknowledge(party.id, tags(claim)) == 1
    assert store.acknowledge(party.id, tags(claim)) == 0
    other.presence.close()


def test_a_message_given_back_is_next_again_and_counts_its_deliveries(store: Store, party: Party) -> None:
    """Giving back restores the old place; the second delivery is known as such, and the first one's tag is stale."""
    send(store, "a", "b")
    first = party.claim()
    assert first is not None
    assert store.give_back(party.id, tags(first)) == 1
    second = party.claim()
    assert second is not None
    assert (b"a", 2, 0) == (second.body, second.deliveries, second.losses)
    assert store.acknowledge(party.id, tags(first)) == 0


def test_what_a_dead_party_held_goes_to_others_and_counts_as_a_loss(store: Store, party: Party) -> None:
    """Death returns every claim; messages acknowledged before stay gone."""
    send(store, "a", "b", "c")
    dying = Party(store)
    first, _second = dying.claim(), dying.claim()
    store.acknowledge(dying.id, tags(first))
    store.sweep(party.id)
    assert store.size("work") == 1
    dying.die()
    store.sweep(party.id)
    claim = party.claim()
    assert claim is not None
    assert (b"b", 2, 1) == (claim.body, claim.deliveries, claim.losses)


def test_a_party_that_leaves_returns_its_claims_without_a_loss(store: Store, party: Party) -> None:
    """An orderly end is not a crash."""
    send(store, "a")
    leaving = Party(store)
    leaving.claim()
    store.leave(leaving.id)
    leaving.presence.close()
    claim = party.claim()
    assert claim is not None
    assert claim.losses == 0


def test_a_party_taken_for_dead_can_neither_claim_nor_acknowledge(store: Store, party: Party) -> None:
    """Whose lock file was deleted is told so, and cannot touch what now belongs to others."""
    send(store, "a", "b")
    fenced = Party(store)
    claim = fenced.claim()
    (store.folder / f"{fenced.id}.lock").unlink()
    presence._own.discard(fenced.id)  # the sweeper is another process
    store.sweep(party.id)
    assert store.acknowledge(fenced.id, tags(claim)) == 0
    assert fenced.claim() is None
    with pytest.raises(FileReplaced):
        store.sweep(fenced.id)
    assert ["a", "b"] == party.bodies()
    fenced.presence.close()


def test_publishing_is_all_or_nothing(store: Store) -> None:
    """A message that cannot be routed takes the whole transaction with it."""
    with pytest.raises(ExchangeMissing):
        store.publish([Outgoing("", "work", "{}", "a", 5), Outgoing("nowhere", "x", "{}", "b", 5)])
    assert store.size("work") == 0


def test_expired_messages_are_not_handed_out_and_are_swept(store: Store, party: Party) -> None:
    """The smaller of the message's and the queue's time to live counts."""
    store.declare_queue("short", message_ttl=0.0)
    send(store, "gone", queue="short", ttl=60)
    send(store, "gone", ttl=0.0)
    send(store, "kept", ttl=60)
    assert ["kept"] == party.bodies()
    assert party.claim("short") is None
    store.sweep(party.id)
    assert store.database.read("SELECT count(*) FROM message") == [(1,)]


def test_a_delayed_message_is_nobodys_until_it_is_due(store: Store, party: Party) -> None:
    """It is neither counted nor handed out before its time; what is due already is ready at once."""
    now = time.time()
    send(store, "later", not_before=now + 0.2)
    send(store, "much later", not_before=now + 3600)
    send(store, "at once", not_before=now - 1)
    assert store.size("work") == 1
    assert party.bodies() == ["at once"]
    assert store.release_due() == now + 0.2
    assert party.claim() is None
    while time.time() < now + 0.2:
        time.sleep(0.01)
    assert store.release_due() == now + 3600
    assert store.size("work") == 1
    assert party.bodies() == ["later"]


def test_many_that_are_due_are_released_a_bounded_number_at_a_time(
    store: Store, party: Party, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that nobody waits long for the file; what is left is due at once."""
    monkeypatch.setattr(store_module, "RELEASED_AT_ONCE", 2)
    due = time.time() + 0.1
    send(store, "a", "b", "c", not_before=due)
    while time.time() < due:
        time.sleep(0.01)
    assert store.release_due() == due
    assert store.size("work") == 2
    assert store.release_due() is None
    assert party.bodies() == ["a", "b", "c"]


def test_consumers_are_woken_for_the_earliest_delayed_message_and_when_it_is_due(store: Store, party: Party) -> None:
    """The first sets their alarm, later ones change nothing, and whoever releases wakes all."""
    store.add_consumer(party.id, "work", "tag")
    now = time.time()
    send(store, "second", not_before=now + 3600)
    assert party.presence.settle()
    send(store, "third", not_before=now + 3601)
    assert not party.presence.settle()
    send(store, "first", not_before=now + 0.1)
    assert party.presence.settle()
    while time.time() < now + 0.1:
        time.sleep(0.01)
    store.release_due()
    assert party.presence.settle()


def test_a_queue_of_delayed_messages_is_not_empty_and_is_purged_with_them(store: Store) -> None:
    """What waits for its time belongs to the queue."""
    send(store, "later", not_before=time.time() + 3600)
    assert store.delete_queue("work", if_empty=True) == 1
    assert store.queue_exists("work")
    assert store.purge("work") == 1
    assert store.release_due() is None


def test_delayed_messages_do_not_slow_claims_down(store: Store, party: Party) -> None:
    """The next message is found by an index that holds ready ones only."""
    store.publish([Outgoing("", "work", "{}", "later", 5, not_before=time.time() + 3600)] * 50_000)
    send(store, *map(str, range(100)))
    began = time.perf_counter()
    assert len(party.bodies()) == 100
    assert time.perf_counter() - began < 1.0  # 0.02 s; without the index several seconds


def test_a_queue_expires_when_nobody_uses_it(store: Store, party: Party) -> None:
    """A consumer keeps it; without one it goes after its time, with bindings and messages."""
    store.declare_exchange("ex", "fanout")
    store.declare_queue("replies", expires=0.05)
    store.bind("replies", "ex", "")
    store.add_consumer(party.id, "replies", "tag")
    time.sleep(0.1)
    store.sweep(party.id)
    assert store.queue_exists("replies")
    store.remove_consumer(party.id, "replies", "tag")
    time.sleep(0.1)
    store.sweep(party.id)
    assert not store.queue_exists("replies")
    assert store.bindings() == []


def test_an_auto_delete_queue_goes_with_its_last_consumer(store: Store, party: Party) -> None:
    """Not with the first one, and also when the last one dies."""
    dying = Party(store)
    store.declare_queue("events", auto_delete=True)
    store.add_consumer(party.id, "events", "one")
    store.add_consumer(dying.id, "events", "two")
    store.remove_consumer(party.id, "events", "one")
    assert store.queue_exists("events")
    dying.die()
    store.sweep(party.id)
    assert not store.queue_exists("events")


def test_an_exclusive_queue_goes_with_its_party(store: Store, party: Party) -> None:
    """Even if nobody ever consumed it."""
    dying = Party(store)
    store.declare_queue("mine", party=dying.id)
    dying.die()
    store.sweep(party.id)
    assert not store.queue_exists("mine")


def test_consumers_of_a_queue_are_woken_and_others_are_not(store: Store, party: Party) -> None:
    """A message wakes those that registered for its queue, and a message given back does too."""
    idle = Party(store)
    store.add_consumer(party.id, "work", "tag")
    store.add_consumer(idle.id, "other", "tag")
    send(store, "a")
    assert party.presence.settle()
    assert not idle.presence.settle()
    claim = party.claim()
    store.give_back(party.id, tags(claim))
    assert party.presence.settle()
    idle.presence.close()


def test_a_full_pipe_stops_no_sender(store: Store, party: Party) -> None:
    """Whoever does not empty its pipe is awake, or will look when it is."""
    store.add_consumer(party.id, "work", "tag")
    for _ in range(70_000):
        presence.wake(store.folder, [party.id])
    assert party.presence.settle()
    assert not party.presence.settle()


def test_purging_spares_what_is_claimed(store: Store, party: Party) -> None:
    """Only ready messages go, as on RabbitMQ."""
    send(store, "a", "b", "c")
    claim = party.claim()
    assert store.purge("work") == 2
    assert store.acknowledge(party.id, tags(claim)) == 1


@pytest.mark.parametrize(("if_unused", "if_empty"), [(True, False), (False, True)])
def test_a_queue_in_use_is_not_deleted_on_condition(
    store: Store, party: Party, if_unused: bool, if_empty: bool
) -> None:
    """``if_unused`` looks at consumers, ``if_empty`` at ready messages."""
    send(store, "a")
    store.add_consumer(party.id, "work", "tag")
    store.delete_queue("work", if_unused=if_unused, if_empty=if_empty)
    assert store.queue_exists("work")
    assert store.delete_queue("work") == 1
    assert not store.queue_exists("work")


def test_files_of_parties_that_never_registered_are_removed_in_time(store: Store) -> None:
    """Old litter goes, young litter may be a party that is just starting."""
    old, young = Presence(store.folder), Presence(store.folder)
    for each in (old, young):
        presence._own.discard(each.id)
        each.abandon()  # as if the process had died: files left, lock dropped
    for suffix in ("lock", "wake"):
        file = store.folder / f"{old.id}.{suffix}"
        past = time.time() - 3600
        os.utime(file, (past, past))
    party = Party(store)
    left = {file.stem for file in store.folder.iterdir()}
    assert left == {young.id, party.id}
    party.presence.close()


@pytest.mark.parametrize(
    ("kind", "binding", "key", "expected"),
    [
        ("direct", "a.b", "a.b", True),
        ("direct", "a.*", "a.b", False),
        ("fanout", "x", "anything", True),
        ("topic", "a.b", "a.b", True),
        ("topic", "a.*", "a.b", True),
        ("topic", "a.*", "a", False),
        ("topic", "a.*", "a.b.c", False),
        ("topic", "a.#", "a", True),
        ("topic", "a.#", "a.b.c", True),
        ("topic", "#", "", True),
        ("topic", "#.c", "a.b.c", True),
        ("topic", "a.#.c", "a.c", True),
        ("topic", "slow", "reports.slow", False),
        ("topic", "a.+", "a.b", False),
    ],
)
def test_routing_follows_amqp(kind: str, binding: str, key: str, expected: bool) -> None:
    """A star is one word, a hash any number; nothing else is special."""
    assert matches(kind, binding, key) is expected
