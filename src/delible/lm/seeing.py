"""A model sees: where ids become embeddings, tokens of pictures become what the tower says of them.

A hook on the embedding, while the backbone is called: so pictures hold on every road of the engine
(padded rows, shared beginnings, trees, generation) without any of them knowing. Where a family
counts places of pictures in three dimensions, a hook on the backbone says them. What comes out is
tried against the model's own forward pass when it is loaded; a model that reads pictures in
another way (attention in both directions, cross-attention) is shown none.

The tower and the projector are computed once for each picture as long as nothing in them changes.
"""

from __future__ import annotations

import io
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from inspect import signature
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from delible.errors import DelibleError
from delible.lm.body import Body
from delible.lm.forward import Forward, collate
from delible.lm.identity import only_reads
from delible.lm.layout import Layout, asked, current_layout, turn
from delible.lm.pictures import FIRST, Pictures, is_picture, numbers_of
from delible.lm.template import Encoded
from delible.messages import ImagePart

#: Pictures that go through the tower at once.
TOGETHER = 16
#: Bytes of what towers say that are kept, for each model.
KEPT_BYTES = 256 * 2**20
#: Largest difference to the model's own logits, as a share of their size.
TOLERANCE = 1e-3
SHORT = 0.05


class _Seen:
    """What a tower said of pictures, as long as it is the same tower."""

    def __init__(self) -> None:
        self.state: object = None
        self.features: OrderedDict[int, Tensor] = OrderedDict()


_SEEN: WeakKeyDictionary[Body, _Seen] = WeakKeyDictionary()


