"""What does "use TLS" mean? One model for every service; each room translates it for its driver.

Verification is on unless the operator says otherwise: kombu's own ``rediss://`` default is to verify nothing, and
py-amqp checks the host name only when it is told one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, BeforeValidator, FilePath, model_validator

__all__ = ["TLS", "OptionalTLS"]


class TLS(BaseModel, frozen=True, extra="forbid", hide_input_in_errors=True):
    """How the connection is encrypted and whom it trusts.

    Args:
        ca_file: PEM file of the authorities to trust; None: those of the operating system.
        cert_file: PEM file of the client's certificate, if the server asks for one.
        key_file: PEM file of its unencrypted private key; None: it is in ``cert_file``.
        verify: whether the server's certificate must be valid. False accepts anybody who answers.
        check_hostname: whether the certificate must name the host that was asked for.
        server_hostname: name expected in the certificate, where it differs from the host (RabbitMQ only).
    """

    ca_file: FilePath | None = None
    cert_file: FilePath | None = None
    key_file: FilePath | None = None
    verify: bool = True
    check_hostname: bool = True
    server_hostname: str | None = None

    if TYPE_CHECKING:

        def __init__(
            self,
            *,
            ca_file: str | FilePath | None = None,
            cert_file: str | FilePath | None = None,
            key_file: str | FilePath | None = None,
            verify: bool = True,
            check_hostname: bool = True,
            server_hostname: str | None = None,
        ) -> None: ...

    @model_validator(mode="after")
    def _a_key_needs_its_certificate(self) -> TLS:
        if self.key_file is not None and self.cert_file is None:
            raise ValueError("key_file without cert_file: name the client certificate that the key belongs to")
        return self

    @property
    def checks_hostname(self) -> bool:
        """Whether the host name is compared; without verification there is nothing to compare it with."""
        return self.verify and self.check_hostname


def _bool_as_tls(value: Any) -> Any:
    if value is True or (isinstance(value, str) and value.lower() in {"true", "1", "yes", "on"}):
        return TLS()
    if value is False or (isinstance(value, str) and value.lower() in {"false", "0", "no", "off"}):
        return None
    return value


OptionalTLS = Annotated[TLS | None, BeforeValidator(_bool_as_tls)]
"""A field that takes a TLS model, True (verified, system authorities) or False (plaintext); holds TLS or None."""
