"""Memory that a CPU kernel takes during a call, against what it says it takes."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
from problems import LAYOUTS

import im2win_tvm
from im2win_tvm import toolchain
from im2win_tvm.problem import ConvProblem

# Counts what is allocated while `threads` is not zero. Every thread keeps what it holds until all
# of them hold something: on a busy machine, one thread would otherwise do all of a short call.
COUNTER = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdlib.h>
#include <time.h>
static pthread_mutex_t guard = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t arrival = PTHREAD_COND_INITIALIZER;
static struct { void *start; size_t bytes; } known[64];
static __thread int arrived;
static size_t arrivals;
size_t threads, live, peak;
void *aligned_alloc(size_t alignment, size_t bytes) {
  void *start = ((void *(*)(size_t, size_t))dlsym(RTLD_NEXT, "aligned_alloc"))(alignment, bytes);
  pthread_mutex_lock(&guard);
  for (int i = 0; threads && i < 64; ++i)
    if (!known[i].start) {
      known[i].start = start, known[i].bytes = bytes, live += bytes;
      if (live > peak) peak = live;
      break;
    }
  pthread_mutex_unlock(&guard);
  return start;
}
static void wait_for_the_others(void) {
  struct timespec limit = {time(NULL) + 60, 0};
  if (arrived++) return;
  ++arrivals;
  pthread_cond_broadcast(&arrival);
  while (arrivals < threads && !pthread_cond_timedwait(&arrival, &guard, &limit)) {}
}
void free(void *start) {
  static void (*next)(void *);
  if (!next) next = (void (*)(void *))dlsym(RTLD_NEXT, "free");
  if (threads && start) {
    pthread_mutex_lock(&guard);
    for (int i = 0; i < 64; ++i)
      if (known[i].start == start) {
        wait_for_the_others();
        live -= known[i].bytes, known[i].start = NULL;
      }
    pthread_mutex_unlock(&guard);
  }
  next(start);
}
"""


@pytest.mark.parametrize("layout", LAYOUTS)
def test_workspace_is_what_a_call_takes(layout, tmp_path):
    """Every allocation of the library counted, on one thread and on two."""
    problem = ConvProblem(2, 12, (40, 41), 22, 3, padding=1, groups=2, layout=layout)
    library = im2win_tvm.compile(problem, "llvm").export(tmp_path / "kernel.so")
    (tmp_path / "counter.c").write_text(COUNTER)
    counter = tmp_path / "counter.so"
    toolchain.run([
        toolchain.find_cc(), "-shared", "-fPIC", "-O1", "-o", str(counter),
        str(tmp_path / "counter.c"), "-ldl",
    ])  # fmt: skip
    script = (
        "import ctypes, sys, numpy as np, im2win_tvm\n"
        "kernel = im2win_tvm.load(sys.argv[1])\n"
        "p = kernel.problem\n"
        "x, w = np.ones(p.input_shape, p.dtype), np.ones(p.weight_shape, p.dtype)\n"
        "packed, all = kernel.prepare(w), ctypes.CDLL(None)\n"
        "ctypes.c_size_t.in_dll(all, 'threads').value = int(sys.argv[2])\n"
        "kernel(x, packed)\n"
        "print(ctypes.c_size_t.in_dll(all, 'peak').value, kernel.workspace_bytes)\n"
    )
    for threads in (1, 2):
        environment = os.environ | {
            "OMP_NUM_THREADS": str(threads),
            "LD_PRELOAD": str(counter),
            "PYTHONPATH": str(Path(im2win_tvm.__file__).parents[1]),
        }
        text = subprocess.run(
            [sys.executable, "-c", script, str(library), str(threads)],
            env=environment, check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip
        taken, claimed = map(int, text.split())
        assert 0 < taken <= claimed <= 1.05 * taken + 64 * threads


def test_workspace_counts_the_threads_that_will_run():
    kernel = im2win_tvm.compile(ConvProblem(2, 3, (9, 11), 5, 3), "llvm")
    each = kernel.metadata["scratch_bytes_per_thread"]
    openmp = ctypes.CDLL("libgomp.so.1")
    before = openmp.omp_get_max_threads()
    try:
        for threads in (1, 5):
            openmp.omp_set_num_threads(threads)
            assert kernel.workspace_bytes == threads * each > 0
    finally:
        openmp.omp_set_num_threads(before)
