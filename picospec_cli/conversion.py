"""Conversions between model formats: GGUF to a Hugging Face folder, and that to ONNX.

torch, transformers and the ONNX builder are imported where they are used (or run as a program
of their own): the other commands must work without them.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from picospec_cli.console import CommandFailed, tail
from picospec_cli.processes import die_with_parent

PRECISIONS = ("int4", "int8")
BUILDER = "onnxruntime_genai.models.builder"  # a program, run as a module

_REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")
_WANTED_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
_DROPPED_KEYS = {"quantization_config", "_name_or_path", "_model_name_or_path", "dtype"}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_DRAFT_FILES = ("model.onnx", "genai_config.json", "tokenizer.json")


def gguf_to_hugging_face(gguf: Path, out: Path, precision: str) -> None:
    """Write the model of a GGUF file as safetensors with tokenizer and chat template.

    `precision`: "fp32" or "bf16". A loaded GGUF model refuses to be saved for its quantization
    config, though its weights are plain by then; so they move into a fresh model without one.
    """
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent), gguf_file=gguf.name, dtype=dtype
    )
    config = type(loaded.config).from_dict(
        {key: value for key, value in loaded.config.to_dict().items() if key not in _DROPPED_KEYS}
    )
    fresh = type(loaded)(config).to(dtype)
    fresh.load_state_dict(loaded.state_dict())
    fresh.generation_config = loaded.generation_config
    fresh.save_pretrained(out)
    AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name).save_pretrained(out)


def hugging_face_to_onnx(source: Path, out: Path, precision: str) -> None:
    """Run onnxruntime-genai's builder on a Hugging Face folder. Raises CommandFailed."""
    with tempfile.TemporaryDirectory(dir=out.parent) as cache:
        command = [sys.executable, "-m", BUILDER]
        command += ["-i", str(source), "-o", str(out), "-c", cache, "-p", precision, "-e", "cpu"]
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
            preexec_fn=die_with_parent,
        )
    # The builder saves the tokenizer anew, with additions that change nothing but its fingerprint.
    if (source / "tokenizer.json").is_file() and out.is_dir():
        shutil.copyfile(source / "tokenizer.json", out / "tokenizer.json")
    missing = [name for name in _DRAFT_FILES if not (out / name).is_file()]
    if done.returncode != 0 or missing:
        reason = f"without writing {', '.join(missing)}" if done.returncode == 0 else ""
        raise CommandFailed(
            f"the ONNX builder ended with status {done.returncode} {reason}\n{tail(done.stdout)}"
        )


def take_tokenizer(source: Path, folder: Path) -> None:
    """Give the model in `folder` the tokenizer and the chat template of the one in `source`."""
    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def local_folder(source: str) -> Path:
    """The Hugging Face folder `source` names: itself, or a repo id to be downloaded."""
    folder = Path(source)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise CommandFailed(f"{source} has no config.json: it is not a Hugging Face model")
        return folder.resolve()
    if not _REPO_ID.fullmatch(source):
        raise CommandFailed(f"{source} is neither a folder nor a repo id (OWNER/NAME)")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=_WANTED_FILES))
    except Exception as error:  # the hub's client raises its transport's errors, too
        raise CommandFailed(f"cannot download {source}: {error}") from error
