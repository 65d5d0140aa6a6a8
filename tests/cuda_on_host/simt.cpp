// The fibers behind simt.h.

// longjmp from fiber to fiber is what it is used for here, and what a checking one takes for an error.
#undef _FORTIFY_SOURCE

#include "simt.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <csetjmp>
#include <deque>
#include <exception>
#include <map>
#include <memory>
#include <numeric>
#include <random>

namespace simt {

namespace {

constexpr size_t kStackBytes = 256 * 1024;
constexpr size_t kLargestMessage = 256;
constexpr int kBarriers = 16;

struct Work {
  std::vector<std::function<void()>> uncommitted;
  std::deque<std::vector<std::function<void()>>> groups;
};

// Where a fiber, or the scheduler, goes on. A context is for a fiber's first turn alone: it takes two system calls to
// switch, a jump takes none.
struct Place {
  ucontext_t context;
  jmp_buf jump;
  bool has_run = false;
};

void go_on(Place& from, Place& to) {
  if (_setjmp(from.jump) != 0) return;
  from.has_run = true;
  if (to.has_run) _longjmp(to.jump, 1);
  setcontext(&to.context);
}

struct Thread {
  Place place;
  uint3 index;
  bool finished = false;
  const char* waits_for = nullptr;
  Location where;
  Work work[static_cast<int>(Queue::count)];
};

struct Block {
  const std::function<void()>* kernel;
  dim3 grid, size;
  uint3 index;
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<Meeting> warps;
  struct Barrier {
    int threads = 0, arrived = 0;
    uint64_t openings = 0;
  } barriers[kBarriers];
  std::map<const void*, std::deque<std::function<void()>>> deferred;
  std::vector<unsigned char> shared;
  std::exception_ptr error;
  uint64_t events = 0;
  int current = 0;
  Place scheduler;
};

thread_local Block* block = nullptr;
uint64_t thread_order = 0;
int gpu_capability = 90;

// Stacks outlive their blocks: a kernel of 1,000 blocks would spend its time mapping them.
unsigned char* stack(int thread) {
  thread_local std::vector<unsigned char*> stacks;
  while (static_cast<int>(stacks.size()) <= thread) {
    void* memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    stacks.push_back(static_cast<unsigned char*>(memory));
  }
  return stacks[thread];
}

Thread& current() { return *block->threads[block->current]; }

void main_of_thread() {
  Thread& self = current();
  try {
    (*block->kernel)();
  } catch (...) {
    if (!block->error) block->error = std::current_exception();
  }
  self.finished = true;
  ++block->events;
  go_on(self.place, block->scheduler);
}

void make_fiber(ucontext_t& context, unsigned char* stack) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, main_of_thread, 0);
}

std::string place(const char* what, const Location& where) {
  return std::string(what) + " at " + where.file_name() + ":" + std::to_string(where.line());
}

[[noreturn]] void throw_deadlock() {
  std::string text = "deadlock: no thread of the block can go on;";
  std::map<std::string, int> places;
  for (const auto& thread : block->threads) {
    ++places[thread->finished ? "have returned" : "wait for " + place(thread->waits_for, thread->where)];
  }
  for (const auto& [what, count] : places) text += " " + std::to_string(count) + " threads " + what + ";";
  throw std::logic_error(text);
}

// Turns until all threads have returned. Fibers that are left behind by an error keep what their stacks own: a test that
// failed leaks, which is nobody's loss.
void take_turns() {
  std::vector<int> order(block->threads.size());
  std::iota(order.begin(), order.end(), 0);
  if (thread_order == 1) std::reverse(order.begin(), order.end());
  std::mt19937_64 random(thread_order + 7919 * block->index.x);
  // In a shuffled order one warp runs ahead of the others, until it waits for them or, some time, is relieved.
  const int warps = static_cast<int>(block->warps.size());
  const bool in_warps = thread_order > 1;
  int ahead = in_warps ? static_cast<int>(random() % warps) : 0;
  int waiting = 0;  // warps, one after the other, without anything that happened
  for (size_t left = order.size(); left > 0;) {
    if (in_warps) std::shuffle(order.begin(), order.end(), random);
    const uint64_t events_before = block->events;
    left = 0;
    for (const int index : order) {
      Thread& thread = *block->threads[index];
      if (!thread.finished && (!in_warps || index / kWarp == ahead)) {
        block->current = index;
        go_on(block->scheduler, thread.place);
        if (block->error) std::rethrow_exception(block->error);
      }
      left += thread.finished ? 0 : 1;
    }
    const bool happened = block->events != events_before;
    waiting = happened ? 0 : waiting + 1;
    if (left > 0 && waiting == (in_warps ? warps : 1)) throw_deadlock();
    if (!happened) {
      ahead = (ahead + 1) % warps;
    } else if (random() % 512 == 0) {
      ahead = static_cast<int>(random() % warps);
    }
  }
}

void run_block(const std::function<void()>& kernel, dim3 grid, dim3 size, uint3 index, size_t shared_bytes) {
  Block running;
  running.kernel = &kernel;
  running.grid = grid;
  running.size = size;
  running.index = index;
  const int threads = static_cast<int>(size.x * size.y * size.z);
  // bytes of 0xFF are NaN in every floating-point type; 1,024 more to align by
  running.shared.assign(shared_bytes + 1024, 0xFF);
  for (int warp = 0; warp < (threads + kWarp - 1) / kWarp; ++warp) {
    running.warps.emplace_back(std::min(kWarp, threads - warp * kWarp), kLargestMessage);
  }
  for (int i = 0; i < threads; ++i) {
    auto thread = std::make_unique<Thread>();
    const unsigned flat = static_cast<unsigned>(i);
    thread->index = {flat % size.x, flat / size.x % size.y, flat / (size.x * size.y)};
    make_fiber(thread->place.context, stack(i));
    running.threads.push_back(std::move(thread));
  }
  block = &running;
  try {
    take_turns();
  } catch (...) {
    block = nullptr;
    throw;
  }
  block = nullptr;
}

}  // namespace

