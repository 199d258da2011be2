"""Hidden states of texts at some of their tokens: all layers in one pass, each text read once.

Streams of a block with input x, attention and MLP:

    attention   what the attention module gives
    middle      x and what attention adds to it
    mlp         what the MLP module gives
    block       what the block gives: the residual stream

The state of the last block is that before the final norm. What is added in the middle is found by
trying, for some families norm what attention gives before they add it: a part A of the block, and
another one B, such that x + A + B is the block's output.

Passes compute in the data type of the weights, without autocast, so that two models can be
compared to the last digits. Interventions on a model act.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from delible.errors import ModelError
from delible.lm.body import Body
from delible.lm.forward import collate
from delible.lm.hooks import capture
from delible.lm.identity import only_reads
from delible.lm.layout import asked, is_asked, padded_rows, told, turn
from delible.lm.template import Encoded

if TYPE_CHECKING:
    from delible.lm.lm import LM

Stream = Literal["block", "mlp", "middle", "attention"]
#: From a block's output to what goes into it.
STREAMS: tuple[Stream, ...] = ("block", "mlp", "middle", "attention")
#: Largest share by which x + A + B may differ from a block's output.
SAME = 1e-4

T = TypeVar("T")


@dataclass(frozen=True)
class Span:
    """Tokens of a text whose states are wanted.

    Attributes:
        row: The text; its states depend on nothing behind the span.
        start: First of the tokens.
        end: Behind the last one.
    """

    row: Encoded
    start: int
    end: int


#: States by stream, each [layer, token, hidden] in fp32 on the CPU.
States = Mapping[Stream, Float[Tensor, "layer token hidden"]]


class StateStore:
    """What was read of models is remembered: one pass over hidden states serves many questions.

    States are known by model, stream, text and tokens; a store keeps those used last.

    Args:
        most_bytes: States that are kept at most.
    """

    def __init__(self, most_bytes: int = 2**30) -> None:
        self.most_bytes = most_bytes
        #: Texts that went through a model so far.
        self.passes = 0
        #: Tokens of texts that were wanted again, by the model's fingerprint.
        self.remembered: Counter[str] = Counter()
        self._states: OrderedDict[Hashable, Tensor] = OrderedDict()
        self._made: dict[Hashable, Any] = {}
        self._bytes = 0

    def states(
        self, lm: LM, spans: Sequence[Span], streams: Sequence[Stream] = ("block",)
    ) -> list[States]:
        """The states of a model at spans of texts, in their order.

        Args:
            lm: The model, with a fingerprint.

        Raises:
            ModelError: The model has not what a stream is.
        """
        known = lm.fingerprint
        keys = [
            (known, span.row.ids[: max(span.end, span.row.start)], span.row.start,
             span.start, span.end)
            for span in spans
        ]  # fmt: skip
        found = {
            (key, stream): self._states[key, stream]
            for key in keys for stream in streams if (key, stream) in self._states
        }  # fmt: skip
        missing = [
            place for place, key in enumerate(keys)
            if any((key, stream) not in found for stream in streams)
        ]  # fmt: skip
        again = [span for place, span in enumerate(spans) if place not in set(missing)]
        self.remembered[known] += sum(len(row.ids) for row in _rows(again))
        for place, one in read_states(lm, [spans[place] for place in missing], streams):
            self.passes += 1
            for stream, states in one.items():
                found[keys[missing[place]], stream] = states
        for key, states in found.items():
            self._keep(key, states)
        return [{stream: found[key, stream] for stream in streams} for key in keys]

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """Something small that was made of states or models, made once.

        Args:
            key: All that it depends on, fingerprints of models included.
        """
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]  # type: ignore[no-any-return]

    def _keep(self, key: Hashable, states: Tensor) -> None:
        if key in self._states:
            self._states.move_to_end(key)
            return
        self._states[key] = states
        self._bytes += states.numel() * states.element_size()
        while self._bytes > self.most_bytes:
            _, old = self._states.popitem(last=False)
            self._bytes -= old.numel() * old.element_size()


@torch.no_grad()
def read_states(
    lm: Body, spans: Sequence[Span], streams: Sequence[Stream] = ("block",)
) -> Iterator[tuple[int, States]]:
    """The states at spans of texts, with the place in ``spans``; the longest texts come first.

    Raises:
        ModelError: The model has not what a stream is.
    """
    added = middle_part(lm) if "middle" in streams and spans else None
    if "middle" in streams and spans and added is None:
        raise ModelError(
            "what attention adds to the residual stream cannot be told from what its blocks give.",
            where=type(lm.core).__name__,
            hint="Leave the stream 'middle' out.",
        )
    backbone = lm.core.get_submodule(lm.anatomy.backbone)
    rows = _rows(spans)
    order = sorted(range(len(rows)), key=lambda index: len(rows[index].ids), reverse=True)
    for indices in lm.batches(order, [len(row.ids) for row in rows]):
        batch = collate([rows[index] for index in indices], lm.pad_id, lm.device)
        width = batch.ids.shape[1]
        chosen = torch.cat([
            torch.arange(spans[index].start, spans[index].end) + place * width
            for place, index in enumerate(indices)
        ]).to(lm.device)  # fmt: skip
        with (
            lm.evaluating(),
            told(lm, padded_rows(batch.ids, batch.lengths, batch.starts)),
            _collected(lm, streams, added, chosen) as seen,
        ):
            backbone(input_ids=batch.ids, use_cache=False)
        if "middle" in streams:
            seen["middle"] = [x + a for x, a in zip(seen["input"], seen["added"], strict=True)]
        stacked = {stream: torch.stack(seen[stream]).float().cpu() for stream in streams}
        counts = [spans[index].end - spans[index].start for index in indices]
        parts = {stream: states.split(counts, dim=1) for stream, states in stacked.items()}
        for place, index in enumerate(indices):
            yield index, {stream: parts[stream][place].clone() for stream in streams}


def _rows(spans: Sequence[Span]) -> list[Encoded]:
    """What of the texts is read: nothing behind a span, but all of the prompt."""
    return [
        Encoded(span.row.ids[: max(span.end, span.row.start + 1)], span.row.start, False)
        for span in spans
    ]


@contextmanager
def _collected(
    lm: Body, streams: Sequence[Stream], added: str | None, chosen: Tensor
) -> Iterator[dict[str, list[Tensor]]]:
    """Within it the backbone's pass leaves the chosen tokens' states, layer by layer, by stream."""
    seen: dict[str, list[Tensor]] = {}
    paths = {"block": "", "mlp": lm.anatomy.mlp, "attention": lm.anatomy.attention}
    wanted: dict[str, str] = {stream: paths[stream] for stream in streams if stream != "middle"}
    if added is not None:
        wanted["added"] = added

    def keep(stream: str) -> Callable[..., None]:
        def hook(module: nn.Module, given: Any, output: Any) -> None:
            if not is_asked(lm.interveners):  # a router's own look at the bare model
                return
            seen.setdefault(stream, []).append(_flat(output)[chosen])

        return only_reads(hook)  # type: ignore[no-any-return]

    def before(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        if not is_asked(lm.interveners):
            return
        states = _flat(given[0] if given else named["hidden_states"])
        seen.setdefault("input", []).append(states[chosen])

    with ExitStack() as stack:
        for layer in range(lm.anatomy.layers):
            block = lm.core.get_submodule(lm.anatomy.block_path(layer))
            for stream, path in wanted.items():
                module = block.get_submodule(path) if path else block
                stack.callback(module.register_forward_hook(keep(stream)).remove)
            if added is not None:
                handle = block.register_forward_pre_hook(only_reads(before), with_kwargs=True)
                stack.callback(handle.remove)
        yield seen


def _flat(output: Any) -> Tensor:
    """What a module gives as [token, hidden]."""
    found = output
    if isinstance(output, tuple | list):
        found = output[0]
    elif isinstance(output, Mapping):
        found = next(iter(output.values()))
    return found.detach().reshape(-1, found.shape[-1])  # type: ignore[no-any-return]


@torch.no_grad()
def middle_part(lm: Body) -> str | None:
    """Path in a block of what gives that which attention adds to the residual stream.

    None: no two parts of a block and its input make up its output.
    """
    anatomy = lm.anatomy
    backbone = lm.core.get_submodule(anatomy.backbone)
    found = set()
    for layer in {0, anatomy.layers - 1}:
        path = anatomy.block_path(layer)
        block = lm.core.get_submodule(path)
        names = dict.fromkeys(
            [*(name for name, _ in block.named_children()), anatomy.attention, anatomy.mlp]
        )
        paths = [f"{path}.{name}" for name in names]
        with (
            lm.evaluating(), turn(lm.core), asked(None),
            capture(lm.core, [path], "input") as given, capture(lm.core, [path, *paths]) as seen,
        ):  # fmt: skip
            backbone(input_ids=torch.tensor([[3, 5, 6, 7]], device=lm.device), use_cache=False)
        difference = _flat(seen[path]) - _flat(given[path])
        # in the order in which they ran: attention comes before what norms its output
        parts = [
            (name, _flat(value)) for one, value in seen.items()
            if one != path and _flat(value).shape == difference.shape
            and (name := one.removeprefix(f"{path}."))
        ]  # fmt: skip
        size = float(difference.abs().max())
        found.add(next(
            (first for place, (first, a) in enumerate(parts) for _, b in parts[place + 1 :]
             if float((a + b - difference).abs().max()) <= SAME * max(size, 1e-6)),
            None,
        ))  # fmt: skip
    return found.pop() if len(found) == 1 else None
