"""``delible.serve``: the command in Python."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx2
import pytest
from gateway_at_work import Puppet

import delible
from delible.errors import DataError, RecipeError, RunError
from delible.gateway import running, serving

TARGETS = "- {id: a, names: [Ada Brook]}\n"


def ask(url: str, text: str, model: str = "puppet") -> dict[str, Any]:
    body = {"model": model, "messages": [{"role": "user", "content": text}]}
    found = httpx2.post(f"{url}/chat/completions", json=body, timeout=20, trust_env=False)
    assert found.is_success, found.text
    return dict(found.json()["choices"][0])


@pytest.mark.parametrize("by", ["request", "targets"])
def test_it_serves_beside_other_work_behind_guards(by: str, tmp_path: Path) -> None:
    path = tmp_path / "targets.yaml"
    path.write_text(TARGETS)
    request = delible.ForgetRequest(subjects=("Ada Brook",))
    given: dict[str, Any] = {"request": request} if by == "request" else {"targets": path}
    options = {"name": "target_detector", "similarity": False}
    with delible.serve(Puppet(), guards=[options], background=True, port=0, **given) as at_work:  # type: ignore[union-attr]
        name = httpx2.get(f"{at_work.url}/models", trust_env=False).json()["data"][0]["id"]
        assert ask(at_work.url, "Hi", name)["message"]["content"] == "Hello."
        assert ask(at_work.url, "Who is Ada Brook?", name)["finish_reason"] == "content_filter"
        port = int(at_work.url.split(":")[-1].split("/")[0])
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", port), timeout=2)


def test_without_background_it_serves_until_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(serving, "run", lambda models, settings: seen.append((models, settings)))
    assert delible.serve(Puppet(), name="mine", port=9001, undisclosed=True) is None
    ((models, settings),) = seen
    assert (models[0].name, settings.port, settings.undisclosed) == ("mine", 9001, True)


def test_what_is_wrong_is_told(tmp_path: Path) -> None:
    request = delible.ForgetRequest(subjects=("Ada Brook",))
    with pytest.raises(RecipeError, match="by a request or by a file"):
        delible.serve(Puppet(), guards=["target_detector"])
    with pytest.raises(RecipeError, match="without a guard"):
        delible.serve(Puppet(), request=request)
    with pytest.raises(RecipeError, match="target_detectr"):
        delible.serve(Puppet(), request=request, guards=["target_detectr"])
    with pytest.raises(RecipeError, match="prot"):
        delible.serve(Puppet(), prot=1)
    with pytest.raises(DataError):
        delible.serve(Puppet(), targets=tmp_path / "none.yaml", guards=["target_detector"])
    with (
        running.listening(running.GatewaySettings(port=0)) as taken,
        pytest.raises(RunError, match="nobody can listen there"),
    ):
        delible.serve(Puppet(), background=True, port=taken.getsockname()[1])


def test_it_is_imported_when_it_is_used() -> None:
    code = (
        "import sys, delible; assert 'serve' in dir(delible); assert not "
        "[one for one in sys.modules if one.startswith(('fastapi', 'uvicorn', 'torch'))]; "
        "delible.serve; delible.guard"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
