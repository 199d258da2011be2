"""Reading and changing what flows through a model: plain forward hooks as context managers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import nn

from delible.errors import ModelError, nearest
from delible.lm.anatomy import Anatomy, unwrapped
from delible.lm.identity import only_reads


def submodule(model: nn.Module, path: str) -> nn.Module:
    """The module at a path; for a PEFT model the path is one of its base model.

    Raises:
        ModelError: There is no such module; the nearest one is offered.
    """
    inner = unwrapped(model)
    try:
        return inner.get_submodule(path)
    except AttributeError:
        known = [name for name, _ in inner.named_modules() if name]
        close = nearest(path, known)
        raise ModelError(
            f"there is no module '{path}'.",
            where=type(inner).__name__,
            hint=close if close.startswith("Did") else None,
        ) from None


@contextmanager
def capture(
    model: nn.Module, paths: Iterable[str], which: Literal["output", "input"] = "output"
) -> Iterator[dict[str, torch.Tensor]]:
    """Collects the first tensor that modules give or receive.

    Args:
        model: Any model.
        paths: Paths of modules, such as ``anatomy.block_path(3)``.
        which: The output (of a tuple or a model output its first element) or the input (the first
            positional argument, or ``hidden_states`` when given by name).

    Yields:
        A dictionary that holds, after a forward pass, one tensor per path, as the module gave it
        (not a copy, not detached): for a block ``[batch, sequence, hidden]``. A second pass
        replaces the values; a module that does not run leaves no key.

    Raises:
        ModelError: There is no such module, or it gave no tensor.
    """
    values: dict[str, torch.Tensor] = {}

    def remember(path: str) -> Callable[..., None]:
        def on_input(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            value = next((each for each in arguments if torch.is_tensor(each)), None)
            if value is None:
                value = named.get("hidden_states")
            if value is None:
                value = next((each for each in named.values() if torch.is_tensor(each)), None)
            if value is None:
                raise ModelError("the module received no tensor.", where=path)
            values[path] = value

        def on_output(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            values[path] = _tensor_of(output, path)

        return only_reads(on_input if which == "input" else on_output)  # type: ignore[no-any-return]

    with ExitStack() as stack:
        for path in dict.fromkeys(paths):
            module = submodule(model, path)
            handle = (
                module.register_forward_pre_hook(remember(path), with_kwargs=True)
                if which == "input"
                else module.register_forward_hook(remember(path))
            )
            stack.callback(handle.remove)
        yield values


@contextmanager
def skipped(model: nn.Module, path: str) -> Iterator[None]:
    """A block that gives what it receives: the residual stream passes it by.

    Args:
        path: Path of a block, whose output has the shape of its input.

    Raises:
        ModelError: There is no such module.
    """
    with capture(model, [path], "input") as seen, steer(model, path, lambda _: seen[path]):
        yield


@contextmanager
def steer(
    model: nn.Module,
    path: str,
    function: Callable[[torch.Tensor], torch.Tensor],
    which: Literal["output", "input"] = "output",
) -> Iterator[None]:
    """Replaces what a module gives by a function of it; other elements of a tuple stay.

    Args:
        model: Any model.
        path: Path of the module, such as ``anatomy.block_path(3)``.
        function: From the output tensor, ``[batch, sequence, hidden]`` for a block, to a tensor
            of the same shape.
        which: Or what the module receives: its first tensor, as in :func:`capture`.

    Raises:
        ModelError: There is no such module, it receives no tensor, or the function changed the
            shape.
    """

    def steered(old: torch.Tensor) -> torch.Tensor:
        new = function(old)
        if new.shape != old.shape:
            raise ModelError(
                f"the steering function returned shape {tuple(new.shape)} for {tuple(old.shape)}.",
                where=path,
            )
        return new

    def replace_input(
        module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        for place, value in enumerate(arguments):
            if torch.is_tensor(value):
                return (*arguments[:place], steered(value), *arguments[place + 1 :]), named
        tensors = [name for name, value in named.items() if torch.is_tensor(value)]
        if not tensors:
            raise ModelError("the module received no tensor.", where=path)
        name = "hidden_states" if "hidden_states" in tensors else tensors[0]
        return arguments, {**named, name: steered(named[name])}

    def replace(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
        new = steered(_tensor_of(output, path))
        if torch.is_tensor(output):
            return new
        if isinstance(output, tuple):
            return (new, *output[1:])
        output[next(iter(output))] = new  # a model output of transformers is an ordered mapping
        return output

    module = submodule(model, path)
    handle = (
        module.register_forward_pre_hook(replace_input, with_kwargs=True)
        if which == "input"
        else module.register_forward_hook(replace)
    )
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def truncated(model: nn.Module, anatomy: Anatomy, layers: int) -> Iterator[nn.Module]:
    """The same model, shortened to its first blocks; the others cost nothing.

    The blocks that remain are the same objects and give the same outputs and gradients. What the
    model says at its end (logits, last hidden state) is that of the shortened model: read block
    outputs with :func:`capture`. Do not save the model or make an optimiser inside.

    Args:
        model: A model with this anatomy.
        anatomy: Where its blocks are.
        layers: How many blocks stay, 1 or more.

    Raises:
        ModelError: The model does not have that many blocks.
    """
    if not 1 <= layers <= anatomy.layers:
        raise ModelError(
            f"cannot keep {layers} of {anatomy.layers} blocks.", where=anatomy.class_name
        )
    parent_path, _, name = anatomy.blocks.rpartition(".")
    parent = unwrapped(model).get_submodule(parent_path)
    whole = getattr(parent, name)
    # The configuration stays as it is: forward passes slice the list by it or walk the list, and
    # index the kinds of layers by position, which a shorter list leaves valid.
    setattr(parent, name, nn.ModuleList(list(whole)[:layers]))
    try:
        yield model
    finally:
        setattr(parent, name, whole)


def _tensor_of(output: Any, path: str) -> torch.Tensor:
    """A tensor, or the first element of a tuple or of a model output."""
    first = output
    if isinstance(output, (tuple, list)):
        first = output[0] if output else None
    elif isinstance(output, Mapping):
        first = next(iter(output.values()), None)
    if not torch.is_tensor(first):
        raise ModelError(f"the module gave no tensor but {type(output).__name__}.", where=path)
    return first
