"""The ClientApp: a client with its own records on its own machine.

Of the node (``--node-config``): ``client`` is its name, ``retain`` and ``forget`` are files of
records (either may be missing). Of the run: ``model``, and the adapter's form in ``options``.
The records never leave it: what goes back is the adapter and how many rows there were.
"""

from __future__ import annotations

import json
from functools import lru_cache

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from delible.errors import DelibleError, RecipeError
from delible.federated.clients import Held
from delible.federated.federation import Federation
from delible.federated.flower import wire
from delible.federated.local import work
from delible.federated.messages import Failure
from delible.federated.starting import dressed
from delible.lm.lm import LM
from delible.loaders import read_records
from delible.records import Record
from delible.systems.opening import open_lm

app = ClientApp()


@lru_cache(maxsize=1)
def _model(name: str, rank: int, alpha: float) -> LM:
    lm = open_lm(name)
    lm.merge_adapter()
    dressed(lm, rank, alpha, 0)  # its values come with every task
    return lm


def _records(context: Context, role: str) -> tuple[Record, ...]:
    file = context.node_config.get(role)
    return tuple(read_records(str(file))) if file else ()


def _held(context: Context) -> tuple[str, Held]:
    name = context.node_config.get("client")
    if name is None:
        raise RecipeError("the node does not say which client it is.", where="--node-config",
                          hint="Add client=\"NAME\".")  # fmt: skip
    return str(name), Held(_records(context, "forget"), _records(context, "retain"))


@app.query()
def holdings(message: Message, context: Context) -> Message:
    """Who it is and how many rows it holds."""
    client, held = _held(context)
    return Message(wire.of_holding(client, held.holding), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Trains the adapter that came on its records, and sends it back."""
    client, held = _held(context)
    config = context.run_config
    options = Federation.build("options", **json.loads(str(config["options"])))
    try:
        lm = _model(str(config["model"]), options.rank, options.alpha)
        answer = work(lm, client, held, wire.to_task(message.content))
    except DelibleError as error:
        answer = Failure(str(error))
    return Message(wire.of_answer(answer), reply_to=message)
