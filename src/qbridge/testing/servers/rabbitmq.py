"""How is a private RabbitMQ node run, and how do tests talk to its management API?"""

from __future__ import annotations

import base64
import json
import os
import secrets
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import quote, unquote, urlsplit

from qbridge.testing.servers.absence import ServerFailed
from qbridge.testing.servers.base import Server, fresh_name, run_once
from qbridge.testing.servers.install import program
from qbridge.testing.servers.process import ChildProcess, free_ports, private_folder, remove_folder
from qbridge.testing.servers.tls import ThrowawayCA
from qbridge.testing.waiting import wait_until

__all__ = ["RabbitMQServer"]

_PROTOCOL_HEADER = b"AMQP\x00\x00\x09\x01"


class RabbitMQServer(Server):
    """A RabbitMQ node with the management plugin and an epmd of its own; several may run beside each other.

    Args:
        tls: listen with TLS too, with a certificate of a throwaway CA (``.tls_url``, ``.ca.certificate``).
        plugins: further plugins to enable.
        settings: further lines of rabbitmq.conf: ``{"consumer_timeout": "60000"}``.
        advanced: advanced.config, for what has no name there: ``"[{rabbit, [{channel_tick_interval, 1000}]}]."``.
        root: run the node of another system under this root folder (needs root rights): a newer RabbitMQ in a
            folder made by debootstrap, for example; None: what ``QBRIDGE_TEST_RABBITMQ_ROOT`` says, or this system.
    """

    name: ClassVar[str] = "rabbitmq"
    environment_variable: ClassVar[str] = "QBRIDGE_TEST_RABBITMQ_URL"
    management_variable: ClassVar[str] = "QBRIDGE_TEST_RABBITMQ_MANAGEMENT_URL"
    start_timeout: ClassVar[float] = 120.0

    def __init__(
        self,
        *,
        tls: bool = False,
        plugins: tuple[str, ...] = (),
        settings: dict[str, str] | None = None,
        advanced: str | None = None,
        root: Path | str | None = None,
    ) -> None:
        super().__init__()
        self.port: int = 0
        self.tls_port: int = 0
        self.management_port: int = 0
        self._dist_port = self._epmd_port = 0
        self.ca: ThrowawayCA | None = None
        self._tls = tls
        self._plugins = ("rabbitmq_management", *plugins)
        self._settings = dict(settings or {})
        self._advanced = advanced
        root = root or os.environ.get("QBRIDGE_TEST_RABBITMQ_ROOT") or None
        self._root = None if root is None else Path(root)
        self._epmd: ChildProcess | None = None
        self._epmd_folder: Path | None = None

    # Where it is.

    @property
    def _private_url(self) -> str:
        return f"amqp://guest:guest@127.0.0.1:{self.port}//"

    @property
    def tls_url(self) -> str:
        """URL of the TLS listener; the name in it is the certificate's."""
        return f"amqps://guest:guest@localhost:{self.tls_port}//"

    @property
    def management_url(self) -> str:
        """URL of the management API, with user and password.

        For a server given by URL: ``QBRIDGE_TEST_RABBITMQ_MANAGEMENT_URL``, else port 15672 of its host.
        """
        if self.private:
            return f"http://guest:guest@127.0.0.1:{self.management_port}"
        address = urlsplit(self.url)
        login = f"{address.username or 'guest'}:{address.password or 'guest'}"
        return os.environ.get(self.management_variable) or f"http://{login}@{address.hostname or 'localhost'}:15672"

    def user_url(self, username: str = "guest", password: str = "guest", vhost: str = "/") -> str:  # noqa: S107
        """URL of this server for another user or vhost.

        Args:
            username: unquoted.
            password: unquoted.
            vhost: its name; ``"/"`` is the default one.
        """
        address = urlsplit(self.url)
        login = f"{quote(username, safe='')}:{quote(password, safe='')}"
        return f"{address.scheme}://{login}@{address.hostname}:{address.port or 5672}/{quote(vhost, safe='')}"

    # How it is run.

    def _choose_ports(self) -> None:
        self.port, self.tls_port, self.management_port, self._dist_port, self._epmd_port = free_ports(5)

    def _folder_parent(self) -> Path | None:
        return None if self._root is None else self._root / "tmp"

    def _inner(self, path: Path) -> str:
        """``path`` as the node sees it."""
        return str(path) if self._root is None else f"/{path.relative_to(self._root)}"

    def _prepare(self, folder: Path) -> None:
        lines = [
            f"listeners.tcp.1 = 127.0.0.1:{self.port}",
            "management.tcp.ip = 127.0.0.1",
            f"management.tcp.port = {self.management_port}",
            "log.console = true",
            "log.file = false",
            # Statistics are what the management API shows: look each second instead of each five.
            "collect_statistics_interval = 1000",
        ]
        if self._tls:
            self.ca = ThrowawayCA(folder / "tls")
            certificate, key = self.ca.issue("server")
            lines += [
                f"listeners.ssl.1 = 127.0.0.1:{self.tls_port}",
                f"ssl_options.cacertfile = {self._inner(self.ca.certificate)}",
                f"ssl_options.certfile = {self._inner(certificate)}",
                f"ssl_options.keyfile = {self._inner(key)}",
                "ssl_options.verify = verify_peer",
                "ssl_options.fail_if_no_peer_cert = false",
            ]
        lines += [f"{name} = {value}" for name, value in self._settings.items()]
        (folder / "rabbitmq.conf").write_text("\n".join(lines) + "\n")
        if self._advanced is not None:
            (folder / "advanced.config").write_text(f"{self._advanced}\n")
        (folder / "enabled_plugins").write_text(f"[{','.join(self._plugins)}].\n")
        cookie = folder / ".erlang.cookie"
        cookie.write_text(secrets.token_hex(20))
        cookie.chmod(0o400)

    def _environment(self, folder: Path) -> Mapping[str, str]:
        inner = self._inner(folder)
        environment = {
            "HOME": inner,
            "RABBITMQ_NODENAME": f"qbridge{self.port}@localhost",
            "RABBITMQ_DIST_PORT": str(self._dist_port),
            "ERL_EPMD_PORT": str(self._epmd_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            # The files of the machine's own node are neither read nor written.
            "RABBITMQ_CONF_ENV_FILE": f"{inner}/rabbitmq-env.conf",
            "RABBITMQ_CONFIG_FILE": f"{inner}/rabbitmq.conf",
            "RABBITMQ_ADVANCED_CONFIG_FILE": f"{inner}/advanced.config",
            "RABBITMQ_ENABLED_PLUGINS_FILE": f"{inner}/enabled_plugins",
            "RABBITMQ_MNESIA_BASE": f"{inner}/data",
            "RABBITMQ_FEATURE_FLAGS_FILE": f"{inner}/feature_flags",
            "RABBITMQ_GENERATED_CONFIG_DIR": f"{inner}/config",
            "RABBITMQ_SCHEMA_DIR": f"{inner}/schema",
            "RABBITMQ_LOG_BASE": f"{inner}/log",
            "RABBITMQ_PID_FILE": f"{inner}/server.pid",
            # The script then becomes the Erlang machine instead of waiting for it: one pid to freeze and kill.
            "RUNNING_UNDER_SYSTEMD": "true",
            "TMPDIR": inner,
        }
        if self._root is not None:
            # A chroot has no distribution that would say where its plugins are.
            found = sorted(self._root.glob("usr/lib/rabbitmq/lib/rabbitmq_server-*/plugins"))
            environment["RABBITMQ_PLUGINS_DIR"] = self._inner(found[-1])
        return environment

    def _enter_root(self, command: list[str]) -> list[str]:
        if self._root is None:
            return command
        # /proc is mounted in a namespace of the process's own, so nothing has to be unmounted afterwards.
        script = 'mount -t proc proc "$0/proc" && exec chroot "$0" "$@"'
        return [program("unshare"), "--mount", "sh", "-c", script, str(self._root), *command]

    def _program(self, name: str) -> str:
        if self._root is not None:
            return f"/usr/lib/rabbitmq/bin/{name}"
        # Debian's /usr/sbin/rabbitmq-server is a wrapper that changes the user; the script itself does not.
        return program(name, "/usr/lib/rabbitmq/bin")

    def _command(self, folder: Path) -> list[str]:
        if self._epmd is None:
            # Else the node starts epmd as a daemon that stays behind. It outlives kill and restart of the node.
            self._epmd_folder = private_folder("epmd", inside=self._folder_parent())
            self._epmd = ChildProcess(
                self._enter_root(
                    ["/usr/bin/epmd" if self._root is not None else program("epmd"),
                     "-port", str(self._epmd_port), "-address", "127.0.0.1"]
                ),
                log=self._epmd_folder / "epmd.log",
                env={"PATH": os.environ.get("PATH", os.defpath), "HOME": "/"},
                cwd=self._epmd_folder,
            )  # fmt: skip
        return self._enter_root([self._program("rabbitmq-server")])

    def _closing(self) -> None:
        if self._epmd is not None:
            self._epmd.kill()
            self._epmd = None
        if self._epmd_folder is not None:
            remove_folder(self._epmd_folder)
            self._epmd_folder = None

    def _is_ready(self) -> bool:
        address = urlsplit(self.url)
        try:
            with socket.create_connection((address.hostname or "localhost", address.port or 5672), 2) as plain:
                if address.scheme == "amqps":
                    return True  # it listens; the handshake is the tests' business
                plain.sendall(_PROTOCOL_HEADER)
                # The first frame is Connection.Start on channel 0: a method frame begins with 1.
                if not plain.recv(1).startswith(b"\x01"):
                    return False
            if self.private:
                self.api("GET", "/api/overview")
        except (OSError, HTTPException, ServerFailed):
            return False
        return True

    # What tests do with it.

    def kill(self) -> None:
        """SIGKILL the node and wait until it is gone; ports and data are kept.

        The node writes the register of its quorum queues up to a second late. One that is killed before that comes back
        with queues that take and give nothing, for ever: a property of RabbitMQ that would make every test of a crash
        a matter of luck. So this waits for the register first, unless the node is frozen.
        """
        if not self._running("kill").frozen:
            wait_until(self._queues_are_on_disk, 10, what="RabbitMQ to write the register of its quorum queues")
        super().kill()

    def _queues_are_on_disk(self) -> bool:
        for register in self.folder.glob("data/*/quorum/*/names.dets"):
            written = register.read_bytes()
            if any(entry.name.encode() not in written for entry in register.parent.iterdir() if entry.is_dir()):
                return False
        return True

    def api(self, method: str, path: str, body: object = None) -> Any:
        """Call the management API.

        Args:
            method: ``"GET"``, ``"PUT"``, ``"POST"``, ``"DELETE"``.
            path: with the leading ``/api/``; names in it quoted (``%2F`` is the default vhost).
            body: is sent as JSON.

        Returns:
            The decoded answer, None if it is empty.

        Raises:
            ServerFailed: if the answer is an error; names its status.
        """
        address = urlsplit(self.management_url)
        login = f"{unquote(address.username or 'guest')}:{unquote(address.password or 'guest')}"
        headers = {
            "Authorization": "Basic " + base64.b64encode(login.encode()).decode(),
            "Content-Type": "application/json",
        }
        connection = HTTPConnection(address.hostname or "localhost", address.port or 15672, timeout=15)
        try:
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
            content = response.read()
        finally:
            connection.close()
        if response.status >= 300:
            raise ServerFailed(f"RabbitMQ answered {response.status} to {method} {path}: {content[:500]!r}")
        return json.loads(content) if content else None

    def create_vhost(self, name: str) -> str:
        """Create a vhost that the URL's user may use.

        Returns:
            Its URL.
        """
        address = urlsplit(self.url)
        user = unquote(address.username or "guest")
        self.api("PUT", f"/api/vhosts/{quote(name, safe='')}")
        self.set_permissions(user, name)
        return self.user_url(user, unquote(address.password or "guest"), name)

    def delete_vhost(self, name: str) -> None:
        """Delete a vhost with all that is in it; the server closes the connections to it.

        A node that was just restarted, or has lost connections in the middle of a task, may answer 500 to the first
        request while its queues are still ending (seen on 3.10), so this asks again until the vhost is gone.

        Raises:
            ServerFailed: if it is there after fifteen seconds; names the last answer.
        """
        path = f"/api/vhosts/{quote(name, safe='')}"
        answers: list[ServerFailed] = []

        def is_gone() -> bool:
            try:
                self.api("DELETE", path)
            except ServerFailed as error:
                answers.append(error)
            return name not in {vhost["name"] for vhost in self.api("GET", "/api/vhosts")}

        try:
            wait_until(is_gone, 15, what=f"RabbitMQ to delete the vhost {name}", interval=0.2)
        except TimeoutError:
            raise answers[-1] if answers else ServerFailed(f"RabbitMQ keeps the vhost {name}") from None

    @contextmanager
    def vhost(self, name: str | None = None) -> Iterator[str]:
        """A vhost for the length of a ``with`` block.

        Args:
            name: None: one that nobody used before.

        Yields:
            Its URL.
        """
        chosen = fresh_name() if name is None else name
        url = self.create_vhost(chosen)
        yield url
        if self.running:
            self.delete_vhost(chosen)

    @contextmanager
    def fresh(self) -> Iterator[str]:
        """A vhost that nobody used before, deleted afterwards.

        Yields:
            Its URL.
        """
        with self.vhost() as url:
            yield url

    def create_user(self, name: str, password: str, *, tags: str = "") -> None:
        """Create a user without any permission.

        Args:
            name: its name.
            password: its password.
            tags: ``"administrator"``, ``"monitoring"`` …, comma-separated.
        """
        self.api("PUT", f"/api/users/{quote(name, safe='')}", {"password": password, "tags": tags})

    def delete_user(self, name: str) -> None:
        """Delete a user."""
        self.api("DELETE", f"/api/users/{quote(name, safe='')}")

    def set_permissions(
        self, user: str, vhost: str = "/", *, configure: str = ".*", write: str = ".*", read: str = ".*"
    ) -> None:
        """Say what a user may do in a vhost; each is a regular expression of names, ``""`` allows nothing."""
        self.api(
            "PUT",
            f"/api/permissions/{quote(vhost, safe='')}/{quote(user, safe='')}",
            {"configure": configure, "write": write, "read": read},
        )

    def queues(self, vhost: str = "/") -> dict[str, dict[str, Any]]:
        """Every queue of a vhost by name, as the management API shows it (numbers of messages lag by a second)."""
        found: list[dict[str, Any]] = self.api("GET", f"/api/queues/{quote(vhost, safe='')}")
        return {queue["name"]: queue for queue in found}

    def ctl(self, *arguments: str) -> str:
        """Run ``rabbitmqctl`` on the private node; the API is faster where it can do the same.

        Returns:
            Its output.
        """
        folder = self.folder
        environment = {"PATH": os.environ.get("PATH", os.defpath), "LANG": "C.UTF-8", **self._environment(folder)}
        command = self._enter_root([self._program("rabbitmqctl"), *arguments])
        return run_once(command, f"rabbitmqctl {arguments[0]}", env=environment)
