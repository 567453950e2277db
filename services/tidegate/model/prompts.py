"""Where a request's prompt tokens are, and how they stay there while it runs.

A prompt is tokens in this host's shared memory, written by preprocess and named by a handle, or tokens in this
process, made by the same library when there is no usable handle (preprocess away, another host, arena full, lease
over). A handle that is used is this service's to renew while the request runs, and to release at its end.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from typing import Final

import msgspec
import numpy as np
import structlog
from numpy.typing import NDArray

from tidegate.common.arena import Arena, ArenaError, HandleError, decode_tensor_header
from tidegate.common.arena_region import region_path
from tidegate.text.model_files import TextModel
from tidegate.text.prompt import Prompt, prepare_prompt
from tidegate.v1 import inference_pb2, tensor_pb2

log = structlog.get_logger()

TOKEN_BYTES: Final = 4

ATTACH_INTERVAL_SECONDS: Final = 1.0
"""Between two attempts to find a region that is not there."""


class HeldPrompt(msgspec.Struct, eq=False):
    """The prompt of one running request: exactly one of `token_ids` and `handle` is there."""

    prompt_token_count: int
    truncated_token_count: int
    max_tokens: int
    """The most tokens that the answer may have, those resumed included."""
    token_ids: NDArray[np.int32] | None = None
    """[prompt_token_count] int32."""
    handle: tensor_pb2.SharedMemoryHandle | None = None


class PromptSource:
    """Finds prompts and keeps their leases.

    Args:
        region: the arena's name; there need not be one.
        lease_seconds: what a renewal asks for.
        inline_bytes: a larger request is tokenized in a thread.
    """

    def __init__(
        self,
        model: TextModel,
        *,
        region: str,
        lease_seconds: float,
        inline_bytes: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._model = model
        self._region = region
        self._lease_seconds = lease_seconds
        self._inline_bytes = inline_bytes
        self._clock = clock
        self._arena: Arena | None = None
        self._next_attach = 0.0
        self._registered_inode = 0
        self._held: dict[int, tensor_pb2.SharedMemoryHandle] = {}

    async def hold(
        self, request: inference_pb2.GenerateRequest, *, tensor_header: str, tenant: str, openai_names: bool
    ) -> HeldPrompt:
        """The prompt of a validated request; `release` it at the request's end.

        Raises:
            TidegateError: the prompt cannot be made, and why.
        """
        if tensor_header:
            held = self._from_arena(request, tensor_header) if self._may_use_tensor(request) else None
            if held is not None:
                return held
            self._give_up(tensor_header)
        prompt = await self._prepare(request, tenant, openai_names=openai_names)
        return HeldPrompt(
            prompt_token_count=prompt.prompt_token_count,
            truncated_token_count=prompt.truncated_token_count,
            max_tokens=prompt.max_tokens,
            token_ids=prompt.token_ids,
        )

    def tokens(self, prompt: HeldPrompt) -> NDArray[np.int32]:
        """The prompt's tokens, [prompt_token_count] int32, copied out of the arena where they are there.

        Raises:
            HandleError: the lease was lost.
        """
        if prompt.token_ids is None:
            assert prompt.handle is not None and self._arena is not None
            copy = self._arena.read(prompt.handle, self._clock())
            prompt.token_ids = np.frombuffer(copy, dtype=np.int32)
        return prompt.token_ids

    def is_live(self, prompt: HeldPrompt) -> bool:
        """Whether the bytes that the prompt's handle names are still the prompt's."""
        if prompt.handle is None or self._arena is None:
            return False
        try:
            self._arena.verify(prompt.handle, self._clock())
        except HandleError:
            return False
        return True

    async def prepare_again(
        self, prompt: HeldPrompt, request: inference_pb2.GenerateRequest, tenant: str
    ) -> NDArray[np.int32]:
        """The tokens of a held prompt whose lease was lost, [prompt_token_count] int32, kept in the prompt from now."""
        prompt.token_ids = (await self._prepare(request, tenant, openai_names=False)).token_ids
        return prompt.token_ids

    async def _prepare(self, request: inference_pb2.GenerateRequest, tenant: str, *, openai_names: bool) -> Prompt:
        arguments = (request, self._model, tenant)
        if request.ByteSize() > self._inline_bytes:
            return await asyncio.to_thread(prepare_prompt, *arguments, openai_names=openai_names)
        return prepare_prompt(*arguments, openai_names=openai_names)

    def release(self, prompt: HeldPrompt) -> None:
        """Ends the lease, where there is one."""
        if (
            prompt.handle is not None
            and self._held.pop(prompt.handle.lease_id, None) is not None
            and self._arena is not None
        ):
            self._arena.release(prompt.handle)

    def is_registered_memory(self) -> bool:
        """Whether the region's name still stands for the memory that Triton was told of."""
        return self._registered_inode != 0 and self._inode() == self._registered_inode

    async def register(self, register: Callable[[str, int], Awaitable[None]]) -> None:
        """Tells Triton of the region, if there is one that it has not been told of."""
        inode = self._inode()
        if not inode or inode == self._registered_inode or not self._attach():
            return
        assert self._arena is not None
        self._registered_inode = 0
        await register(self._arena.region, self._arena.byte_count)
        if self._inode() == inode:
            self._registered_inode = inode

    async def run(self) -> None:
        """Renews the leases of what runs, all of them in one go."""
        while True:
            await asyncio.sleep(self._lease_seconds / 3)
            for handle in list(self._held.values()):
                if self._arena is not None and not self._arena.renew(handle, self._lease_seconds, self._clock()):
                    log.warning("tensor_lease_lost", region=handle.region, lease_id=handle.lease_id)
                    self._held.pop(handle.lease_id, None)

    def _may_use_tensor(self, request: inference_pb2.GenerateRequest) -> bool:
        """False where only the full path knows all that is to be checked or told."""
        return (
            request.model in ("", self._model.name)
            # What truncation left out is not in the tensor, and the client is to be told.
            and request.truncation != inference_pb2.TRUNCATION_POLICY_DROP_OLDEST
            and not request.resume.token_ids
            and request.sampling.top_k <= self._model.vocabulary_size
            and max(request.sampling.logit_bias, default=0) < self._model.vocabulary_size
        )

    def _from_arena(self, request: inference_pb2.GenerateRequest, header: str) -> HeldPrompt | None:
        """The prompt that a header names; None when the prompt must be made here."""
        try:
            tensor = decode_tensor_header(header)
            token_count = self._token_count(tensor)
            if tensor.WhichOneof("location") == "inline_bytes":
                token_ids = np.frombuffer(tensor.inline_bytes, dtype=np.int32)
                return self._held_prompt(request, token_count, token_ids=token_ids) if token_count else None
            handle = tensor.shared_memory
            if not token_count or not self._attach():
                return None
            assert self._arena is not None
            self._arena.verify(handle, self._clock())
            if not self._arena.renew(handle, self._lease_seconds, self._clock()):
                return None
        except HandleError as error:
            log.debug("tensor_not_usable", error=str(error))
            return None
        held = self._held_prompt(request, token_count, handle=handle)
        if held is not None:
            self._held[handle.lease_id] = handle
        return held

    def _give_up(self, header: str) -> None:
        """Ends the lease of a handle that came and is not used, so that its bytes do not wait for its end."""
        try:
            tensor = decode_tensor_header(header)
        except HandleError:
            return
        if tensor.WhichOneof("location") == "shared_memory" and self._attach():
            assert self._arena is not None
            self._arena.release(tensor.shared_memory)

    def _token_count(self, tensor: tensor_pb2.Tensor) -> int:
        """How many tokens a tensor holds; 0 when it is not a prompt."""
        if tensor.data_type != tensor_pb2.DATA_TYPE_INT32 or len(tensor.shape) != 1:
            return 0
        byte_count = (
            len(tensor.inline_bytes)
            if tensor.WhichOneof("location") == "inline_bytes"
            else tensor.shared_memory.byte_count
        )
        return tensor.shape[0] if 0 < tensor.shape[0] * TOKEN_BYTES == byte_count else 0

    def _held_prompt(
        self,
        request: inference_pb2.GenerateRequest,
        token_count: int,
        *,
        token_ids: NDArray[np.int32] | None = None,
        handle: tensor_pb2.SharedMemoryHandle | None = None,
    ) -> HeldPrompt | None:
        room = self._model.context_token_count - token_count
        max_tokens = min(room, request.max_tokens) if request.HasField("max_tokens") else room
        # A prompt that does not fit is left to the full path, which says so in the words of its surface.
        if room < 1:
            return None
        return HeldPrompt(
            prompt_token_count=token_count,
            truncated_token_count=0,
            max_tokens=max_tokens,
            token_ids=token_ids,
            handle=handle,
        )

    def _attach(self) -> bool:
        if self._arena is None and self._clock() >= self._next_attach:
            self._next_attach = self._clock() + ATTACH_INTERVAL_SECONDS
            try:
                self._arena = Arena.attach(self._region)
            except ArenaError as error:
                log.debug("arena_not_there", region=self._region, error=str(error))
        return self._arena is not None

    def _inode(self) -> int:
        try:
            return os.stat(region_path(self._region)).st_ino
        except OSError:
            return 0
