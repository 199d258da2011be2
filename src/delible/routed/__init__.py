"""Adapters behind a gate: which of them answer, request by request and token by token."""
