"""`depth_mix`: the suite for XLA, and what does not depend on a backend."""

from tests.kernels.depth_mix_suite import DepthMixSuite


class TestXla(DepthMixSuite):
    implementation = "xla"
