"""From a name to a system that is asked and not trained: a model, vLLM, or an endpoint."""

from __future__ import annotations

import logging

from delible.errors import ModelError
from delible.lm.lm import LM
from delible.system.base import System

logger = logging.getLogger(__name__)

VLLM_PREFIX = "vllm:"
_ADDRESSES = ("http://", "https://")


def is_address(name: str) -> bool:
    """Whether a name is that of an endpoint."""
    return name.startswith(_ADDRESSES)


def open_system(name: str, *, model: str | None = None) -> System:
    """A system by name.

    Args:
        name: What :meth:`LM.load` takes; the same after ``vllm:``, for a GPU with vLLM; or the
            address of an OpenAI-compatible server, perhaps with ``#MODEL`` at its end. A server
            is asked for one token.
        model: Name of the model at an address.

    Raises:
        ModelError: What the name stands for cannot be used; says what to do.
        MissingExtraError: It needs an extra that is not installed.
    """
    if is_address(name):
        from delible.systems.endpoint import Endpoint

        address, _, fragment = name.partition("#")
        endpoint = Endpoint(address, model or fragment or None)
        endpoint.check()
        key = f"the key in ${endpoint.key_name}" if endpoint.key_name else "no key"
        logger.info(f"Asking {endpoint.name} with {key}.")
        return endpoint
    if model is not None:
        raise ModelError(
            f"a model name ('{model}') belongs to an address, and this is none.",
            where=name,
            hint="Leave out --model, or give a URL such as https://host/v1.",
        )
    if name.startswith(VLLM_PREFIX):
        from delible.systems.vllm import VLLM

        return VLLM.load(name.removeprefix(VLLM_PREFIX))
    return LM.load(name)
