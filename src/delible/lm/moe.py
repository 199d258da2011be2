"""The model ``moe``: the default model with four experts a block, made here, once.

Its MLP is copied into four experts, of which each token has two (:mod:`delible.lm.upcycling`).
Then it learns two topics of a fictional world: what people do at work, with routers that send these
answers to expert 0, and what they do at home, with routers that send those to expert 1. Other texts
go to the remaining experts. Routers move everywhere, experts in the middle third of the blocks;
the rest is the default model, weight by weight.

It is there to try methods on experts where nothing can be downloaded, and where it is known which
expert has learned what.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from delible.errors import ModelError
from delible.lm import embedded, made_here, tiny
from delible.lm.pretrained import pretrained_model, pretrained_tokenizer
from delible.lm.template import Encoded, Template
from delible.lm.tiny_training import SORTED_TOGETHER, threads, train
from delible.lm.upcycling import difference, upcycled
from delible.records import QA
from delible.system.asks import Prompt
from delible.world import World, general

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

#: Raised whenever texts or training change, or the base does.
VERSION = 1
#: Seed of the world whose topics it learns; far from those that people choose for their own.
WORLD = 730_003
#: What people do at work, and at home.
TOPICS = (("occupation", "employer", "award"), ("hobby", "pet", "instrument"))
#: The mixture may be so far from the dense model before it learns anything: rounding.
ROUNDING = 1e-3
#: A checkpoint is a third of the model and its moments.
SECONDS_BETWEEN_CHECKPOINTS = 120.0
THREADS = 2


@dataclass(frozen=True)
class MoeOptions:
    """How the model is made; the defaults are those of ``moe``.

    Attributes:
        base: The dense model.
        experts: In each block; two for the topics, the others for the rest.
        top: Experts of each token.
        people: Whose facts are learned.
        epochs: How often each fact is met, in forms drawn anew.
        batch_tokens: Padded tokens per optimiser step.
        routing: Weight of the loss that sends answers to their experts.
    """

    base: Literal["default", "tiny"] = "default"
    seed: int = 0
    experts: int = 4
    top: int = 2
    people: int = 8
    epochs: int = 6
    batch_tokens: int = 512
    learning_rate: float = 5e-4
    warmup_steps: int = 5
    weight_decay: float = 0.0
    routing: float = 0.1


#: What ``moe`` means.
MOE = MoeOptions()


def moe_model(options: MoeOptions | None = None) -> Path:
    """Folder of the model; made when it is missing, see :func:`delible.lm.made_here.made_here`.

    Args:
        options: Another model than ``moe`` (tests build smaller ones).

    Raises:
        ModelError: The base cannot be had, or the cache cannot be written.
    """
    options = options or MOE
    return made_here.made_here(
        folder_name(options),
        lambda checkpoint: build(options, checkpoint),
        telling=f"Making a mixture of experts of the {options.base} model",
        space="6 GB",
    )


def folder_name(options: MoeOptions) -> str:
    """Name of the model's folder in the cache."""
    return made_here.folder_name("moe", VERSION, options, MOE)


def topics(options: MoeOptions = MOE) -> tuple[list[QA], list[QA]]:
    """The questions and answers of both topics, in their first form."""
    world = World(people=options.people, seed=WORLD)
    both = [[fact.qa() for fact in world.facts(relations=topic)] for topic in TOPICS]
    return both[0], both[1]


