"""The server of the app, as it comes with delible; Flower looks for an assignment."""

from delible.federated.flower import server

app = server.app
