"""Where a server listens."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

from pando.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Address:
    """Host, port, whether over TLS, and the path before `/v1`."""

    host: str
    port: int
    secure: bool
    base: str

    @classmethod
    def parse(cls, url: str) -> Address:
        """Address of a base URL, with or without a trailing `/v1`. Raises ConfigError."""
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"{url!r} is not a server's URL; give one like http://127.0.0.1:30000", param="url")
        secure = parts.scheme == "https"
        port = parts.port or (443 if secure else 80)
        return cls(parts.hostname, port, secure, parts.path.rstrip("/").removesuffix("/v1"))

    @property
    def url(self) -> str:
        """The address for people."""
        return f"{'https' if self.secure else 'http'}://{self.host}:{self.port}{self.base}"
