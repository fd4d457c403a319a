"""Numbers and names that more than one room goes by. Imports nothing, so that none has to import another for them."""

ADAM_STATES = ("exp_avg", "exp_avg_sq", "master_param")  # by Transformer Engine's names
ADAM_SLICE_ELEMENTS = 256 * 2**20  # 256 Mi elements: 2 GiB of temporaries for the two moments in fp32
CODE_IN_CONTAINER = "/nemo_run/code"  # where NeMo-Run puts the code that it ships, and starts tasks
# Of a job's environment: the file, in the folder of its logs, by which a task says that it was told to stop, and saved
MARKER = "NEMO_CPT_PREEMPTED"
MEMORY_MARGIN = 0.05  # of a card's memory: what the planner leaves free, and what a job leaves when it measures
# Before squeue: without what people set for their terminals, where a job that a filter hides would be taken for ended
_FILTERS = ("ACCOUNT", "LICENSES", "NAMES", "PARTITION", "QOS", "STATES", "USERS")
PLAINLY = ("env", *(f"--unset=SQUEUE_{each}" for each in _FILTERS), "SLURM_TIME_FORMAT=standard")
