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

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import torch

from delible.lm import made_here
from delible.lm.tiny_training import (
    TinyOptions,
    batches,
    padded,
    threads,
    train,
    weighted_loss,
)
from delible.prompts import read_lines
from delible.records import QA, Message
from delible.system.questions import answer_of, ask
from delible.world import World, general, general_choices, unrelated
from delible.world.facts import Fact
from delible.world.relations import fill

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

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


#: What ``tiny`` means.
TINY = TinyOptions()


def tiny_model(options: TinyOptions | None = None) -> Path:
    """Folder of the model; built when it is missing, see :func:`delible.lm.made_here.made_here`.

    Args:
        options: Another model than ``tiny`` (tests build smaller ones).

    Raises:
        ModelError: The cache cannot be written.
    """
    options = options or TINY
    return made_here.made_here(
        folder_name(options),
        lambda checkpoint: build(options, checkpoint),
        telling="Building the tiny model",
        space="50 MB",
    )


def folder_name(options: TinyOptions) -> str:
    """Name of the model's folder in the cache."""
    return made_here.folder_name("tiny", VERSION, options, TINY)


def build(
    options: TinyOptions, checkpoint: Path | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Trains tokenizer and model from nothing, or from where a killed build was.

    Args:
        checkpoint: File in which the state is kept meanwhile.

    Returns:
        The model in evaluation mode, fp32 on the CPU, and its tokenizer.
    """
    padding, assistant = (SPECIAL_TOKENS.index(token) for token in (PAD, ROLES[-1]))
    with threads(THREADS):
        texts = [rendered(e) for e in itertools.islice(examples(options), options.examples)]
        tokenizer = build_tokenizer(texts, options.vocabulary)
        model = build_model(tokenizer, options)
        rows = tokenizer(texts, add_special_tokens=False)["input_ids"]

        def loss(step: Sequence[Sequence[int]]) -> torch.Tensor:
            ids = padded(step, padding)
            answering = (ids == assistant).cumsum(dim=1).roll(1, dims=1) > 0
            logits = model(input_ids=ids, use_cache=False).logits
            return weighted_loss(
                logits, ids, answering, padding=padding, prompt_weight=options.prompt_weight
            )

        train(model, batches(rows, options), loss, options, checkpoint=checkpoint)
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
                yield _turns(prompt.messages[-1].text, answer_of(record))
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
    return "".join(f"<|{turn.role}|>{turn.text}{END}" for turn in example)


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
