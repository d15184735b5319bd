"""Search for the fastest configuration of one convolution here, and compile with what was found.

Records are kept in a folder of yours, named by IM2WIN_TUNING_LOGS; more trials add up.
"""

import os
import subprocess
import sys
import tempfile

import im2win_tvm

LAYER = "mb1ic32ih28oc32kh3ph1"  # a oneDNN problem descriptor

folder = os.environ.setdefault("IM2WIN_TUNING_LOGS", tempfile.mkdtemp(prefix="im2win-logs-"))
problem = im2win_tvm.ConvProblem.parse(LAYER)
print("before:", im2win_tvm.compile(problem, "llvm").metadata["schedule"])

command = [sys.executable, "-m", "im2win_tvm", "tune", LAYER, "--target", "llvm"]
subprocess.run([*command, "--trials", "6", "--out", folder], check=True)

schedule = im2win_tvm.compile(problem, "llvm").metadata["schedule"]
print("after:", schedule)
assert schedule["origin"]["kind"] == "record"
