"""Where do certificates for TLS tests come from? From a CA that lives as long as the test."""

from __future__ import annotations

from pathlib import Path

from qbridge.testing.servers.base import run_once
from qbridge.testing.servers.install import program

__all__ = ["ThrowawayCA"]


class ThrowawayCA:
    """A certificate authority in a folder, made with the ``openssl`` program.

    Args:
        folder: is made, and holds all certificates and keys.
    """

    def __init__(self, folder: Path) -> None:
        self.folder: Path = folder
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        self.certificate: Path = folder / "ca.pem"
        self._key = folder / "ca.key"
        self._openssl = program("openssl")
        run_once(
            [self._openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
             "-subj", "/CN=qbridge throwaway CA", "-keyout", str(self._key), "-out", str(self.certificate)],
            "making a throwaway CA",
        )  # fmt: skip

    def issue(self, name: str, *, host: str | None = None, expired: bool = False) -> tuple[Path, Path]:
        """Make a certificate for servers and clients alike; one of this name that was there is replaced.

        Args:
            name: its common name, and the name of its files.
            host: the one host that it is for; None: ``localhost`` and 127.0.0.1.
            expired: whether it was valid until yesterday.

        Returns:
            Paths of the certificate and of its key, both PEM.
        """
        certificate, key, request = (self.folder / f"{name}.{ending}" for ending in ("pem", "key", "csr"))
        extensions = self.folder / f"{name}.ext"
        names = "DNS:localhost,IP:127.0.0.1" if host is None else f"DNS:{host}"
        extensions.write_text(f"subjectAltName={names}\nextendedKeyUsage=serverAuth,clientAuth\n")
        run_once(
            [self._openssl, "req", "-newkey", "rsa:2048", "-nodes", "-subj", f"/CN={name}",
             "-keyout", str(key), "-out", str(request)],
            "making a certificate request",
        )  # fmt: skip
        run_once(
            [self._openssl, "x509", "-req", "-days", "-1" if expired else "2", "-in", str(request),
             "-CA", str(self.certificate), "-CAkey", str(self._key), "-CAcreateserial",
             "-extfile", str(extensions), "-out", str(certificate)],
            "signing a certificate",
        )  # fmt: skip
        for path in (certificate, key):
            path.chmod(0o644)  # the server may run as another user; the key is worth nothing
        return certificate, key
