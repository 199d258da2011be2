"""The engine without a network: clients with their own records take turns on one model.

Nothing of the model is copied per client; the adapters are exchanged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from delible.federated.clients import Held, holdings
from delible.federated.local import work
from delible.federated.messages import Answer, Holding, Task
from delible.lm.lm import LM
from delible.watching import Steps, indented


@dataclass(frozen=True)
class InProcess:
    """Clients in this process.

    Attributes:
        lm: The model that all of them share; wears whichever adapter was trained last.
        clients: Their records by name.
    """

    lm: LM
    clients: Mapping[str, Held]
    steps: Steps | None = None

    def holdings(self) -> Mapping[str, Holding]:
        return holdings(self.clients)

    def work(self, tasks: Mapping[str, Task]) -> Mapping[str, Answer]:
        with indented():
            return {
                client: work(self.lm, client, self.clients[client], task, self.steps)
                for client, task in sorted(tasks.items())
            }
