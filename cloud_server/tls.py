"""TLS: the gRPC server's credentials, from PEM files."""

from pathlib import Path

import grpc

from cloud_server.config import ServerConfig
from picospec.errors import ConfigError


def server_credentials(config: ServerConfig) -> grpc.ServerCredentials | None:
    """The certificate chain and key that `config` names; None without TLS. Raises ConfigError."""
    if not config.tls_cert:
        return None
    pem = []
    for name in ("tls_key", "tls_cert"):
        path = getattr(config, name)
        try:
            pem.append(Path(path).read_bytes())
        except OSError as error:
            raise ConfigError(f"server.{name} = {path!r}: {error.strerror}") from None
    return grpc.ssl_server_credentials([(pem[0], pem[1])])
