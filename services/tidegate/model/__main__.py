"""Runs a model service: `python -m tidegate.model`."""

from __future__ import annotations

import asyncio
import random
import secrets
import signal
import sys
import time
from collections.abc import Callable

import grpc
import structlog
from prometheus_client import REGISTRY, CollectorRegistry

from tidegate.common import metrics as metrics_page
from tidegate.common import service_process
from tidegate.common.grpc_clients import open_channel
from tidegate.common.grpc_server import Server
from tidegate.model import orca, servicer
from tidegate.model.answers import Answers
from tidegate.model.capacity import Capacity
from tidegate.model.config import Settings
from tidegate.model.credits import CreditLedger
from tidegate.model.credits import Terms as CreditTerms
from tidegate.model.engine_watch import EngineWatch
from tidegate.model.load import ReplicaLoad
from tidegate.model.look_ahead import LookAhead
from tidegate.model.metrics import Metrics, StateCollector
from tidegate.model.peers import Peers
from tidegate.model.prompts import PromptSource
from tidegate.model.records import AnswerRecorder
from tidegate.model.replica_servicer import ReplicaServicer
from tidegate.model.reports import Reports
from tidegate.model.slots import Slots
from tidegate.model.sources import ResumeTerms, TokenSource
from tidegate.model.triton_client import TritonClient
from tidegate.text.model_files import ModelFileError, TextModel, load_text_model
from tidegate.v1 import batch_pb2 as _batch_pb2  # noqa: F401 - the ingress's reflection is answered here for Batch, too.
from tidegate.v1 import inference_pb2, inference_pb2_grpc, replica_pb2, replica_pb2_grpc, scheduler_pb2

log = structlog.get_logger()


def main() -> int:
    """Runs until SIGTERM; 2 for bad settings, 1 when it cannot start or for a fault."""
    return service_process.run("model", Settings, serve, start_errors=(ModelFileError,))


async def serve(settings: Settings) -> int:
    """Builds the service and serves; raises when the model or a port cannot be had."""
    model = load_text_model(settings.model_path, settings.model_name, context_token_limit=settings.max_context_tokens)
    mesh = open_channel(settings.mesh_address)
    faults: list[BaseException] = []

    def stop(fault: BaseException) -> None:
        # Envoy's health checks take the requests elsewhere, and whoever runs this process starts it anew.
        faults.append(fault)
        signal.raise_signal(signal.SIGTERM)

    triton = TritonClient(settings.triton_address, settings.triton_model_name)
    service = ModelService(settings, model, triton, mesh, on_fault=stop)
    if settings.metrics_port:
        metrics_page.serve(settings.host, settings.metrics_port)
    await service.start()
    log.info(
        "started",
        port=service.server.port,
        metrics_port=settings.metrics_port,
        model=model.name,
        triton_address=settings.triton_address,
        context_token_count=model.context_token_count,
    )
    await service.server.run_until_signal()
    await service.close()
    await mesh.close()
    return 1 if faults else 0


