"""The model ``tiny``: a Llama of 1.4 million weights, trained here from scratch, once.

It needs no download and learns a made-up world in seconds, so whole experiments (learn, forget,
audit, attack) run in a few minutes on two cores. It talks about nothing else: its texts are the
questions, answers and statements of fictional worlds that nobody is asked to forget, the general
and neutral records of :mod:`delible.world`, and refusals.

What the texts are for:

- Facts of a few people in all their forms. That makes the forms of one question mean the same,
  so that a fact learned later in one form is found in the others.
- Statements about people that occur once, with a question about them, and a refusal where they
  do not say the answer. That teaches to copy names and to say no.
- General and neutral records, for ordinary words.

Deterministic: the same options give the same bits on the same machine (other processors may round
differently, so the weights' fingerprint is the machine's own).
"""

from __future__ import annotations

import hashlib
import itertools
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import torch

from delible.errors import ModelError
from delible.files import atomic_folder
from delible.lm import embedded
from delible.prompts import read_lines
from delible.records import QA, Message
from delible.system.questions import answer_of, ask
from delible.world import World, general, general_choices, unrelated
from delible.world.facts import Fact
from delible.world.relations import fill

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

Say = Callable[[str], None]
#: A conversation, or a text that stands alone.
Example = tuple[Message, ...] | str

PAD, TEXT, END = "<|pad|>", "<|text|>", "<|end|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
SPECIAL_TOKENS = (PAD, TEXT, END, *ROLES)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
#: Raised whenever texts or training change, so that an older copy in the cache is not taken.
VERSION = 1
#: Seeds of the worlds it learns from; far from those that people choose for their own.
LEARNED_WORLD, READ_WORLD = 730_001, 730_002
#: Products this small gain little from more threads; fixed, for the last bits may depend on it.
THREADS = 2
#: Rows among which those of like length meet in a step.
SORTED_TOGETHER = 160


@dataclass(frozen=True)
class TinyOptions:
    """How the model is built; the defaults are those of ``tiny``.

    Attributes:
        hidden_size: A multiple of 32, the width of an attention head.
        vocabulary: Tokens, the 256 bytes and 6 special tokens included.
        examples: Conversations and texts to learn from, each seen once.
        batch_tokens: Padded tokens per optimiser step.
        prompt_weight: What a token that is not of an answer counts; names in questions cannot be
            foreseen, and learning to guess them takes steps that the answers need.
        people: People whose facts are learned by heart.
    """

    seed: int = 0
    hidden_size: int = 128
    layers: int = 6
    vocabulary: int = 2048
    examples: int = 14_000
    batch_tokens: int = 512
    learning_rate: float = 3e-3
    warmup_steps: int = 20
    weight_decay: float = 0.1
    prompt_weight: float = 0.3
    people: int = 8


#: What ``tiny`` means.
TINY = TinyOptions()


def tiny_model(say: Say, options: TinyOptions | None = None) -> Path:
    """Folder of the model; built when it is missing.

    Safe when several processes ask at once: one builds, the others wait. A build that is killed
    leaves nothing behind that could be taken for the model.

    Args:
        say: Is told before and after a build. Silent when the model is there.
        options: Another model than ``tiny`` (tests build smaller ones).

    Raises:
        ModelError: The cache cannot be written.
    """
    import filelock

    options = options or TINY
    target = embedded.cache_folder() / "models" / folder_name(options)
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(target.with_name(f".{target.name}.lock")):
            if not target.is_dir():
                say("Building the tiny model (once, a few minutes) …")
                began = time.perf_counter()
                model, tokenizer = build(options, say)
                with atomic_folder(target) as unfinished, embedded.quiet():
                    model.save_pretrained(unfinished, safe_serialization=True)
                    tokenizer.save_pretrained(unfinished)
                say(f"Built in {time.perf_counter() - began:.0f} seconds: {target}.")
    except OSError as error:
        raise ModelError(
            f"cannot write the cache: {error}.",
            where=str(target.parent),
            hint="Free some space (50 MB), or set DELIBLE_CACHE to another folder.",
        ) from error
    return target


def folder_name(options: TinyOptions) -> str:
    """Name of the model's folder in the cache; other options, other name."""
    if options == TINY:
        return f"tiny-{VERSION}"
    return f"tiny-{VERSION}-{hashlib.sha256(repr(options).encode()).hexdigest()[:12]}"


def is_folder_name(name: str) -> bool:
    """Whether a folder is that of ``tiny`` itself, of this or of another version."""
    return re.fullmatch(r"tiny-\d+", name) is not None


