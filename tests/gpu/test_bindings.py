"""fastrl._C.cuda and its types."""

from __future__ import annotations

import stub


def test_stub_matches_the_submodule(host_cuda_kernels):
    """The bindings compiled for the host are those of the module built with CUDA."""
    assert stub.found(host_cuda_kernels) == stub.declared("cuda")
