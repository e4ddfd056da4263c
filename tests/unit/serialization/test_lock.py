"""Keys, signatures and encryption: what is accepted, what is not, and what is never shown."""

from __future__ import annotations

import pickle
from base64 import b64encode, urlsafe_b64encode
from itertools import pairwise

import pytest

from qbridge import BridgeConfig, ConfigurationError
from qbridge.config import SerializationConfig
from qbridge.serialization.keys import Key, new_key, read_key
from qbridge.serialization.lock import Lock
from qbridge.serialization.refused import MessageRefused

OLD, NEW, OTHER = (read_key(new_key(name)) for name in ("old", "new", "other"))


def refusal(
    lock: Lock, signature: object, kind: str = "task", bound: tuple[object, ...] = (), body: bytes = b"x"
) -> str:
    """Verify what must not pass; return why it does not."""
    with pytest.raises(MessageRefused) as caught:
        lock.verify(signature, kind, list(bound), body)
    assert caught.value.reason == "bad_signature"
    return str(caught.value)


# Keys.


def test_a_key_is_read_in_either_alphabet_with_or_without_padding() -> None:
    """People copy them through shells and secret stores."""
    secret = bytes(range(220, 255)) + b"?>"
    for written in (b64encode(secret), urlsafe_b64encode(secret), b64encode(secret).rstrip(b"=")):
        assert read_key(f" k1:{written.decode()} ") == Key("k1", secret)


@pytest.mark.parametrize(
    "text",
    [
        "", "k1", "k1:", ":c2VjcmV0", "k 1:c2VjcmV0", "k1:%%%", "k1:c2VjcmV0", f"{'k' * 41}:{'A' * 44}", "k1:é",
        f"k1:{'A' * 42}",
    ],
)  # fmt: skip
def test_what_is_no_key_is_refused_and_not_shown(text: str) -> None:
    """A key that can be guessed, too; the text may be a key that somebody mistyped."""
    with pytest.raises(ConfigurationError) as caught:
        read_key(text)
    assert "c2VjcmV0" not in str(caught.value)


def test_new_keys_are_all_different_and_say_when_they_were_made() -> None:
    """Their ids too, so that two of one day can be told apart."""
    made = {new_key() for _ in range(50)}
    assert len(made) == 50
    assert all(len(read_key(text).secret) == 32 for text in made)


def test_a_secret_is_not_shown() -> None:
    """Neither by the key, nor by the configuration, in any form."""
    text = new_key("k1")
    config = SerializationConfig(signing_keys=[text])
    whole = BridgeConfig(serialization=config)
    for shown in (read_key(text), config, whole, config.model_dump_json(), whole.model_dump(), config.lock()):
        assert text.partition(":")[2] not in f"{shown!r}{shown!s}"


# The configuration.


def test_keys_come_from_the_environment_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """One variable, with a comma between them."""
    first, second = new_key("a"), new_key("b")
    monkeypatch.setenv("QBRIDGE_SERIALIZATION__SIGNING_KEYS", f"{first}, {second}")
    config = BridgeConfig()
    assert [key.get_secret_value() for key in config.serialization.signing_keys] == [first, second]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"signing_keys": ["k1:abc"]}, "bytes"),
        ({"signing_keys": {"k1": "x"}}, "list of keys"),
        ({"signing_keys": [5]}, "list of texts"),
        ({"signing_keys": [f"a:{'A' * 43}", f"a:{'B' * 43}"]}, "two keys are called 'a'"),
        ({"signing_keys": [f"a:{'A' * 43}", f"b:{'A' * 43}"]}, "the same secret"),
        ({"signing_keys": [f"a:{'A' * 43}"], "encryption_keys": [f"b:{'A' * 43}"]}, "the same secret"),
        ({"encryption_keys": [f"a:{'A' * 43}"]}, "set signing_keys too"),
    ],
)
def test_keys_that_lock_nothing_are_refused(fields: dict[str, object], said: str) -> None:
    """When the configuration is made, with the field's name and without the key."""
    with pytest.raises(ConfigurationError, match=said) as caught:
        BridgeConfig(serialization=fields)  # type: ignore[arg-type]
    assert "serialization" in str(caught.value)
    assert "AAAA" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"defaults": "celery"}, "look at no signature"),
        ({"celery": {"worker_consumer": "proj:Consumer"}}, "looks at signatures"),
        ({"celery": {"task_protocol": 1}}, "protocol 2"),
        ({"celery": {"result_extended": True}}, "in clear"),
    ],
)
def test_what_would_undo_the_lock_is_refused(fields: dict[str, object], said: str) -> None:
    """A configuration that looks locked is."""
    keys = {"signing_keys": [new_key("a")], "encryption_keys": [new_key("b")]}
    with pytest.raises(ConfigurationError, match=said):
        BridgeConfig(serialization=keys, **fields)  # type: ignore[arg-type]


