"""The OpenAI HTTP surface as pure functions: JSON bodies to GenerateRequest, events to JSON and server-sent events."""
