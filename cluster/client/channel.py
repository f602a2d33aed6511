"""How a server is reached."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from grpc import aio

from headrace.scheduler.errors import HeadraceError

_OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.keepalive_time_ms", 30_000),  # a server that is gone would else be waited for
]


@dataclass(frozen=True, slots=True)
class Target:
    """HOST:PORT; with `tls` by the machine's own certificates, or those of a file in PEM."""

    address: str
    api_key: str | None = None
    tls: bool = False
    ca_file: Path | None = None

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        return () if self.api_key is None else (("authorization", f"Bearer {self.api_key}"),)

    def channel(self) -> Any:
        """HeadraceError for a file that cannot be read."""
        credentials = self._credentials()
        if credentials is None:
            return grpc.insecure_channel(self.address, options=_OPTIONS)
        return grpc.secure_channel(self.address, credentials, options=_OPTIONS)

    def aio_channel(self) -> Any:
        """On the event loop that runs."""
        credentials = self._credentials()
        if credentials is None:
            return aio.insecure_channel(self.address, options=_OPTIONS)
        return aio.secure_channel(self.address, credentials, options=_OPTIONS)

    def _credentials(self) -> Any:
        if self.ca_file is None:
            return grpc.ssl_channel_credentials() if self.tls else None
        try:
            return grpc.ssl_channel_credentials(self.ca_file.read_bytes())
        except OSError as error:
            raise HeadraceError(f"cannot read {self.ca_file}: {error.strerror}") from error