void run(dim3 grid, dim3 size, size_t shared_bytes, const std::function<void()>& kernel) {
  if (block != nullptr) throw std::logic_error("a kernel was launched from a kernel");
  std::vector<size_t> order(size_t{grid.x} * grid.y * grid.z);
  std::iota(order.begin(), order.end(), 0);
  if (thread_order == 1) std::reverse(order.begin(), order.end());
  if (thread_order > 1) std::shuffle(order.begin(), order.end(), std::mt19937_64(thread_order));
  for (const size_t i : order) {
    const auto x = static_cast<unsigned>(i % grid.x), y = static_cast<unsigned>(i / grid.x % grid.y),
               z = static_cast<unsigned>(i / grid.x / grid.y);
    run_block(kernel, grid, size, {x, y, z}, shared_bytes);
  }
}

void set_order(uint64_t order) { thread_order = order; }
void set_capability(int capability) { gpu_capability = capability; }
int capability() { return gpu_capability; }

const uint3& thread_index() { return current().index; }
const uint3& block_index() { return block->index; }
const dim3& block_size() { return block->size; }
const dim3& grid_size() { return block->grid; }
int flat_thread() { return block->current; }
int lane() { return block->current % kWarp; }
size_t dynamic_shared_bytes() { return block->shared.size() - 1024; }

unsigned char* dynamic_shared_memory() {
  const auto address = reinterpret_cast<uintptr_t>(block->shared.data());
  return reinterpret_cast<unsigned char*>((address + 1023) / 1024 * 1024);
}

void happened() { ++block->events; }

void wait_until(const std::function<bool()>& ready, const char* what, const Location& where) {
  Thread& self = current();
  self.waits_for = what;
  self.where = where;
  while (!ready()) go_on(self.place, block->scheduler);
}

Meeting::Meeting(int threads, size_t bytes) : threads_(threads), arrivals_(threads, 0) {
  for (Turn& turn : turns_) turn.bytes.resize(threads * bytes);
}

const unsigned char* Meeting::exchange(int thread, const void* bytes, size_t size, const char* what, const Location& where) {
  const uint64_t number = arrivals_[thread]++;
  Turn& turn = turns_[number % 2];
  if (turn.arrived == threads_) turn.arrived = 0;  // all have left the meeting before the last one
  if (turn.arrived == 0) {
    turn.what = what;
    turn.where = where;
  }
  if (std::strcmp(turn.what, what) != 0 || turn.where.line() != where.line()) {
    throw std::logic_error("threads that must meet are in different calls: " + place(turn.what, turn.where) + " and " +
                           place(what, where));
  }
  if (size > 0) std::memcpy(turn.bytes.data() + thread * size, bytes, size);
  if (++turn.arrived == threads_) happened();
  // The next user of this turn is the meeting after the next, which nobody reaches before all have been at the next.
  wait_until([&] { return turn.arrived == threads_; }, what, where);
  return turn.bytes.data();
}

Meeting& warp() { return block->warps[block->current / kWarp]; }

uint64_t arrive(int name, int threads) {
  if (name < 0 || name >= kBarriers) throw std::logic_error("there are 16 barriers, this is " + std::to_string(name));
  if (threads % kWarp != 0)
    throw std::logic_error("a barrier is of whole warps, not of " + std::to_string(threads) + " threads");
  Block::Barrier& barrier = block->barriers[name];
  if (barrier.arrived == 0) barrier.threads = threads;
  if (barrier.threads != threads) throw std::logic_error("a barrier is used with two numbers of threads");
  const uint64_t opening = barrier.openings;
  happened();
  if (++barrier.arrived == threads) {
    barrier.arrived = 0;
    ++barrier.openings;
  }
  return opening;
}

void sync(int name, int threads, const Location& where) {
  const uint64_t opening = arrive(name, threads);
  wait_until([=] { return block->barriers[name].openings != opening; }, "a barrier", where);
}

void defer(Queue queue, std::function<void()> work) {
  current().work[static_cast<int>(queue)].uncommitted.push_back(std::move(work));
}

void commit(Queue queue) {
  Work& work = current().work[static_cast<int>(queue)];
  work.groups.push_back(std::move(work.uncommitted));
  work.uncommitted.clear();
}

void wait_for_all_but(Queue queue, int groups) {
  Work& work = current().work[static_cast<int>(queue)];
  while (static_cast<int>(work.groups.size()) > groups) {
    const auto group = std::move(work.groups.front());
    work.groups.pop_front();
    for (const auto& job : group) job();
  }
}

void defer_to_barrier(const void* mbarrier, std::function<void()> work) {
  block->deferred[mbarrier].push_back(std::move(work));
  happened();
}

void run_deferred(const void* mbarrier) {
  auto& jobs = block->deferred[mbarrier];
  while (!jobs.empty()) {
    const auto job = std::move(jobs.front());
    jobs.pop_front();
    job();
    happened();
  }
}

}  // namespace simt

extern "C" {
__attribute__((visibility("default"))) void simt_set_order(uint64_t order) { simt::set_order(order); }
__attribute__((visibility("default"))) void simt_set_capability(int capability) { simt::set_capability(capability); }
}
