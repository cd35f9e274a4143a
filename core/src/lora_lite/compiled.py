"""What torch.compile does not see by itself: that a layer has got hooks, or has lost them.

1. What it compiled before an adapter came, or went, must be compiled again.
2. Blocks that are compiled one by one share one graph where they look alike. A block with an
adapter
   looks like one without, unless torch.compile is told to look at hooks as well.
"""

import sys


def forget_compiled() -> None:
    """Let torch.compile compile everything again, if it has compiled anything."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        look_at_hooks()
        dynamo.reset()


def look_at_hooks() -> None:
    """Let torch.compile tell layers with hooks from layers without, if it is there."""
    config = sys.modules.get("torch._dynamo.config")
    if config is not None and getattr(config, "skip_nnmodule_hook_guards", False):
        config.skip_nnmodule_hook_guards = False  # type: ignore[attr-defined]
