"""Preprocess: from a request's body to tokens in shared memory."""
