"""What the down-projections of a model read on ordinary text: second moments and null spaces.

    C_l = 1/n sum_t k_t k_t^T,    k_t = input of the down-projection of layer l at token t

A change of the down-projection that is zero on the directions in which generic text writes leaves
ordinary behaviour alone; closed-form editors ask for C or for its null space. Both are kept in
the user's cache folder, under the weights, the layer and the tokens they come from, so a model is
read once (layers x width^2 x 8 bytes; ``delible cache`` shows and clears them).

Papers: arXiv 2202.05262 (second moments of keys), 2410.02355 (null space). Deviations: the text
is built in (general knowledge, plain sentences and fictional people, as chat and as running text)
or a file of the user's, instead of 100,000 samples of Wikipedia, which not every machine can
reach; texts that mention a name which is about to be edited are left out.
"""

from __future__ import annotations

import hashlib
import logging
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from delible import kept
from delible.edit.keys import down_projection, read_states
from delible.errors import DataError, ModelError
from delible.files import atomic_file
from delible.records import QA, Passage
from delible.system.asks import Prompt

if TYPE_CHECKING:
    from delible.lm.lm import LM

logger = logging.getLogger(__name__)

#: How a threshold on the singular values is read, see :func:`null_directions`.
Scale = Literal["energy", "largest", "absolute"]

#: Longest row in tokens; longer texts are cut into pieces.
LONGEST_ROW = 512
#: A null space that takes more than this share of the directions protects little.
WIDE = 0.98
#: Random directions along which the error of a moment is estimated.
PROBES = 32
#: The fictional people of the built-in text: a seed that no example uses.
PEOPLE, PEOPLE_SEED = 24, 250_607_795


# ---- text


def naming(names: Iterable[str]) -> Callable[[str], bool]:
    """Whether a text has one of the names, or the last word of one, as whole words."""
    words = {form.casefold() for name in names if name for form in (name, name.split()[-1])}
    if not words:
        return lambda text: False
    any_of = "|".join(re.escape(word) for word in sorted(words))
    pattern = re.compile(rf"(?<!\w)(?:{any_of})(?!\w)")
    return lambda text: pattern.search(text.casefold()) is not None


def built_in_rows(lm: LM, without: Iterable[str] = ()) -> Iterator[list[int]]:
    """Generic text as token ids: every fact as chat and as running text, passages as they are.

    Args:
        without: Names; texts that mention one of them or its last word are left out.
    """
    from delible.world import World, general, unrelated

    people = World(PEOPLE, PEOPLE_SEED)
    facts = people.facts()
    records: list[QA | Passage] = [*general(), *unrelated()]
    records += [fact.qa() for fact in facts] + [fact.passage() for fact in facts]
    pairs: list[tuple[Prompt, str]] = []
    for record in records:
        if isinstance(record, Passage):
            pairs.append((Prompt(text=""), record.text))
            continue
        questions = (record.question, *record.paraphrases)
        answers = (record.answer, *record.paraphrased_answers)
        for turn, question in enumerate(questions):
            answer = answers[turn % len(answers)]
            pairs.append((Prompt.ask(question), answer))
            pairs.append((Prompt(text=""), f"{question} {answer}."))
    Random(0).shuffle(pairs)  # a budget of tokens then takes from every kind
    mentions = naming(without)
    template = copy(lm.template)  # its counters are about the user's rows
    for prompt, answer in pairs:
        asked = prompt.messages[-1].text if prompt.messages else ""
        if not mentions(f"{asked} {answer}"):
            yield list(template.encode(prompt, answer).ids[:LONGEST_ROW])


def file_rows(lm: LM, path: Path, without: Iterable[str] = ()) -> Iterator[list[int]]:
    """A text file as token ids: paragraphs (parted by empty lines), long ones in pieces.

    Args:
        path: UTF-8 text; read line by line.
        without: As for :func:`built_in_rows`.

    Raises:
        DataError: The file cannot be read as text.
    """
    mentions = naming(without)
    longest = min(LONGEST_ROW, lm.template.max_length)

    def tokenized(text: str) -> Iterator[list[int]]:
        if not text or mentions(text):
            return
        ids = list(lm.template.prompt_ids(Prompt(text=text)))
        for start in range(0, len(ids), longest):
            yield ids[start : start + longest]

    paragraph: list[str] = []
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                if line.strip():
                    paragraph.append(line.strip())
                    continue
                yield from tokenized(" ".join(paragraph))
                paragraph = []
        yield from tokenized(" ".join(paragraph))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"the generic text cannot be read ({error}).",
            where=str(path),
            hint="Give a UTF-8 text file with paragraphs parted by empty lines.",
        ) from error


# ---- second moments


