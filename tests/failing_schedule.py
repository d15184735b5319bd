"""A CPU schedule whose build ends its process; in a file of its own for other processes to find."""

import os

from im2win_tvm.schedules.cpu_blocked import CpuBlocked


class Ending(CpuBlocked):
    name = "ending"

    def schedule(self, problem, config, target, epilogue):
        os._exit(3)
