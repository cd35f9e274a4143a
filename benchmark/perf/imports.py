"""What `import lora_lite` costs in a process that has torch already, pydantic and pluggy included.

python benchmark/perf/imports.py
"""

import subprocess
import sys

CODE = """
import time
import torch
start = time.perf_counter()
import lora_lite
print(time.perf_counter() - start)
"""


def main() -> None:
    times = sorted(float(subprocess.check_output([sys.executable, "-c", CODE])) for _ in range(7))
    print(
        f"import lora_lite after torch: median {times[3]:.3f} s (0.3 s is the limit), "
        f"from {times[0]:.3f} to {times[-1]:.3f}"
    )


if __name__ == "__main__":
    main()