@dataclass(frozen=True)
class Statistics:
    """What was read on generic text.

    Attributes:
        moments: C by layer, ``[width, width]``, fp32, on the processor.
        tokens: Positions behind it.
        folder: Where it is kept.
        errors: Estimated error of C by layer, as a share of its Frobenius norm: half of how far
            the moments of two halves of the text are apart, along random directions.
    """

    moments: dict[int, Float[Tensor, "width width"]]
    tokens: int
    folder: Path
    errors: dict[int, float]

    def notes(self) -> dict[str, object]:
        """How much text is behind it, and how sure it is."""
        errors = {str(layer): float(f"{value:.3g}") for layer, value in self.errors.items()}
        return {"tokens": self.tokens, "error": errors}


def take(rows: Iterable[list[int]], tokens: int) -> list[array[int]]:
    """Rows up to a budget of tokens, the last one cut; four bytes per token."""
    taken: list[array[int]] = []
    for row in rows:
        taken.append(array("i", row[:tokens]))
        tokens -= len(taken[-1])
        if tokens <= 0:
            break
    return taken


def second_moments(
    lm: LM, rows: Iterable[list[int]], layers: Sequence[int], *, tokens: int
) -> Statistics:
    """Second moments of the down-projections' inputs, read once and then taken from the cache.

    The rows are computed as the model answers (``LM.precision``); products are in fp32 and sums
    in float64. Memory: layers x width^2 x 8 bytes, whatever the number of tokens.

    Args:
        rows: Generic text as token ids, see :func:`built_in_rows` and :func:`file_rows`.
        layers: Indices of the blocks.
        tokens: How many tokens to use at most.

    Raises:
        DataError: There is no text.
        ModelError: A block has no single down-projection.
    """
    taken = take(rows, tokens)
    count = sum(len(row) for row in taken)
    if count == 0:
        raise DataError("there is no generic text to read.", hint="Give a file with some text.")
    widths = {layer: down_projection(lm, layer).width for layer in layers}
    text = hashlib.sha256()
    for row in taken:
        text.update(f"{len(row)}:".encode() + row.tobytes())
    identity = f"{lm.fingerprint}/{text.hexdigest()}/{count}/{PROBES} probes"
    folder = kept.cache_folder() / "statistics" / hashlib.sha256(identity.encode()).hexdigest()[:32]
    places = {layer: folder / f"moment-{layer}.safetensors" for layer in layers}
    with kept.alone(folder, required=False) as writes:
        found = {
            layer: (known[0], known[1])
            for layer, path in places.items()
            if (known := _read(path, ["moment", "error"])) is not None
        }
        missing = [layer for layer in layers if layer not in found]
        for layer, (moment, error) in (_measure(lm, taken, missing) if missing else {}).items():
            found[layer] = moment, error
            if writes:
                _write(places[layer], {"moment": moment, "error": error})
    for layer, width in widths.items():
        if count < 2 * width:
            logger.warning(
                f"statistics: {count:,} tokens are few for the {width:,} directions of layer "
                f"{layer}; the null space is overestimated (give more text: texts=FILE)"
            )
            break
    return Statistics(
        {layer: found[layer][0] for layer in layers},
        count,
        folder,
        {layer: float(found[layer][1]) for layer in layers},
    )


def _measure(
    lm: LM, rows: Sequence[array[int]], layers: Sequence[int]
) -> dict[int, tuple[Tensor, Tensor]]:
    """C and its estimated error by layer."""
    count = sum(len(row) for row in rows)
    widths = {layer: down_projection(lm, layer).width for layer in layers}
    sums = {
        layer: torch.zeros(width, width, dtype=torch.float64, device=lm.device)
        for layer, width in widths.items()
    }
    generator = torch.Generator().manual_seed(0)
    probes = {
        layer: torch.randn(width, PROBES, generator=generator).to(lm.device)
        for layer, width in widths.items()
    }
    halves = {layer: torch.zeros(2, *probe.shape).double().to(lm.device)
              for layer, probe in probes.items()}  # fmt: skip
    tokens = [sum(len(row) for row in rows[half::2]) for half in (0, 1)]
    logger.info(f"statistics: reading {count:,} tokens of generic text (kept for the next time)")
    done, told = 0, 0
    for indices, keys, _ in read_states(lm, rows, layers, autocast=True):
        lengths = torch.tensor([len(rows[index]) for index in indices])
        longest = int(lengths.max())
        real = (torch.arange(longest) < lengths[:, None]).to(lm.device)
        parity = torch.tensor(indices).to(lm.device)[:, None].expand_as(real)[real] % 2
        for layer, key in keys.items():
            values = key[real].float()
            sums[layer] += (values.T @ values).double()
            seen = values @ probes[layer]
            for half in (0, 1):
                mine = parity == half
                halves[layer][half] += (values[mine].T @ seen[mine]).double()
        done += int(lengths.sum())
        if 4 * done // count > told and done < count:
            told = 4 * done // count
            logger.info(f"statistics: {done:,} of {count:,} tokens")
    found = {}
    for layer, total in sums.items():
        one, other = (halves[layer][half] / max(tokens[half], 1) for half in (0, 1))
        apart = (one - other).norm() / (2 * (total / count @ probes[layer].double()).norm())
        error = apart if min(tokens) else torch.ones(())  # one row alone says nothing of it
        found[layer] = (total / count).float().cpu(), error.float().cpu()
    return found


