"""What Adam keeps and how it steps here, without importing torch: the optimizer does it, the planner counts it."""

STATES = ("exp_avg", "exp_avg_sq", "master_param")  # by Transformer Engine's names
SLICE_ELEMENTS = 256 * 2**20  # 256 Mi elements: 2 GiB of temporaries for the two moments in fp32
