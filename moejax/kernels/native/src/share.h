// Sharing tasks between the calling thread and threads of XLA's pool.
//
// Virtual devices call at once, each from its own thread, and the pool may have more threads than there are cores: a
// scheduled closure may start late or only after the call has returned. So tasks are claimed from a counter; the caller
// claims like any helper and in the end waits only for tasks that somebody has claimed, which are running.
//
// To wake a thread of the pool takes 30 to 80 microseconds, as long as a core needs to read a megabyte. So in decode a
// helper that is done stays for a moment, awake, and helps the next call from its start. Not in prefill, where XLA needs
// the thread for what it computes itself between two calls.
#pragma once

#include <atomic>
#include <chrono>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>

#include "cores.h"
#include "xla/ffi/api/ffi.h"

namespace moejax {

inline std::atomic<int64_t>& BusyThreads() {
  static std::atomic<int64_t> busy{0};
  return busy;
}

enum class Sharing { kNone, kOnce, kSoonAgain };

class Helpable {
 public:
  explicit Helpable(Sharing sharing) : sharing_(sharing) {}
  virtual ~Helpable() = default;
  virtual void Help() = 0;
  bool SoonAgain() const { return sharing_ == Sharing::kSoonAgain; }

 private:
  const Sharing sharing_;
};

template <class Work>
class Share : public Helpable {
 public:
  Share(Work work, int64_t tasks, Sharing sharing) : Helpable(sharing), work_(std::move(work)), tasks_(tasks) {}

  // Claims and does tasks until all are claimed. Touches no more than the counter when they already are.
  void Help() override {
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

// Threads of the pool that stay awake between calls, and the call that they would help.
class Helpers {
 public:
  static Helpers& All() {
    static Helpers* helpers = new Helpers;  // never destroyed: one may still wait when the process ends
    return *helpers;
  }

  int64_t waiting() const { return waiting_.load(); }

  void Offer(std::shared_ptr<Helpable> call) {
    std::lock_guard<std::mutex> lock(mutex_);
    call_ = std::move(call);
    calls_.fetch_add(1);
  }

  void Withdraw(const Helpable* call) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (call_.get() == call) call_.reset();
  }

  // Helps this call, and while more are said to come soon, those that are offered until none has come for a moment.
  void HelpOn(std::shared_ptr<Helpable> call) {
    int64_t seen = calls_.load();
    do {
      bool again = !call || call->SoonAgain();  // none: it was over before anybody came
      if (call) call->Help();
      if (!again) return;
    } while (Next(seen, call));
  }

 private:
  static constexpr std::chrono::microseconds kMoment{200};  // longer than what XLA does between two products in decode

  // Waits for another call, and whether one came.
  bool Next(int64_t& seen, std::shared_ptr<Helpable>& call) {
    call.reset();
    if (waiting_.fetch_add(1) < Cores() - 1) {
      auto end = std::chrono::steady_clock::now() + kMoment;
      while (calls_.load() == seen && std::chrono::steady_clock::now() < end) std::this_thread::yield();
    }
    waiting_.fetch_sub(1);
    std::lock_guard<std::mutex> lock(mutex_);
    if (calls_.load() == seen) return false;
    seen = calls_.load();
    call = call_;
    return true;
  }

  std::mutex mutex_;
  std::shared_ptr<Helpable> call_;
  std::atomic<int64_t> calls_{0}, waiting_{0};
};

// Calls work(i) for each i below `tasks`, on at most as many threads as there are idle cores.
template <class Work>
void ShareTasks(xla::ffi::ThreadPool& pool, int64_t tasks, Sharing sharing, Work work) {
  auto share = std::make_shared<Share<Work>>(std::move(work), tasks, sharing);
  if (sharing == Sharing::kNone) return share->Help();
  Helpers& all = Helpers::All();
  int64_t helpers = std::min({Cores() - 1 - BusyThreads().load(), tasks - 1, pool.num_threads()}) - all.waiting();
  all.Offer(share);
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([share, &all] { all.HelpOn(share); });
  share->Help();
  share->Wait();
  all.Withdraw(share.get());
}

}  // namespace moejax
