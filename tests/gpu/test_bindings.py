"""fastrl._C.cuda and its types."""

from __future__ import annotations

import stub

from fastrl.ops import backend


def test_stub_matches_the_submodule(request):
    """Built without CUDA, the submodule compiled for the host stands in."""
    module = backend.cuda or request.getfixturevalue("host_cuda_kernels")
    assert stub.found(module) == stub.declared("cuda")