def test_without_keys_there_is_no_lock() -> None:
    """And nothing costs anything."""
    assert SerializationConfig().lock() is None


# Signatures.


def test_a_signature_holds_for_its_purpose_what_is_bound_and_the_body() -> None:
    """Nothing of it can be taken for another, or moved from one part into the other."""
    lock = Lock([NEW])
    signature = lock.sign("task", ["a", "b"], b"body")
    assert lock.verify(signature, "task", ["a", "b"], b"body") > 1_700_000_000
    assert "changed" in refusal(lock, signature, "result", ("a", "b"), b"body")
    assert "changed" in refusal(lock, signature, "task", ("a", "c"), b"body")
    assert "changed" in refusal(lock, signature, "task", ("ab",), b"body")
    assert "changed" in refusal(lock, signature, "task", ("a", "b"), b"Body")
    assert "changed" in refusal(lock, signature, "task", ("a",), b'b"]\nbody')


@pytest.mark.parametrize("part", range(4))
def test_no_part_of_a_signature_can_be_changed(part: int) -> None:
    """Version, key, time and code."""
    lock = Lock([NEW, OTHER])
    parts = lock.sign("task", [], b"x").split(":")
    parts[part] = ["2", "other", str(int(parts[2]) + 1), parts[3][:-2]][part]
    refusal(lock, ":".join(parts))


@pytest.mark.parametrize(
    "signature", [None, 5, "", ":::", "1:new:x:y", "1:new:5:\u00e9", "1:new:5:===", b"1:new:5:AA", []]
)
def test_what_is_no_signature_is_refused(signature: object) -> None:
    """Whatever stands in its place."""
    refusal(Lock([NEW]), signature)


def test_keys_rotate_without_a_moment_at_which_anything_is_refused() -> None:
    """Behind the old one first, then before it, then alone: neighbouring states of a fleet read one another."""
    fleet = [Lock([OLD]), Lock([OLD, NEW]), Lock([NEW, OLD]), Lock([NEW])]
    for one, other in pairwise(fleet):
        for sender, receiver in ((one, other), (other, one)):
            receiver.verify(sender.sign("task", [], b"x"), "task", [], b"x")
    assert "not among the signing_keys" in refusal(Lock([NEW]), Lock([OLD]).sign("task", [], b"x"))


def test_another_key_of_the_same_name_is_refused() -> None:
    """An id is no secret."""
    assert "not the one called new" in refusal(Lock([NEW]), Lock([Key("new", OTHER.secret)]).sign("task", [], b"x"))


# Encryption.


def test_what_is_encrypted_is_different_each_time_and_read_by_holders_only() -> None:
    """A new key for the newest, and the old one still opens."""
    lock = Lock([NEW], [OLD])
    name, first = lock.encrypt(b"secret")
    assert name == "old"
    assert b"secret" not in first
    assert first != lock.encrypt(b"secret")[1]
    assert Lock([NEW], [OTHER, OLD]).decrypt("old", first) == b"secret"
    for wrong in (Lock([NEW], [OTHER]), Lock([NEW], [Key("old", OTHER.secret)]), Lock([NEW])):
        with pytest.raises(MessageRefused):
            wrong.decrypt("old", first)


@pytest.mark.parametrize("at", [0, 15, 16, 27, 28, -1])
def test_what_is_encrypted_cannot_be_changed(at: int) -> None:
    """Neither salt nor nonce, nor text, nor tag; nor cut off."""
    lock = Lock([NEW], [OLD])
    encrypted = bytearray(lock.encrypt(b"secret")[1])
    encrypted[at] ^= 1
    for broken in (bytes(encrypted), lock.encrypt(b"secret")[1][:-1], b"", b"short"):
        with pytest.raises(MessageRefused):
            lock.decrypt("old", broken)


def test_a_lock_can_be_sent_to_a_child_process() -> None:
    """Workers with a pool of spawned processes pickle the app."""
    lock = pickle.loads(pickle.dumps(Lock([NEW], [OLD])))
    assert lock.decrypt(*Lock([NEW], [OLD]).encrypt(b"x")) == b"x"
