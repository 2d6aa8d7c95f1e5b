"""Ask Linux for a CPU's matrix units (AMX) as Python starts, for vLLM, which uses them in bfloat16 without asking.

oneDNN asks as well, before the first product that is large enough for them; the layers of a tiny model are not, and
its worker ends at the first request by an illegal instruction (vLLM 0.32). On other CPUs the call changes nothing.
"""

import ctypes

ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA = 158, 0x1023, 18  # asm/unistd_64.h, asm/prctl.h of Linux on x86-64

ctypes.CDLL(None).syscall(ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)
