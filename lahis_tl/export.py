"""Ship a head mask: as a PEFT adapter, or folded into an ordinary Hugging Face checkpoint.

A head mask is an IA3 vector (Liu et al. 2022, arXiv 2205.05638) on the input of the output projection, in which each
factor stands d_head times; so ``peft`` alone can apply it. Folded, the projection's input columns are scaled (its bias
is not), and nothing but ``transformers`` is needed.
"""

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lahis_tl.cards import checkpoint_fingerprint
from lahis_tl.errors import ModelError
from lahis_tl.heads import HeadGrid
from lahis_tl.masks import HeadMask
from lahis_tl.models import dtype_named
from lahis_tl.models.sources import Source, open_source
from lahis_tl.processes import is_main
from lahis_tl.tuning import TunedMask

MASK_FILE = "head_mask.safetensors"
_PROJECTION = re.compile(
    r"\.(self_attn|attn|attention|self_attention)\.(o_proj|c_proj|dense|out_proj)$"
)


def export_ia3(
    mask: HeadMask | TunedMask, model: str, folder: str | Path, **source_options: Any
) -> Path:
    """Write the mask as a PEFT IA3 adapter for the Hugging Face model of that name.

    >>> export_ia3(tuned, "meta-llama/Llama-3.2-3B", "out/adapter")                    # doctest: +SKIP
    >>> peft.PeftModel.from_pretrained(hf_model, "out/adapter")                         # doctest: +SKIP

    Args:
        model: hub name, local checkpoint, ``.gguf`` file or ``smollm2``; only read.
        folder: must not exist.
        source_options: ``revision``, ``trust_remote_code``.

    Returns:
        the folder, with ``adapter_model.safetensors``, ``adapter_config.json`` and a README.

    Raises:
        ModelError: the mask is for another model, or its output projections cannot be found.
        FileExistsError: the folder exists; nothing in it is touched.
        ValueError: a mask with a row for each text, with a fill or with factors that are not finite, or that changes
            nothing.
    """
    refuse_folder(folder)
    source, factors = _open(mask, model, **source_options)
    changed = [layer for layer, row in enumerate(factors) if bool((row != 1).any())]
    if not changed:
        raise ValueError("the mask is 1 everywhere, so there is nothing to export")
    projections = output_projections(source.hf, HeadGrid(*factors.shape))
    tensors, names, conv = {}, [], False
    for layer in changed:
        name, module = projections[layer]
        conv = conv or _is_conv(module)
        names.append(name)
        vector = factors[layer].repeat_interleave(_inputs(module) // factors.shape[1])
        tensors[f"base_model.model.{name}.ia3_l"] = vector[None].contiguous()
    config = {
        "peft_type": "IA3",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": source.name,
        "revision": source.revision if source.revision and ":" not in source.revision else None,
        "target_modules": names,
        "feedforward_modules": names,
        "fan_in_fan_out": conv,
        "inference_mode": True,
        "init_ia3_weights": True,
        "modules_to_save": None,
    }

    def write(scratch: Path) -> None:
        save_file(tensors, scratch / "adapter_model.safetensors", metadata={"format": "pt"})
        _write_json(scratch / "adapter_config.json", config)
        _describe(scratch, mask, factors, source, "peft")

    return _write_folder(folder, write)


def export_folded(
    mask: HeadMask | TunedMask,
    model: str,
    folder: str | Path,
    *,
    dtype: str = "float32",
    max_shard_size: str = "5GB",
    **source_options: Any,
) -> Path:
    """Write the model with the mask folded into its output projections, as an ordinary checkpoint with its tokenizer.

    >>> export_folded(tuned, "meta-llama/Llama-3.2-3B", "out/folded", dtype="bfloat16")  # doctest: +SKIP
    >>> AutoModelForCausalLM.from_pretrained("out/folded")                                # doctest: +SKIP

    For evaluation harnesses too: lm-eval takes it as ``--model hf --model_args pretrained=out/folded``.

    Args:
        model: as in ``export_ia3``; loaded from its source, which is never changed.
        folder: must not exist.
        dtype: of the weights that are written.
        max_shard_size: of one file.

    Raises:
        ModelError, FileExistsError, ValueError: as ``export_ia3``, but a mask that changes nothing will do.
    """
    refuse_folder(folder)
    source, factors = _open(mask, model, dtype=dtype, **source_options)
    with torch.no_grad():
        for (_, module), row in zip(
            output_projections(source.hf, HeadGrid(*factors.shape)), factors, strict=True
        ):
            weight: Tensor = module.weight  # type: ignore[assignment]
            scale = row.repeat_interleave(_inputs(module) // len(row)).to(weight.device)
            # In float32, and only rounded to the weights' dtype at the end.
            wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
            wide = wide * (scale[:, None] if _is_conv(module) else scale[None])
            weight.copy_(wide.to(weight.dtype))

    def write(scratch: Path) -> None:
        source.hf.save_pretrained(scratch, max_shard_size=max_shard_size)
        if source.tokenizer is not None:
            source.tokenizer.save_pretrained(scratch)
        _describe(scratch, mask, factors, source, "transformers")

    return _write_folder(folder, write)


def output_projections(hf: nn.Module, grid: HeadGrid) -> list[tuple[str, nn.Module]]:
    """The module by which each layer's heads write to the residual stream, and its name.

    Raises:
        ModelError: there is not one for each layer, or its input is no multiple of the heads.
    """
    found = [
        (name, module) for name, module in hf.named_modules() if _PROJECTION.search(f".{name}")
    ]
    if len(found) != grid.n_layers:
        raise ModelError(
            f"{type(hf).__name__}: {len(found)} output projections were found for a mask of {grid}; the mask is "
            "for another model, or this architecture names them otherwise"
        )
    for name, module in found:
        if _inputs(module) % grid.n_heads:
            raise ModelError(
                f"{name} has {_inputs(module)} inputs, no multiple of the mask's {grid.n_heads} heads: the mask is "
                "for another model"
            )
    return found


def _is_conv(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"  # GPT-2 stores [in, out]


def _inputs(module: nn.Module) -> int:
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.shape[0] if _is_conv(module) else weight.shape[1]


def _open(
    mask: HeadMask | TunedMask,
    model: str,
    dtype: str = "float32",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[Source, Tensor]:
    """The model from its source, and the factors, once they are known to be for it."""
    plain = mask.mask if isinstance(mask, TunedMask) else mask
    if plain.factors.ndim != 2 or plain.fill is not None:
        raise ValueError(
            "only a mask of shape [layer, head] without a fill can be exported, not one with a row for each text "
            "or mean ablation"
        )
    source = open_source(
        model,
        dtype=dtype_named(dtype),
        device=torch.device("cpu"),
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    config = source.hf.config.get_text_config()
    grid = HeadGrid(int(config.num_hidden_layers), int(config.num_attention_heads))
    if plain.grid != grid:
        raise ModelError(f"the mask is for {plain.grid}, but {source.name} has {grid}")
    known = mask.card.get("model", {}) if isinstance(mask, TunedMask) else {}
    theirs, ours = known.get("checkpoint_sha256"), checkpoint_fingerprint(source.hf)
    # The fingerprint is of bfloat16 roundings, which float16 changes.
    if theirs and "float16" not in (known.get("dtype"), dtype) and theirs != ours:
        raise ModelError(
            f"the mask was tuned on another model ({known.get('name')}): its weights differ from those of {source.name}"
        )
    return source, plain.factors.float()


def refuse_folder(folder: str | Path) -> None:
    """
    Raises:
        FileExistsError: something of that name exists.
    """
    if Path(folder).exists():
        raise FileExistsError(f"{folder} exists already; name a new folder, nothing was written")


def _write_folder(folder: str | Path, write: Callable[[Path], None]) -> Path:
    """Write a new folder whole or not at all; of several processes the main one does."""
    folder = Path(folder)
    if not is_main():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        write(scratch)
        scratch.chmod(0o755)
        scratch.rename(folder)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    return folder


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _describe(
    folder: Path, mask: HeadMask | TunedMask, factors: Tensor, source: Source, library: str
) -> None:
    """A model card for people and the hub, and the mask's own card."""
    card = mask.card if isinstance(mask, TunedMask) else {}
    changed = [
        f"L{layer}H{head} × {float(factors[layer, head]):.4g}"
        for layer, head in (factors != 1).nonzero().tolist()
    ]
    use = {
        "peft": "peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)",
        "transformers": "AutoModelForCausalLM.from_pretrained(folder)",
    }[library]
    on_hub = "/" in source.name and not Path(source.name).expanduser().exists()
    base = f"base_model: {source.name}\n" if on_hub else ""
    lines = [
        f"---\nlibrary_name: {library}\n{base}tags: [lahis-tl, attention-head-mask]\n---\n",
        f"# {Path(source.name).name} with {len(changed)} attention heads rescaled\n",
        f"Heads (layer, head, factor; both count from 0): {', '.join(changed)}.\n",
        f"Load it by `{use}`.\n",
    ]
    if card.get("settings"):
        lines.append(f"Trained with lahis-tl: {json.dumps(card['settings'])}.\n")
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")
    tuned = mask if isinstance(mask, TunedMask) else TunedMask(factors, mask.heads())
    tuned.save(folder / MASK_FILE)  # to read back: TunedMask.load(pull(...) / MASK_FILE)


def push(
    folder: str | Path, repository: str, *, private: bool = True, token: str | None = None
) -> str:
    """Upload an exported folder, the mask itself included, to the Hugging Face hub; returns its address.

    Args:
        private: of a repository that is made for it; one that exists stays as it is, and its files are replaced.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    from huggingface_hub import HfApi

    if not Path(folder).is_dir():
        raise FileNotFoundError(f"there is no folder {folder}; export a mask first")
    if not is_main():
        return f"https://huggingface.co/{repository}"
    api = HfApi(token=token)
    api.create_repo(repository, private=private, exist_ok=True)
    api.upload_folder(repo_id=repository, folder_path=str(folder))
    return f"https://huggingface.co/{repository}"


def pull(repository: str, *, revision: str | None = None, token: str | None = None) -> Path:
    """Download what ``push`` uploaded; returns the local folder."""
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(repository, revision=revision, token=token))
