"""`python -m cloud_server.probe`: exit 0 if a cloud server serves, 1 if it does not.

For health checks that run inside its container. Asks the standard gRPC health service.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from picospec.protocol.codec import GENERATE_METHOD

SERVICE_NAME = GENERATE_METHOD.split("/")[1]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m cloud_server.probe", description=__doc__)
    parser.add_argument("address", nargs="?", default="127.0.0.1:50051", metavar="HOST:PORT")
    parser.add_argument("--tls-ca", type=Path, help="PEM file of the authority to trust")
    parser.add_argument("--tls-name", help="name in the certificate, where it is not HOST")
    parser.add_argument("--timeout-s", type=float, default=5.0, help="longest wait for the answer")
    arguments = parser.parse_args(argv)
    try:
        with _channel(arguments) as channel:
            answer = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(service=SERVICE_NAME), timeout=arguments.timeout_s
            )
    except grpc.RpcError as error:
        print(f"{arguments.address}: {error.code().name}: {error.details()}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"{arguments.tls_ca}: {error.strerror}", file=sys.stderr)
        return 1
    status = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    print(f"{arguments.address}: {status}")
    return 0 if answer.status == health_pb2.HealthCheckResponse.SERVING else 1


def _channel(arguments: argparse.Namespace) -> grpc.Channel:
    if arguments.tls_ca is None:
        return grpc.insecure_channel(arguments.address)
    credentials = grpc.ssl_channel_credentials(arguments.tls_ca.read_bytes())
    name = arguments.tls_name
    options = [("grpc.ssl_target_name_override", name)] if name else []
    return grpc.secure_channel(arguments.address, credentials, options=options)


if __name__ == "__main__":
    sys.exit(main())
