"""Settings of every pytest run: one thread.

The tests' tensors are small, and on a busy machine two threads that wait for each other cost more than they bring. The
variables reach the kernels of the notebooks and the processes that tests start.
"""

import os

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"
