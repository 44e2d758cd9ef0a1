"""What is served: vLLM's configuration, and the model as an edge must know it."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.platforms import current_platform

from cloud_server.config import EngineConfig
from cloud_server.engine.envelope import MIN_STEP_TOKENS
from cloud_server.engine.interface import KVCacheSize
from picospec import PROTOCOL_VERSION
from picospec.errors import ConfigError
from picospec.protocol.fingerprint import chat_template_fingerprint, tokenizer_fingerprint
from picospec.protocol.messages import Limits, ModelCard, VerificationMode

# What the hooks need; a configuration that says otherwise is refused, not overruled.
_REQUIRED: dict[str, Any] = {
    "scheduler_cls": "cloud_server.engine.scheduler.VerificationScheduler",
    "worker_cls": "cloud_server.engine.worker.VerificationWorker",
    "async_scheduling": False,
    "disable_log_stats": False,
}
_CPU_DEFAULTS: dict[str, Any] = {
    "dtype": "float32",
    "kv_cache_memory_bytes": 1 << 30,
    "block_size": 32,
}
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
    "config.json",
)


def build_vllm_config(config: EngineConfig, report_name: str) -> VllmConfig:
    """vLLM's configuration for verification; its scheduler reports to `report_name`.

    Raises ConfigError for engine arguments that vLLM refuses or that the hooks cannot work with.
    """
    arguments = dict(config.args)
    for name, value in (*_REQUIRED.items(), ("speculative_config", None)):
        if arguments.get(name, value) != value:
            raise ConfigError(
                f"engine.args.{name} = {arguments[name]!r}: verification needs {value!r}; remove it"
            )
    if arguments.get("pipeline_parallel_size", 1) != 1:
        raise ConfigError("engine.args.pipeline_parallel_size: only 1 is supported")
    defaults: dict[str, Any] = {}
    if current_platform.is_cpu():
        defaults = _CPU_DEFAULTS
        # On CPU vLLM cannot read its ahead-of-time artifact back ("no attribute
        # 'finalize_loading'") and compiles anew at every start; torch's own cache works.
        os.environ.setdefault("VLLM_USE_AOT_COMPILE", "0")
    try:
        engine_args = AsyncEngineArgs(
            **{
                **defaults,
                **arguments,
                **_REQUIRED,
                "model": config.model,
                "additional_config": {
                    **arguments.get("additional_config", {}),
                    MIN_STEP_TOKENS: config.min_step_tokens,
                },
                "speculative_config": {
                    "method": "custom_class",
                    "model": "cloud_server.engine.null_speculator.NullSpeculator",
                    "num_speculative_tokens": config.max_draft_tokens,
                },
            }
        )
        with _two_processes():
            vllm_config = engine_args.create_engine_config()
    except (TypeError, ValueError) as error:
        raise ConfigError(f"vLLM refuses the engine's configuration: {error}") from error
    # Where the engine's process finds it, and no part of the keys of vLLM's compile cache.
    vllm_config.instance_id = report_name
    return vllm_config


@contextmanager
def _two_processes() -> Iterator[None]:
    """Keep the worker in the engine's process.

    On CPU vLLM moves a single worker to a third process when this variable is 1 while the
    configuration is made (vllm/platforms/cpu.py); that hop would cost every step.
    """
    name = "VLLM_ENABLE_V1_MULTIPROCESSING"
    before = os.environ.get(name)
    os.environ[name] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def model_card(config: EngineConfig, vllm_config: VllmConfig) -> ModelCard:
    """The card of the model that `vllm_config` serves; reads its tokenizer's files."""
    model = vllm_config.model_config
    files = _read_files(model.model, model.revision)
    tokenizer_json = files.get("tokenizer.json")
    if tokenizer_json is None:
        raise ConfigError(f"engine.model = {config.model!r}: it has no tokenizer.json")
    return ModelCard(
        model_id=config.model_id or Path(config.model).name,
        logits_width=model.get_vocab_size(),
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer_json),
        chat_template_fingerprint=chat_template_fingerprint(_chat_template(files)),
        eos_token_ids=_eos_token_ids(files),
        max_model_len=model.max_model_len,
        modes=(VerificationMode.SPLIT, VerificationMode.COUPLED),
        limits=Limits(
            max_draft_tokens=config.max_draft_tokens,
            max_window=config.max_window,
            max_sparse_k=config.max_sparse_k,
        ),
        protocol_version=PROTOCOL_VERSION,
    )


def kv_cache_size(vllm_config: VllmConfig) -> KVCacheSize:
    """What sessions can use of the KV cache that vLLM has allocated for `vllm_config`.

    vLLM tells how many requests of the model's length fit, which knows layers that need less
    than others. One block it keeps to itself (vllm/v1/core/block_pool.py, null_block).
    """
    cache = vllm_config.cache_config
    num_blocks = cache.num_gpu_blocks or 0
    per_request = -(-vllm_config.model_config.max_model_len // cache.block_size)
    num_requests = cache.kv_cache_max_concurrency or num_blocks / per_request
    usable = max(0, num_blocks - 1) / max(1, num_blocks)
    num_tokens = round(num_requests * usable * per_request * cache.block_size)
    return KVCacheSize(num_tokens, cache.block_size)


def _read_files(model: str, revision: str | None) -> dict[str, bytes]:
    folder = Path(model)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(
            snapshot_download(model, revision=revision, allow_patterns=list(_TOKENIZER_FILES))
        )
    return {
        name: (folder / name).read_bytes() for name in _TOKENIZER_FILES if (folder / name).is_file()
    }


def _chat_template(files: dict[str, bytes]) -> str | None:
    if "chat_template.jinja" in files:
        return files["chat_template.jinja"].decode()
    template = json.loads(files.get("tokenizer_config.json", b"{}")).get("chat_template")
    return template if isinstance(template, str) else None


def _eos_token_ids(files: dict[str, bytes]) -> tuple[int, ...]:
    for name in ("generation_config.json", "config.json"):
        ids = json.loads(files.get(name, b"{}")).get("eos_token_id")
        if ids is not None:
            return tuple(ids) if isinstance(ids, list) else (ids,)
    return ()
