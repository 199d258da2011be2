"""Training a top-k sparse autoencoder on the states of one site, once per model and kept.

    loss = |x - x^|^2 + 1/32 |(x - x^) - e^|^2

with x^ from the k largest pre-activations and e^ from the largest ones of latents that were silent
for long (AuxK), so that few stay so. Decoder rows have length 1; W_enc begins as their transpose,
b_dec as the mean. States are scaled to variance 1 while training, which is folded into the weights.

Papers: arXiv 2406.04093 (top-k, AuxK). Deviations: made for a laptop: 8 latents per dimension and
some hundred thousand states, which are seen several times. A text's first state and those of more
than ten times the median length are left out: every model has a few such outliers, and they would
be all that is learned. Every 20th text is held out for the share of variance that is unexplained.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save
from torch import Tensor, nn

from delible import kept
from delible.errors import DataError, RunError
from delible.files import atomic_file
from delible.intervene.reading import read
from delible.intervene.sae import SAE
from delible.intervene.sites import Site
from delible.lm.lm import LM
from delible.lm.template import Encoded
from delible.watching import Pace, Stage, unwatched, watched

logger = logging.getLogger(__name__)

#: Part of what a kept autoencoder is known by: goes up whenever training changes.
VERSION = 1
#: Weight of AuxK.
AUXILIARY = 1 / 32
#: Every so many texts one is held out.
HELD_OUT = 20
#: States longer than this many medians are outliers.
LONG = 10.0
#: A latent that was silent for this share of all states that training sees counts as dead.
DEAD_AFTER = 0.1
#: From which share of unexplained variance an autoencoder is said to be poor.
POOR = 0.2
#: Seconds between checkpoints.
CHECKPOINT_SECONDS = 60.0


@dataclass(frozen=True)
class Training:
    """How an autoencoder is trained.

    Attributes:
        expansion: Latents per dimension of the states.
        active: Latents that may speak at once.
        tokens: States that are read at most.
        passes: How often each is seen.
        batch: States per step.
        learning_rate: Of Adam; falls to 0 over the last fifth.
    """

    expansion: int = 8
    active: int = 32
    tokens: int = 200_000
    passes: int = 4
    batch: int = 512
    learning_rate: float = 1e-3


def trained_sae(
    lm: LM,
    site: Site,
    rows: Iterable[Sequence[int]],
    training: Training,
    *,
    seed: int = 0,
    stage: Stage | None = None,
) -> SAE:
    """The autoencoder of a site, trained once and then taken from the cache.

    A killed training goes on where its last checkpoint was.

    Args:
        lm: The model.
        site: One layer of it.
        rows: Texts as token ids; as many as ``training.tokens`` allows are read.
        training: How.
        seed: Of first weights and order.
        stage: Told how far it is; None: the log is.

    Raises:
        DataError: There is too little text.
        ModelError: The model lacks the site, or the cache cannot be written.
    """
    texts = _within(rows, training.tokens)
    text = hashlib.sha256(json.dumps(texts).encode()).hexdigest()

    def read_states(stage: Stage) -> Read:
        return states_of(lm, site, texts, stage)

    return kept_sae(lm, site, text, read_states, training, seed=seed, stage=stage)


#: States for training, held-out ones, and their layer.
Read = tuple[Float[Tensor, "token width"], Float[Tensor, "token width"], int | None]


def kept_sae(
    lm: LM,
    site: Site,
    text: str,
    read_states: Callable[[Stage], Read],
    training: Training,
    *,
    seed: int = 0,
    stage: Stage | None = None,
) -> SAE:
    """The autoencoder of a site, of states that are read when it is not in the cache.

    Args:
        text: Hash of what the states are of.
        read_states: Reads them.
    """
    stage = stage or _logged()
    content = {
        "version": VERSION, "model": lm.fingerprint, "site": site.model_dump(mode="json"),
        "text": text, "training": asdict(training), "seed": seed,
    }  # fmt: skip
    known = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]

    def make(work: Path) -> Path:
        states, held, layer = read_states(stage)
        sae = fit_sae(
            states, training, seed=seed, stage=stage, checkpoint=work / "checkpoint",
            device=lm.device,
        )  # fmt: skip
        about = {
            "model_name": lm.name, "hook_name": _hook_name(site, layer), "tokens": len(states),
            "unexplained": sae.unexplained(held if len(held) else states),
            "silent": silent_share(sae, states),
        }  # fmt: skip
        SAE(**{**vars(sae), "about": about}).save(work / "sae")
        return work / "sae"

    target = kept.cache_folder() / "saes" / known
    found = SAE.load(kept.folder(target, make, space="100 MB", goes_on=True))
    told = found.about
    logger.info(
        f"sparse autoencoder of {told['hook_name']}: {told['unexplained']:.3f} of the variance "
        f"unexplained, {told['silent']:.1%} of {found.latents:,} latents silent"
    )
    if told["unexplained"] >= POOR:
        logger.warning(
            "The sparse autoencoder explains the states poorly: more texts (or pictures) or more "
            "passes help, or "
            "an autoencoder of your own (sae=FOLDER)."
        )
    return found


def _logged() -> Stage:
    """Tells the log from time to time."""
    paces: dict[str, Pace] = {}

    def stage(title: str, done: int, total: int) -> None:
        pace = paces.setdefault(title, Pace(done))
        if pace.due():
            logger.info(f"{title}: {done:,} of {total:,}; {pace.left(done, total)}")
            pace.told()

    return stage


def _within(rows: Iterable[Sequence[int]], tokens: int) -> list[list[int]]:
    found: list[list[int]] = []
    for row in rows:
        if tokens <= 0:
            break
        found.append(list(row[:tokens]))
        tokens -= len(found[-1])
    return [row for row in found if len(row) > 1]


def _hook_name(site: Site, layer: int | None) -> str:
    """What SAE Lens calls the site, where it has a name for it."""
    name = {"block": "hook_resid_post", "block_input": "hook_resid_pre", "mlp": "hook_mlp_out",
            "attention": "hook_attn_out"}.get(site.what, site.what)  # fmt: skip
    return name if layer is None else f"blocks.{layer}.{name}"


def states_of(
    lm: LM, site: Site, rows: Sequence[Sequence[int]], stage: Stage = unwatched
) -> tuple[Float[Tensor, "token width"], Float[Tensor, "token width"], int | None]:
    """States for training, held-out ones, and the layer; without outliers, fp32 on the CPU.

    Raises:
        DataError: There is no text of more than one token, or the site is several layers.
    """
    texts = [Encoded(tuple(row), len(row), has_end=False) for row in rows]
    found: dict[int, Tensor] = {}
    layer: int | None = None
    parts = ([one] for one in read(lm, texts, site))
    for ((place, states),) in watched(parts, f"states of {len(rows)} texts", len(rows), stage):
        if len(states) != 1:
            raise DataError("a sparse autoencoder is of one layer.", where=f"site {site.what}")
        ((layer, values),) = states.items()
        found[place] = values[1:].cpu()
    if not found:
        raise DataError("there is no text to train a sparse autoencoder on.")
    return (*parted([found[place] for place in range(len(found))]), layer)


def parted(found: Sequence[Float[Tensor, "token width"]]) -> tuple[Tensor, Tensor]:
    """States of texts or pictures for training, and held-out ones, without outliers."""
    length = torch.cat([one.norm(dim=1) for one in found]).median()
    usual = [one[one.norm(dim=1) <= LONG * length] for one in found]
    held = usual[HELD_OUT - 1 :: HELD_OUT]
    rest = [one for place, one in enumerate(usual) if place % HELD_OUT != HELD_OUT - 1]
    return torch.cat(rest), torch.cat(held) if held else rest[0][:0]


class _Fit:
    """A training under way, on states of variance 1."""

    def __init__(self, mean: Tensor, training: Training, seed: int) -> None:
        width, self.training = len(mean), training
        latents = training.expansion * width
        random = torch.Generator().manual_seed(_number(seed, "weights"))
        rows = nn.functional.normalize(torch.randn(latents, width, generator=random), dim=1)
        rows = rows.to(mean.device)
        self.decoder, self.encoder = nn.Parameter(rows), nn.Parameter(rows.T.clone().contiguous())
        self.encoder_bias = nn.Parameter(mean.new_zeros(latents))
        self.decoder_bias = nn.Parameter(mean.clone())
        self.weights = [self.encoder, self.encoder_bias, self.decoder, self.decoder_bias]
        self.optimizer = torch.optim.Adam(self.weights, lr=training.learning_rate)
        self.silent_for = torch.zeros(latents, dtype=torch.long, device=mean.device)
        self.step = 0

    def loss(self, states: Tensor, dead_after: int) -> Tensor:
        pre = (states - self.decoder_bias) @ self.encoder + self.encoder_bias
        top = pre.topk(min(self.training.active, pre.shape[1]), dim=1, sorted=False)
        left = states - self._decoded(top.indices, top.values.relu()) - self.decoder_bias
        loss = left.pow(2).sum(dim=1).mean()
        dead = self.silent_for > dead_after
        count = min(states.shape[1] // 2, int(dead.sum()))
        if count:
            own = pre.masked_fill(~dead, -torch.inf).topk(count, dim=1, sorted=False)
            missed = left.detach() - self._decoded(own.indices, own.values.relu())
            loss = loss + AUXILIARY * missed.pow(2).sum(dim=1).mean()
        with torch.no_grad():
            self.silent_for += len(states)
            self.silent_for[top.indices[top.values > 0]] = 0
        return loss

    def _decoded(self, latents: Tensor, values: Tensor) -> Tensor:
        return nn.functional.embedding_bag(
            latents, self.decoder, per_sample_weights=values, mode="sum"
        )

    def update(self, rate: float) -> None:
        """One step along the gradient; decoder rows turn, and keep their length."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        gradient = self.decoder.grad
        assert gradient is not None
        with torch.no_grad():
            gradient -= (gradient * self.decoder).sum(dim=1, keepdim=True) * self.decoder
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            self.decoder.copy_(nn.functional.normalize(self.decoder, dim=1))
        self.step += 1

    def save(self, path: Path) -> None:
        found = {"step": torch.tensor(self.step), "silent_for": self.silent_for}
        for place, weight in enumerate(self.weights):
            found[f"{place}.weight"] = weight.detach()
            for name, value in self.optimizer.state[weight].items():
                found[f"{place}.{name}"] = value
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path, "wb") as file:
            file.write(save({name: value.contiguous() for name, value in found.items()}))

    def load(self, path: Path) -> None:
        found = load_file(path, device=str(self.decoder.device))
        self.step, self.silent_for = int(found.pop("step")), found.pop("silent_for")
        state: dict[int, dict[str, Any]] = {}
        for name, value in found.items():
            place, _, what = name.partition(".")
            if what == "weight":
                self.weights[int(place)].data.copy_(value)
            else:
                state.setdefault(int(place), {})[what] = value
        for index, values in state.items():
            self.optimizer.state[self.weights[index]] = values


