"""What is known to break in RLHF code, as checks of any implementation: `fastrl conformance IMPL`."""

from fastrl.conformance.adapter import Adapter, NotOffered

__all__ = ["Adapter", "NotOffered"]
