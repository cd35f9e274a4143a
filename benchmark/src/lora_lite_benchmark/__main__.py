"""`python -m lora_lite_benchmark` is `lora-lite-bench`."""

import sys

from lora_lite_benchmark.cli import main

sys.exit(main())
