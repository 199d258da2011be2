"""What is found out about a model when it is loaded, by trying: nothing is assumed.

Body and head apart must give its own logits. Whether a beginning can be computed once for several
rows, whether answers can grow as trees, and how answers can be generated in batches is measured
against the plain computation; what does not reproduce it is not used.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from delible.errors import ModelError
from delible.lm import after_head
from delible.lm.body import ROADS, Body, Road
from delible.lm.decode import plain_settings, speak
from delible.lm.forward import Batch, Forward
from delible.lm.speaker import Row
from delible.lm.tree import Prefix, Tree, node_states
from delible.system.asks import Decoding

#: Tokens that are generated to compare with; the second of three rows leaves after half of them.
STEPS = 4
#: Largest difference of two computations of the same logits, as a share of their size.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
#: The same of data types that are shorter than fp32.
SHORT = 0.05
#: The roads that were found to work, by architecture, device and data type, in this process.
_KNOWN: dict[str, Road] = {}


@torch.inference_mode()
def check(lm: Body) -> None:
    """Sets ``after_head``, ``shares_prefix``, ``grows_trees`` and ``road`` of a model.

    Raises:
        ModelError: Body and head do not reproduce its logits, or it cannot generate at all.
    """
    ids = _ordinary(lm, 40).reshape(2, 20)
    ids[:, :12] = ids[0, :12]
    lm.after_head = after_head.measure(lm, ids)
    lm.shares_prefix = True
    starts = torch.tensor([13, 15], device=ids.device)
    whole = Batch(ids, torch.tensor([20, 20], device=ids.device), starts, 0)
    plain = Forward(lm)(whole)[0]
    close = partial(_close, plain)
    try:
        lm.shares_prefix = close(Forward(lm)(Batch(whole.ids, whole.lengths, whole.starts, 12))[0])
    except Exception:  # a cache that cannot be repeated: any error means "do not share"
        lm.shares_prefix = False
    try:
        trees = [Tree.grow(row[12:start], [row[start:], [7, *row[start:]]])
                 for row, start in zip(ids.tolist(), (13, 15), strict=True)]  # fmt: skip
        states = node_states(lm, Prefix(ids[0, :12].tolist()), trees)
        first = len(trees[0].ids)
        paths = [*trees[0].predicting[0], *(first + one for one in trees[1].predicting[0])]
        lm.grows_trees = lm.shares_prefix and close(states[paths])
    except Exception:  # attention that takes no mask of its own, or no positions
        lm.grows_trees = False
    lm.road = _road(lm)


def _close(plain: Tensor, other: Tensor) -> bool:
    """Whether two computations of the same states agree, as far as their data type can."""
    if plain.dtype in TOLERANCE:
        return torch.allclose(plain, other, atol=1e-3, rtol=1e-3)
    return float((plain - other).abs().max()) <= SHORT * float(plain.abs().max())


def _ordinary(lm: Body, count: int) -> Tensor:
    """Token ids of ordinary text: none that a model treats in a way of its own."""
    special = {*lm.tokenizer.all_special_ids, *lm.tokenizer.added_tokens_decoder}
    usable = [token for token in range(min(lm.vocabulary, 1000)) if token not in special]
    chosen = [usable[7 * place % len(usable)] for place in range(count)]
    return torch.tensor(chosen, device=lm.device)


def _road(lm: Body) -> Road:
    """The fastest way of generating that gives what the library's own ``generate`` gives.

    It is a property of the architecture: models of the same settings are tried once a process.
    """
    settings = lm.core.config.to_json_string(use_diff=False)
    dtype = next(lm.core.parameters()).dtype
    known = (
        f"{type(lm.core)} {lm.device.type} {dtype} {lm.grows_trees}{lm.shares_prefix} {settings}"
    )
    if known not in _KNOWN:
        _KNOWN[known] = _tried(lm, TOLERANCE.get(dtype, SHORT))
    return _KNOWN[known]


def _tried(lm: Body, tolerance: float) -> Road:
    ids = _ordinary(lm, 30).tolist()
    rows = [ids[:12] + own for own in (ids[12:15], ids[15:21], ids[21:30])]
    try:
        expected = [_own(lm, row) for row in rows]
    except Exception as error:  # whatever a model's code raises
        raise ModelError(
            f"transformers' own generation fails with it: {type(error).__name__}: {error}",
            where=type(lm.core).__name__,
            hint="A model that generates text with transformers is needed.",
        ) from error
    for road in ROADS:
        lm.road = road
        try:
            if road == "plain" or _gives(lm, rows, expected, tolerance):
                return road
        except Exception:  # a cache that cannot do what a faster road needs
            continue
    raise AssertionError("the last road is the library's own")


def _own(lm: Body, row: list[int]) -> tuple[list[int], Tensor]:
    """Tokens and logits [tokens, vocab] of the library's greedy generation of one row."""
    with plain_settings(lm):
        ids = torch.tensor([row], device=lm.device)
        found = lm.core.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=STEPS,
            do_sample=False,
            pad_token_id=lm.pad_id,
            output_logits=True,
            return_dict_in_generate=True,
        )
    return found.sequences[0, len(row) :].tolist(), torch.cat(list(found.logits)).float()


def _gives(
    lm: Body, rows: list[list[int]], expected: list[tuple[list[int], Tensor]], tolerance: float
) -> bool:
    """Whether the logits are those expected at every step, as rows say the expected tokens."""
    same, leaves = True, min(lm.ends)
    speakers = [Row(Decoding(STEPS)) for _ in rows]

    def choose(logits: Tensor, speaking: Sequence[Row]) -> list[int]:
        nonlocal same
        tokens = []
        for found, speaker in zip(logits, speaking, strict=True):
            row, step = speakers.index(speaker), len(speaker.said)
            own = expected[row][1][min(step, STEPS - 1)]
            if speaker.finish is None:
                far = (found - own).abs().max()
                same &= bool(far <= tolerance * max(1.0, float(own.abs().max())))
            ends = row == 1 and step >= STEPS // 2
            tokens.append(leaves if ends else expected[row][0][min(step, STEPS - 1)])
        return tokens

    speak(lm, speakers, rows, choose)
    return same
