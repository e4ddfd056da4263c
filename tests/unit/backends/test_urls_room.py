"""URLs are taken apart as kombu does, and their passwords stay where they are."""

from __future__ import annotations

import traceback

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kombu.utils.url import url_to_parts

from qbridge.backends.urls import Address, address, join_url, mask_url, split_url
from qbridge.exceptions import ConfigurationError

SECRET = "s3cret"


@pytest.mark.parametrize(
    "url",
    [
        "amqp://h", "amqp://h/", "amqp://h//", "amqp://h/v", "amqp://h//v", "amqp://h/%2Fv", "amqp://h/%2F",
        "amqp://u:p%40%2F%23@h:1/v", "amqp://:p@h", "redis://h/3", "redis://:p@[::1]:7/0?x=y", "redis+socket:///a/b.sock?virtual_host=2",
    ],
)  # fmt: skip
def test_a_url_has_the_parts_that_kombu_finds(url: str) -> None:
    """Peers write the same URLs for plain Celery."""
    parts, theirs = split_url(url), url_to_parts(url)
    assert (
        theirs.scheme, theirs.hostname, theirs.port, theirs.username, theirs.password, theirs.path, dict(theirs.query)
    ) == (
        parts.scheme, parts.host, parts.port, parts.username, parts.password, parts.path, dict(parts.query)
    )  # fmt: skip


texts = st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "S"]), min_size=1, max_size=20)


@given(username=texts, password=texts, path=texts)
def test_what_is_joined_is_read_back(username: str, password: str, path: str) -> None:
    """Any account and any path survive the way through a URL, in ours and in kombu's reading."""
    url = join_url("amqp", username=username, password=password, server=Address("h", 1), path=path)
    parts, theirs = split_url(url), url_to_parts(url)
    assert (username, password, path) == (parts.username, parts.password, parts.path)
    assert (username, password, path) == (theirs.username, theirs.password, theirs.path)


@given(password=texts.filter(lambda text: len(text) > 3))
def test_a_masked_url_shows_no_password(password: str) -> None:
    """Of any account, also in lists of URLs."""
    url = join_url("amqp", username="u", password=f"{password}{SECRET}", server=Address("h", 1))
    assert SECRET not in mask_url(f"{url};{url}")
    assert "amqp://u:**@h:1/;amqp://u:**@h:1/" == mask_url(f"{url};{url}")


@pytest.mark.parametrize(
    "url",
    [
        f"amqp://u:{SECRET}#x@h//", f"amqp://u:{SECRET}/x@h//", f"amqp://u:{SECRET}?x@h//", f"amqp://u:x:{SECRET}/@h",
        f"amqp://u:{SECRET}[@h", f"u:{SECRET}@h", f"am qp://u:{SECRET}@h",
    ],
)  # fmt: skip
def test_a_malformed_url_is_refused_without_being_shown(url: str) -> None:
    """urllib's own messages quote half of the password; the chain of causes does not help them out."""
    with pytest.raises(ConfigurationError) as caught:
        split_url(url)
    assert SECRET not in "".join(traceback.format_exception(caught.value))


def test_a_repr_shows_no_password() -> None:
    """The parts of a URL can be logged."""
    assert SECRET not in repr(split_url(f"amqp://u:{SECRET}@h/?password={SECRET}"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("h", Address("h", 9)),
        ("h:1", Address("h", 1)),
        ("[::1]:1", Address("::1", 1)),
        ("[::1]", Address("::1", 9)),
        ("::1", Address("::1", 9)),
        ("10.0.0.1:2", Address("10.0.0.1", 2)),
    ],
)
def test_a_host_may_bring_its_port(text: str, expected: Address) -> None:
    """Names, IPv4 and IPv6."""
    assert expected == address(text, 9)


@pytest.mark.parametrize("text", ["", "a b", "u:p@h", "amqp://h", "h:x", "h/v", "h:1:2"])
def test_what_is_no_host_is_refused(text: str) -> None:
    """A URL is not a host."""
    with pytest.raises(ConfigurationError):
        address(text, 9)


def test_an_ipv6_address_is_written_in_brackets() -> None:
    """Else its port could not be told from it."""
    assert ["[::1]:2", "h:2"] == [str(Address("::1", 2)), str(Address("h", 2))]
