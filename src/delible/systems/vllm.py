"""vLLM as a system: a model on a GPU that generates and scores many thousand rows.

Prompts and answers become token ids through the same template as in :class:`LM`, so scores are
those of ``LM`` up to the precision that vLLM computes in. It gives the log-probability of each
token and whether it is the most likely one; distributions over the vocabulary (and with them
moments), hidden states and weights stay in the engine, so that metrics and attacks that need them
are left out, with that reason. Greedy answers are those of ``LM``; drawn ones depend on the seed
and the prompt alone, but on other random numbers than there.

vLLM is imported when a model is loaded. It was tested with vLLM 0.32 on a processor, its calls
also against the source of 0.33; tests that need no vLLM take a stand-in. It was not run on a GPU.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Self

import numpy as np

from delible.errors import MissingExtraError, ModelError
from delible.lm import embedded
from delible.lm.ends import declared_ends
from delible.lm.named import folder_of, is_named
from delible.lm.template import Encoded, Template
from delible.system.asks import (
    Decoding,
    NoAnswer,
    Prompt,
    Score,
    TokenScores,
)
from delible.system.base import BlackBox

logger = logging.getLogger(__name__)

#: Longest row that is scored, and longest prompt, as in :class:`LM`.
LONGEST_ROW = 2048
#: Tokens that an answer may have after a prompt of that length.
LONGEST_ANSWER = 2048

_FILES = ("*.safetensors", "*.json", "*.jinja", "tokenizer*", "vocab*", "merges.txt", "*.model")


class VLLM(BlackBox):
    """A model in a vLLM engine; made by :meth:`load`.

    Args:
        engine: A ``vllm.LLM``.
        module: The module ``vllm``.
        tokenizer: The model's Hugging Face tokenizer.
        folder: Where its weights are.
        name: For people and manifests.
        longest: The engine's ``max_model_len``: tokens of prompt and answer together.
        dtype: Data type that the engine was asked to compute in.
    """

    capabilities = frozenset({"generate", "score"})
    #: Share of the GPU's memory: an audit holds two models at a time.
    memory_share = 0.42

    def __init__(
        self,
        engine: Any,
        module: Any,
        tokenizer: Any,
        folder: Path,
        *,
        name: str,
        longest: int,
        dtype: str = "auto",
        ends: frozenset[int] = frozenset(),
    ) -> None:
        self.engine, self.module, self.tokenizer = engine, module, tokenizer
        self.folder, self.name, self.longest, self.dtype = folder, name, longest, dtype
        # the engine wants to generate a token after the row, even when it only scores
        self.template = Template(
            tokenizer, max_length=min(LONGEST_ROW, longest - 1), declared_ends=ends
        )
        self.capabilities = self.capabilities | self.template.capabilities
        self._digest: str | None = None

    @classmethod
    def load(
        cls,
        name: str,
        *,
        dtype: str = "auto",
        **options: Any,
    ) -> Self:
        """Loads ``default``, ``tiny``, a folder, a run directory or a model of the hub.

        Args:
            name: As in :meth:`LM.load`, but neither an adapter nor a ``.gguf`` file.
            dtype: ``auto`` is vLLM's choice (16 bit for weights in 32 bit), or such as
                ``float32``, which is slower and exact.
            options: More arguments of ``vllm.LLM``, such as ``tensor_parallel_size``.

        Raises:
            MissingExtraError: vLLM is not installed.
            ModelError: The name is no model with safetensors, or the engine does not start.
        """
        try:
            module = import_module("vllm")
        except ImportError:
            raise MissingExtraError("a model behind 'vllm:'", "vllm") from None
        from transformers import AutoConfig, AutoTokenizer, GenerationConfig

        folder = _folder(name)
        try:
            with embedded.quiet():
                config = AutoConfig.from_pretrained(folder, local_files_only=True)
                tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
                generation = (
                    GenerationConfig.from_pretrained(folder, local_files_only=True)
                    if (Path(folder) / "generation_config.json").is_file()
                    else None
                )
        except Exception as error:  # transformers and tokenizers raise many kinds
            raise ModelError(
                f"it cannot be read: {_first_line(error)}", where=str(folder)
            ) from error
        context = getattr(config.get_text_config(), "max_position_embeddings", None)
        longest = min(int(context or LONGEST_ROW), LONGEST_ROW + LONGEST_ANSWER)
        logger.info(f"vLLM loads {name} ({dtype} precision).")
        arguments = {
            "model": str(folder),
            "tokenizer": str(folder),
            "dtype": dtype,
            "load_format": "safetensors",
            "max_model_len": longest,
            "generation_config": "vllm",  # the model's own would add samplers and stops
            "gpu_memory_utilization": cls.memory_share,
            **options,
        }
        try:
            engine = cls._engine(module, arguments)
        except Exception as error:  # whatever the engine, CUDA or a worker process met
            raise ModelError(
                f"vLLM cannot start with it: {_first_line(error)}",
                where=str(folder),
                hint="It needs a GPU with free memory; without the prefix 'vllm:' the model runs "
                "without vLLM.",
            ) from error
        return cls(
            engine,
            module,
            tokenizer,
            folder,
            name=f"vllm:{name}",
            longest=longest,
            dtype=dtype,
            ends=declared_ends(generation, config),
        )

    @classmethod
    def _engine(cls, module: Any, arguments: dict[str, Any]) -> Any:
        """An engine that has loaded the model."""
        return module.LLM(**arguments)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over weight files, template, precision and vLLM's version."""
        if self._digest is None:
            self._digest = _digest(self.folder)
        version = getattr(self.module, "__version__", "")
        joined = f"vllm/{version}/{self._digest}/{self.template.fingerprint}/{self.dtype}"
        return hashlib.sha256(joined.encode()).hexdigest()

    @property
    def ends(self) -> frozenset[int]:
        """Tokens that end an answer."""
        return self.template.ends

    def generate(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[str | NoAnswer]:
        """Answers up to the end of the turn, a stop text or the length limit."""
        ids = [self.template.prompt_ids(prompt) for prompt in prompts]
        room = self.template.max_length - 1
        answers: list[str | NoAnswer] = [
            NoAnswer(f"the prompt is longer than {room} tokens")
        ] * len(prompts)
        asked = [index for index, row in enumerate(ids) if len(row) <= room]
        results = self._run(
            [ids[index] for index in asked],
            [self._drawing(prompts[index], decoding) for index in asked],
        )
        for index, result in zip(asked, results, strict=True):
            answers[index] = self._text(result.outputs[0], decoding)
        return answers

    def score(self, requests: Sequence[Score]) -> list[TokenScores | NoAnswer]:
        """Teacher-forced log-probabilities and argmax hits at the answers' tokens.

        Raises:
            TypeError: A request with moments; the capability ``"distribution"`` is missing.
        """
        if any(request.moments for request in requests):
            raise TypeError("vLLM gives no moments of the vocabulary")
        rows = [self.template.encode(request.prompt, request.answer) for request in requests]
        whole = [index for index, row in enumerate(rows) if not row.cut]
        found: list[TokenScores | NoAnswer] = [
            NoAnswer(f"prompt and answer are longer than {self.template.max_length} tokens")
        ] * len(requests)
        # with the most likely token asked for as well, of two equally likely ones one has rank 1
        only = self.module.SamplingParams(
            max_tokens=1, temperature=0.0, prompt_logprobs=1, detokenize=False
        )
        results = self._run([rows[index].ids for index in whole], [only] * len(whole))
        for index, result in zip(whole, results, strict=True):
            found[index] = _scores(rows[index], result.prompt_logprobs)
        return found

    def _run(self, rows: Sequence[Sequence[int]], parameters: Sequence[Any]) -> list[Any]:
        if not rows:
            return []
        prompts = [{"prompt_token_ids": list(row)} for row in rows]
        return list(self.engine.generate(prompts, list(parameters), use_tqdm=False))

    def _drawing(self, prompt: Prompt, decoding: Decoding) -> Any:
        """The engine's parameters of one answer."""
        drawn: dict[str, Any] = {}
        if decoding.temperature > 0:
            # one seed for all prompts would draw the same random numbers for each of them
            text = f"{decoding.seed}/{self.template.render(prompt)}"
            seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
            drawn = {"top_p": decoding.top_p, "seed": seed}
        return self.module.SamplingParams(
            max_tokens=decoding.max_new_tokens,
            temperature=decoding.temperature,
            stop=list(decoding.stop) or None,
            stop_token_ids=sorted(self.ends),
            **drawn,
        )

    def _text(self, output: Any, decoding: Decoding) -> str | NoAnswer:
        cut = output.finish_reason == "length"
        if cut and len(output.token_ids) < decoding.max_new_tokens:
            return NoAnswer(f"prompt and answer are longer than {self.longest} tokens")
        # its own text leaves out letters that are cut off at the end
        ids = [token for token in output.token_ids if token not in self.ends]
        text = str(self.tokenizer.decode(ids, skip_special_tokens=True))
        for one in decoding.stop:
            text = text.partition(one)[0]
        return text.strip()


def _scores(row: Encoded, positions: Sequence[Any]) -> TokenScores | NoAnswer:
    """A row's values from the engine's token -> (logprob, rank) at each position."""
    found = [positions[place][row.ids[place]] for place in range(row.start, len(row.ids))]
    logprobs = np.array([one.logprob for one in found], np.float32)
    if not np.isfinite(logprobs).all():
        return NoAnswer("the model gives values that are not finite numbers")
    return TokenScores(logprobs, np.array([one.rank == 1 for one in found], np.bool_), row.has_end)


def _folder(name: str) -> Path:
    """The folder that holds a model's weights and tokenizer."""
    if is_named(name):
        return folder_of(name)
    path = Path(name).expanduser()
    if path.is_dir():
        adapters = [
            one for one in (path, path / "adapter") if (one / "adapter_config.json").is_file()
        ]
        for folder in (path, path / "model"):
            if (folder / "config.json").is_file() and list(folder.glob("*.safetensors")):
                return folder
        raise ModelError(
            "it is an adapter, which vLLM is not given here."
            if adapters
            else "the folder has no config.json with *.safetensors, nor has a model/ folder in it.",
            where=str(path),
            hint="Merge it into the model first (finish 'merge_adapter')."
            if adapters
            else "Give the folder that save_pretrained wrote, or a run directory of delible.",
        )
    if path.exists() or path.suffix == ".gguf":
        raise ModelError("vLLM is given folders with safetensors.", where=str(path))
    from huggingface_hub import snapshot_download

    logger.info(
        f"Loading {name} from the Hugging Face hub; what is not in its cache yet is downloaded."
    )
    try:
        return Path(snapshot_download(name, allow_patterns=list(_FILES)))
    except Exception as error:  # the hub's client raises many kinds
        raise ModelError(
            f"no such folder here, and not to be had from the hub: {_first_line(error)}",
            where=name,
            hint="Check the spelling and the connection.",
        ) from error


def _digest(folder: Path) -> str:
    """SHA-256 over configuration and weight files, in hexadecimal."""
    whole = hashlib.sha256()
    for file in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]:
        with file.open("rb") as handle:
            whole.update(f"{file.name} ".encode())
            whole.update(hashlib.file_digest(handle, "sha256").digest())
    return whole.hexdigest()


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
