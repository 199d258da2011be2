"""The optimiser of a run, and how its state is written and read."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from delible.errors import MissingExtraError
from delible.lm.held import is_packed
from delible.train.recipe import Training
from delible.train.slots import Placement

#: Tensors of fewer weights, or of a number that is no multiple of :data:`BLOCK`, keep moments in
#: fp32 beside an optimiser of 8 bits.
LEAST_PACKED = 4096
#: Moments that share a scale, with 8 bits.
BLOCK = 256


def make_optimizer(training: Training, placement: Placement) -> torch.optim.Optimizer:
    """AdamW or plain descent over what moves; vectors do not decay."""
    # with masks the engine decays by hand, so that frozen entries stay where they are
    decay = 0.0 if placement.masks and placement.masked_decay else training.weight_decay
    matrices = [value for value in placement.parameters.values() if value.ndim >= 2]
    vectors = [value for value in placement.parameters.values() if value.ndim < 2]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if training.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=training.learning_rate)
    if training.optimizer == "adamw_8bit":
        kind, options = _of_eight_bits(groups[0]["params"][0].device), {}
    else:
        kind, options = torch.optim.AdamW, {"fused": True}
    if training.offload_optimizer:
        kind = _resting(kind)
        for group in groups:
            group["rests"] = True
    return kind(groups, lr=training.learning_rate, **options)  # type: ignore[no-any-return]


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The learning rate of the next step."""
    for group in optimizer.param_groups:
        if torch.is_tensor(group["lr"]):  # what is compiled reads it from there
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def check_eight_bits() -> None:
    """Refuses moments in 8 bits where nothing packs them.

    Raises:
        MissingExtraError: With what to install.
    """
    if importlib.util.find_spec("torchao") is None:
        raise MissingExtraError("optimizer 'adamw_8bit'", "quantized")


def _of_eight_bits(device: torch.device) -> Any:
    """torchao's AdamW with moments in 8 bits.

    It compiles its step, anew for every shape: on a processor that takes a minute, needs a
    compiler of C++ and gives the same numbers, so there the step runs as it is written.
    """
    check_eight_bits()
    from torchao.optim import AdamW8bit

    if device.type != "cpu":
        return AdamW8bit

    class AsWritten(AdamW8bit):  # type: ignore[misc]
        def step(self, closure: Any = None) -> Any:
            with torch.compiler.set_stance("force_eager"):
                return super().step(closure)

    return AsWritten


def _resting(kind: Any, home: str = "cpu") -> Any:
    """The same optimiser, whose state lies at ``home`` and comes to a parameter for its update.

    Parameter by parameter, so that no more than one of them has its moments on the device. The
    update is computed where it was, by the same code: no number changes. (torchao's optimiser that
    computes on the processor takes gradients as they are made, before they are clipped and masked.)
    """

    class Resting(kind):  # type: ignore[misc]
        param_groups: Any

        def step(self, closure: Any = None) -> Any:
            groups = self.param_groups
            try:
                for group in groups:
                    for parameter in group["params"]:
                        if parameter.grad is None:
                            continue
                        self.param_groups = [{**group, "params": [parameter]}]
                        state = self.state[parameter]
                        moved(state, parameter.device)
                        super().step(closure)
                        moved(state, torch.device(home))
            finally:
                self.param_groups = groups

    return Resting


def moved(state: dict[str, Any], device: torch.device) -> None:
    """Brings an optimiser's moments of one parameter to a device; the count of steps stays."""
    for key, value in state.items():
        if key != "step" and torch.is_tensor(value):
            state[key] = value.to(device)


# ---- in files


def places(optimizer: torch.optim.Optimizer) -> dict[int, tuple[torch.device, torch.device]]:
    """Where the count of steps and the moments of each parameter belong, by its identity."""
    processor = torch.device("cpu")
    return {
        id(one): (
            one.device if group.get("fused") else processor,
            processor if group.get("rests") else one.device,
        )
        for group in optimizer.param_groups
        for one in group["params"]
    }


def plain(key: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """Part of a state as tensors that files can hold: itself, or ``KEY.PIECE`` of packed ones."""
    if torch.is_tensor(value) and is_packed(value):
        names = value.__tensor_flatten__()[0]  # type: ignore[attr-defined]
        for name in names:
            yield f"{key}.{name}", getattr(value, name).detach().contiguous()
        return
    yield key, torch.as_tensor(value).detach().contiguous()


def put_together(pieces: Mapping[str, Tensor]) -> dict[str, Any]:
    """The state of a parameter from what :func:`plain` gave, on the device where the pieces are.

    Raises:
        MissingExtraError: The moments are packed, and nothing here unpacks them.
    """
    state: dict[str, Any] = {key: one for key, one in pieces.items() if "." not in key}
    packed = sorted({key.partition(".")[0] for key in pieces if "." in key})
    if packed:
        check_eight_bits()
        from torchao.optim.subclass_8bit import (
            OptimState8bit,
        )

        for key in packed:
            codes, scale, levels = (pieces[f"{key}.{name}"] for name in ("codes", "scale", "qmap"))
            signed = bool(levels.min() < 0)
            state[key] = OptimState8bit(codes, scale, levels, signed, torch.float32)
    return state
