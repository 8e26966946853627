"""gRPC's health and reflection services, beside the federation's: may this coordinator be sent work, and what is there?

Both are on the members' port, behind the same mutual TLS and the same gate, and health is on the operator's socket too.
They tell anybody with a certificate of the federation what a member would learn anyway.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from coordinator.pulse import Wellbeing
from privacy.wire.transport import SERVICE

Call = grpc.aio.ServicerContext[Any, Any]
Status = health_pb2.HealthCheckResponse

HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
#: Seconds between two looks for somebody who watches.
LOOK_S = 1.0


class HealthService(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # the package has no types of its own
    """``grpc.health.v1.Health``, of the whole server (the empty name) and of the federation service."""

    def __init__(self, wellbeing: Wellbeing) -> None:
        self._wellbeing = wellbeing

    async def _status(self, service: str) -> int:
        if service not in ("", SERVICE):
            return int(Status.SERVICE_UNKNOWN)
        fault = await asyncio.to_thread(self._wellbeing.fault)
        return int(Status.NOT_SERVING if fault else Status.SERVING)

    async def Check(self, request: Any, context: Call) -> Any:
        """The state now; NOT_FOUND for another service."""
        status = await self._status(request.service)
        if status == Status.SERVICE_UNKNOWN:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"expected '' or '{SERVICE}' as the service")
        return Status(status=status)

    async def Watch(self, request: Any, _context: Call) -> AsyncIterator[Any]:
        """The state now, and each time it changes."""
        last = None
        while True:
            status = await self._status(request.service)
            if status != last:
                yield Status(status=status)
            last = status
            await asyncio.sleep(LOOK_S)


def add_health(server: grpc.aio.Server, wellbeing: Wellbeing) -> None:
    """Register the health service."""
    health_pb2_grpc.add_HealthServicer_to_server(HealthService(wellbeing), server)


def add_reflection(server: grpc.aio.Server) -> None:
    """Register the reflection service: names and messages of the services, as the proto files have them."""
    reflection.enable_server_reflection((SERVICE, HEALTH, reflection.SERVICE_NAME), server)
