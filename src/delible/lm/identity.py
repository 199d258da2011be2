"""What a model's answers depend on, as one text: its weights, and what is not in its weights.

The weights' digest takes a second for 135M weights, so it is kept while the state looks the same:
the same modules, and tensors that stand where they stood and were not written to. What is not in
the weights is looked up at every call, in a walk over the modules:

- hooks and replaced ``forward`` methods. Those that only read do not count. One that names itself
  (``delible_identity``) counts by that name; any other one can do anything, so it counts as
  something that exists in this process only, and its answers are shared with no other process;
- modules of classes that no library for models defines: likewise;
- modules that were exchanged since the model was taken for what it is;
- adapters of PEFT: which are on, which are merged, how they are scaled.

A plain model has none of these, and its identity is the digest alone.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

from delible.lm.digest import weights_digest
from delible.lm.sharded import plain_class, share_of

#: Attribute of a hook that changes nothing.
ONLY_READS = "delible_only_reads"
#: Attribute of a hook or a module that names what it does: the same name, the same answers.
IDENTITY = "delible_identity"
#: Packages whose modules keep all that they depend on in their state.
_LIBRARIES = frozenset({
    "torch", "transformers", "peft", "delible", "accelerate", "bitsandbytes", "torchao",
    "gptqmodel", "awq", "hqq", "compressed_tensors", "optimum", "kernels",
})  # fmt: skip
#: Settings that say where a model is from, or how it is stored, computed or trained.
_UNTELLING = frozenset({
    "_name_or_path", "transformers_version", "architectures", "auto_map", "dtype", "torch_dtype",
    "use_cache", "quantization_config", "_attn_implementation", "attn_implementation",
    "_experts_implementation", "bos_token_id", "eos_token_id", "pad_token_id",
    "output_hidden_states", "output_attentions", "return_dict", "gradient_checkpointing",
})  # fmt: skip
#: Hooks of the libraries that change no value: what collects outputs, what asks for gradients,
#: what gathers weights.
_READING = re.compile(
    r"transformers\.utils\.output_capturing\..*|(transformers|peft)\..*\.make_inputs_require_grads?"
    r"|torch\.distributed\.fsdp\._fully_shard\..*"
)
_HOOKS = (
    "_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks",
)  # fmt: skip
_GLOBAL_HOOKS = tuple(f"_global{name}" for name in _HOOKS)
#: Names for things that are unlike any other: by their addresses, while they live.
_names: dict[int, tuple[Callable[[], Any], str]] = {}


def only_reads(hook: Any) -> Any:
    """Marks a hook as one that changes no answer."""
    setattr(hook, ONLY_READS, True)
    return hook


class Identity:
    """The identity of one model's answers.

    Args:
        model: As it was loaded.
    """

    def __init__(self, model: nn.Module) -> None:
        self._loaded = {name: plain_class(module) for name, module in model.named_modules()}
        self._digest: str | None = None
        self._state: tuple[Any, ...] | None = None

    def forget(self) -> None:
        """The weights have changed."""
        self._digest = None

    def of(self, model: nn.Module) -> str:
        """The digest of the weights, and a hash of whatever else changes answers, if anything."""
        state = _state(model)
        if self._digest is None or self._state != state:
            self._digest, self._state = weights_digest(model), state
        besides = "\n".join([*_besides(model), *self._exchanged(model)])
        if not besides:
            return self._digest
        return f"{self._digest}+{hashlib.sha256(besides.encode()).hexdigest()}"

    def moved(self, model: nn.Module, twin: nn.Module) -> Identity:
        """That of a copy with the same weights: nothing is computed again."""
        found = Identity(twin)
        found._loaded = self._loaded
        if self._digest is not None and self._state == _state(model):
            found._digest, found._state = self._digest, _state(twin)
        return found

    def _exchanged(self, model: nn.Module) -> Iterator[str]:
        for name, module in model.named_modules():
            kind = plain_class(module)
            if self._loaded.get(name, kind) is not kind:
                yield f"{name} is {kind.__module__}.{kind.__qualname__}"


def settings_of(config: Any) -> str:
    """A model's settings (window, rope, scales, …) without those that change no answer, as JSON.

    Two models of equal weights answer differently where these differ.
    """

    def telling(part: Any) -> Any:
        if isinstance(part, dict):
            return {key: telling(value) for key, value in part.items() if key not in _UNTELLING}
        return part

    return json.dumps(telling(config.to_diff_dict()), sort_keys=True, default=str)


def _state(model: nn.Module) -> tuple[Any, ...]:
    """Changes when modules are exchanged, and when tensors are, or are written to."""
    modules = tuple((name, plain_class(module)) for name, module in model.named_modules())
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return modules, tuple((name, *_written(one)) for name, one in tensors)


def _written(tensor: Any) -> tuple[int, int]:
    """Where a tensor stands, and how often it was written to."""
    tensor = share_of(tensor.detach())
    try:
        place = int(tensor.data_ptr())
    except (RuntimeError, NotImplementedError):  # packed weights of a library for quantization
        place = id(tensor)
    # tensors made in inference mode count no changes
    return place, 0 if tensor.is_inference() else int(tensor._version)


def _besides(model: nn.Module) -> Iterator[str]:
    for kind in _GLOBAL_HOOKS:
        for hook in getattr(torch_module, kind, {}).values():
            yield from _hooked("everywhere", kind, hook)
    for name, module in model.named_modules():
        own = vars(module)
        for kind in _HOOKS:
            for hook in own.get(kind, {}).values():
                yield from _hooked(name, kind, hook)
        if "forward" in own:
            yield f"{name} forward {_name_of(own['forward'])}"
        if plain_class(module).__module__.partition(".")[0] not in _LIBRARIES:
            yield f"{name} module {_name_of(module)}"
        elif (foreign := _foreign_forward(plain_class(module))) is not None:
            yield f"{name} class {_name_of(foreign)}"
        if hasattr(module, "active_adapters") and hasattr(module, "merged_adapters"):
            yield f"{name} adapters {_adapters(module)}"


def _hooked(place: str, kind: str, hook: Any) -> Iterator[str]:
    if getattr(hook, ONLY_READS, False):
        return
    inner = getattr(hook, "func", hook)  # of a partial
    named = f"{getattr(inner, '__module__', '')}.{getattr(inner, '__qualname__', '')}"
    if not _READING.fullmatch(named):
        yield f"{place} {kind} {_name_of(hook)}"


def _foreign_forward(kind: type) -> Any:
    """The ``forward`` of a library's class, if somebody has put another one in its place."""
    for one in kind.__mro__:
        found = vars(one).get("forward")
        if found is not None:
            # not its __module__, which a decorator copies from what it replaces
            home = getattr(found, "__globals__", {}).get("__name__", one.__module__)
            return None if home.partition(".")[0] in _LIBRARIES else found
    return None


def _adapters(module: Any) -> str:
    """Which adapters of a layer act, and how strongly."""
    active = sorted(str(one) for one in module.active_adapters)
    scaling = getattr(module, "scaling", {})
    strengths = {one: scaling[one] for one in sorted(scaling)} if isinstance(scaling, dict) else {}
    return f"{not module.disable_adapters} {active} {sorted(module.merged_adapters)} {strengths}"


def _name_of(thing: Any) -> str:
    """The name that a thing gives itself, or one that no other thing has, in any process."""
    given = getattr(thing, IDENTITY, None)
    if isinstance(given, str):
        return given
    kept = _names.get(id(thing))
    if kept is not None and kept[0]() is thing:
        return kept[1]
    name = secrets.token_hex(16)
    try:
        alive: Callable[[], Any] = weakref.ref(thing, partial(_dropped, id(thing)))
    except TypeError:  # kept alive, so that its address is nobody else's

        def alive() -> Any:
            return thing

    _names[id(thing)] = (alive, name)
    return name


def _dropped(key: int, _: object) -> None:
    kept = _names.get(key)
    if kept is not None and kept[0]() is None:
        del _names[key]
