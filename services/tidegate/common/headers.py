"""The names of the headers (gRPC metadata) that the mesh's processes say things with.

Envoy removes every `x-tidegate-*` header that a client sends, so inside the mesh they can be trusted.
"""

from typing import Final

REQUEST_ID: Final = "x-request-id"
"""Envoy makes it, every response and log line carries it."""

CLIENT_REQUEST_ID: Final = "x-client-request-id"
"""The client's own name for its request, as OpenAI's clients send it; at most 128 characters count."""

QUEUE_STATUS: Final = "x-queue-status"
"""`stream` from a client that wants to read its place in the queue on the stream of its answer."""

TENANT: Final = "x-tidegate-tenant"
"""Whose request it is; Envoy writes it from the API key. Absent: DEFAULT_TENANT."""

SERVICE_CLASS: Final = "x-tidegate-class"
"""realtime, standard or batch."""

ARRIVED: Final = "x-tidegate-arrived"
"""When the request reached the ingress, in Unix seconds with a fraction, by Envoy's clock."""

WHOLE: Final = "x-tidegate-whole"
"""When all of it had, body included."""

SENT: Final = "x-tidegate-sent"
"""When the scheduler sent the request on, in Unix seconds with a fraction, by its clock."""

ASKED_CLASS: Final = "x-service-class"
"""What a client may send to say the class where Envoy can see it; the ingress makes SERVICE_CLASS of it."""

REPLICA: Final = "x-tidegate-replica"
"""ip:port of the replica to go to, then the next best ones, with commas between."""

CREDIT: Final = "x-tidegate-credit"
"""The id of the credit that the request spends at the first replica of the list."""

TENSOR: Final = "x-tidegate-tensor"
"""The prompt's tokens: a serialized tidegate.v1.Tensor, base64url without padding."""

ANSWER_KEY: Final = "x-tidegate-answer-key"
"""The key under which the answer may be cached: 64 hexadecimal digits. The model service records under it."""

ROUTE: Final = "x-tidegate-route"
"""`cache` sends the request to the cache service, `lite` to a replica of the lite model; absent, any replica."""

LITE: Final = "x-tidegate-lite"
"""On a request that goes to the lite model, and on what answers it: why. `name`, `prompt` or `load`."""

LITE_BY_NAME: Final = "name"
"""The request asks for that model; the others ask for another one."""

ASKED_TIMEOUT_MS: Final = "x-request-timeout-ms"
"""What a client without gRPC may send to say for how long it wants the whole answer, in milliseconds."""

MAX_TOKENS: Final = "x-tidegate-max-tokens"
"""The bound on the answer's tokens that the scheduler sets in a brownout; the request's own holds where it is less."""

BROWNOUT: Final = "x-tidegate-brownout"
"""On a request, and on what answers or refuses it: the step of the brownout that touched it. Absent: none did."""

FLOOR: Final = "x-tidegate-floor"
"""There on a request that its class's floor pays for: nothing more urgent may pause it, or the floor would be none."""

TIMEOUT_MS: Final = "x-tidegate-timeout-ms"
"""How long the request may still take when it is dispatched, in whole milliseconds. Absent: the client gave no
deadline, and the model service's own default holds."""

QUEUE_MS: Final = "x-tidegate-queue-ms"
"""How long the request waited in the scheduler's queue, in milliseconds, for the log line of the model service."""

RESUME: Final = "x-tidegate-resume"
"""How many tokens of the answer were sent before, on a request that one replica hands to another."""

CACHED: Final = "x-tidegate-cache"
"""On a response: `hit` when a known answer is replayed."""

REASON: Final = "x-tidegate-reason"
"""On a refusal: the reason word of common/errors.py."""

ERROR_BODY: Final = "x-tidegate-error"
"""On a refusal by a service: the OpenAI error object as ASCII JSON; Envoy makes it the HTTP body."""

HTTP_STATUS: Final = "x-tidegate-http-status"
"""On a refusal by a service: the HTTP status of the reason, where gRPC's own mapping would say another."""

ASKED_BY_SCHEDULER: Final = "x-tidegate-asked-by-scheduler"
"""On a question about a waiting request from another scheduler, which asks all of them itself."""

DEFAULT_TENANT: Final = "default"