class ModelService:
    """All parts of one model service, put together.

    Args:
        mesh: a channel to the mesh listener.
        on_fault: called when a part that should run for ever ends by a fault of ours; the replica is of no use then.
    """

    def __init__(
        self,
        settings: Settings,
        model: TextModel,
        triton: TritonClient,
        mesh: grpc.aio.Channel,
        *,
        registry: CollectorRegistry = REGISTRY,
        on_fault: Callable[[BaseException], None] = lambda fault: None,
    ) -> None:
        self._triton = triton
        self._on_fault = on_fault
        triton.on_fault.append(self._tell_fault)
        self.registry = registry
        life = secrets.token_hex(6)
        self.load = ReplicaLoad(
            settings.address, settings.model_name, model.context_token_count, lambda: triton.latest_load
        )
        self.slots = Slots(
            CreditLedger(credit_terms(settings), life),
            self.load.retry_after_seconds,
            refuses_late=settings.refuses_late,
        )
        self.load.slots = self.slots
        self.load.capacity = Capacity(settings.tpot_target_seconds)
        self.load.look_ahead = look_ahead = LookAhead(settings.credit_ahead_limit, time.monotonic())
        self.slots.on_gap = lambda seconds: look_ahead.add_gap(seconds, time.monotonic())
        self.slots.on_turnover = lambda: look_ahead.add_turnover(time.monotonic())
        self._prompts = PromptSource(
            model,
            region=settings.arena_region,
            lease_seconds=settings.tensor_lease_seconds,
            inline_bytes=settings.inline_prepare_bytes,
        )
        metrics = Metrics(settings.model_name, vllm_names=settings.vllm_metric_names, registry=registry)
        registry.register(
            StateCollector(settings.model_name, self.load, self.slots, vllm_names=settings.vllm_metric_names)
        )
        self._recorder = AnswerRecorder(
            mesh,
            queue_limit=settings.record_queue_limit,
            timeout_seconds=settings.record_timeout_seconds,
            on_drop=metrics.drop_record,
        )
        source = TokenSource(
            triton,
            self.slots,
            Peers(mesh, settings.endpoints_file, settings.address),
            self._prompts,
            model,
            ResumeTerms(wait_seconds=settings.resume_wait_seconds, backoff_seconds=settings.resume_backoff_seconds),
            engine_id_prefix=life,
        )
        answers = Answers(
            model,
            self._prompts,
            source,
            Reports(metrics, self.load, self.slots),
            self._recorder,
            lite_model_name=settings.lite_model_name,
            buffer_token_limit=settings.stream_buffer_token_limit,
            batch_delta_seconds=settings.batch_delta_seconds,
            dice=random.Random(secrets.randbits(64)),
        )
        self.server = Server(settings.host, settings.port)
        self._add_services(settings, answers, mesh)
        self._watch = EngineWatch(
            triton,
            self.slots,
            self.load,
            self._prompts,
            slot_limit=settings.slot_limit,
            set_serving=self.server.set_serving,
            poll_seconds=settings.load_poll_seconds,
        )
        self._tasks: list[asyncio.Task[None]] = []

    def _add_services(self, settings: Settings, answers: Answers, mesh: grpc.aio.Channel) -> None:
        terms = servicer.Terms(
            default_timeout_seconds=settings.default_timeout_seconds,
            longest_timeout_seconds=settings.longest_timeout_seconds,
            write_grace_seconds=settings.write_grace_seconds,
            many_limit=settings.many_limit,
            many_write_seconds=settings.many_write_seconds,
        )
        model_names = list(dict.fromkeys(filter(None, (settings.model_name, settings.lite_model_name))))
        inference = servicer.InferenceServicer(answers, self.load, mesh, model_names, terms, is_lite=settings.is_lite)
        inference_pb2_grpc.add_InferenceServicer_to_server(inference, self.server.grpc)
        replica = ReplicaServicer(self.slots, self.load, load_interval_seconds=settings.load_report_seconds)
        replica_pb2_grpc.add_ReplicaServicer_to_server(replica, self.server.grpc)
        self.server.grpc.add_generic_rpc_handlers((orca.handler(self.load),))
        self.server.add_service_name(inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name)
        self.server.add_service_name(replica_pb2.DESCRIPTOR.services_by_name["Replica"].full_name)
        self.server.add_service_name(orca.SERVICE_NAME)
        # The ingress leads reflection to a replica, and the places in the queue to the scheduler.
        self.server.describe(scheduler_pb2.DESCRIPTOR.services_by_name["Scheduler"].full_name)

    async def start(self) -> None:
        """Listens, and begins to look for Triton; health says NOT_SERVING until it is there."""
        await self.server.start()
        await self.server.set_serving(False)
        self._watch.start()
        await self._triton.start()
        for work in (self._watch.run(), self.slots.run(), self._prompts.run(), self._recorder.run()):
            task = asyncio.create_task(work)
            task.add_done_callback(self._note_end)
            self._tasks.append(task)

    def _note_end(self, task: asyncio.Task[None]) -> None:
        if task.cancelled():
            return
        fault = task.exception()
        assert fault is not None, "a task that should run for ever has returned"
        self._tell_fault(fault)

    def _tell_fault(self, fault: BaseException) -> None:
        log.error("task_failed", exc_info=fault)
        self._on_fault(fault)

    async def close(self) -> None:
        """Ends the background work."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._triton.close()


def credit_terms(settings: Settings) -> CreditTerms:
    """The bounds of the ledger, by these settings."""
    return CreditTerms(
        lease_seconds=settings.credit_lease_seconds,
        grace_seconds=settings.credit_grace_seconds,
        protected_seconds=settings.credit_protected_seconds,
        queue_limit=settings.queue_limit,
        overflow_slot_count=settings.overflow_slot_count,
        preempting_share=settings.preempting_share,
    )


if __name__ == "__main__":
    sys.exit(main())