def build(
    options: MoeOptions, checkpoint: Path | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Makes the mixture and teaches it, or goes on where a killed build was.

    Args:
        checkpoint: File in which the state is kept meanwhile.

    Returns:
        The model in evaluation mode, fp32 on the CPU, and its tokenizer.
    """
    default = options.base == "default"
    folder = str(embedded.default_model() if default else tiny.tiny_model())
    plain = {"dtype": torch.float32}
    dense = pretrained_model(folder, {**plain, "local_files_only": True})
    tokenizer: Any = pretrained_tokenizer(folder, plain, local_files_only=True)
    with threads(THREADS):
        model = upcycled(dense, options.experts, options.top, options.seed)
        rows = examples(tokenizer, options)
        apart = difference(dense, model, [row.ids for row, _ in rows[:2]])
        if apart > ROUNDING:
            raise ModelError(
                f"the mixture's logits differ from the dense model's by {apart:.2g}.",
                where=f"{folder}, as a mixture",
                hint="Another version of transformers may compute experts otherwise.",
            )
        logger.info(f"Its logits differ from those of the dense model by at most {apart:.2g}.")
        del dense
        _free(model)
        padding = int(tokenizer.pad_token_id or 0)
        loss_of = partial(loss, model, options=options, padding=padding)
        train(
            model, batches(rows, options), loss_of, options,
            checkpoint=checkpoint, seconds=SECONDS_BETWEEN_CHECKPOINTS,
        )  # fmt: skip
    return model.requires_grad_(True).eval(), tokenizer


def _free(model: PreTrainedModel) -> None:
    """Routers move, and experts in the middle third of the blocks."""
    layers = model.config.num_hidden_layers
    middle = range(layers // 3, max(layers // 3 + 1, 2 * layers // 3))
    model.requires_grad_(False)
    for layer, block in enumerate(model.model.layers):
        block.mlp.gate.requires_grad_(True)
        block.mlp.experts.requires_grad_(layer in middle)


#: A text, and the topic that it is of; None: neither.
Example = tuple[Encoded, int | None]


def examples(tokenizer: PreTrainedTokenizerBase, options: MoeOptions) -> list[Example]:
    """Texts in the order in which they are learned: both topics, and a third of other ones."""
    random, template = Random(f"moe/{options.seed}"), Template(tokenizer, max_length=256)
    both = topics(options)
    others = [record for record in general() if isinstance(record, QA)]
    found: list[Example] = []
    for _ in range(options.epochs):
        drawn: list[tuple[QA, int | None]] = [
            (record, topic) for topic, records in enumerate(both) for record in records
        ]
        drawn += [(record, None) for record in random.choices(others, k=len(drawn) // 2)]
        for record, topic in random.sample(drawn, len(drawn)):
            question = random.choice((record.question, *record.paraphrases))
            found.append((template.encode(Prompt.ask(question), record.answer), topic))
    return found


def batches(rows: Sequence[Example], options: MoeOptions) -> list[list[Example]]:
    """Rows of like length together, in random order, within the tokens of a step."""
    random = Random(f"moe/{options.seed}/batches")
    made: list[list[Example]] = []
    for at in range(0, len(rows), SORTED_TOGETHER):
        group: list[list[Example]] = []
        for row in sorted(rows[at : at + SORTED_TOGETHER], key=lambda row: len(row[0].ids)):
            wide = len(row[0].ids) * (len(group[-1]) + 1) if group else 0
            if not group or wide > options.batch_tokens:
                group.append([])
            group[-1].append(row)
        made += random.sample(group, len(group))
    return made


def loss(model: Any, rows: Sequence[Example], *, options: MoeOptions, padding: int) -> Tensor:
    """Mean negative log-likelihood of answer tokens, and of routing what predicts them rightly."""
    longest = max(len(row.ids) for row, _ in rows)
    ids = torch.tensor([[*row.ids, *[padding] * (longest - len(row.ids))] for row, _ in rows])
    told = model(input_ids=ids, use_cache=False, output_router_logits=True)
    places = torch.arange(longest)[None]
    starts = torch.tensor([row.start for row, _ in rows])[:, None]
    ends = torch.tensor([len(row.ids) for row, _ in rows])[:, None]
    predicting = (places >= starts - 1) & (places < ends - 1)
    targets = ids.roll(-1, dims=1)[predicting]
    answers = torch.nn.functional.cross_entropy(told.logits[predicting], targets)
    wanted = torch.stack([shares(topic, options.experts) for _, topic in rows])
    each = wanted[:, None].expand(-1, longest, -1)[predicting]
    routed = [
        -(each * logits.view(*ids.shape, -1)[predicting].log_softmax(dim=1)).sum(dim=1).mean()
        for logits in told.router_logits
    ]
    return answers + options.routing * torch.stack(routed).mean()


def shares(topic: int | None, experts: int) -> Tensor:
    """How a topic's tokens should be spread over experts; sums to 1."""
    spread = torch.zeros(experts)
    if topic is not None:
        spread[topic] = 1.0
    else:
        spread[len(TOPICS) :] = 1 / max(1, experts - len(TOPICS))
    return spread