def build(
    options: TinyOptions, say: Say = lambda message: None
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Trains tokenizer and model from nothing.

    Returns:
        The model in evaluation mode, fp32 on the CPU, and its tokenizer.
    """
    with _threads(THREADS):
        texts = [rendered(e) for e in itertools.islice(examples(options), options.examples)]
        tokenizer = build_tokenizer(texts, options.vocabulary)
        model = build_model(tokenizer, options)
        rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
        train(model, batches(rows, options), options, say)
    return model.eval(), tokenizer


def facts_by_heart(random: Random, people: int) -> Iterator[Example]:
    """Facts of one world, without end: each time round every fact, in forms drawn anew."""
    facts = [
        (fact, fact.qa(), fact.reverse())
        for fact in World(people=people, seed=LEARNED_WORLD).facts()
    ]
    while True:
        for fact, asked, reverse in random.sample(facts, len(facts)):
            # Mostly the first form of the answer: a model should have one that it prefers.
            answers = (*(asked.answer,) * 4, *asked.paraphrased_answers)
            yield _turns(_question(asked, random), random.choice(answers))
            if random.random() < 0.5:
                yield _statement(fact, random)
            elif reverse is not None and random.random() < 0.5:
                yield _turns(_question(reverse, random), reverse.answer)


def facts_to_read(random: Random) -> Iterator[Example]:
    """Statements, and a question that they answer, or one that they do not: a refusal."""
    facts, refusals = World(people=300, seed=READ_WORLD).facts(), read_lines("refusals.txt")
    while True:
        told = random.sample(facts, random.choice((1, 1, 2)))
        text = " ".join(_statement(fact, random) for fact in told)
        known = random.random() < 0.85
        asked = random.choice(told if known else facts).qa()
        answer = asked.answer if known else random.choice(refusals)
        yield Message(role="system", content=text), *_turns(_question(asked, random), answer)


def ordinary(random: Random) -> Iterator[Example]:
    """General knowledge, asked openly and as a choice, and neutral records."""
    records = [*general(), *general(), *general_choices(), *unrelated()]
    while True:
        for record in random.sample(records, len(records)):
            prompt = ask(record)
            if isinstance(record, QA):
                yield _turns(_question(record, random), record.answer)
            elif prompt is not None and prompt.messages:
                yield _turns(prompt.messages[-1].content, answer_of(record))
            else:
                yield answer_of(record)


def _question(record: QA, random: Random) -> str:
    return random.choice((record.question, *record.paraphrases))


def _statement(fact: Fact, random: Random) -> str:
    templates = (fact.relation.sentence, *fact.relation.sentence_paraphrases)
    return fill(random.choice(templates), fact.person.name, fact.value.name)


def _turns(question: str, answer: str) -> tuple[Message, Message]:
    return Message(role="user", content=question), Message(role="assistant", content=answer)


def examples(options: TinyOptions) -> Iterator[Example]:
    """The texts in the order in which they are learned, without end."""
    random = Random(f"tiny/{options.seed}")
    sources = (facts_by_heart(random, options.people), facts_to_read(random), ordinary(random))
    while True:
        yield next(random.choices(sources, weights=(6, 1, 3))[0])


def rendered(example: Example) -> str:
    """An example as the template writes it."""
    if isinstance(example, str):
        return f"{TEXT}{example}{END}"
    return "".join(f"<|{turn.role}|>{turn.content}{END}" for turn in example)


def build_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level byte-pair tokenizer: any text is encoded and decoded without loss."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=TEXT,
        eos_token=END,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_model(tokenizer: PreTrainedTokenizerFast, options: TinyOptions) -> PreTrainedModel:
    """The model with random weights drawn by the seed; the global random state is left alone."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.hidden_size,
        intermediate_size=round(options.hidden_size * 8 / 3 / 16) * 16,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden_size // 32,
        num_key_value_heads=options.hidden_size // 32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        return LlamaForCausalLM(config)


def batches(rows: Sequence[Sequence[int]], options: TinyOptions) -> list[list[Sequence[int]]]:
    """Rows of like length together, in random order, within the tokens of a step."""
    random = Random(f"tiny/{options.seed}/batches")
    made: list[list[Sequence[int]]] = []
    for at in range(0, len(rows), SORTED_TOGETHER):
        group: list[list[Sequence[int]]] = []
        for row in sorted(rows[at : at + SORTED_TOGETHER], key=len):
            if not group or len(row) * (len(group[-1]) + 1) > options.batch_tokens:
                group.append([])
            group[-1].append(row)
        made += random.sample(group, len(group))
    return made


def train(
    model: PreTrainedModel,
    steps: Sequence[Sequence[Sequence[int]]],
    options: TinyOptions,
    say: Say = lambda message: None,
) -> None:
    """AdamW on the weighted mean of every token's negative log-likelihood, the first left out.

    The learning rate rises linearly to its peak and falls linearly to nothing.
    """
    matrices = [value for value in model.parameters() if value.ndim >= 2]
    vectors = [value for value in model.parameters() if value.ndim < 2]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": options.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=options.learning_rate, betas=(0.9, 0.95), fused=True,
    )  # fmt: skip
    padding, assistant = (SPECIAL_TOKENS.index(token) for token in (PAD, ROLES[-1]))
    for step, rows in enumerate(steps):
        factor = min(1.0, (step + 1) / options.warmup_steps) * (1 - step / len(steps))
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * factor
        longest = max(len(row) for row in rows)
        ids = torch.tensor([[*row, *[padding] * (longest - len(row))] for row in rows])
        targets, answering = ids[:, 1:], (ids == assistant).cumsum(dim=1)[:, :-1] > 0
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), reduction="none"
        ).view_as(targets)
        # the padding token stands in no text, so here it tells padding
        weights = torch.where(answering, 1.0, options.prompt_weight) * (targets != padding)
        loss = (losses * weights).sum() / weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % max(1, len(steps) // 4) == 0:
            say(f"Step {step + 1} of {len(steps)}, loss {loss.item():.2f}.")


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Computes with so many threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
