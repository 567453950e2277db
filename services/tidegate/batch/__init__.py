"""The batch service: files of requests that may wait, answered with capacity that nobody else needs."""
