"""From a name to a model and its tokenizer: default, tiny, folder, run, adapter, GGUF, hub."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from delible import kept
from delible.errors import ModelError, nearest
from delible.lm import embedded, tiny
from delible.lm.parts import class_of, companions, dropped_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Source = Literal["default", "tiny", "folder", "run", "adapter", "gguf", "hub"]

_HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt",
    "spiece.model",
)  # fmt: skip


@dataclass(frozen=True)
class ModelInfo:
    """Where a model came from.

    Attributes:
        name: What the caller asked for.
        source: Kind of the place.
        path: Folder or file of the weights; ``None`` for the hub.
        base: What an adapter sits on, otherwise ``None``.
        revision: Commit of a hub model, if it is known.
        companions: Small files beside a model of several parts (settings of an image processor),
            by name.
    """

    name: str
    source: Source
    path: str | None = None
    base: str | None = None
    revision: str | None = None
    companions: Mapping[str, bytes] = field(default_factory=dict, repr=False)

    @property
    def place(self) -> str:
        """What the weights below any adapter are loaded from, wherever one stands."""
        return self.base or self.path or self.name


class Loaded(NamedTuple):
    """A model in evaluation mode, its tokenizer, and where they came from."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    info: ModelInfo


def load_model(
    name: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Loaded:
    """Loads a causal language model and its tokenizer.

    Args:
        name: ``default`` (SmolLM2-135M-Instruct from the package index), ``tiny`` (1.4 million
            weights, trained here on first use), a folder with a ``config.json``, a run directory,
            a folder of a PEFT adapter, a ``.gguf`` file (dequantised), or the name of a model on
            the Hugging Face hub.
        dtype: Data type of the weights; fp32 is what training wants.
        revision: Branch, tag or commit of a hub model.
        trust_remote_code: Run the code a model brings along. Off unless asked for.

    Returns:
        The model on the CPU, the tokenizer and where they came from. A tokenizer without a
        padding token pads with its end token: masks are explicit everywhere in delible.

    Raises:
        ModelError: Nothing is there, it is damaged, it has only pickled weights, weights or a
            tokenizer are missing, the hub cannot be reached. Says what to do.
    """
    name = os.fspath(name)
    options = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    if name == "default":
        folder = embedded.default_model()
        return _load_folder(name, folder, "default", options)
    if name == "tiny":
        return _load_folder(name, tiny.tiny_model(), "tiny", options)
    path = Path(name).expanduser().absolute()
    if path.is_dir():
        kept.use(path)  # if it is one that benchmarks taught
        for folder, in_run in ((path, False), (path / "model", True), (path / "adapter", True)):
            if (folder / "adapter_config.json").is_file():
                return _load_adapter(name, folder, options)
            if (folder / "config.json").is_file():
                return _load_folder(name, folder, "run" if in_run else "folder", options)
        raise ModelError(
            "the folder has no config.json and no adapter_config.json, nor has a model/ or "
            "adapter/ folder in it.",
            where=name,
            hint="Give the folder that save_pretrained wrote, or a run directory of delible.",
        )
    if path.suffix == ".gguf" and path.is_file():
        model, tokenizer = embedded.load_gguf(path, dtype)
        info = ModelInfo(name, "gguf", str(path))
        return Loaded(model, _ready(tokenizer, model, name), info)
    path = Path(name).expanduser()
    if path.is_file():
        raise ModelError(
            f"a {path.suffix or 'plain'} file is not a model.",
            where=name,
            hint="Give the folder that holds it, or a .gguf file.",
        )
    if _means_a_path(name):
        raise ModelError("there is no such folder or file.", where=name, hint=_nearest_path(path))
    return _load_hub(name, path, revision, options)


def _means_a_path(name: str) -> bool:
    """Whether a name cannot be one of the hub: ``./x``, ``a/b/c``, ``x.gguf``."""
    return not _HUB_NAME.match(name) or name.endswith(".gguf")


def _nearest_path(path: Path) -> str:
    """A hint with the folder or file most like a path that does not exist."""
    parent = path.parent
    while not parent.is_dir() and parent != parent.parent:
        path, parent = parent, parent.parent
    try:
        known = [entry.name for entry in parent.iterdir() if not entry.name.startswith(".")]
    except OSError:
        known = []
    close = nearest(path.name, known) if known else ""
    if close.startswith("Did you mean"):
        found = re.sub(r"^Did you mean '(.*)'\?$", r"\1", close)
        return f"Did you mean '{parent / found}'?"
    return f"'{parent}' has no '{path.name}'."


def _load_folder(name: str, folder: Path, source: Source, options: dict[str, Any]) -> Loaded:
    _read_json(folder / "config.json")
    if not list(folder.glob("*.safetensors")):
        pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
        if pickles:
            raise _only_pickle(str(folder), pickles[0])
        raise ModelError(
            "the folder has a config.json but no weights (*.safetensors).",
            where=str(folder),
            hint="Copy the whole folder that save_pretrained wrote.",
        )
    _require_tokenizer(folder)
    model = _pretrained(str(folder), {**options, "local_files_only": True})
    tokenizer = _tokenizer(str(folder), options, local_files_only=True)
    info = ModelInfo(name, source, str(folder), companions=companions(model, str(folder)))
    return Loaded(model, _ready(tokenizer, model, name), info)


def _load_hub(name: str, path: Path, revision: str | None, options: dict[str, Any]) -> Loaded:
    logger.info(
        f"Loading {name} from the Hugging Face hub; what is not in its cache yet is downloaded."
    )
    where = {"revision": revision} if revision else {}
    with _no_conversion_requests():
        model = _pretrained(name, {**options, **where}, likely_path=path)
    tokenizer = _tokenizer(name, {**options, **where})
    commit = getattr(model.config, "_commit_hash", None)
    info = ModelInfo(
        name, "hub", revision=commit or revision, companions=companions(model, name, commit)
    )
    return Loaded(model, _ready(tokenizer, model, name), info)


def _load_adapter(name: str, folder: Path, options: dict[str, Any]) -> Loaded:
    """The base model that the adapter names, wearing the adapter."""
    settings = _read_json(folder / "adapter_config.json")
    if not (folder / "adapter_model.safetensors").is_file():
        if (folder / "adapter_model.bin").is_file():
            raise _only_pickle(str(folder), "adapter_model.bin")
        raise ModelError("the adapter has no adapter_model.safetensors.", where=str(folder))
    base = settings.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ModelError(
            "it does not name its base model.",
            where=str(folder / "adapter_config.json"),
            hint="Set base_model_name_or_path to the folder or hub name of the base model.",
        )
    if (folder / base).is_dir():
        base = str(folder / base)
    elif Path(base).name == embedded.DEFAULT_MODEL.folder:
        base = "default"  # its folder in the cache, perhaps of another machine
    elif tiny.is_folder_name(Path(base).name):
        base = "tiny"
    try:
        below = load_model(base, revision=settings.get("revision"), **options)
    except ModelError as error:
        raise ModelError(
            f"the base model of the adapter cannot be loaded: {error.problem}",
            where=f"{folder} (base {base})",
            hint=error.hint,
        ) from error
    model = with_adapter(below.model, folder, base)
    tokenizer = below.tokenizer
    if any((folder / file).is_file() for file in _TOKENIZER_FILES):
        tokenizer = _ready(
            _tokenizer(str(folder), options, local_files_only=True), below.model, name
        )
    info = replace(below.info, name=name, source="adapter", path=str(folder), base=below.info.place)
    return Loaded(model.eval(), tokenizer, info)


def with_adapter(model: Any, folder: Path, base: str, name: str = "default") -> Any:
    """A model that wears a saved PEFT adapter, beside those that it wears already.

    Raises:
        ModelError: It does not fit the model, or changes no weights.
    """
    from peft import PeftModel

    _make_room(model, folder / "adapter_model.safetensors")
    try:
        with embedded.quiet(), warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*missing adapter keys.*")
            if isinstance(model, PeftModel):
                model.load_adapter(str(folder), adapter_name=name, local_files_only=True)
                worn: Any = model
            else:
                worn = PeftModel.from_pretrained(
                    model, str(folder), adapter_name=name, local_files_only=True
                )
    except Exception as error:  # peft raises whatever its parsers meet
        raise ModelError(
            f"the adapter does not fit its base model: {_first_line(error)}",
            where=f"{folder} (base {base})",
            hint="Check base_model_name_or_path in adapter_config.json.",
        ) from error
    if not hasattr(worn, "merge_and_unload"):
        kind = _read_json(folder / "adapter_config.json").get("peft_type")
        raise ModelError(
            f"an adapter of the kind {kind} changes no weights and cannot be merged into them.",
            where=str(folder),
            hint="Adapters that can be merged work: LoRA, DoRA, IA3 and their like.",
        )
    return worn.eval()


def _make_room(model: PreTrainedModel, weights: Path) -> None:
    """Gives the base as many embedding rows as the adapter brings (tokens added for it).

    The new rows are the adapter's; nothing is resized for an adapter that brings none.
    """
    from safetensors import safe_open

    rows = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    tables = {
        path.rpartition(".")[2]
        for path, module in model.named_modules()
        if module in (model.get_input_embeddings(), model.get_output_embeddings())
    }
    try:
        with safe_open(weights, framework="pt") as kept:
            brought = [
                kept.get_slice(name).get_shape()[0]
                for name in kept.keys()  # noqa: SIM118 (no mapping)
                if name.rpartition(".")[2] == "weight"
                and name.rpartition(".")[0].removesuffix(".base_layer").rpartition(".")[2] in tables
            ]
    except Exception:  # a damaged file: told when it is loaded
        return
    if brought and max(brought) > rows:
        with embedded.quiet():
            model.resize_token_embeddings(max(brought), mean_resizing=False)


def _pretrained(
    place: str, options: dict[str, Any], *, likely_path: Path | None = None
) -> PreTrainedModel:
    """``from_pretrained`` with safetensors only, complete weights, and errors in one sentence."""
    try:
        with embedded.quiet():
            loaded: Any = class_of(place, options).from_pretrained(
                place, use_safetensors=True, output_loading_info=True, **options
            )
    except ModelError:
        raise
    except Exception as error:  # transformers and safetensors raise many kinds
        raise _told(place, error, likely_path) from error
    model: PreTrainedModel = loaded[0]
    missing = sorted(loaded[1]["missing_keys"])
    if missing:
        raise ModelError(
            f"{len(missing)} weights are missing, first '{missing[0]}'.",
            where=place,
            hint="The checkpoint is incomplete or not one of a causal language model.",
        )
    dropped = dropped_tensors(model, place, set(loaded[1]["unexpected_keys"]))
    if dropped:
        logger.warning(
            f"{len(dropped)} tensors of {place} are no part of {type(model).__name__} and will "
            f"not be in a result, first '{dropped[0]}'."
        )
    model.eval()
    return model


def _tokenizer(place: str, options: dict[str, Any], **more: Any) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    chosen = {key: value for key, value in options.items() if key != "dtype"}
    try:
        with embedded.quiet():
            return AutoTokenizer.from_pretrained(place, **chosen, **more)
    except Exception as error:  # transformers and tokenizers raise many kinds
        raise ModelError(
            f"the tokenizer cannot be loaded: {_first_line(error)}",
            where=place,
            hint="Save the tokenizer next to the model: tokenizer.save_pretrained(folder).",
        ) from error


def _require_tokenizer(folder: Path) -> None:
    if not any((folder / file).is_file() for file in _TOKENIZER_FILES):
        raise ModelError(
            "the folder has no tokenizer.",
            where=str(folder),
            hint="Save the tokenizer next to the model: tokenizer.save_pretrained(folder).",
        )


def _ready(
    tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, name: str
) -> PreTrainedTokenizerBase:
    """A tokenizer that can pad and whose tokens the model knows."""
    embedding: Any = model.get_input_embeddings()
    rows = int(embedding.weight.shape[0])
    pad = tokenizer.pad_token_id
    if pad is None or pad >= rows:
        if pad is not None:
            logger.warning(
                f"The padding token of {name} is number {pad} and the model embeds {rows} tokens: "
                "another one pads (masks are explicit, so it changes no value)."
            )
        stand_in = (
            tokenizer.eos_token
            or tokenizer.sep_token
            or tokenizer.bos_token
            or tokenizer.unk_token
            or tokenizer.convert_ids_to_tokens(0)
        )
        tokenizer.pad_token = stand_in
    # Added tokens beyond the embedding are harmless until a text names them, and some readers add
    # an unused one; a vocabulary or an end token beyond it is not.
    used = {"last token": tokenizer.vocab_size - 1, "end token": tokenizer.eos_token_id}
    for what, index in used.items():
        if index is not None and index >= rows:
            raise ModelError(
                f"the {what} of the tokenizer is number {index}, the model embeds {rows} tokens.",
                where=name,
                hint="They do not belong together; use the tokenizer the model was trained with.",
            )
    return tokenizer


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ModelError(
            f"not valid JSON: {error.msg}.",
            where=f"{file}:{error.lineno}",
            hint="Copy the file again from where the model came.",
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"cannot be read: {error}.", where=str(file)) from error
    if not isinstance(values, dict):
        raise ModelError("it holds no JSON object.", where=str(file))
    return values


def _only_pickle(where: str, file: str) -> ModelError:
    return ModelError(
        f"its weights are pickled ({file}), and pickle can run code.",
        where=where,
        hint="Only safetensors are loaded. Convert it where you trust it: "
        "model.save_pretrained(folder) writes safetensors.",
    )


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _told(place: str, error: BaseException, likely_path: Path | None) -> ModelError:
    """What went wrong in ``from_pretrained``, in the user's terms."""
    kinds, cause = set(), error
    while cause is not None and type(cause).__name__ not in kinds:
        kinds.add(type(cause).__name__)
        cause = cause.__cause__ or cause.__context__  # type: ignore[assignment]
    text = str(error)
    if "cannot be loaded with `safetensors`" in text or "no file named model.safetensors" in text:
        return _only_pickle(place, "no *.safetensors file")
    if "trust_remote_code" in text:
        return ModelError(
            "the model brings its own code, which is not run unless you ask for it.",
            where=place,
            hint="Choose a model that transformers knows without it; after reading that code, "
            "load it in Python with delible.lm.load.load_model(name, trust_remote_code=True).",
        )
    if likely_path is None:
        return ModelError(f"the model cannot be loaded: {_first_line(error)}", where=place)
    near = _nearest_path(likely_path)
    folder = f" If a folder was meant: {near}" if near.startswith("Did") else ""
    if "GatedRepoError" in kinds or "gated repo" in text:
        return ModelError(
            "access to this hub model must be granted first.",
            where=place,
            hint="Accept its terms on the hub, then run: hf auth login.",
        )
    if "RepositoryNotFoundError" in kinds or "is not a valid model identifier" in text:
        return ModelError(
            "there is no such model on the hub, and no such folder.",
            where=place,
            hint=f"Check the spelling; private models need: hf auth login.{folder}",
        )
    unreachable = {
        "LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectError", "ConnectionError",
        "ConnectTimeout", "HfHubHTTPError", "MaxRetryError", "ProxyError",
    }  # fmt: skip
    if kinds & unreachable or "couldn't connect" in text.lower():
        return ModelError(
            "no such folder here, and the hub cannot be reached for it.",
            where=place,
            hint="Check the connection, HF_ENDPOINT and HF_HUB_OFFLINE, or use 'default', which "
            f"comes from the package index, or 'tiny', which needs no download.{folder}",
        )
    return ModelError(
        f"the model cannot be loaded: {_first_line(error)}",
        where=place,
        hint=folder.strip() or None,
    )


@contextmanager
def _no_conversion_requests() -> Iterator[None]:
    """Keeps transformers from asking a conversion service on the hub for missing safetensors."""
    key = "DISABLE_SAFETENSORS_CONVERSION"
    before = os.environ.get(key)
    os.environ[key] = "true"
    try:
        yield
    finally:
        if before is None:
            del os.environ[key]
        else:
            os.environ[key] = before


def weights_digest(model: torch.nn.Module) -> str:
    """SHA-256 over names, shapes, data types and bytes of the state, in hexadecimal.

    Equal for equal weights on every device, whether tensors are tied or equal copies, and
    whatever the order of registration; 135M weights in fp32 take about a second.
    """
    state = model.state_dict()
    unique: dict[tuple[Any, ...], torch.Tensor] = {}
    keys: dict[str, tuple[Any, ...]] = {}
    for name, tensor in sorted(state.items()):
        shape, strides = tuple(tensor.shape), tuple(tensor.stride())
        keys[name] = (str(tensor.device), tensor.data_ptr(), str(tensor.dtype), shape, strides)
        if tensor.numel() == 0 or tensor.is_meta:
            keys[name] = (name,)
        unique.setdefault(keys[name], tensor)
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        hashes = dict(zip(unique, pool.map(_tensor_digest, unique.values()), strict=True))
    whole = hashlib.sha256()
    for name, key in keys.items():
        tensor = state[name]
        whole.update(f"{name} {list(tensor.shape)} {tensor.dtype} ".encode())
        whole.update(hashes[key])
    return whole.hexdigest()


def _tensor_digest(tensor: torch.Tensor) -> bytes:
    if tensor.is_meta:
        raise ModelError("the model has no weights in memory (meta device).")
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().data).digest()
