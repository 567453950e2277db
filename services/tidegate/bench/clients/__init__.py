"""Clients that cost little: each sends one request and notes when what came."""
