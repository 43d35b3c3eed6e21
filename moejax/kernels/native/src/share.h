// Sharing tasks between the calling thread and threads of XLA's pool.
//
// Virtual devices call at once, each from its own thread, and the pool may have more threads than there are cores: a
// scheduled closure may start late or only after the call has returned. So tasks are claimed from a counter; the caller
// claims like any helper and in the end waits only for tasks that somebody has claimed, which are running.
#pragma once

#include <atomic>
#include <memory>
#include <thread>
#include <utility>

#include "xla/ffi/api/ffi.h"

namespace moejax {

inline std::atomic<int64_t>& BusyThreads() {
  static std::atomic<int64_t> busy{0};
  return busy;
}

template <class Work>
class Share {
 public:
  Share(Work work, int64_t tasks) : work_(std::move(work)), tasks_(tasks) {}

  // Claims and does tasks until all are claimed. Touches no more than the counter when they already are.
  void Help() {
    if (next_.load() >= tasks_) return;
    BusyThreads().fetch_add(1);
    for (int64_t i; (i = next_.fetch_add(1)) < tasks_;) {
      work_(i);
      done_.fetch_add(1, std::memory_order_release);
    }
    BusyThreads().fetch_sub(1);
  }

  void Wait() const {
    while (done_.load(std::memory_order_acquire) < tasks_) std::this_thread::yield();
  }

 private:
  Work work_;
  const int64_t tasks_;
  std::atomic<int64_t> next_{0}, done_{0};
};

// Calls work(i) for each i below `tasks`, on at most as many threads as there are idle cores.
template <class Work>
void ShareTasks(xla::ffi::ThreadPool& pool, int64_t tasks, bool worth_sharing, Work work) {
  auto share = std::make_shared<Share<Work>>(std::move(work), tasks);
  if (worth_sharing) {
    int64_t cores = std::thread::hardware_concurrency();
    int64_t helpers = std::min({cores - 1 - BusyThreads().load(), tasks - 1, pool.num_threads()});
    for (int64_t i = 0; i < helpers; ++i) pool.Schedule([share] { share->Help(); });
  }
  share->Help();
  share->Wait();
}

}  // namespace moejax
