// What generated CPU code asks of its host: threads and aligned scratch memory.
//
// TVM's compiler calls these through the pointers at the end of this file. A process that has TVM
// would set them to TVM's own thread pool, which takes half of the processors for hyper-threads;
// the linker hides them (see toolchain.py), so that a library behaves the same with and without TVM.

#include <omp.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>

typedef struct {
  void* sync_handle;
  int32_t num_task;
} ParallelGroup;

typedef int (*Task)(int id, ParallelGroup* group, void* closure);

// Parts that each thread gets on average. More parts even out what the threads do; each costs one
// atomic increment.
enum { PARTS_PER_THREAD = 16 };

// GNU OpenMP's threads do not follow a fork, and a child that asks for them waits for ever. Set in
// the child of a process that has this library loaded: it computes serially, as PyTorch's workers.
static int forked;

static void in_child(void) { forked = 1; }

int im2win_threads(void) { return forked ? 1 : omp_get_max_threads(); }

static int parallel_launch(Task task, void* closure, int parts) {
  const int threads = im2win_threads();
  ParallelGroup group = {NULL, parts > 0 ? parts : threads * PARTS_PER_THREAD};
  int failed = 0;
  if (forked) {
    for (int id = 0; id < group.num_task; ++id) failed |= task(id, &group, closure) != 0;
    return failed ? -1 : 0;
  }
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) reduction(| : failed)
  for (int id = 0; id < group.num_task; ++id) failed |= task(id, &group, closure) != 0;
  return failed ? -1 : 0;
}

static void* workspace_allocate(int device_type, int device_id, uint64_t bytes, int dtype_code,
                                int dtype_bits) {
  (void)device_type, (void)device_id, (void)dtype_code, (void)dtype_bits;
  return aligned_alloc(64, (bytes + 63) / 64 * 64);
}

static int workspace_free(int device_type, int device_id, void* pointer) {
  (void)device_type, (void)device_id;
  free(pointer);
  return 0;
}

// Defined weak by generated code, as null pointers to be filled in by whoever loads it.
__attribute__((weak)) void* __TVMBackendParallelLaunch;
__attribute__((weak)) void* __TVMBackendAllocWorkspace;
__attribute__((weak)) void* __TVMBackendFreeWorkspace;

__attribute__((constructor)) static void fill_in(void) {
  pthread_atfork(NULL, NULL, in_child);
  __TVMBackendParallelLaunch = (void*)parallel_launch;
  __TVMBackendAllocWorkspace = (void*)workspace_allocate;
  __TVMBackendFreeWorkspace = (void*)workspace_free;
}