@contextmanager
def seeing(lm: Body) -> Iterator[None]:
    """Within it the embedding takes tokens of pictures."""
    pictures = lm.pictures
    if pictures is None:
        yield
        return
    shown: list[tuple[Tensor, Tensor]] = []

    def plain(module: Any, given: tuple[Any, ...]) -> Any:
        ids = given[0]
        own = is_picture(ids)
        if not bool(own.any()):
            return None
        shown.append((ids, own))
        return (ids.masked_fill(own, pictures.token_id), *given[1:])

    def seen(module: Any, given: Any, output: Tensor) -> Any:
        if not shown:
            return None
        ids, own = shown.pop()
        said = features(lm, ids[own]).to(output.device, output.dtype)
        return output.masked_scatter(own[..., None].expand_as(output), said)

    embedding = lm.core.get_submodule(lm.anatomy.embedding)
    with ExitStack() as stack:
        # before all others: what else changes embeddings sees those of pictures
        for handle in (
            embedding.register_forward_pre_hook(only_reads(plain), prepend=True),
            embedding.register_forward_hook(only_reads(seen), prepend=True),
        ):
            stack.callback(handle.remove)
        if rope_index(lm) is not None:
            backbone = lm.core.get_submodule(lm.anatomy.backbone)
            hook = only_reads(lambda _, given, named: _placed(lm, given, named))
            stack.callback(backbone.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


def features(lm: Body, ids: Int[Tensor, " token"]) -> Float[Tensor, "token hidden"]:
    """What the language model reads at tokens of pictures."""
    numbers, places = numbers_of(ids)
    wanted, which = numbers.unique(return_inverse=True)
    by_picture = of_pictures(lm, wanted.tolist())
    sizes = torch.tensor([len(one) for one in by_picture], device=ids.device)
    starts = sizes.cumsum(0) - sizes
    return torch.cat(by_picture)[(starts[which] + places).to(by_picture[0].device)]


def of_pictures(lm: Body, numbers: Sequence[int]) -> list[Float[Tensor, "token hidden"]]:
    """What tower and projector say of pictures that were shown, by their numbers."""
    assert lm.pictures is not None
    learns = torch.is_grad_enabled() and any(one.requires_grad for one in tower(lm).values())
    if learns:
        return _looked_at(lm, numbers)
    kept = _SEEN.setdefault(lm, _Seen())
    state = _state(lm)
    if state is None or kept.state != state:
        kept.features.clear()
        kept.state = state
    missing = [number for number in numbers if number not in kept.features]
    found = {number: kept.features[number] for number in numbers if number not in missing}
    with torch.no_grad():
        for at in range(0, len(missing), TOGETHER):
            part = missing[at : at + TOGETHER]
            found |= dict(zip(part, _looked_at(lm, part), strict=True))
    if state is not None:
        for number in numbers:
            # whatever was computed in inference mode may be wanted where gradients are on
            kept.features[number] = found[number]
            kept.features.move_to_end(number)
        size = sum(one.nbytes for one in kept.features.values())
        while size > KEPT_BYTES and len(kept.features) > 1:
            size -= kept.features.popitem(last=False)[1].nbytes
    return [found[number] for number in numbers]


@torch.no_grad()
def look(lm: Body, images: Sequence[ImagePart]) -> list[Float[Tensor, "token hidden"]]:
    """What the language model reads of pictures, computed afresh; hooks in the tower act.

    Raises:
        DataError: A picture cannot be opened.
    """
    assert lm.pictures is not None
    numbers = [lm.pictures.shown(image) for image in images]
    with turn(lm.core), lm.intervening(), asked(lm.interveners), lm.computing():
        unique = list(dict.fromkeys(numbers))
        found = dict(zip(unique, _looked_at(lm, unique), strict=True))
    return [found[number] for number in numbers]


def tower(lm: Body) -> dict[str, torch.nn.Parameter]:
    """The parameters that no text passes through."""
    anatomy = lm.anatomy
    language = tuple(f"{one}." for one in (anatomy.backbone, anatomy.head, anatomy.embedding))
    return {name: one for name, one in lm.core.named_parameters() if not name.startswith(language)}


def _state(lm: Body) -> object:
    """Changes when the tower could say something else; None: that cannot be told."""
    language = (f"{lm.anatomy.backbone}.", f"{lm.anatomy.embedding}.")
    hooks = list[Any]()
    for name, module in lm.core.named_modules():
        if f"{name}.".startswith(language):
            continue
        if hasattr(module, "merged_adapters"):  # a layer of PEFT
            return None
        hooks.append(vars(module).get("forward"))
        for kind in (module._forward_pre_hooks, module._forward_hooks):
            hooks += [key for key, hook in kind.items() if not _collects(hook)]
    values = tuple(
        (one.data_ptr(), 0 if one.is_inference() else one._version) for one in tower(lm).values()
    )
    return values, tuple(hooks), lm.precision


def _collects(hook: Any) -> bool:
    """Whether a hook is one with which transformers collects outputs."""
    inner = getattr(hook, "func", hook)  # of a partial
    return str(getattr(inner, "__module__", "")).startswith("transformers.")


def _looked_at(lm: Body, numbers: Sequence[int]) -> list[Tensor]:
    """What the model's own code makes of pictures; those of like form go through it together."""
    assert lm.pictures is not None
    inputs = {number: lm.pictures.inputs(number) for number in numbers}
    alike: dict[object, list[int]] = {}
    for number, given in inputs.items():
        alike.setdefault(_form(given), []).append(number)
    found: dict[int, Tensor] = {}
    for mine in alike.values():
        joined = {
            name: torch.cat([inputs[number][name] for number in mine]).to(lm.device)
            for name in inputs[mine[0]]
        }
        said = _flat(_image_features(lm.core, joined))
        for number, one in zip(mine, said.chunk(len(mine)), strict=True):
            found[number] = one
    return [found[number] for number in numbers]


def _form(given: Mapping[str, Tensor]) -> object:
    """Pictures with the same form can be joined, and have as many tokens."""
    return tuple(
        (name, tuple(one.shape), () if one.is_floating_point() else tuple(one.flatten().tolist()))
        for name, one in sorted(given.items())
    )


def _image_features(core: Any, given: Mapping[str, Tensor]) -> Any:
    known = signature(core.get_image_features).parameters
    open_ended = any(one.kind is one.VAR_KEYWORD for one in known.values())
    taken = {
        name: one.to(core.dtype) if one.is_floating_point() else one
        for name, one in given.items()
        if open_ended or name in known
    }
    return core.get_image_features(**taken)


def _flat(found: Any) -> Float[Tensor, "token hidden"]:
    found = getattr(found, "pooler_output", found)
    if torch.is_tensor(found):
        return found.reshape(-1, found.shape[-1])
    return torch.cat([_flat(one) for one in found])


# ---- places in three dimensions


def rope_index(lm: Body) -> Any:
    """What says where tokens of pictures stand, in families that count in three dimensions."""
    return getattr(getattr(lm.core, "model", None), "get_rope_index", None)


def _placed(lm: Body, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """Arguments of the backbone with places in three dimensions, if a text holds a picture."""
    ids = given[0] if given else named.get("input_ids")
    layout = current_layout(ids.numel()) if torch.is_tensor(ids) else None
    if layout is None or not any(token >= FIRST for one in layout.prompts for token in one):
        return None
    return given, {**named, "position_ids": places(lm, layout)}


def places(lm: Body, layout: Layout) -> Int[Tensor, "three rows new"]:
    """Where each token of a call stands, in time, height and width."""
    if "places" not in layout.known:
        longest = max(max(map(len, layout.prompts)), int(layout.place.max()) + 1)
        table = torch.stack([_places_of(lm, prompt, longest) for prompt in layout.prompts], dim=1)
        text = layout.text.clamp(min=0).cpu()
        found = table[:, text, layout.place.clamp(min=0).cpu()]
        layout.known["places"] = found.to(layout.place.device)
    return layout.known["places"]  # type: ignore[no-any-return]


def _places_of(lm: Body, prompt: Sequence[int], length: int) -> Int[Tensor, "three place"]:
    """Of a prompt and what follows it; behind it all three count on from the furthest."""
    assert lm.pictures is not None
    ids = torch.tensor([list(prompt)])
    own = is_picture(ids)
    if not bool(own.any()):
        return torch.arange(length).expand(3, -1)
    numbers, place = numbers_of(ids[own])  # a picture may be shown twice: one grid each time
    grids = [lm.pictures.inputs(one)["image_grid_thw"] for one in numbers[place == 0].tolist()]
    found, _ = rope_index(lm)(
        input_ids=ids.masked_fill(own, lm.pictures.token_id),
        mm_token_type_ids=own.int(),
        image_grid_thw=torch.cat(grids),
        attention_mask=torch.ones_like(ids),
    )
    found = found[-3:, 0]
    more = torch.arange(1, length - found.shape[1] + 1) + found.max()
    return torch.cat([found, more.expand(3, -1)], dim=1)[:, :length]


# ---- trying it


def check(lm: Body) -> str:
    """Whether pictures are read as the model itself reads them; "" or why not."""
    pictures = lm.pictures
    assert pictures is not None
    try:
        images = [ramp(turned) for turned in (False, True)]
        before, after = _ordinary(lm, 8)
        differences = []
        for image in images:
            inside = list(pictures.picture(image).ids)
            ids = [*before, *inside, *after]
            row = Encoded(tuple(ids), len(before) + len(inside) + 1, has_end=False)
            with torch.inference_mode(), lm.computing():
                states = Forward(lm)(collate([row], lm.pad_id, lm.device))[0]
                mine = lm.head(states).float()
                own = _own_logits(lm, pictures, ids, image).float()
            own = own[len(before) + len(inside) : len(ids) - 1]
            differences.append(float((mine - own).abs().max()) / max(1.0, float(own.abs().max())))
    except DelibleError as error:
        return error.problem
    except Exception as error:  # whatever a model's code raises
        return f"{type(error).__name__}: {error}"
    finally:
        if rope_index(lm) is not None:
            lm.core.model.rope_deltas = None  # of the trial
    tolerance = TOLERANCE if next(lm.core.parameters()).dtype == torch.float32 else SHORT
    if lm.precision != "float32":
        tolerance = SHORT
    if max(differences) > tolerance:
        return (
            "its language model reads them in another way than as tokens from the left to the "
            f"right (logits differ by {max(differences):.2g} of their size)"
        )
    return ""


def ramp(turned: bool = False) -> ImagePart:
    """A small picture of a ramp."""
    from PIL import Image

    levels = np.linspace(0, 255, 32 * 32 * 3).reshape(32, 32, 3).astype(np.uint8)
    written = io.BytesIO()
    Image.fromarray(levels.transpose(1, 0, 2) if turned else levels).save(written, format="PNG")
    return ImagePart.model_validate({"source": written.getvalue()})


def _ordinary(lm: Body, count: int) -> tuple[list[int], list[int]]:
    special = {*lm.tokenizer.all_special_ids, *lm.tokenizer.added_tokens_decoder}
    usable = [token for token in range(min(lm.vocabulary, 1000)) if token not in special]
    chosen = [usable[7 * place % len(usable)] for place in range(count)]
    return chosen[: count // 2], chosen[count // 2 :]


def _own_logits(lm: Body, pictures: Pictures, ids: Sequence[int], image: ImagePart) -> Tensor:
    """Logits of the model's own forward pass, [place, vocab]."""
    row = torch.tensor([list(ids)], device=lm.device)
    own = is_picture(row)
    given: dict[str, Any] = {
        name: value.to(lm.device, lm.core.dtype if value.is_floating_point() else value.dtype)
        for name, value in pictures.inputs(int(numbers_of(row[own])[0][0])).items()
    }
    if "mm_token_type_ids" in signature(type(lm.core).forward).parameters:
        given["mm_token_type_ids"] = own.int()
    found = lm.core(
        input_ids=row.masked_fill(own, pictures.token_id),
        attention_mask=torch.ones_like(row),
        use_cache=False,
        **given,
    )
    return found.logits[0]  # type: ignore[no-any-return]
