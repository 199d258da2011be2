"""A whole federation on one machine, over loopback: a SuperLink, a SuperNode per client, one run.

    python loopback.py FOLDER --model MODEL [--method NAME] [--options JSON] [--out DIR]

FOLDER has a folder per client, with retain.jsonl, forget.jsonl or both. Real processes that talk
over 127.0.0.1, as they would over a network; all of them end with the script.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

APP = Path(__file__).parent


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextmanager
def running(log: Path, *command: str, **environment: str):
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, **environment},
        )  # fmt: skip
        try:
            yield process
        finally:
            with_children(process)


def with_children(process: subprocess.Popen) -> None:
    """Ends a process that was started here, and those that it started."""
    try:
        os.killpg(process.pid, 15)
        process.wait(10)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
    except ProcessLookupError:
        pass


def listening(port: int, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            if time.monotonic() > end:
                raise SystemExit(f"nobody listens on port {port} after {seconds:.0f} s") from None
            time.sleep(0.2)


def federate(
    folder: Path, out: Path, work: Path, *, seconds: float = 900.0, **config: object
) -> dict:
    """Runs the app with the clients of a folder; what it says of its rounds.

    Args:
        work: For logs and Flower's own files.
        seconds: To wait for the result.
        config: The run's: model, method, seed, learn, options, timeout.
    """
    clients = sorted(one for one in folder.iterdir() if one.is_dir())
    work.mkdir(parents=True, exist_ok=True)
    home = work / "flower"
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir()
    port = free_port()
    connection = f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{port}"\n'
    (home / "config.toml").write_text(connection + "insecure = true\n")
    quiet = {"FLWR_HOME": str(home), "FLWR_TELEMETRY_ENABLED": "0",
             "FLWR_DISABLE_UPDATE_CHECK": "1",
             "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}  # fmt: skip
    said = {"out": str(out.resolve()), "clients": len(clients), **config}
    with ExitStack() as stack:
        stack.enter_context(
            running(work / "superlink.log", "flower-superlink", "--insecure", "--host",
                    "127.0.0.1", "--port", str(port), "--disable-runtime-dependency-installation",
                    **quiet)
        )  # fmt: skip
        listening(port)
        for client in clients:
            files = [
                f'{role}="{file.resolve()}"'
                for role in ("forget", "retain")
                if (file := client / f"{role}.jsonl").exists()
            ]
            stack.enter_context(
                running(work / f"{client.name}.log", "flower-supernode", "--insecure",
                        "--superlink", f"127.0.0.1:{port}", "--port", str(free_port()),
                        "--node-config", " ".join([f'client="{client.name}"', *files]), **quiet)
            )  # fmt: skip
        settings = work / "run.toml"
        settings.write_text("".join(f"{key} = {json.dumps(one)}\n" for key, one in said.items()))
        subprocess.run(
            ["flwr", "run", str(APP), "here", "--run-config", str(settings)],
            env={**os.environ, **quiet}, check=True,
        )  # fmt: skip
        result, end = out / "federated.json", time.monotonic() + seconds
        while not result.exists():
            if time.monotonic() > end:
                raise SystemExit(f"no result after {seconds:.0f} s; see the logs in {work}")
            time.sleep(0.5)
    return json.loads(result.read_text())


def main() -> None:
    read = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    read.add_argument("folder", type=Path)
    read.add_argument("--model", required=True)
    read.add_argument("--method", default="npo")
    read.add_argument("--seed", type=int, default=0)
    read.add_argument("--learn", type=int, default=0, help="rounds in which everybody learns first")
    read.add_argument("--options", default="{}", help="of the rounds, as JSON")
    read.add_argument("--out", type=Path, default=Path("federated-run"))
    read.add_argument("--logs", type=Path, default=Path("federated-logs"))
    given = vars(read.parse_args())
    folder, out, logs = given.pop("folder"), given.pop("out"), given.pop("logs")
    found = federate(folder, out, logs, **given)
    print(json.dumps({key: one for key, one in found.items() if key != "entries"}, indent=2))


if __name__ == "__main__":
    main()
