// Threads and scratch memory, compiled once for all instruction sets.

#pragma once

#include <cstddef>
#include <cstdint>

namespace fastbert::cpu {

// Hands over the address of GOMP_parallel in the OpenMP runtime of the process, or 0 to work on one thread.
//
// It is what `#pragma omp parallel` compiles to, and libgomp, LLVM's libomp and Intel's libiomp5 all export it: called
// through a pointer it runs on the threads that torch already has, whichever runtime that is and whichever compiler built
// this file. A second runtime in the process would spin against the first.
void set_openmp_parallel(uintptr_t gomp_parallel);

// Calls body(context, index) for every index below count, each once, on at most num_threads threads, in rising order of the
// start. An exception that a body throws is thrown again here, once all threads are done.
void parallel_for(int64_t count, int num_threads, void (*body)(void* context, int64_t index), void* context);

// The same in a region of threads (together), where each of them begins with neighbouring indices of its own and helps the
// others when those are done: for work on memory that one thread reads faster in a row. Elsewhere it is parallel_for.
void parallel_shares(int64_t count, int num_threads, void (*body)(void* context, int64_t index), void* context);

// Calls body(context) on num_threads threads at once. They share the indices of each parallel loop that they come to, all of
// them in the same order, whatever num_threads it is given, and go on when all of its indices are done; what else body does,
// every thread does for itself. A thread that is late finds what the others have done and catches up.
//
// Several loops in one region of threads wait for each other here, not in the OpenMP runtime, whose threads go to sleep
// behind each region where the process has more of them than the machine has cores (a second Python thread that uses torch
// does that): the 130 loops of bert-base's layers took 2.5 ms longer then, on two cores.
//
// An exception ends the work, and is thrown again here once all threads are done.
void together(int num_threads, void (*body)(void* context), void* context);

template <typename Body>
void together(int num_threads, const Body& body) {
  together(num_threads, [](void* context) { (*static_cast<const Body*>(context))(); }, const_cast<Body*>(&body));
}

// At least this many floats, aligned to 64 bytes, that belong to the calling thread until its next call. They are kept for
// the life of the thread: pages fresh from the system would cost more than many a kernel. Throws std::bad_alloc.
float* thread_scratch(size_t floats);

}  // namespace fastbert::cpu
