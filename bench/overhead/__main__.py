"""What PicoSpec costs beside the models' own forwards: `python -m bench.overhead`.

    engine    a step of the engine outside forward and sampling
    delivery  from a Draft's arrival in the gRPC process to the step that takes it
    codec     a law to bytes and back, against the same with lists in between
    pipeline  the edge's own time for each drafted token over the bare drafter's
    bytes     on the wire for each output token, HTTP/2 framing included

The cloud computes on the first core, the edge on the last. Real target, eager; real int4 draft.
What is compared alternates, and medians are given.
"""

import argparse
import asyncio
import json
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from bench.bed import daemon, served
from bench.machine import description, edge_core, pinned
from bench.overhead.cloud import measure_delivery, measure_engine
from bench.overhead.codec import measure_codec
from bench.overhead.edge import measure_bytes, measure_pipeline
from edge_agent.link import CloudLink
from picospec_cli.processes import free_ports

Result = dict[str, Any]


async def _with_cloud(quick: bool) -> tuple[Result, list[Result]]:
    """What needs the cloud's daemon, on a core of its own."""
    [port] = free_ports(1)
    flags = ["--server.port", str(port), "--metrics.enabled", "false", "--server.grace_s", "1"]
    flags += ["--engine.args.enforce_eager", "true", "--engine.args.max_model_len", "1024"]
    with tempfile.TemporaryDirectory() as folder:
        async with AsyncExitStack() as stack:
            cloud = daemon(stack, "cloud_server", flags, Path(folder))
            link = CloudLink(f"127.0.0.1:{port}")
            stack.push_async_callback(link.close)
            await served(link, cloud)
            with pinned(edge_core()):
                delivery = await measure_delivery(link, 40 if quick else 200)
                return delivery, await measure_bytes(port, 24 if quick else 64)


def _print(result: Result) -> None:
    print("\nengine, ms per step                  forward  sampling  outside: step    loop")
    for name, row in result["engine"].items():
        print(
            f"  {name:<34}{row['forward_ms']:9.2f}{row['sampling_ms']:10.2f}"
            f"{row['step_outside_ms']:15.2f}{row['loop_outside_ms']:8.2f}"
        )
    delivery = result["delivery_ms"]
    print("\nDraft's arrival to the engine's step, ms (idle engine, n = {n})".format(**delivery))
    print("  p5 {p5:.2f}   p50 {p50:.2f}   p95 {p95:.2f}".format(**delivery))
    print(
        "\na law on the wire, us             packed: encode  decode   bytes   lists: encode  decode"
    )
    for name, row in result["codec"].items():
        print(
            f"  {name:<30}{row['encode_us']:17.1f}{row['decode_us']:8.1f}{row['bytes']:8d}"
            f"{row['list_encode_us']:16.1f}{row['list_decode_us']:8.1f}"
        )
    print("\ndrafted token, ms (one core)")
    pipeline = result["pipeline"]
    for name, value in pipeline["ms_per_token"].items():
        print(f"  {name:<10}{value:8.2f}   {pipeline['ratio'][name + '_over_bare']:.3f} of bare")
    print("\nbytes per output token         payload up  down   on the wire up    down  acceptance")
    for row in result["bytes"]:
        verify = "fast" if row["fast_verify"] else "round"
        print(
            f"  {row['mode']:<8} {verify:<6} n = {row['draft_length']}   "
            f"{row['payload_up']:14.1f}{row['payload_down']:7.1f}"
            f"{row['wire_up']:15.1f}{row['wire_down']:8.1f}{row['acceptance']:10.2f}"
        )


async def _run(quick: bool) -> Result:
    result: Result = {"machine": description()}
    with pinned(edge_core()):
        result["codec"] = measure_codec(50 if quick else 500)
    result["engine"] = await measure_engine(1 if quick else 5, 65)
    result["pipeline"] = await measure_pipeline(1 if quick else 5, 100 if quick else 200)
    result["delivery_ms"], result["bytes"] = await _with_cloud(quick)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    arguments = parser.parse_args()
    result = asyncio.run(_run(arguments.quick))
    _print(result)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