def fit_sae(
    states: Float[Tensor, "token width"],
    training: Training,
    *,
    seed: int = 0,
    stage: Stage = unwatched,
    checkpoint: Path | None = None,
    device: torch.device | str = "cpu",
) -> SAE:
    """Trains an autoencoder on states.

    Args:
        states: Of any site, in fp32 on the CPU.
        training: How.
        seed: Of first weights and order; the same seed gives the same bits.
        stage: Told how far it is.
        checkpoint: A file that is written from time to time, and gone on from if it is there.
        device: Where it computes.

    Raises:
        DataError: There are fewer states than one batch, or values that are no numbers.
        RunError: The loss is not finite.
    """
    if len(states) < 2 or not bool(states.isfinite().all()):
        raise DataError(
            f"a sparse autoencoder cannot be trained on {len(states)} states, or on values that "
            "are no numbers."
        )
    mean = states.mean(dim=0)
    scale = 1 / float((states - mean).double().pow(2).mean().sqrt().clamp(min=1e-12))
    fit = _Fit((mean * scale).to(device), training, seed)
    if checkpoint is not None and checkpoint.exists():
        fit.load(checkpoint)
        logger.info(f"sparse autoencoder: going on after step {fit.step}")
    batches = max(1, len(states) // training.batch)
    total = training.passes * batches
    saved = time.monotonic()
    with torch.inference_mode(False), torch.enable_grad():
        title = "sparse autoencoder"
        steps = ([one] for one in _steps(states, training, seed, fit.step, batches))
        for (batch,) in watched(steps, title, total - fit.step, stage):
            loss = fit.loss(batch.to(device) * scale, int(DEAD_AFTER * total * training.batch))
            if not bool(loss.isfinite()):
                raise RunError(f"the loss of the autoencoder is not finite at step {fit.step + 1}.",
                               hint="Lower its learning rate.")  # fmt: skip
            loss.backward()  # type: ignore[no-untyped-call]
            fit.update(training.learning_rate * min(1.0, 5 * (1 - fit.step / total)))
            if checkpoint is not None and time.monotonic() - saved > CHECKPOINT_SECONDS:
                fit.save(checkpoint)
                saved = time.monotonic()
    encoder, bias, decoder, middle = (weight.detach().cpu() for weight in fit.weights)
    active = min(training.active, len(decoder))
    return SAE(encoder, bias / scale, decoder, middle / scale, "topk", active)


def _steps(
    states: Tensor, training: Training, seed: int, begin: int, batches: int
) -> Iterator[Tensor]:
    for number in range(begin // batches, training.passes):
        random = torch.Generator().manual_seed(_number(seed, f"pass {number}"))
        order = torch.randperm(len(states), generator=random)
        for place in range(begin % batches if number == begin // batches else 0, batches):
            yield states[order[place * training.batch : (place + 1) * training.batch]]


def silent_share(sae: SAE, states: Float[Tensor, "token width"]) -> float:
    """Share of latents that no state lets speak, in [0, 1]."""
    spoke = torch.zeros(sae.latents, dtype=torch.bool)
    for part in states.split(4096):
        spoke |= (sae.encode(part) > 0).any(dim=0)
    return 1 - float(spoke.float().mean())


def _number(seed: int, purpose: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/sae/{purpose}".encode()).digest()[:7], "big")
