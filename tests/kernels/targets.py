"""GPUs that tests pretend to run on."""

from blockjax.kernels.platforms import Target

H100 = Target("gpu", "NVIDIA H100 80GB HBM3")
