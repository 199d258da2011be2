"""Adapters by request: each prompt says, once, how much of which request's adapter it gets.

    W x  becomes  W x + sum_t w_t(prompt) (alpha / rank) B_t A_t x

w_t is what request t's detector says of the prompt's words. One product for all rows of a batch,
whatever their weights; a row whose weights are all 0 is computed as the bare model computes it.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import linear

from delible.errors import ModelError, RunError
from delible.files import atomic_folder
from delible.lm.layout import Layout
from delible.lm.lm import LM
from delible.routed.detector import Detector, DetectorOptions
from delible.routed.features import EncoderFeatures, Features, StateFeatures
from delible.routed.low_rank import LowRank
from delible.routed.router import Acting, Call, Router
from delible.routed.texts import Asked

#: How adapters and gates belong together: every request has its own adapter, which its own
#: detector opens; or each adapter was trained on from the last one, so that the last one holds
#: all requests and any of the detectors opens it.
Loads = Literal["own", "cumulative"]
#: Prompts whose weights are remembered, and sets of adapters that are laid side by side.
REMEMBERED, LAID = 4096, 4
_ADAPTER, _DETECTOR, _SETTINGS = "adapter", "detector", "router.json"


@dataclass(frozen=True)
class Member:
    """A request's adapter and its detector.

    Attributes:
        request: Id of the request.
    """

    request: str
    adapter: LowRank
    detector: Detector

    @cached_property
    def identity(self) -> str:
        joined = f"{self.request}/{self.adapter.identity}/{self.detector.identity}"
        return hashlib.sha256(joined.encode()).hexdigest()


class RequestRouter(Router):
    """A router of members, in the order of their requests.

    Args:
        parts: The members.
        loads: How adapters and gates belong together.
        learned_on: Identity of the bare model.
    """

    form: ClassVar[str] = "requests"

    def __init__(
        self, parts: Sequence[Member], loads: Loads = "own", learned_on: str | None = None
    ) -> None:
        self.parts, self.loads, self.learned_on = tuple(parts), loads, learned_on
        self.members = tuple(one.request for one in self.parts)
        if len(set(self.members)) < len(self.members):
            raise RunError("two members of a router have the same request.", where="router")

    @property
    def identity(self) -> str:
        joined = "/".join([self.loads, *(one.identity for one in self.parts)])
        return hashlib.sha256(joined.encode()).hexdigest()

    def acting(self, lm: LM) -> Acting:
        return _ByRequest(self, lm)

    def extended(self, member: Member) -> RequestRouter:
        """The router with one more request."""
        return RequestRouter((*self.parts, member), self.loads, self.learned_on)

    def without(self, names: Sequence[str]) -> RequestRouter:
        names = self.named(names)
        left = tuple(one for one in self.parts if one.request not in names)
        taken = [place for place, one in enumerate(self.parts) if one.request in names]
        if self.loads == "cumulative" and taken and min(taken) < len(left):
            raise RunError(
                f"the adapter of '{self.parts[min(taken)].request}' is in those of the later "
                "requests, which were trained on from it: it cannot be taken out alone.",
                where="router",
                hint="Take out the later ones, too "
                f"({', '.join(self.members[min(taken) :])}), or make the router with "
                "adapters='own', whose requests are independent of each other.",
            )
        return RequestRouter(left, self.loads, self.learned_on)

    # ---- files

    def save(self, folder: Path, base: str) -> dict[str, str]:
        parts = {}
        for place, one in enumerate(self.parts):
            home = f"members/{place:04d}"
            one.adapter.save(folder / home / _ADAPTER, base)
            settings = {
                "request": one.request,
                "options": one.detector.options.model_dump(mode="json"),
                "features_of": one.detector.features_of,
                "identity": one.identity,
            }
            with atomic_folder(folder / home / _DETECTOR) as target:
                (target / _SETTINGS).write_text(json.dumps(settings, indent=2), encoding="utf-8")
                tensors = {name: value.contiguous() for name, value in one.detector.tensors.items()}
                save_file(tensors, target / "tensors.safetensors")
            parts[one.request] = home
        told: dict[str, Any] = {
            "loads": self.loads,
            "members": self.members,
            "learned_on": self.learned_on,
        }
        with atomic_folder(folder / "members" / "all") as target:
            (target / _SETTINGS).write_text(json.dumps(told, indent=2), encoding="utf-8")
        return {"router": "members/all", **parts}

    @classmethod
    def load(cls, folder: Path, parts: Mapping[str, str]) -> RequestRouter:
        try:
            path = folder / parts["router"] / _SETTINGS
            settings = json.loads(path.read_text(encoding="utf-8"))
            homes = [folder / parts[name] for name in settings["members"]]
            loads, learned_on = settings["loads"], settings["learned_on"]
        except (OSError, ValueError, KeyError) as error:
            raise _unreadable(folder, str(error)) from error
        return cls([_member(home) for home in homes], loads, learned_on)


def _member(home: Path) -> Member:
    try:
        path = home / _DETECTOR / _SETTINGS
        settings = json.loads(path.read_text(encoding="utf-8"))
        tensors = load_file(home / _DETECTOR / "tensors.safetensors")
        options = DetectorOptions.build(str(path), **settings["options"])
        detector = Detector(options, tensors, settings["features_of"])
        found = Member(settings["request"], LowRank.load(home / _ADAPTER), detector)
        known = settings["identity"]
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise _unreadable(home, str(error)) from error
    if found.identity != known:
        raise RunError(
            f"the member '{found.request}' is not the one that was saved: its files were changed.",
            where=str(home),
        )
    return found


def _unreadable(place: Path, told: str) -> RunError:
    return RunError(
        f"a member of the router cannot be read: {told}",
        where=str(place),
        hint="Copy the whole folder of the run again, or run the same command once more.",
    )


@dataclass(frozen=True)
class _Laid:
    """Some adapters side by side at one matrix.

    Attributes:
        down: All A below each other. ``up``: all B beside each other.
        owner: The column of the weights that each row of ``down`` is scaled by.
    """

    down: Float[Tensor, "ranks inner"]
    up: Float[Tensor, "outer ranks"]
    owner: Int[Tensor, " ranks"]


class _ByRequest(Acting):
    """A router of requests at work."""

    watched: Sequence[str] = ()
    shares = True

    def __init__(self, router: RequestRouter, lm: LM) -> None:
        self.router, self.lm = router, lm
        parts = router.parts
        loaded = parts[-1:] if router.loads == "cumulative" else parts
        self.adapters = [one.adapter for one in loaded]
        self.paths = list(dict.fromkeys(path for one in self.adapters for path in one.pairs))
        known = dict(lm.core.named_modules())
        for path in self.paths:
            if path not in known:
                raise ModelError(
                    f"the adapters of the router stand beside '{path}', which the model has not.",
                    where=lm.name,
                    hint="Open it on the model that it was made on.",
                )
        self._asked = Asked(lm.template)
        self._sources: dict[Any, Features] = {}
        self._weights: OrderedDict[tuple[int, ...], np.ndarray] = OrderedDict()
        self._laid: OrderedDict[tuple[int, ...], dict[str, _Laid]] = OrderedDict()
        self._plan: tuple[dict[str, _Laid], Tensor] | None = None
        self.asks_the_model = any(one.detector.options.backbone == "states" for one in parts)

    def prepare(self, prompts: Sequence[Sequence[int]]) -> None:
        self.weights(prompts)

    # ---- the gate

    def weights(self, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        """How much of each loaded adapter prompts get, [prompt, adapter]."""
        keys = [tuple(one) for one in prompts]
        missing = [key for key in dict.fromkeys(keys) if key not in self._weights]
        fresh = dict(zip(missing, self._judged(missing), strict=True)) if missing else {}
        found = []
        for key in keys:
            one = fresh.get(key)
            if one is None:
                one = self._weights[key]
                self._weights.move_to_end(key)
            found.append(one)
        self._weights.update(fresh)
        while len(self._weights) > REMEMBERED:
            self._weights.popitem(last=False)
        return np.stack(found) if found else np.zeros((0, len(self.adapters)))

    def _judged(self, prompts: Sequence[tuple[int, ...]]) -> np.ndarray:
        parts = self.router.parts
        if not parts:
            return np.zeros((len(prompts), 0))
        texts = [self._asked(ids) for ids in prompts]
        words = list(dict.fromkeys(text for one in texts for text in one))
        place = {text: number for number, text in enumerate(words)}
        columns, read = [], dict[str, np.ndarray]()
        for one in parts:
            detector = one.detector
            source = self._source(detector)
            if detector.tuned:
                vectors = detector.features(words, source)
            else:
                known = source.identity
                if known not in read:
                    read[known] = detector.features(words, source)
                vectors = read[known]
            columns.append(detector.weights(vectors))
        by_text = np.stack(columns, axis=1)
        found = np.stack([by_text[[place[text] for text in one]].max(axis=0) for one in texts])
        if self.router.loads == "cumulative":
            found = found.max(axis=1, keepdims=True)
        return found

    def _source(self, detector: Detector) -> Features:
        options = detector.options
        key = (options.backbone, options.encoder_folder)
        if key not in self._sources:
            self._sources[key] = (
                EncoderFeatures.of(options.encoder_folder)
                if options.backbone == "encoder"
                else StateFeatures(self.lm)
            )
        found = self._sources[key]
        if found.identity != detector.features_of:
            raise ModelError(
                "the router's detectors were made with another encoder than the one that is here.",
                where=str(options.encoder_folder or "the built-in encoder"),
                hint="Put that encoder back: the distances of another one mean nothing.",
            )
        return found

    # ---- at work

    def spoken(self, rows: Sequence[Any], logits: Tensor) -> None:
        return

    def begins(self, layout: Layout, forced: Sequence[str | None] | None, call: Call) -> bool:
        rows = self._rows(layout, forced)
        active = tuple(np.flatnonzero(rows.any(axis=0)).tolist())
        if not active:
            self._plan = None
            return False
        device = layout.text.device
        chosen = torch.from_numpy(rows[:, list(active)]).to(device, torch.float32)
        text = layout.text.reshape(-1)
        weights = chosen[text.clamp(min=0)] * (text >= 0)[:, None]
        self._plan = self._beside(active, device), weights
        return True

    def _rows(self, layout: Layout, forced: Sequence[str | None] | None) -> np.ndarray:
        prompts = layout.prompts
        if forced is None:
            return self.weights(prompts)
        named = [
            forced[place] if place < len(forced) else forced[-1] for place in range(len(prompts))
        ]
        gated = [place for place, name in enumerate(named) if name is None]
        found = np.zeros((len(prompts), len(self.adapters)))
        if gated:
            found[gated] = self.weights([prompts[place] for place in gated])
        for place, name in enumerate(named):
            if name:
                column = self.router.members.index(name)
                found[place, min(column, len(self.adapters) - 1)] = 1.0
        return found

    def _beside(self, active: tuple[int, ...], device: torch.device) -> dict[str, _Laid]:
        """Adapters side by side, matrix by matrix; those of the last few sets are kept."""
        if active in self._laid:
            self._laid.move_to_end(active)
            return self._laid[active]
        found = {}
        for path in self.paths:
            here = [
                (column, self.adapters[number])
                for column, number in enumerate(active)
                if path in self.adapters[number].pairs
            ]
            if not here:
                continue
            pairs = [one.pairs[path] for _, one in here]
            found[path] = _Laid(
                torch.cat([down for down, _ in pairs]).to(device),
                torch.cat(
                    [one.scale * up for (_, one), (_, up) in zip(here, pairs, strict=True)], dim=1
                ).to(device),
                torch.tensor(
                    [column for (column, _), (down, _) in zip(here, pairs, strict=True)
                     for _ in range(len(down))], device=device,
                ),
            )  # fmt: skip
        self._laid[active] = found
        while len(self._laid) > LAID:
            self._laid.popitem(last=False)
        return found

    def sees(self, path: str, states: Tensor) -> None:
        return

    def added(self, path: str, received: Tensor) -> Tensor | None:
        if self._plan is None or path not in self._plan[0]:
            return None
        laid, weights = self._plan[0][path], self._plan[1]
        inner = linear(received.to(laid.down.dtype), laid.down)
        scales = weights if weights.shape[1] == 1 else weights[:, laid.owner]
        return linear(inner * scales.to(inner.dtype), laid.up)

    def alike(self, shared: int, prompts: Sequence[Sequence[int]], forced: str | None) -> int:
        if forced is not None or not len(prompts):
            return shared
        weights = self.weights(prompts)
        return shared if bool((weights == weights[0]).all()) else 0


__all__ = ["Loads", "Member", "RequestRouter"]
