"""``[web]`` in the file of either daemon: where its status page is served, and who may read it. Imports no server."""

from __future__ import annotations

import ipaddress

from pydantic import model_validator

from privacy.settings import Listen, Section

HERE = "127.0.0.1"
MOST_PORT = 65535


class Web(Section):
    """The status page; without an address there is none."""

    #: A port, or host:port; a port alone and the loopback interface are for this machine only. Empty: no page.
    listen: Listen = ""
    #: File of mode 0600 with the password, 16 characters or more; every address that others can reach demands one.
    password_file: str = ""
    #: TLS certificate for an address that others can reach. Without it the coordinator's own; a site has none.
    certificate_file: str = ""
    #: Its key.
    key_file: str = ""

    @property
    def host(self) -> str:
        """The host to listen on."""
        host = self.listen.rpartition(":")[0].strip("[]")
        return HERE if host in ("", "localhost") else host

    @property
    def port(self) -> int:
        return int(self.listen.rpartition(":")[2])

    @property
    def is_local(self) -> bool:
        """Is the page for this machine only?"""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:  # a name, which may lead anywhere
            return False

    @model_validator(mode="after")
    def _can_be_served(self) -> Web:
        if not self.listen:
            return self
        if self.port > MOST_PORT:
            raise ValueError(f"listen: expected a port of at most {MOST_PORT}")
        if not self.is_local and not self.password_file:
            raise ValueError(
                f"expected a password_file, since others can reach {self.host}; listen on {HERE} to do without"
            )
        if bool(self.certificate_file) != bool(self.key_file):
            raise ValueError("expected certificate_file and key_file, or neither of them")
        return self
