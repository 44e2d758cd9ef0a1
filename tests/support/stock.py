"""What vLLM alone generates: its own scheduler, worker and sampler, no speculation.

Run as a program, in a process of its own: `python -m tests.support.stock MODEL REQUESTS OUTPUT`,
where REQUESTS is a JSON list of prompts (lists of token ids) and OUTPUT gets the list of greedy
continuations.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


def generate_greedily(
    model: str, prompts: list[list[int]], max_tokens: int, folder: Path, *, one_by_one: bool = False
) -> list[list[int]]:
    """Greedy continuations of `prompts` by stock vLLM, `max_tokens` each, stop tokens ignored.

    All in one batch, or one after the other.
    """
    requests, output = folder / "requests.json", folder / "output.json"
    requests.write_text(
        json.dumps({"prompts": prompts, "max_tokens": max_tokens, "one_by_one": one_by_one})
    )
    command = [sys.executable, "-m", "tests.support.stock", model, str(requests), str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"stock vLLM failed:\n{done.stderr[-4000:]}")
    result: list[list[int]] = json.loads(output.read_text())
    return result


def main(model: str, requests_path: str, output_path: str) -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    requests = json.loads(Path(requests_path).read_text())
    llm = LLM(
        model,
        dtype="float32",
        enforce_eager=True,
        max_model_len=1024,
        kv_cache_memory_bytes=1 << 29,
        block_size=32,
        async_scheduling=False,
    )
    params = SamplingParams(temperature=0.0, max_tokens=requests["max_tokens"], ignore_eos=True)
    prompts = [TokensPrompt(prompt_token_ids=prompt) for prompt in requests["prompts"]]
    batches = [[prompt] for prompt in prompts] if requests["one_by_one"] else [prompts]
    outputs = [
        list(output.outputs[0].token_ids)
        for batch in batches
        for output in llm.generate(batch, params, use_tqdm=False)
    ]
    Path(output_path).write_text(json.dumps(outputs))


if __name__ == "__main__":
    main(*sys.argv[1:4])
