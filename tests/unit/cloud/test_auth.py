"""Who may call."""

from __future__ import annotations

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from picospec.v1 import speculation_pb2 as pb
from tests.support.cloud import failure, running_cloud

GOOD = (("authorization", "Bearer correct horse"),)


@pytest.mark.parametrize(
    "metadata",
    [
        (),
        (("authorization", ""),),
        (("authorization", "Bearer "),),
        (("authorization", "Bearer correct hors"),),
        (("authorization", "Bearer correct horse "),),
        (("authorization", "Basic correct horse"),),
        (("x-authorization", "Bearer correct horse"),),
    ],
)
async def test_without_the_token_nothing_is_served(metadata: tuple[tuple[str, str], ...]) -> None:
    async with running_cloud(auth_token="correct horse") as cloud:
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await cloud.stub.GetModel(pb.GetModelRequest(), metadata=metadata)
        assert failure(refusal.value).code == "UNAUTHENTICATED"
        assert "correct horse" not in str(refusal.value)
        # A stream is refused before it has sent anything.
        assert (await cloud.stream(metadata=metadata).failure()).code == "UNAUTHENTICATED"
        listing = reflection_pb2_grpc.ServerReflectionStub(cloud.channel).ServerReflectionInfo(
            iter([reflection_pb2.ServerReflectionRequest(list_services="")]), metadata=metadata
        )
        with pytest.raises(grpc.aio.AioRpcError):
            await listing.read()
        health = health_pb2_grpc.HealthStub(cloud.channel)
        answer = await health.Check(health_pb2.HealthCheckRequest(service=""))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        assert cloud.engine.opened == []


async def test_with_the_token_all_is_served() -> None:
    async with running_cloud(auth_token="correct horse") as cloud:
        await cloud.stub.GetModel(pb.GetModelRequest(), metadata=GOOD)
        await cloud.stream(metadata=GOOD).start()


async def test_where_no_token_is_set_none_is_asked_for() -> None:
    async with running_cloud() as cloud:
        await cloud.stub.GetModel(pb.GetModelRequest(), metadata=(("authorization", "Bearer x"),))
        await cloud.stub.GetModel(pb.GetModelRequest())