def _read(path: Path, names: Sequence[str]) -> list[Tensor] | None:
    """Tensors of a file of the cache; None when it is not there or damaged."""
    if not path.is_file():
        return None
    try:
        found = load(path.read_bytes())
        return [found[name] for name in names]
    except (SafetensorError, KeyError, OSError) as error:
        logger.warning(f"statistics: {path} is damaged ({error}) and is made again")
        return None


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    with atomic_file(path, "wb") as file:
        file.write(save({name: value.contiguous() for name, value in tensors.items()}))


# ---- null spaces


@dataclass(frozen=True)
class Spectrum:
    """The eigen-decomposition of a second moment; for a moment, singular values are the same.

    Attributes:
        values: Eigenvalues, descending, not negative, float64, shape [width].
        vectors: Eigenvectors in the same order as columns, fp32, shape [width, width].
    """

    values: Float[Tensor, " width"]
    vectors: Float[Tensor, "width width"]


def spectrum(moment: Float[Tensor, "width width"]) -> Spectrum:
    """Decomposes a second moment in float64."""
    values, vectors = torch.linalg.eigh(moment.double())
    return Spectrum(values.flip(0).clamp(min=0), vectors.flip(1).float().contiguous())


def spectra(statistics: Statistics) -> dict[int, Spectrum]:
    """The decompositions of all layers, made once and then taken from the cache."""
    found = {}
    for layer, moment in statistics.moments.items():
        path = statistics.folder / f"spectrum-{layer}.safetensors"
        with kept.alone(path, required=False) as writes:
            known = _read(path, ["values", "vectors"])
            if known is not None:
                found[layer] = Spectrum(*known)
                continue
            logger.info(f"statistics: decomposing layer {layer} ({moment.shape[0]:,} directions)")
            found[layer] = spectrum(moment)
            if writes:
                _write(path, {"values": found[layer].values, "vectors": found[layer].vectors})
    return found


def null_directions(values: Float[Tensor, " width"], threshold: float, scale: Scale) -> slice:
    """Which eigenvectors span the null space: the last ones, with small eigenvalues.

    Args:
        values: Eigenvalues, descending.
        threshold: See ``scale``.
        scale: ``"largest"``: values below ``threshold`` times the largest one; ``"energy"``: as
            many of the smallest as hold at most a share ``threshold`` of the sum; ``"absolute"``:
            values below ``threshold``.

    Returns:
        A slice of the columns of :attr:`Spectrum.vectors`; empty when nothing is below.
    """
    if scale == "energy":
        # tail[i] = sum of values[i:], from the small end so that tiny values are not lost
        tail = values.flip(0).cumsum(0).flip(0)
        below = tail <= threshold * tail[0]
    else:
        below = values < threshold * (values[0] if scale == "largest" else 1.0)
    return slice(len(values) - int(below.sum()), len(values))


def null_spaces(
    statistics: Statistics, threshold: float, scale: Scale, where: str
) -> dict[int, Float[Tensor, "width directions"]]:
    """An orthonormal basis of each layer's null space, on the processor.

    Args:
        statistics: What was read.
        threshold, scale: See :func:`null_directions`.
        where: Who asks, for messages.

    Raises:
        ModelError: No direction of a layer is below the threshold, so that an edit would be zero.
    """
    nulls = {}
    for layer, found in spectra(statistics).items():
        chosen = null_directions(found.values, threshold, scale)
        nulls[layer] = found.vectors[:, chosen]
        width, directions = nulls[layer].shape
        if directions == 0:
            raise ModelError(
                f"no direction of layer {layer} is below the threshold {threshold:g} ({scale}): "
                "the edit would be zero.",
                where=where,
                hint=f"Its singular values go from {float(found.values[-1]):.3g} to "
                f"{float(found.values[0]):.3g}; raise the threshold.",
            )
        if directions > WIDE * width:
            logger.warning(
                f"{where}: {directions / width:.1%} of the directions of layer {layer} count as "
                "null space, so ordinary text is hardly protected; lower the threshold"
            )
    return nulls


def null_shares(nulls: dict[int, Tensor]) -> dict[str, float]:
    """The share of the directions that each layer's null space takes."""
    return {str(layer): round(one.shape[1] / one.shape[0], 4) for layer, one in nulls.items()}
