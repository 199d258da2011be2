"""The engine over Flower: each client is a SuperNode on a machine of its own.

Tasks go out as messages of Flower's Message API and come back within a time, or do not. Who a
node is, it says itself, once.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from delible.errors import RunError
from delible.federated.flower import wire
from delible.federated.messages import Answer, Failure, Holding, Task

logger = logging.getLogger(__name__)

#: Seconds between two looks at who is there.
_LOOK = 1.0


@dataclass
class Flower:
    """Clients that are reached over Flower's grid.

    Attributes:
        clients: How many must be there before anything begins.
        timeout_seconds: For all answers of a round; who is later has not answered.
        waiting_seconds: For the clients to be there.
    """

    grid: Grid
    clients: int
    timeout_seconds: float = 3600.0
    waiting_seconds: float = 300.0
    _nodes: dict[str, int] = field(default_factory=dict)
    _held: dict[str, Holding] = field(default_factory=dict)

    def holdings(self) -> Mapping[str, Holding]:
        """Who is there, asked once.

        Raises:
            RunError: Too few are, or two say that they are the same.
        """
        if not self._held:
            self._meet()
        return self._held

    def _meet(self) -> None:
        nodes = self._there()
        for node, reply in self._exchanged({node: RecordDict() for node in nodes}, "query").items():
            if not isinstance(reply, RecordDict):
                raise RunError(f"node {node} does not say who it is: {reply.problem}",
                               where="federated run")  # fmt: skip
            client, held = wire.to_holding(reply)
            if client in self._nodes:
                raise RunError(
                    f"two nodes say that they are client '{client}'.", where="federated run",
                    hint="Give each SuperNode another client=… in its --node-config.",
                )  # fmt: skip
            self._nodes[client], self._held[client] = node, held
        if len(self._nodes) < self.clients:
            raise RunError(f"{len(self._nodes)} of {self.clients} clients say who they are.",
                           where="federated run")  # fmt: skip

    def _there(self) -> list[int]:
        end = time.monotonic() + self.waiting_seconds
        while len(nodes := sorted(self.grid.get_node_ids())) < self.clients:
            if time.monotonic() > end:
                raise RunError(
                    f"{len(nodes)} of {self.clients} clients are there after "
                    f"{self.waiting_seconds:.0f} seconds.", where="federated run",
                    hint="Start the other SuperNodes, or ask for fewer clients.",
                )  # fmt: skip
            time.sleep(_LOOK)
        return nodes

    def work(self, tasks: Mapping[str, Task]) -> Mapping[str, Answer]:
        contents = {self._nodes[client]: wire.of_task(task) for client, task in tasks.items()}
        group = next((f"{task.phase}-{task.round}" for task in tasks.values()), "")
        replies = self._exchanged(contents, "train", group)
        found: dict[str, Answer] = {}
        for client in tasks:
            reply = replies.get(self._nodes[client])
            found[client] = wire.to_answer(reply) if isinstance(reply, RecordDict) else reply
        return found

    def _exchanged(
        self, contents: Mapping[int, RecordDict], kind: str, group: str = ""
    ) -> dict[int, RecordDict | Failure]:
        """What came back in time, by node."""
        messages = [
            Message(content=content, dst_node_id=node, message_type=kind, group_id=group)
            for node, content in contents.items()
        ]
        found: dict[int, RecordDict | Failure] = {}
        for reply in self.grid.send_and_receive(messages, timeout=self.timeout_seconds):
            node = reply.metadata.src_node_id
            if reply.has_error():
                found[node] = Failure(reply.error.reason or f"error {reply.error.code}")
            else:
                found[node] = reply.content
        return found
