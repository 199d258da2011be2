"""Tasks and answers as Flower's records: tensors as arrays, the rest as one text of JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from torch import Tensor

from delible.federated.adapter import Adapter
from delible.federated.messages import Answer, Failure, Holding, Order, Task, Update

#: Names of the two records of a message.
_ADAPTER, _SAID = "adapter", "said"


def _record(said: Mapping[str, Any], adapter: Adapter | None = None) -> RecordDict:
    content = RecordDict({_SAID: ConfigRecord({"json": json.dumps(said)})})
    if adapter is not None:
        arrays = {
            name: Array.from_numpy_ndarray(value.detach().cpu().contiguous().numpy())
            for name, value in adapter.items()
        }
        content[_ADAPTER] = ArrayRecord(arrays)
    return content


def _said(content: RecordDict) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(str(content.config_records[_SAID]["json"]))
    return found


def _adapter(content: RecordDict) -> dict[str, Tensor]:
    arrays = content.array_records.get(_ADAPTER, {})
    return {str(name): torch.from_numpy(np.array(one.numpy())) for name, one in arrays.items()}


def of_task(task: Task) -> RecordDict:
    """A task as it is sent."""
    order = task.order
    return _record(
        {"phase": task.phase, "round": task.round, "seed": task.seed,
         "order": {"recipe": dict(order.recipe), "on": order.on, "proximal": order.proximal,
                   "frozen_a": order.frozen_a}},
        task.adapter,
    )  # fmt: skip


def to_task(content: RecordDict) -> Task:
    """A task as it comes in."""
    said = _said(content)
    return Task(said["phase"], said["round"], said["seed"], Order(**said["order"]),
                _adapter(content))  # fmt: skip


def of_answer(answer: Update | Failure) -> RecordDict:
    """An answer as it is sent."""
    if isinstance(answer, Failure):
        return _record({"problem": answer.problem})
    said = {"phase": answer.phase, "round": answer.round, "rows": answer.rows,
            "notes": dict(answer.notes)}  # fmt: skip
    return _record(said, answer.adapter)


def to_answer(content: RecordDict) -> Answer:
    """An answer as it comes in; one that has not its form is a failure."""
    try:
        said = _said(content)
        if "problem" in said:
            return Failure(str(said["problem"]))
        return Update(str(said["phase"]), int(said["round"]), int(said["rows"]),
                      _adapter(content), dict(said["notes"]))  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        return Failure(f"its answer cannot be read ({type(error).__name__}: {error})")


def of_holding(client: str, held: Holding) -> RecordDict:
    """Who a client is and what it holds, as it is sent."""
    return _record({"client": client, "forget": held.forget, "retain": held.retain})


def to_holding(content: RecordDict) -> tuple[str, Holding]:
    """Who a client is and what it holds, as it comes in."""
    said = _said(content)
    return str(said["client"]), Holding(int(said["forget"]), int(said["retain"]))
